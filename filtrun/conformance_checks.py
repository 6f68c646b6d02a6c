"""What the conformance suite asks of a method: one function for each promise.

A check gets a `BenchRun` (or the method alone), returns on success, and raises `Failed` or `Skip` with the reason.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import tempfile
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from filtrun import runner
from filtrun.bench_run import BenchRun, losses_of, probe
from filtrun.checkpoint import Checkpoints, checkpoint_files, load_checkpoint, weights_sha256
from filtrun.context import Run, mix_seed, seed_generators
from filtrun.delta import FILE, load_delta, save_delta
from filtrun.errors import UserError
from filtrun.method import Method
from filtrun.pack import load_tree, save_tree

MERGE_TOLERANCE = 1e-5
SPLIT_TOLERANCE = 1e-4
SOURCE = re.compile(r"arxiv|\d{4}\.\d{4,5}|doi\b|https?://|baseline|\b(19|20)\d\d\b", re.IGNORECASE)


class Skip(Exception):
    """A check that does not apply, and why."""


class RandomStep(Skip):
    """A step that depends on more than the batch, so that no two ways to cut it can be compared."""


class Failed(Exception):
    """What a method does not keep."""


# -- comparing tensors -----------------------------------------------------------------------------------------------
def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, up to the sign of zero; NaN equals NaN: that numbers are finite is a check of its own."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest magnitude of `a` where that is above 1; NaN against NaN is 0."""
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a.nan_to_num(), b.nan_to_num()
    return ((a - b).abs().max() / a.abs().max().clamp(min=1)).item() if a.numel() else 0.0


