"""Tunable Convolutions with Parametric Multi-Loss Optimization (CVPR 2023, arXiv 2304.00898).

Maggioni, Tanay, Babiloni, McDonagh, Leonardis; the authors' layer is mirrored in
sybahk/tunable-convolution-pytorch, the training code is not public. Every convolution of a network becomes a bank of
kernels, one for each objective; the knobs px mix the kernels in the forward pass and weigh the objectives in the loss,
``sum_p px_p L_p``, so one network offers a dial between the objectives at run time.

Where this differs from the released layer, on purpose:

- Every kernel starts as the network's own and the trained layer as px itself, so that a pre-trained network is
  unchanged at first; there the kernels start sqrt(P * out) times smaller than a plain convolution's
  (``start=official``).
- With one setting for the whole batch one plain convolution is run.

Alone, on any model: `make_tunable`, `set_knobs` and `bake` in `filtrun.methods.restoration.tunable_layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.errors import UserError, unknown
from filtrun.losses import LOSSES
from filtrun.method import Method
from filtrun.methods.restoration.tunable_layers import Knobs, TunableConv2d, bake, knobs_of, make_tunable, set_knobs
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run

__all__ = ["TunableConv", "bake", "knobs_of", "make_tunable", "objective", "sample_knobs", "set_knobs"]

PER_IMAGE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l1": lambda out, target, x: (out - target).abs().flatten(1).mean(1),
    "l2": lambda out, target, x: (out - target).square().flatten(1).mean(1),
    "input_l1": lambda out, target, x: (out - x).abs().flatten(1).mean(1),
    "input_l2": lambda out, target, x: (out - x).square().flatten(1).mean(1),
}
"""Objectives against the target, or against the network's own input ("leave it as it is")."""


def objective(name: str, output: Tensor, target: Tensor, x: Tensor) -> Tensor:
    """One objective for each image: (N,) from output and target (N, C, H, W) and the network's input.

    `name` is l1, l2, input_l1, input_l2 or any loss of `filtrun.losses`. Raises UserError when the input has another
    shape than the output and the objective compares them.
    """
    if name in PER_IMAGE:
        if name.startswith("input") and x.shape != output.shape:
            raise UserError(
                f"method.tunable_conv.objectives: {name} compares output {tuple(output.shape)} and input "
                f"{tuple(x.shape)}, which differ in shape here"
            )
        return PER_IMAGE[name](output, target, x)
    return torch.stack([LOSSES[name](output[i : i + 1], target[i : i + 1]) for i in range(len(output))])


def sample_knobs(count: int, knobs: int, sampling: str, corners: float, device: torch.device) -> Tensor:
    """Random knobs (count, knobs) in [0, 1] from torch's global generator.

    Args:
        sampling: ``simplex``: uniform over the vectors that sum to 1; ``cube``: each knob uniform on its own.
        corners: probability that an image gets one knob at 1 and the others at 0 instead.
    """
    draws = torch.rand(count, knobs, device=device)
    if sampling == "simplex":
        draws = -torch.log(draws.clamp(min=1e-12))  # exponential variables, normalised, are uniform on the simplex
        draws = draws / draws.sum(1, keepdim=True)
    single = torch.eye(knobs, device=device)[torch.randint(knobs, (count,), device=device)]
    at_corner = torch.rand(count, 1, device=device) < corners
    return torch.where(at_corner, single, draws)


