"""The loop against bare torch, bit for bit, and everything hooks may rely on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun import runner
from filtrun.bench_run import BenchRun, losses_of
from filtrun.context import Run, mix_seed
from filtrun.data.augment import alternating
from filtrun.data.loader import epoch_order
from filtrun.errors import UserError
from filtrun.method import HOOKS, Method
from filtrun.methods.baseline.full import Full
from filtrun.methods.baseline.none import NoMethod
from filtrun.trainer import Phase

VIT = ["model=vit", "model.size=nano", "model.depth=1"]
RESNET = ["model=resnet20", "model.width=4"]


def equal(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    one, two = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def fitted(run: Run, *methods: Method) -> Run:
    """The run with these methods, trained."""
    run.methods = list(methods) or run.methods
    runner.edit(run)
    runner.setup(run)
    runner.fit(run)
    return run


# -- the same as torch alone


def cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def bare_loop(bench: BenchRun, steps: int, batch: int, *, seed: int = 0, dropout: bool = False) -> nn.Module:
    """What anybody would write: AdamW, clipping, warm-up and cosine, a new order every epoch."""
    model = copy.deepcopy(bench.base).train()
    train = bench.data.split("train", "all")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in bench.data.mean_std())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.02, fused=True)
    for step in range(steps):
        epoch, position = divmod(step, len(train) // batch)
        rows = epoch_order(len(train), seed, epoch)[position * batch : (position + 1) * batch]
        x, y = train.batch(rows).x, train.batch(rows).y
        optimizer.param_groups[0]["lr"] = 5e-3 * cosine(step, steps, 3)
        if dropout:
            torch.manual_seed(mix_seed(seed, step, 1, 0))
        F.cross_entropy(model((x - mean) / std), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model


SETTINGS = {"steps": 7, "batch_size": 400, "clip": 0.5, "schedule": "cosine", "warmup": 3, "weight_decay": 0.02}


@pytest.mark.parametrize(("model", "dropout"), [(RESNET, False), ([*VIT, "model.dropout=0.1"], True)])
def test_the_loop_computes_what_bare_torch_computes(tmp_path: Path, model: list[str], dropout: bool) -> None:
    bench = BenchRun("full", model, tmp_path)
    assert len(bench.data.split("train", "all")) // 400 == 3  # seven steps see three epochs
    run = bench.trained(**SETTINGS)
    want = bare_loop(bench, 7, 400, dropout=dropout)
    assert equal(run.model, want)
    assert not equal(run.model, bench.base)


@pytest.mark.parametrize(
    "change", [{"clip": 0.0}, {"warmup": 0}, {"schedule": "constant"}, {"weight_decay": 0.0}, {"optimizer": "adam"}]
)
def test_each_option_matters(tmp_path: Path, change: dict[str, Any]) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    plain = bench.trained(**SETTINGS | {"steps": 5})
    assert not equal(bench.trained(**SETTINGS | {"steps": 5} | change).model, plain.model)


def test_four_micro_batches_are_one_batch(tmp_path: Path) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    sgd = {"optimizer": "sgd", "lr": 0.1, "steps": 3, "batch_size": 32}
    whole, cut = bench.trained(**sgd), bench.trained(**sgd, accumulate=4)
    for (name, a), b in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
    assert torch.stack(losses_of(whole)).tolist() == pytest.approx(torch.stack(losses_of(cut)).tolist(), abs=1e-5)


def test_a_short_batch_that_does_not_cut_evenly_counts_every_image_once(tmp_path: Path) -> None:
    bench = BenchRun("full", [*VIT, "data.few_shot=1"], tmp_path)  # ten images: micro-batches of 3, 3, 3 and 1
    sgd = {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 16}
    whole, cut = bench.trained(**sgd), bench.trained(**sgd, accumulate=4)
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


# -- seeds and order


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    bench = BenchRun("full", [*VIT, "model.dropout=0.1"], tmp_path)

    def with_seed(seed: int) -> Run:
        run = bench.fresh(edit=False)
        run.seed = seed
        torch.manual_seed(torch.seed() % 1000)  # whatever was drawn before must not matter
        return fitted(run)

    one, two, other = with_seed(3), with_seed(3), with_seed(4)
    assert equal(one.model, two.model) and not equal(one.model, other.model)


@dataclass
class Seen(Method):
    """Keeps the sample numbers of every batch."""

    trains: ClassVar = "all"

    def __post_init__(self) -> None:
        self.batches: list[list[int]] = []

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        self.batches.append(batch.index.tolist())
        return loss


def test_the_order_of_the_data_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    bench = BenchRun("full", VIT, tmp_path)

    def seen(seed: int, steps: int = 6, resumed: int = 0) -> list[list[int]]:
        run, method = bench.fresh(edit=False, batch_size=400, steps=steps), Seen()
        run.seed, run.step = seed, resumed
        fitted(run, method)
        return method.batches

    batches = seen(0)
    images = len(bench.data.split("train", "all"))
    train = bench.data.split("train", "all")
    for epoch in (0, 1):
        want = train.index[epoch_order(images, 0, epoch)[:1200]].tolist()
        assert sum(batches[3 * epoch : 3 * epoch + 3], []) == want
    assert batches[:3] != batches[3:] and len(set(sum(batches[:3], []))) == 1200
    assert seen(0) == batches and seen(1) != batches
    assert seen(0, resumed=2) == batches[2:]  # the same from the middle of an epoch


class Draws(Full):
    """Owns the step and keeps what it drew."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def own_step(self, run: Run, batch: Any) -> Tensor:  # type: ignore[override]
        self.drawn.append(torch.rand(()).item())
        return torch.zeros(())