def widest(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """The largest `gap` between two sets of named tensors, and whose it is."""
    if a.keys() != b.keys():
        return float("inf"), sorted(a.keys() ^ b.keys())[0]
    return max(((gap(a[name], b[name]), name) for name in a), default=(0.0, ""))


def tensors_of(run: Run) -> dict[str, Tensor]:
    """Copies of all parameters and buffers of a run's model."""
    named = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


# -- the checks: each returns on success, or raises Failed or Skip ---------------------------------------------------
def trains_what_it_says(bench: BenchRun) -> None:
    """Two steps change the trainable tensors, all of them, and nothing else."""
    run = bench.fresh()
    runner.setup(run)
    said = {id(p) for p in run.model.parameters() if p.requires_grad} | run.claimed
    trainable = {name for name, p in run.model.named_parameters() if p.requires_grad}
    kinds = {m.trains for m in run.methods}
    if kinds == {"nothing"} and trainable:
        raise Failed(f"says it trains nothing, but {sorted(trainable)[0]} is trainable")
    if kinds == {"part"} and all(p.requires_grad for p in run.weights.values()):
        raise Failed("says it trains a part, but every tensor of the base is trainable")
    if "nothing" not in kinds and not trainable:
        raise Failed("says it trains, but nothing is trainable")
    before, base = tensors_of(run), {n: p.detach().clone() for n, p in run.weights.items()}
    runner.fit(run)
    for name, parameter in run.model.named_parameters():
        if name in before and id(parameter) not in said and not same(parameter, before[name]):
            raise Failed(f"{name} changed although it is neither trainable nor claimed")
    for name, weight in run.weights.items():
        if id(weight) not in said and not same(weight, base[name]):
            raise Failed(f"{name} changed although it is neither trainable nor claimed")
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # follow the data wherever a model trains
    for name, buffer in run.model.named_buffers():
        if name in run.shared["base_buffers"] and not name.endswith(statistics) and not same(buffer, before[name]):
            raise Failed(f"the buffer {name} changed")
    after = dict(run.model.named_parameters())
    still = [n for n in sorted(trainable) if n in after and same(after[n], before[n])]
    if still and not any(m.unused_params for m in run.methods):
        raise Failed(f"{still[0]} is trainable but two steps did not change it; set unused_params if that may be")
    free = {name for name, p in run.weights.items() if id(p) not in said}
    run.each_reversed("finish")
    for name, parameter in run.model.named_parameters():
        if name in free and parameter.shape == base[name].shape and not same(parameter, bench_base(bench, name)):
            raise Failed(f"{name} is not what it was in the base after finish, although neither trainable nor claimed")


def bench_base(bench: BenchRun, name: str) -> Tensor:
    """A parameter of the unchanged base."""
    return dict(bench.base.named_parameters())[name]


def identity_at_start(bench: BenchRun) -> None:
    """`edit_model` leaves the output as it was, within 1e-6."""
    run = bench.fresh(edit=False)
    methods, run.methods = run.methods, []
    plain = probe(run)
    run.methods = methods
    runner.edit(run)
    if not all(m.identity_at_start for m in methods):
        raise Skip("says it is not the identity at the start")
    if (far := gap(plain, probe(run))) > 1e-6:
        raise Failed(f"edit_model moves the output by {far:.2g}")


def exact_finish(bench: BenchRun) -> None:
    """`finish` leaves the output of the trained model as it was, within 1e-5."""
    run = bench.trained()
    before = probe(run)
    run.each_reversed("finish")
    after = probe(run)
    if not all(m.exact_finish for m in run.methods):
        raise Skip("says finish changes the output")
    if (far := gap(before, after)) > MERGE_TOLERANCE:
        raise Failed(f"finish moves the output by {far:.2g}")


def delta_reloads(bench: BenchRun) -> None:
    """What is stored, put into a fresh base edited by the same method, gives the same output bit for bit."""
    run = bench.trained()
    sha = weights_sha256(bench.base)
    with run.evaluating():
        tuned = run.task.probe(run).clone()
        save_delta(run, run.dir, sha)
    run.each_reversed("finish")
    finished = probe(run)
    again = bench.fresh()
    load_delta(again, again.dir / FILE, sha)
    if not same(tuned, probe(again)):
        raise Failed(f"the reloaded model's output differs by {gap(tuned, probe(again)):.2g}")
    again.each_reversed("finish")
    if not same(finished, probe(again)):
        raise Failed(f"after finish the reloaded model's output differs by {gap(finished, probe(again)):.2g}")


def numbers_are_stated_exactly(bench: BenchRun) -> None:
    """A stated sparsity, rank or bit-width (`report`) holds in the finished weights, and `verify` agrees."""
    run = bench.trained()
    before = {name: p.detach().clone() for name, p in bench.base.named_parameters()}
    claimed = {name for name, p in run.weights.items() if id(p) in run.claimed}
    verifiers = [v for m in run.methods if callable(v := getattr(m, "verify", None))]
    report: dict[str, Any] = {}
    for method in run.methods:
        report |= method.report(run)
    for verify in verifiers:
        try:
            verify(run)
        except ValueError as error:
            raise Failed(str(error)) from error
    stated = [key for key in ("sparsity", "rank", "bits") if isinstance(report.get(key), (int, float))]
    if not stated and not verifiers:
        raise Skip("states no sparsity, rank or bit-width")
    run.each_reversed("finish")
    after = {name: p.detach() for name, p in run.model.named_parameters()}
    names = [n for n in after if (n in claimed if claimed else after[n].ndim > 1)]
    if "sparsity" in stated:
        zeros = sum(int((after[n] == 0).sum()) for n in names) / max(1, sum(after[n].numel() for n in names))
        if abs(zeros - report["sparsity"]) > 1e-6:
            raise Failed(f"states sparsity {report['sparsity']:.6g}, but {zeros:.6g} of the weights are zero")
    for name in names:
        same_shape = name in before and before[name].shape == after[name].shape  # channels may have been taken out
        if "rank" in stated and same_shape and after[name].ndim > 1:
            singular = torch.linalg.svdvals((after[name] - before[name]).double().flatten(1))
            rank = int((singular > max(1e-6, 1e-3 * singular[0].item())).sum())
            if rank > report["rank"]:
                raise Failed(f"states rank {report['rank']}, but {name} changed by a matrix of rank {rank}")
        if "bits" in stated and after[name].ndim > 1:
            values = max(len(row.unique()) for row in after[name].flatten(1))
            if values > 2 ** report["bits"]:
                raise Failed(f"states {report['bits']} bits, but a row of {name} has {values} different values")


def finite(bench: BenchRun, precision: str) -> None:
    """Losses, weights and outputs of two steps are finite."""
    run = bench.trained(precision=precision)
    for i, loss in enumerate(losses_of(run)):
        if not loss.isfinite() and not any(m.nan_ok for m in run.methods):
            raise Failed(f"the loss of step {i + 1} is {loss.item()}")
    for name, tensor in tensors_of(run).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Failed(f"{name} is not finite after two steps")
    if not probe(run).isfinite().all():
        raise Failed("the output is not finite after two steps")


def works_without_gradients(bench: BenchRun) -> None:
    """Evaluation under ``torch.no_grad`` sees the weights of the last step, as evaluation with gradients does."""
    run = bench.trained()
    quiet = probe(run)
    with run.evaluating(), torch.enable_grad():
        loud = run.task.probe(run).detach()
    if (far := gap(loud, quiet)) > 1e-6:
        raise Failed(f"the output under no_grad differs by {far:.2g}")


def resumes(bench: BenchRun) -> None:
    """The method's state survives a file; a run resumed after one step ends as one that was never stopped."""
    run = bench.fresh()
    runner.setup(run)
    run.dir = Path(tempfile.mkdtemp(dir=bench.folder))
    run.callbacks.append(Checkpoints(1))
    runner.fit(run)
    for method in run.methods:
        save_tree(run.dir / "state.safetensors", {"state": method.state_dict()})
        method.load_state_dict(load_tree(run.dir / "state.safetensors")[0]["state"])
    ended = probe(run)
    if run.optimizer is None:
        return
    checkpoint_files(run.dir)[-1].unlink()
    again = bench.fresh()
    again.dir = run.dir
    runner.setup(again)
    if not load_checkpoint(again) or again.step != 1:
        raise Failed("the checkpoint of step 1 cannot be loaded")
    runner.fit(again)
    far, name = widest(tensors_of(run), tensors_of(again))
    if far > 0:
        raise Failed(f"{name} differs by {far:.2g} from the run that was not stopped")
    if not same(ended, probe(again)):
        raise Failed("the output differs from that of the run that was not stopped")


def accumulates(bench: BenchRun) -> None:
    """Two micro-batches give the weights of one batch, within 1e-4."""
    start, reference = _reference(bench)
    cut = tensors_of(bench.trained(fixed=True, accumulate=2, **SPLIT_TRAINER))
    _agree(bench, start, reference, cut, "when the batch is cut in two")


SPLIT_TRAINER: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.05, "clip": 0.0}
"""Adam divides by the gradient: where that is rounding noise, the step is too, and clipping hides a wrong scale. So
batches are cut under plain SGD."""


