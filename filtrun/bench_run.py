"""Tiny experiments on the embedded digits and photographs, built anew as often as the conformance suite needs them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from filtrun import runner
from filtrun.build import resolve
from filtrun.context import Run, seed_generators
from filtrun.errors import UserError
from filtrun.method import Method
from filtrun.tasks.diffuse import Diffuse
from filtrun.tasks.image_to_image import ImageToImage

SETTINGS: dict[str, dict[str, list[str]]] = {
    "diffuse": {"unet": ["model.size=nano", "task.judge_steps=20"]},
    "classify": {"vit": ["model.size=nano", "model.depth=2"], "resnet20": ["model.width=4"]},
    "inverse": {"unet": ["task=inverse", "model.size=nano"]},
}
"""Task -> model -> what makes it tiny; each task's first one has no batch norm."""
ANY = ("diffuse", "classify")
"""Where a method that works with any task is tried; inverse trains as diffuse does."""

_PHOTOS = ["data=photos", "data.patches=200", "task.crop=32", "task.eval_images=1"]
_TABLES = ["task=tonemap", *_PHOTOS, "model.lut_size=5"]
IMAGE_SETTINGS: dict[str, list[str]] = {
    "mid": ["task=denoise", *_PHOTOS, "model.width=8", "model.levels=2"],
    "lpn": ["task=denoise", *_PHOTOS],
    "misf": ["task=inpaint", *_PHOTOS, "model.width=8", "model.blocks=1"],
    "espcn": ["task=superres", *_PHOTOS],
    "srcnn": ["task=superres", *_PHOTOS],
    "dpenet": ["task=derain", *_PHOTOS, "model.width=8", "model.streak_blocks=1", "model.detail_blocks=1"],
    "lut3d": [*_TABLES, "model.luts=2", "model.dropout=0.0"],
    "llf_lut": [*_TABLES, "model.luts=2", "model.references=3", "model.drop_path=0.0", "model.unused_layers=false"],
    "plain_unet": ["task=denoise", *_PHOTOS, "model.width=8", "model.levels=2"],
}
"""Model -> what makes it tiny, for image-to-image tasks. A method of such tasks is tried on the model it picks; any
method on the one that is named, each task's first where only the task is."""

TRAINER: dict[str, Any] = {
    "steps": 2, "epochs": None, "batch_size": 16, "accumulate": 1, "lr": 5e-3, "weight_decay": 0.0, "warmup": 0,
    "schedule": "constant", "ema": 0.0, "precision": "32", "checkpoint_every": 0, "compile": False, "devices": 1,
}  # fmt: skip


def tiny(overrides: Sequence[str], picked: str = "") -> list[str]:
    """Overrides that name an image model or task, after what makes it tiny and they do not say themselves.

    Args:
        overrides: what the user says.
        picked: the model that the composed configuration has.
    """
    said = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in overrides}
    model, task = said.get("model", picked), said.get("task")
    firsts = {words[0].partition("=")[2]: name for name, words in reversed(IMAGE_SETTINGS.items())}
    if task in firsts and model not in IMAGE_SETTINGS and "model" not in said:
        model = firsts[task]
    words = [f"model={model}", *IMAGE_SETTINGS.get(model, [])] if model in IMAGE_SETTINGS else []
    return [*(word for word in words if word.partition("=")[0] not in said), *overrides]


class FixedDiffuse(Diffuse):
    """Diffusion whose noise belongs to the image, so that its loss does not depend on how a batch is cut."""

    def loss(self, run: Run, batch: Any) -> Tensor:
        denoiser = self.denoiser(run)
        if "fixed_noise" not in run.shared:
            generator = torch.Generator().manual_seed(3)
            room = 1 + int(run.data.split("train", "all").index.max())
            size = (room, run.data.channels, run.data.image_size, run.data.image_size)
            sigma = (1.2 * torch.randn(room, generator=generator) - 1.2).exp()
            run.shared["fixed_noise"] = torch.randn(size, generator=generator), sigma
        noise, sigma = (t[batch.index.cpu()].to(batch.x.device) for t in run.shared["fixed_noise"])
        return denoiser.losses(batch.x * 2 - 1, batch.y, sigma=sigma, noise=noise, drop_labels=False).mean()


class FixedPairs:
    """Mixed into an image-to-image task: no random crops, and what is drawn for an image belongs to the image."""

    def augment(self, data: Any) -> Any:
        """The first corner of each tile."""
        task: Any = self
        side = task.crop + 2 * task.margin if task.crop else data.image_size
        return lambda x: x[..., :side, :side]

    def make_pair(self, run: Run, batch: Any, generator: Any = None) -> Any:
        """The pairs of a batch, each image's made with a generator of its own."""
        task: Any = super()
        if generator is not None:
            return task.make_pair(run, batch, generator)
        made = []
        for one in runner.chunks(batch, len(batch)):
            made.append(task.make_pair(run, one, torch.Generator().manual_seed(int(one.index))))
        columns = {f.name: [getattr(pair, f.name) for pair in made] for f in dataclasses.fields(made[0])}
        return type(made[0])(**{n: None if c[0] is None else torch.cat(c) for n, c in columns.items()})