def test_what_a_step_draws_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    bench = BenchRun("full", VIT, tmp_path)

    def drawn(seed: int, resumed: int = 0) -> list[float]:
        run, method = bench.fresh(edit=False, steps=5), Draws()
        run.seed, run.step = seed, resumed
        torch.manual_seed(resumed + 77)
        fitted(run, method)
        return method.drawn

    assert len(set(drawn(0))) == 5 and drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, resumed=3) == drawn(0)[3:]


def test_epochs_are_as_many_steps(tmp_path: Path) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    by_steps = bench.trained(steps=4, batch_size=400)
    by_epochs = bench.trained(steps=None, epochs=1.1, batch_size=400)
    assert by_epochs.step == 4 and equal(by_steps.model, by_epochs.model)
    assert (by_epochs.steps_per_epoch, by_epochs.epoch) == (3, 1)


def test_mixed_seeds_are_spread() -> None:
    seeds = {mix_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512 and all(0 <= s < 2**63 for s in seeds)
    assert mix_seed(1, 2) != mix_seed(2, 1)


# -- hooks


class Recorder(Method):
    """Writes down each hook that is called."""

    trains: ClassVar = "all"

    def __init__(self, name: str, calls: list[str]) -> None:
        self.slug, self.calls = name, calls  # type: ignore[misc]

    def __getattribute__(self, name: str) -> Any:
        if name in HOOKS and name != "own_step":
            calls = object.__getattribute__(self, "calls")
            calls.append(f"{object.__getattribute__(self, 'slug')}.{name}")
        return object.__getattribute__(self, name)


def test_the_order_of_hooks(tmp_path: Path) -> None:
    calls: list[str] = []
    run = BenchRun("full", VIT, tmp_path).fresh(edit=False, batch_size=400, steps=4)
    run.callbacks = [Recorder("log", calls)]
    fitted(run, Recorder("a", calls), Recorder("b", calls))
    with run.evaluating():
        calls.append("evaluate")
    run.each_reversed("finish")

    def each(*names: str, callbacks: bool = True) -> list[str]:
        return [f"{who}.{name}" for name in names for who in (["a", "b", "log"] if callbacks else ["a", "b"])]

    step = [*each("loss", callbacks=False), *each("after_backward", "after_step")]
    assert calls == [
        *each("prepare", "edit_model"), *each("param_groups", "phases", callbacks=False),
        *each("start_phase"), *step * 3, *each("after_epoch"), *step, *each("after_epoch"),
        *each("before_eval"), "evaluate", "log.after_eval", "b.after_eval", "a.after_eval",
        "log.finish", "b.finish", "a.finish",
    ]  # fmt: skip


def test_gradients_are_alive_in_after_step_and_gone_in_the_next(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Looks(Full):
        def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
            self.clean = all(p.grad is None for p in run.model.parameters())
            return loss

        def after_step(self, run: Run) -> None:
            seen.append((self.clean, all(p.grad is not None for p in run.model.parameters())))

    fitted(BenchRun("full", RESNET, tmp_path).fresh(edit=False), Looks())
    assert seen == [(True, True)] * 2


def test_terms_add_up_and_gradients_can_be_edited(tmp_path: Path) -> None:
    class Adds(Full):
        def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
            return loss + 2.5

        def after_backward(self, run: Run) -> None:
            for p in run.model.parameters():
                assert p.grad is not None
                p.grad.zero_()

    bench = BenchRun("full", RESNET, tmp_path)
    run = fitted(bench.fresh(edit=False, steps=1), Adds())
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), bench.base.parameters(), strict=True))
    assert run.task_loss is not None and losses_of(run)[0].item() == pytest.approx(run.task_loss.item() + 2.5)