def _agree(
    bench: BenchRun, start: dict[str, Tensor], reference: dict[str, Tensor], found: dict[str, Tensor], when: str
) -> None:
    """Raise Failed unless both trainings ended within 1e-4 of each other, and within 1 % of the way they went.

    Raises Skip where two steps make as much of the rounding of the weights (instance norm of flat images does).
    """
    far, name = widest(reference, found)
    if far > SPLIT_TOLERANCE:
        if far < 3 * (noise := widest(reference, _rounded(bench))[0]):
            raise Skip(f"rounding errors grow: weights that differ by 1e-7 end up {noise:.1g} apart")
        raise Failed(f"{name} differs by {far:.2g} {when}")
    floats = [n for n, t in reference.items() if t.is_floating_point() and not t.isnan().any()]
    floats = [n for n in floats if start[n].shape == reference[n].shape]  # channels may have been taken out
    way = sum((reference[n] - start[n]).double().square().sum().item() for n in floats) ** 0.5
    apart = sum((reference[n] - found[n]).double().square().sum().item() for n in floats) ** 0.5
    if apart > 1e-2 * way:
        raise Failed(f"the update differs by {apart / max(way, 1e-30):.2g} of its length {when}")


def _rounded(bench: BenchRun) -> dict[str, Tensor]:
    """The tensors after two whole batches from weights that differ by about 1e-7 of themselves."""
    run, generator = bench.fresh(fixed=True, **SPLIT_TRAINER), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(1 + 6e-8 * torch.randn(parameter.shape, generator=generator))
    runner.setup(run)
    runner.fit(run)
    return tensors_of(run)


