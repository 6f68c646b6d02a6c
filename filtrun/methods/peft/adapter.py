"""AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition (NeurIPS 2022, arXiv 2205.13535).

A bottleneck next to the MLP of every transformer block, x + mlp(norm(x)) + s up(relu(down(x))), is all that trains
beside the head (official code ShoufaChen/AdaptFormer: s = 0.1, no layer norm, dropout 0.1, up zero at the start).

Convolutional networks have no such MLP: there a bottleneck of two 1x1 convolutions stands next to every spatial
convolution, which is the parallel residual adapter of Rebuffi et al. (CVPR 2018, arXiv 1803.10082) with a ReLU between
two thin layers. Nothing merges (a ReLU is in the way), so the adapters stay in the model.

Alone, on any model:

>>> adapter = Adapter(dim=64).attach(model)  # doctest: +SKIP
>>> ...                                      # train the parameters that require a gradient
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from filtrun.errors import UserError
from filtrun.method import Method, train_head
from filtrun.methods.peft.branches import Bottleneck, beside_mlp, stay_behind, zero_start
from filtrun.methods.peft.places import spatial_convs, transformer_blocks
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run


def find_places(model: nn.Module, place: str, slug: str) -> tuple[dict[str, nn.Module], dict[str, nn.Conv2d]]:
    """(transformer blocks, spatial convolutions) that get adapters: one of the two, by `place` (auto, mlp, conv).

    Raises UserError when the model has none of what is asked for.
    """
    blocks = transformer_blocks(model) if place in ("auto", "mlp") else {}
    convs = spatial_convs(model) if place == "conv" or (place == "auto" and not blocks) else {}
    if not blocks and not convs:
        wanted = {"mlp": "transformer block", "conv": "spatial convolution"}.get(place, "place for adapters")
        raise UserError(
            f"method.{slug}.place={place}: {type(model).__name__} has no {wanted}; adapters go next to the MLP of "
            "transformer blocks (norm2, mlp) or next to convolutions that keep the size of the image"
        )
    return blocks, convs


def conv_pair(conv: nn.Conv2d, dim: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """1x1 convolutions to `dim` channels (with the stride of `conv`) and on to as many as `conv` gives."""
    return nn.Conv2d(conv.in_channels, dim, 1, stride=conv.stride), nn.Conv2d(dim, conv.out_channels, 1)  # type: ignore[arg-type]


@dataclass
class Adapter(Method):
    """Train bottleneck adapters in parallel to the MLPs (or convolutions) of a frozen model (AdaptFormer)."""

    dim: int = opt(64, "width of the bottleneck", low=1, source="paper, Table 4; --ffn_num of the code")
    scale: float = opt(0.1, "factor s of the adapter's output", source="paper, Table 4")
    learn_scale: bool = opt(False, "train the factor, starting at 1", source="code: adapter_scalar")
    norm: str = opt("none", "layer norm of an adapter beside an MLP, at its input or output",
                    choices=("none", "in", "out"), source="code: main_image.py")  # fmt: skip
    dropout: float = opt(0.1, "dropout on the narrow features", low=0, high=0.99, source="code")
    place: str = opt("auto", "next to the MLPs of transformer blocks or to spatial convolutions; auto: MLPs if any",
                     choices=("auto", "mlp", "conv"),
                     source="paper: mlp; conv is an addition of this package")  # fmt: skip
    head: bool = opt(True, "also train the classification head, as PEFT protocols do", source="code")

    trains: ClassVar = "part"
    paper: ClassVar[str] = "AdaptFormer, arXiv 2205.13535 (NeurIPS 2022)"

    def __post_init__(self) -> None:
        check_options(self, "method.adapter")
        self.branches: list[Bottleneck] = []

    def attach(self, model: nn.Module) -> Adapter:
        """Freeze `model` and put trainable adapters into it; returns self.

        Raises UserError when the model has no place for them, or `norm` is asked for beside a convolution.
        """
        model.requires_grad_(False)
        self._find(model)
        self._insert()
        return self

    def _find(self, model: nn.Module) -> None:
        self._places = find_places(model, self.place, "adapter")
        if self._places[1] and self.norm != "none":
            raise UserError(f"method.adapter.norm={self.norm} is for adapters beside an MLP; use norm=none here")

    def _insert(self) -> None:
        blocks, convs = self._places
        self.branches = [beside_mlp(block, self._beside_mlp) for block in blocks.values()]
        self.branches += [stay_behind(conv, self._branch(*conv_pair(conv, self.dim))) for conv in convs.values()]

    def _beside_mlp(self, width: int) -> Bottleneck:
        return self._branch(nn.Linear(width, self.dim), nn.Linear(self.dim, width), width)

    def _branch(self, down: nn.Module, up: nn.Module, width: int = 0) -> Bottleneck:
        zero_start(down, up)
        return Bottleneck(
            down, up, scale=self.scale, learn_scale=self.learn_scale, norm=self.norm, dropout=self.dropout, width=width
        )

    # -- hooks -----------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        self._find(run.model)  # before other methods put convolutions of their own into it

    def edit_model(self, run: Run) -> None:
        self._insert()
        if self.head:
            train_head(run)

    def report(self, run: Run) -> dict[str, float | int | str]:
        size = sum(p.numel() for branch in self.branches for p in branch.parameters())
        return {"bottleneck": self.dim, "adapters": len(self.branches), "adapter_params": size}
