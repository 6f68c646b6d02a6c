"""THE loop. Methods hook into it, tasks give it a loss; nothing else in filtrun trains."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from filtrun.callbacks import Hold
from filtrun.context import Run, mix_seed, seed_generators
from filtrun.errors import UserError
from filtrun.recompute import recompute_blocks
from filtrun.speed import PLAIN, Way, choose
from filtrun.trainer import MATRIX_RULES, Phase, grouped, lr_factor, make_optimizer


def edit(run: Run) -> None:
    """Let the methods prepare and edit the model; afterwards `requires_grad` says what trains."""
    run.weights = dict(run.model.named_parameters())
    # what methods draw must not depend on whether the base was trained just now or taken from the cache
    seed_generators(mix_seed(run.seed, 0), run.device)
    run.each("prepare")
    kinds = {m.trains for m in run.methods}
    run.model.requires_grad_(kinds == {"all"} or kinds == {"all", "nothing"})
    run.each("edit_model")


def setup(run: Run) -> None:
    """After all surgery: optimizer, phases and Fabric's wrapping."""
    trainer = run.trainer
    groups = _groups(run)
    if trainer.compile:
        run.model.compile()
    plans = {m.slug: phases for m in run.methods if (phases := m.phases(run)) is not None}
    planned = list(plans.values())
    if len(planned) > 1:
        raise UserError(f"two methods plan the phases of the run: {', '.join(plans)}; use one of them")
    images = len(run.train_split) if run.train_split is not None else 0
    run.phases = planned[0] if planned else [Phase(run.label, trainer.total_steps(images))]
    if not groups:
        run.phases = []
    if trainer.speed != "off" and groups:
        run.speed = choose(run)
    _wrap(run, groups)
    if any(group.get("hold_epochs") for group in groups):
        run.callbacks.append(Hold())
    run.net.train()


def _groups(run: Run) -> list[dict[str, Any]]:
    """The optimizer groups of what trains now."""
    own = [groups for m in run.methods for groups in m.param_groups(run)]
    asks = getattr(run.model, "param_groups", None)
    return grouped((p for p in run.model.parameters() if p.requires_grad), own, asks() if callable(asks) else ())


def _no_matrices(run: Run) -> list[Tensor]:
    """Two-dimensional parameters whose rows are entries of a table or classes: rules for matrices leave them alone."""
    if run.trainer.optimizer not in MATRIX_RULES:
        return []
    tables = [m.weight for m in run.model.modules() if isinstance(m, nn.Embedding)]
    with contextlib.suppress(UserError):  # a model without a head to be found
        tables += run.task.head(run.model)
    return tables


def _wrap(run: Run, groups: list[dict[str, Any]]) -> None:
    """A new optimizer over `groups`, and Fabric's wrapping; no optimizer when nothing trains."""
    way = run.speed.way if run.speed is not None else PLAIN
    Way(way.channels_last or run.trainer.channels_last).lay_out(run.model)
    if run.trainer.checkpoint_activations and groups:
        recompute_blocks(run.model)
    run.net = run.optimizer = None  # an old wrapper must not outlive the tensors it was made for
    if groups:
        optimizer = make_optimizer(run.trainer, groups, _no_matrices(run))
        module = way.wrapped(run.model)
        run.net, run.optimizer = run.fabric.setup(module, optimizer)
        run.plain = is_plain(run)
        if run.plain:  # nothing to reduce: the wrapper only takes time (and passes attributes on to the model)
            run.net.__dict__["forward"] = _forward(run, module)
    else:
        run.net = run.fabric.setup_module(run.model) if run.fabric.world_size == 1 else run.model.to(run.device)


def is_plain(run: Run) -> bool:
    """Whether Fabric has nothing to do in a step but autocast: one process, and no loss to be scaled."""
    from lightning_fabric.strategies import SingleDeviceStrategy

    strategy = run.fabric.strategy
    return isinstance(strategy, SingleDeviceStrategy) and strategy.precision.precision in ("32-true", "bf16-mixed")


def _forward(run: Run, module: nn.Module) -> Callable[..., Any]:
    """The forward pass of `module` in the run's precision."""
    precision = run.fabric.strategy.precision
    if precision.precision == "32-true":
        return module.__call__

    def forward(*args: Any, **options: Any) -> Any:
        with precision.forward_context():
            output = module(*args, **options)
        return precision.convert_output(output)

    return forward