@dataclass
class TunableConv(Method):
    """Turn every convolution of a restoration network into a tunable one and train it for all mixtures of objectives.

    The task's own loss is replaced. While training, every image of a batch has its own knobs; in evaluation all have
    `fixed`, or equal shares. The default pair is a strength dial: ``denoise`` pulls to the clean image, ``keep`` to the
    input.
    """

    knobs: list[str] = opt(["denoise", "keep"], "names of the knobs, one for each objective")
    objectives: list[str] = opt(["l2", "input_l2"], "what each knob asks for: l1, l2, input_l1, input_l2 or a loss of "
                                "task.losses", source="paper: e.g. L1 and perceptual")  # fmt: skip
    scales: list[float] = opt([], "factor of each objective in the loss; empty: 1")
    mode: str = opt("mlp", "weights of the kernels: the knobs themselves, or a trained linear layer of them",
                    choices=("linear", "mlp"), source="tunable_conv.py")  # fmt: skip
    expand: int = opt(1, "kernels for each knob", low=1, source="tunable_conv.py")
    start: str = opt("copy", "kernels at the start: the network's own, each drawn anew, or as the released layer",
                     choices=("copy", "own", "official"))  # fmt: skip
    sampling: str = opt("simplex", "knobs in training: sum to 1, or each in [0, 1]", choices=("simplex", "cube"))
    corners: float = opt(0.25, "share of training images with one knob at 1 and the others at 0", low=0, high=1)
    fixed: dict[str, float] | None = opt(
        None, "evaluate at these knobs and leave a plain network with their kernels; null: keep the dial"
    )

    trains: ClassVar = "all"
    tasks: ClassVar = ("denoise", "derain", "superres", "inpaint", "tonemap")
    paper: ClassVar[str] = "Tunable Convolutions, arXiv 2304.00898 (CVPR 2023)"

    def __post_init__(self) -> None:
        check_options(self, "method.tunable_conv")
        known = [*PER_IMAGE, *(name for name in LOSSES if name not in PER_IMAGE)]
        for name in self.objectives:
            if name not in known:
                raise unknown("objective of method.tunable_conv.objectives", name, known)
        count = len(self.knobs)
        if len(self.objectives) != count or len(self.scales) not in (0, count):
            raise UserError(
                f"method.tunable_conv needs one objective for each of its {count} knobs (and one scale, or none), not "
                f"{len(self.objectives)} (and {len(self.scales)})"
            )
        if not all(factor >= 0 for factor in self.scales):
            raise UserError(f"method.tunable_conv.scales={self.scales} must not be negative")
        self.board = Knobs(self.knobs, self.sampling == "simplex")
        self.board.set(self.fixed or {})
        self._hook: Any = None
        if self.start != "copy":  # on the instance: the class says what the default does
            self.identity_at_start = False  # type: ignore[misc]

    def attach(self, model: nn.Module) -> TunableConv:
        """Make `model` tunable and draw new knobs at each of its forwards in training mode; returns self."""
        simplex = self.sampling == "simplex"
        self.board = make_tunable(
            model, self.knobs, mode=self.mode, expand=self.expand, start=self.start, simplex=simplex
        )
        self.board.set(self.fixed or {})
        self._hook = model.register_forward_pre_hook(self._draw)
        return self

    def _draw(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, board = inputs[0], knobs_of(model)  # not self.board: the model may be a copy
        board.drawn = None
        if model.training:
            board.drawn = sample_knobs(len(x), len(self.knobs), self.sampling, self.corners, x.device)

    def mixed_loss(self, output: Tensor, target: Tensor, x: Tensor, px: Tensor) -> Tensor:
        """``mean_b sum_p px[b, p] L_p(output_b)``, a scalar; px (N, P)."""
        factors = self.scales or [1.0] * len(self.objectives)
        columns = [f * objective(name, output, target, x) for f, name in zip(factors, self.objectives, strict=True)]
        return (px * torch.stack(columns, dim=1)).sum(1).mean()

    def detach(self) -> None:
        """Stop drawing knobs; with `fixed`, bake its kernels into the plain convolutions of the model."""
        self._hook.remove()
        self.board.drawn = None

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        self.attach(run.model)
        layers = [m for m in run.model.modules() if isinstance(m, TunableConv2d)]
        run.claim(self, [p for layer in layers for p in layer.plain[0].parameters()])  # what `bake` writes to

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        from filtrun.tasks.image_to_image import result

        made, output = run.shared["pair"], result(run.shared["output"]).float()
        assert self.board.drawn is not None
        return self.mixed_loss(output, made.y, made.x, self.board.drawn)

    def finish(self, run: Run) -> None:
        self.detach()
        if self.fixed is not None:
            bake(run.model)

    def report(self, run: Run) -> dict[str, float | int | str]:
        at = ", ".join(f"{n}={v:g}" for n, v in zip(self.knobs, self.board.setting.tolist(), strict=True))
        return {"knobs": at, "kernels": len(self.knobs) * self.expand}