class Owner(Full):
    """Plain gradient descent by its own hand."""

    def own_step(self, run: Run, batch: Any) -> Tensor:  # type: ignore[override]
        loss = run.task.loss(run, batch)
        run.fabric.backward(loss)
        with torch.no_grad():
            for p in run.model.parameters():
                p -= 0.1 * p.grad
        return loss.detach()


def test_own_step_replaces_the_runners(tmp_path: Path) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    mine = fitted(bench.fresh(edit=False, steps=3), Owner())
    sgd = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "clip": 0.0, "steps": 3}
    plain = bench.trained(**sgd)
    for a, b in zip(mine.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert len(losses_of(mine)) == 3


def test_two_owners_of_the_step_are_refused(tmp_path: Path) -> None:
    one, two = Owner(), Owner()
    one.slug, two.slug = "gan", "meta"  # type: ignore[misc]
    with pytest.raises(UserError, match="two methods own the training step: gan, meta"):
        fitted(BenchRun("full", VIT, tmp_path).fresh(edit=False), one, two)


class Phased(Full):
    def __init__(self, slug: str, rates: list[float]) -> None:
        self.slug, self.rates = slug, rates  # type: ignore[misc]
        self.seen: list[tuple[str, int]] = []

    def phases(self, run: Run) -> list[Phase]:
        return [Phase("first", 2), Phase("second", 3, lr=0.5)]

    def start_phase(self, run: Run) -> None:
        assert run.phase is not None
        self.seen.append((run.phase.name, run.step))

    def after_step(self, run: Run) -> None:
        self.rates.append(run.optimizer.param_groups[0]["lr"])

    def after_epoch(self, run: Run) -> None:
        self.seen.append(("epoch", run.step))


def test_phases_have_their_own_schedule(tmp_path: Path) -> None:
    method = Phased("phased", [])
    run = fitted(BenchRun("full", VIT, tmp_path).fresh(edit=False, schedule="linear", lr=0.1, batch_size=400), method)
    assert method.rates == pytest.approx([0.1, 0.05, 0.5, 0.5 * 2 / 3, 0.5 / 3])
    assert method.seen == [("first", 0), ("epoch", 2), ("second", 2), ("epoch", 3), ("epoch", 5)]
    assert run.step == 5


def test_two_plans_of_phases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two methods plan the phases of the run: one, two"):
        fitted(BenchRun("full", VIT, tmp_path).fresh(edit=False), Phased("one", []), Phased("two", []))


def test_own_groups_keep_their_share_of_the_schedule(tmp_path: Path) -> None:
    rates: list[list[float]] = []

    class Head(Full):
        def param_groups(self, run: Run) -> list[dict[str, Any]]:
            return [{"params": [run.weights["head.weight"]], "lr": 1.0}]

        def after_step(self, run: Run) -> None:
            rates.append([g["lr"] for g in run.optimizer.param_groups])

    fitted(BenchRun("full", VIT, tmp_path).fresh(edit=False, schedule="linear", lr=0.1), Head())
    assert rates == [[1.0, 0.1], [0.5, 0.05]]


# -- what trains


@dataclass
class Part(Method):
    """Trains the head's weight."""

    trains: ClassVar = "part"

    def edit_model(self, run: Run) -> None:
        run.weights["head.weight"].requires_grad_(True)


@pytest.mark.parametrize(
    ("make", "trained"),
    [
        (lambda: [Full()], "all"),
        (lambda: [Part()], "part"),
        (lambda: [NoMethod()], "nothing"),
        (lambda: [Full(), NoMethod()], "all"),
        (lambda: [Full(), Part()], "part"),  # "all" trains everything unless another trains a part
        (lambda: [NoMethod(), Part()], "part"),
        (lambda: [], "nothing"),
    ],
)
def test_what_trains(tmp_path: Path, make: Callable[[], list[Method]], trained: str) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    run = bench.fresh(edit=False)
    run.methods = []
    fitted(run, *make())
    names = {n for n, p in run.model.named_parameters() if p.requires_grad}
    everything = set(run.weights)
    assert names == {"all": everything, "part": {"head.weight"}, "nothing": set()}[trained]
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, dict(bench.base.named_parameters())[n])}
    assert moved <= names and bool(moved) == (trained != "nothing")
    assert run.step == (0 if trained == "nothing" else 2) and (run.optimizer is None) == (trained == "nothing")