def _reference(bench: BenchRun) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors before and after two whole batches; Skip where they depend on more than the batch."""
    if bench.has_batch_norm:
        raise Skip("batch norm depends on how the batch is cut")
    run = bench.fresh(fixed=True, **SPLIT_TRAINER)
    if not any(p.requires_grad for p in run.model.parameters()):
        raise Skip("trains nothing")
    if any(m.own_step is not None for m in run.methods):
        raise RandomStep("owns its training step")
    start = tensors_of(run)
    runner.setup(run)
    runner.fit(run)
    other = bench.fresh(fixed=True, **SPLIT_TRAINER)

    def other_draws(micro: int = 0) -> None:
        seed_generators(mix_seed(other.seed, other.step, micro, 77), other.device)

    other.seed_step = other_draws  # type: ignore[method-assign]
    runner.setup(other)
    runner.fit(other)
    found = tensors_of(run)
    if widest(found, tensors_of(other))[0] > 0:
        raise RandomStep("draws random numbers in every step")
    return start, found


def runs_on_two_processes(bench: BenchRun, overrides: list[str], config_dir: Path | None) -> None:
    """Two processes (DDP, gloo) stay equal, and equal one process with the same global batch, within 1e-4.

    The second part is left out where a step depends on more than the batch: it draws random numbers, or is a method's
    own.
    """
    import pickle

    from lightning_fabric import Fabric

    from filtrun.launch import ddp

    try:
        start, reference = _reference(bench)
    except RandomStep:
        start, reference = {}, {}
    try:
        pickle.dumps(bench.method)
    except Exception as error:
        raise Skip("other processes cannot import what makes the method") from error
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    fabric: Any = Fabric(accelerator="cpu", devices=2, strategy=ddp(bench.plan, spawn=True))
    with _quiet_stderr():
        fabric.launch(_ddp_worker, bench.method, overrides, folder, config_dir, list(sys.path))
    first, second = (load_tree(folder / f"rank{i}.safetensors")[0] for i in range(2))
    far, name = widest(first, second)
    if far > 0:
        raise Failed(f"{name} differs by {far:.2g} between the two processes")
    if reference:
        _agree(bench, start, reference, first, "from one process with the same batch")


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep what child processes say about how they start to themselves; their errors arrive as exceptions."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _ddp_worker(
    fabric: Any, method: Any, overrides: list[str], folder: Path, config_dir: Path | None, path: list[str]
) -> None:
    torch.set_num_threads(1)
    sys.path[:] = path
    bench = BenchRun(method, overrides, folder / f"scratch{fabric.global_rank}", config_dir)
    run = bench.trained(fixed=True, fabric=fabric, **SPLIT_TRAINER)
    save_tree(folder / f"rank{fabric.global_rank}.safetensors", tensors_of(run))
    fabric.barrier()


# -- checks that need no model ---------------------------------------------------------------------------------------
def names_its_source(method: Method) -> None:
    """`paper` is set, and the docstring of the class or its module names the paper or says it is a baseline."""
    if not method.paper:
        raise Failed("paper is empty: name title, link and year")
    module = sys.modules.get(type(method).__module__)
    own = type(method).__doc__ or ""
    if not own or own.startswith(f"{type(method).__name__}("):  # what dataclass writes when there is none
        raise Failed("the class has no docstring")
    if not SOURCE.search(f"{own} {inspect.getdoc(module) or ''} {method.paper}"):
        raise Failed("neither docstring nor paper names a source (a link, an arXiv id, a year)")


def refuses_bad_options(method: Method, node: dict[str, Any], trust: list[str]) -> None:
    """An unknown key, a wrong type and a value out of range each give one clear message that names the key."""
    from filtrun.build import build

    hints = typing.get_type_hints(type(method))
    wrong: list[tuple[str, Any]] = [("no_such_option", 1)]
    for field in dataclasses.fields(method):
        if field.init and _is_number(hints[field.name]):
            wrong.append((field.name, "not-a-number"))
            low = field.metadata.get("low")
            if low is not None:
                wrong.append((field.name, low - 1))
    for key, value in wrong:
        try:
            build({**node, key: value}, Method, f"method.{method.slug}", trust=trust)
        except UserError as error:
            lines = str(error).splitlines()
            if key not in lines[0] or len(lines) > 6:
                raise Failed(f"{key}={value!r}: the message does not start with the key: {lines[0]!r}") from error
            continue
        except Exception as error:
            raise Failed(f"{key}={value!r} raises {type(error).__name__} and not UserError: {error}") from error
        raise Failed(f"{key}={value!r} is taken without complaint")


def _is_number(hint: Any) -> bool:
    kinds = set(typing.get_args(hint) or (hint,)) - {type(None)}
    return bool(kinds) and kinds <= {int, float}