def refit(run: Run) -> None:
    """Go on with a changed model: a new optimizer over what trains now, without the old one's moments.

    For a method that changes shapes in the middle of a run (channels removed), or what trains, in `start_phase`. The
    Parameter objects must be the same ones; their tensors may have other shapes. `after_refit` tells the other hooks.
    """
    if run.optimizer is None:
        return
    training = run.model.training
    _wrap(run, _groups(run))
    run.net.train(training)
    run.each("after_refit")


def chunks(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into `parts` micro-batches of equal size (views, no copies)."""
    if parts == 1:
        return [batch]
    size = -(-len(batch) // parts)
    columns = [getattr(batch, f.name).split(size) for f in dataclasses.fields(batch)]
    return [type(batch)(*column) for column in zip(*columns, strict=True)]


def train_step(run: Run, batch: Any) -> Tensor:
    """Forward, backward (over micro-batches) and one optimizer step; returns the mean loss, still on the device."""
    parts = chunks(batch, run.trainer.accumulate)
    plain = run.plain
    total: Tensor | None = None
    task_total: Tensor | None = None
    for i, part in enumerate(parts):
        run.seed_step(i + 1)
        with contextlib.nullcontext() if plain else run.fabric.no_backward_sync(run.net, enabled=i + 1 < len(parts)):
            task_loss = loss = run.task.loss(run, part)
            for method in run.methods:
                loss = method.loss(run, part, loss)
            if len(part) != len(batch):
                share = len(part) / len(batch)  # a short batch may not cut evenly
                loss, task_loss = loss * share, task_loss.detach() * share
            if plain:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                run.fabric.backward(loss)
        same = task_loss is loss
        loss = loss.detach()
        task_loss = loss if same else task_loss.detach()
        total = loss if total is None else total + loss
        task_total = task_loss if task_total is None else task_total + task_loss
    run.each("after_backward")
    if run.trainer.clip and plain:
        trained = [p for group in run.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, run.trainer.clip, error_if_nonfinite=False)
    elif run.trainer.clip:
        run.fabric.clip_gradients(run.net, run.optimizer, max_norm=run.trainer.clip, error_if_nonfinite=False)
    (getattr(run.optimizer, "optimizer", run.optimizer) if plain else run.optimizer).step()
    run.task_loss = task_total
    assert total is not None
    return total


def drop_gradients(optimizer: Any) -> None:
    """What ``optimizer.zero_grad()`` does, without torch's profiling around it: that costs as much as a kernel."""
    if type(getattr(optimizer, "optimizer", optimizer)).zero_grad is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def early_factor(run: Run, phase: Phase, done: int, group: dict[str, Any]) -> float:
    """Share of the peak learning rate of a group that trains for the first ``lr_share`` of a phase only."""
    length = max(1, round(group["lr_share"] * phase.steps))
    step = run.step - done
    return lr_factor(run.trainer, step, length, phase.schedule, phase.warmup) if step < length else 0.0


def fit(run: Run) -> None:
    """Train to the end of the last phase, from `run.step` on (not 0 when a checkpoint was loaded)."""
    owners = [m for m in run.methods if m.own_step is not None]
    if len(owners) > 1:
        raise UserError(f"two methods own the training step: {', '.join(m.slug for m in owners)}; use one of them")
    step_of: Callable[[Run, Any], Tensor] = owners[0].own_step if owners and owners[0].own_step else train_step
    try:
        _phases(run, step_of)
    except BaseException:
        with contextlib.suppress(Exception):  # what ended the training is what is told
            _close(run)
        raise
    _close(run)


def _close(run: Run) -> None:
    """Let callbacks that work beside the training come to an end."""
    for callback in run.callbacks:
        close = getattr(callback, "close", None)
        if close is not None:
            close()


def _phases(run: Run, step_of: Callable[[Run, Any], Tensor]) -> None:
    done = 0
    for phase in run.phases:
        run.phase = phase
        end = done + phase.steps
        if run.step <= done:
            run.each("start_phase")
        while run.step < end:
            run.epoch, position = divmod(run.step, run.steps_per_epoch)
            for batch in run.batches(run.epoch, skip=position):
                factor = lr_factor(run.trainer, run.step - done, phase.steps, phase.schedule, phase.warmup)
                for group in run.optimizer.param_groups:
                    peak = group["base_lr"] if phase.lr is None else phase.lr * group.get("lr_factor", 1.0)
                    group["lr"] = peak * (early_factor(run, phase, done, group) if "lr_share" in group else factor)
                if step_of is not train_step or run.augmentation is not None:  # it seeds again before it draws
                    run.seed_step()
                run.total_loss = step_of(run, run.augment(batch))
                run.step += 1
                run.each("after_step")
                drop_gradients(run.optimizer)
                if run.step == end:
                    break
            run.each("after_epoch")
        done = end