class Losses(Method):
    """Callback that keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def after_step(self, run: Run) -> None:
        assert run.total_loss is not None
        self.values.append(run.total_loss.detach())


class BenchRun:
    """One setting (task and model) for one method; `fresh` gives a new run of it from the same base every time.

    Args:
        method: its name in the configuration, or a callable that makes one.
        overrides: what the command line would say beside it.
        folder: scratch space.
        config_dir: folder of the user's own configurations.

    Raises:
        UserError: the configuration does not compose or the parts do not fit.
    """

    def __init__(
        self, method: str | Callable[[], Method], overrides: Sequence[str], folder: Path, config_dir: Path | None = None
    ) -> None:
        from filtrun.api import compose

        self.method, self.folder = method, folder
        slug = method if isinstance(method, str) else "none"
        words = [f"method={slug}", "logger=none", "device=cpu", f"stages.root={folder / 'stages'}"]
        self.config, self.choices, _ = compose(*words, *overrides, config_dir=config_dir)
        chosen = any(word.startswith("data=") for word in overrides) or self.choices.get("data") == "digits"
        if not chosen and not issubclass(resolve(self.config["task"]["_target_"], self.config["trust"]), ImageToImage):
            self.config, self.choices, _ = compose(*words, "data=digits", *overrides, config_dir=config_dir)
        self.config["trainer"] |= TRAINER
        self.config["model"] |= {"base": "scratch", "checkpoint": None}
        self.name = f"{self.choices.get('task')}/{self.choices.get('model')}"
        self.plan = self._plan({})
        self.data = self.plan.data.setup(self.config["split_seed"])
        seed_generators(0, torch.device("cpu"))
        self.base = self.plan.make_model()
        with torch.no_grad():
            for parameter in self.base.parameters():  # fresh layers are zero here and there: a trained base is not
                parameter.add_(0.02 * torch.randn_like(parameter))

    def _plan(self, trainer: dict[str, Any]) -> Any:
        from filtrun.plan import check_fit, make_plan

        config = copy.deepcopy(self.config)
        config["trainer"] |= trainer
        plan = make_plan(config, self.choices)
        if not isinstance(self.method, str):
            made: Any = self.method()
            if not issubclass(type(made), Method):
                raise UserError(f"{self.method!r} makes a {type(made).__name__}, not a Method")
            made.slug = made.slug or type(made).__name__.lower()
            plan.methods = [made]
            plan.config["method"] = {made.slug: {}}
            check_fit(plan)
        return plan

    @property
    def has_batch_norm(self) -> bool:
        """Whether a step depends on how the batch is cut, whatever the method does."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.base.modules())

    def fresh(self, *, edit: bool = True, fixed: bool = False, fabric: Any = None, **trainer: Any) -> Run:
        """A new run of two steps on a copy of the base.

        Args:
            edit: whether the methods have edited the model.
            fixed: make the task's random draws a function of the image.
            fabric: the process group; a single CPU process if None.
            trainer: training options that differ from `TRAINER`.
        """
        from filtrun.experiment import new_run
        from filtrun.launch import make_fabric

        plan = self._plan(trainer)
        plan.data = self.data
        run = new_run(plan, fabric or make_fabric(plan, "cpu", 1), self.folder)
        run.model = copy.deepcopy(self.base)
        run.net = run.model
        run.shared["base_buffers"] = {name: b.detach().clone() for name, b in run.model.named_buffers()}
        run.train_split = run.data.split("train", plan.which)
        if fixed and isinstance(run.task, Diffuse):
            names = [field.name for field in dataclasses.fields(FixedDiffuse)]
            run.task = FixedDiffuse(**{name: getattr(run.task, name) for name in names})
        elif fixed and isinstance(run.task, ImageToImage):
            kind = type(run.task)
            run.task = copy.copy(run.task)
            run.task.__class__ = type(f"Fixed{kind.__name__}", (FixedPairs, kind), {})
        run.callbacks = [Losses()]
        if edit:
            runner.edit(run)
        return run

    def trained(self, **options: Any) -> Run:
        """A run after its two steps, not finished."""
        run = self.fresh(**options)
        runner.setup(run)
        runner.fit(run)
        return run


def losses_of(run: Run) -> list[Tensor]:
    """The losses of the steps a run has done."""
    return next(c.values for c in run.callbacks if isinstance(c, Losses))


def probe(run: Run) -> Tensor:
    """The model's output on the task's fixed input, as an evaluation sees it."""
    with run.evaluating():
        return run.task.probe(run).clone()
