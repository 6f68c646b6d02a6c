"""Run: everything hooks see and may change while one experiment trains and is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.stages import Stages
from filtrun.trainer import Phase, Trainer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from filtrun.data.base import Batch, Data, Split
    from filtrun.method import Method
    from filtrun.speed import Choice
    from filtrun.task import Task


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers (splitmix64 steps): nearby inputs give unrelated seeds."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    Does what matters of ``torch.manual_seed``, which also queues a call with a stack trace for every kind of device
    that is not initialised and so costs 0.1 ms: too much for every step of a small model.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _clash(one: str, two: str) -> bool:
    """Whether two methods may not have these roles (see `Run.claim`) for one tensor."""
    both = {one, two}
    # what is added where a mask has zeros trains with the network and is cut off in the end
    return "change" in both or both <= {"mask", "entries"} or both == {"merge", "entries"}


@dataclass
class Run:
    """One training, as the hooks of methods and callbacks see it.

    `which` are the classes it trains on and is judged by ("all" or "target"); `keeps` those it should not forget
    ("source", or None).

    `measured` takes metrics (split/name) that a method has found on the way; they go into the record with its report.

    `plain` says that Fabric has nothing to do in a step (one process, no scaled loss), so that the loop passes it by.

    `model` is the plain module, `net` the same wrapped by Fabric (precision, DDP): losses call `net`, surgery edits
    `model`. `weights` maps each base tensor's name to its Parameter, taken before any edit.
    """

    fabric: Fabric
    task: Task
    data: Data
    model: nn.Module
    methods: list[Method]
    trainer: Trainer
    stages: Stages
    seed: int = 0
    dir: Path = Path()
    train_split: Split | None = None
    normalize: str = "data"
    config: Mapping[str, Any] = field(default_factory=dict)
    callbacks: list[Method] = field(default_factory=list)
    label: str = "train"
    which: str = "all"
    keeps: str | None = None
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    net: Any = None
    optimizer: Any = None
    plain: bool = False
    speed: Choice | None = None
    phases: list[Phase] = field(default_factory=list)
    phase: Phase | None = None
    step: int = 0
    epoch: int = 0
    task_loss: Tensor | None = None
    total_loss: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    bar: Any = None
    _claims: dict[int, dict[str, str]] = field(default_factory=dict)
    _augmentation: tuple[tuple[int, int], Callable[..., Tensor] | None] | None = None

    @property
    def claimed(self) -> set[int]:
        """Ids of the tensors that some method has claimed, in any role."""
        return set(self._claims)

    @property
    def device(self) -> torch.device:
        """The device this process computes on."""
        return self.fabric.device

    @property
    def hooks(self) -> list[Method]:
        """Methods, then the runner's own callbacks."""
        return [*self.methods, *self.callbacks]

    def each(self, hook: str, *args: Any) -> None:
        """Call one hook of every method and callback, in order."""
        for owner in self.hooks:
            getattr(owner, hook)(self, *args)

    def each_reversed(self, hook: str, *args: Any) -> None:
        """Call one hook in the reverse order, so that each undoes what it did."""
        for owner in reversed(self.hooks):
            getattr(owner, hook)(self, *args)

    def claim(self, method: Method, parameters: Iterable[nn.Parameter], role: str = "change") -> None:
        """Say what `method` does with these base tensors; UserError names both methods when two do not go together.

        Roles: ``"change"``: it alone decides how they change; ``"mask"``: it alone says which channels are taken out;
        ``"entries"``: it alone says which entries are zero in the end; ``"merge"``: it leaves them as they are until
        its `finish` adds to them; ``"scale"``: until it scales them. Several may merge into or scale a tensor. Nobody
        may add to one whose zeros another promises, nor touch one that somebody changes.
        """
        names = {id(p): name for name, p in self.weights.items()}
        for parameter in parameters:
            roles = self._claims.setdefault(id(parameter), {})
            for other, has in roles.items():
                if other != method.slug and _clash(role, has):
                    raise UserError(
                        f"method={method.slug} and method={other} both claim the tensor "
                        f"{names.get(id(parameter), '?')!r}; use one of them, or choose other layers for one"
                    )
            roles[method.slug] = role

    def stage(self, name: str, parts: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
        """A cached piece of work (see `Stages.get`); under DDP every process calls it with the same arguments.

        All processes run `build` when it is not cached, so that it may itself train under DDP; what the first one
        writes is kept.
        """
        if self.fabric.world_size == 1:
            return self.stages.get(name, parts, build)
        cached = self.fabric.broadcast(self.stages.cached(name, parts))
        if self.fabric.global_rank == 0:
            folder = self.stages.get(name, parts, build)
        elif not cached:
            import tempfile

            with tempfile.TemporaryDirectory() as scratch:
                build(Path(scratch))
        self.fabric.barrier()
        return folder if self.fabric.global_rank == 0 else self.stages.folder(name, parts)

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """Sum or mean of a tensor over all processes."""
        return value if self.fabric.world_size == 1 else cast(Tensor, self.fabric.all_reduce(value, reduce_op=how))

    def seed_step(self, micro: int = 0) -> None:
        """Make every draw of this step a function of (seed, step, process): resuming needs no generator state."""
        seed_generators(mix_seed(self.seed, self.step, micro, self.fabric.global_rank), self.device)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the training split; an incomplete last one is dropped unless it is the only one."""
        from filtrun.data.loader import batches_per_epoch

        assert self.train_split is not None
        return batches_per_epoch(self.train_split, self.trainer.batch_size)

    @property
    def ends_epoch(self) -> bool:
        """Whether the step just done was the last of an epoch or of a phase, so that `after_epoch` comes next."""
        ends = accumulate(phase.steps for phase in self.phases)
        return self.step % self.steps_per_epoch == 0 or self.step in ends

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """The training batches of one epoch on the device, after the first `skip`; not augmented yet."""
        from filtrun.data.loader import epoch_batches

        assert self.train_split is not None
        return epoch_batches(
            self.train_split,
            self.trainer.batch_size,
            seed=self.seed,
            epoch=epoch,
            device=self.device,
            skip=skip,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
            workers=getattr(self.data, "workers", 0),
        )

    @property
    def augmentation(self) -> Callable[..., Tensor] | None:
        """The task's training augmentation of the data; made once, not in every step."""
        made_for = (id(self.task), id(self.data))
        if self._augmentation is None or self._augmentation[0] != made_for:
            self._augmentation = made_for, self.task.augment(self.data)
        return self._augmentation[1]

    def augment(self, batch: Batch) -> Batch:
        """The task's training augmentation; drawn after the step was seeded, so that resuming draws the same."""
        augmentation = self.augmentation
        if augmentation is None:
            return batch
        if getattr(augmentation, "alternate", False):
            return replace(batch, x=augmentation(batch.x, batch.index, self.epoch, self.seed))
        return replace(batch, x=augmentation(batch.x))

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Evaluation of the model as it is now, without the hooks of methods and callbacks."""
        methods, callbacks = self.methods, self.callbacks
        self.methods, self.callbacks = [], []
        try:
            with self.evaluating():
                yield
        finally:
            self.methods, self.callbacks = methods, callbacks

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The plain model in evaluation mode without gradients, between the methods' `before_eval` and `after_eval`."""
        net, self.net = self.net, self.model
        training = self.model.training
        self.each("before_eval")
        self.model.eval()
        try:
            with torch.no_grad(), self.fabric.autocast():
                yield
        finally:
            self.model.train(training)
            self.each_reversed("after_eval")
            self.net = net