def test_a_tensor_has_one_owner(tmp_path: Path) -> None:
    run = BenchRun("full", VIT, tmp_path).fresh()
    one, two = Full(), Full()
    one.slug, two.slug = "one", "two"  # type: ignore[misc]
    run.claim(one, [run.weights["head.weight"]])
    run.claim(one, [run.weights["head.weight"]])  # saying it twice is no quarrel
    with pytest.raises(UserError, match="method=two and method=one both claim the tensor 'head.weight'"):
        run.claim(two, [run.weights["head.weight"]])


@dataclass
class Shown(Method):
    """Keeps the pictures of every batch as they reach the loss."""

    trains: ClassVar = "all"

    def __post_init__(self) -> None:
        self.pictures: list[tuple[int, Tensor, Tensor]] = []

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        self.pictures.append((run.epoch, batch.index, batch.x))
        return loss


def test_augmented_pictures_repeat_and_resume_exactly(tmp_path: Path) -> None:
    words = ["data.crop_pad=1", "data.flip=true", "data.alternate_flip=true", "data.brightness=0.3"]
    bench = BenchRun("full", [*VIT, *words], tmp_path)

    def shown(resumed: int = 0, seed: int = 0) -> list[tuple[int, Tensor, Tensor]]:
        run, method = bench.fresh(edit=False, batch_size=400, steps=6), Shown()
        run.seed, run.step = seed, resumed
        fitted(run, method)
        return method.pictures

    def equal(one: list[tuple[int, Tensor, Tensor]], two: list[tuple[int, Tensor, Tensor]]) -> bool:
        return all(torch.equal(a[2], b[2]) for a, b in zip(one, two, strict=True))

    pictures = shown()
    assert [epoch for epoch, _, _ in pictures] == [0, 0, 0, 1, 1, 1]
    assert equal(shown(), pictures) and equal(shown(resumed=4), pictures[4:])
    assert not equal(shown(seed=1), pictures)


def test_alternating_flips_follow_the_epoch_of_the_run(tmp_path: Path) -> None:
    bench = BenchRun("full", [*VIT, "data.flip=true", "data.alternate_flip=true"], tmp_path)
    run, method = bench.fresh(edit=False, batch_size=400, steps=6), Shown()
    run.seed = 5
    fitted(run, method)
    plain = bench.data.split("train", "all")
    at = {int(i): row for row, i in enumerate(plain.index)}
    for epoch, index, x in method.pictures:
        original = plain.batch([at[i] for i in index.tolist()]).x
        mirrored = alternating(index, epoch, 5)
        assert torch.equal(x, torch.where(mirrored.view(-1, 1, 1, 1), original.flip(-1), original))


@pytest.mark.parametrize("options", [{}, {"accumulate": 3, "batch_size": 15}, {"clip": 0.0}, {"precision": "bf16"}])
def test_a_step_without_fabric_s_wrappers_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    plain = bench.trained(steps=4, **options)
    assert runner.is_plain(plain) and "forward" in vars(plain.net)
    monkeypatch.setattr(runner, "is_plain", lambda run: False)
    wrapped = bench.trained(steps=4, **options)
    assert "forward" not in vars(wrapped.net)
    pairs = zip(plain.model.parameters(), wrapped.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("wrapped", [False, True])
def test_half_precision_reaches_layers_and_not_the_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    if wrapped:
        monkeypatch.setattr(runner, "is_plain", lambda run: False)
    bench = BenchRun("full", VIT, tmp_path)
    run = bench.fresh(steps=1, precision="bf16")
    seen: list[torch.dtype] = []
    run.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    layer = next(m for m in run.model.modules() if isinstance(m, torch.nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    runner.setup(run)
    assert ("forward" in vars(run.net)) is not wrapped
    out = run.net(torch.rand(2, 1, 8, 8) * 999)
    assert out.dtype == torch.float32 and seen == [torch.float32, torch.bfloat16]


def test_an_optimizer_clears_gradients_in_its_own_way_if_it_has_one() -> None:
    class Own(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            weight.grad = torch.full_like(weight, 5.0)

    weight = torch.nn.Parameter(torch.ones(2))
    for optimizer, left in ((torch.optim.SGD([weight], lr=0.1), None), (Own([weight], lr=0.1), 5.0)):
        weight.grad = torch.ones(2)
        runner.drop_gradients(optimizer)
        assert (None if weight.grad is None else weight.grad[0].item()) == left
