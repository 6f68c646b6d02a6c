"""VPT: Visual Prompt Tuning (ECCV 2022, arXiv 2203.12119; official code KMnP/vpt, ``vit_prompt/vit.py``).

p learned tokens stand behind the class token at the input of the first block (shallow), and in every further block the
tokens that came out of the one before are replaced by learned ones (deep). Everything else stays frozen but the head.

Two things follow the code and not the text: prompts start uniform in +-sqrt(6 / (values of a patch + C)), and dropout
and stochastic depth of the frozen backbone are off while the prompts train. Prompts are taken out again behind the
last block, so that models which average the patches do so without them (the code's ``img_pool``; models that read the
class token are not concerned).

Alone, on any vision transformer with a sequence of blocks:

>>> vpt = VPT(tokens=10).attach(model)  # doctest: +SKIP
>>> ...                                 # train the parameters that require a gradient
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.errors import UserError
from filtrun.method import Method, train_head
from filtrun.methods.peft.places import image_layers, mlp_width, transformer_blocks
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run


def with_prompts(x: Tensor, prompts: Tensor, prefix: int, drop: int = 0) -> Tensor:
    """Put prompts behind the first `prefix` tokens, in place of the `drop` ones that stand there.

    Args:
        x: tokens (N, prefix + drop + T, C).
        prompts: (p, C).

    Returns:
        (N, prefix + p + T, C).
    """
    return torch.cat([x[:, :prefix], prompts.to(x.dtype).expand(len(x), -1, -1), x[:, prefix + drop :]], dim=1)


class Prompts(nn.Module):
    """The learned tokens: `tokens` (layers, p, D), D the width C of the model, or a narrower one with a projection.

    Args:
        layers: 1 for shallow prompts, the number of blocks for deep ones.
        count, width: p and C.
        project: D, or None for D = C.
        patch: values of a patch (channels * height * width), for the size of the start.
    """

    def __init__(self, layers: int, count: int, width: int, project: int | None, patch: int, dropout: float) -> None:
        super().__init__()
        inner = width if project is None else project
        bound = math.sqrt(6 / (patch + inner))
        self.tokens = nn.Parameter(torch.empty(layers, count, inner).uniform_(-bound, bound))
        self.projection = None if project is None else nn.Linear(project, width)
        if self.projection is not None:
            nn.init.kaiming_normal_(self.projection.weight, a=0, mode="fan_out")
        self.dropout = dropout

    def of(self, layer: int) -> Tensor:
        """The prompts (p, C) of one layer.

        No call of a module: torch's counter of operations fails on a view of a parameter that goes into or out of one.
        """
        prompts = self.tokens[layer]
        if self.projection is not None:
            prompts = F.linear(prompts, self.projection.weight, self.projection.bias)
        return F.dropout(prompts, self.dropout, self.training)


def _enter(prompts: Prompts, layer: int, prefix: int, drop: int, block: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return (with_prompts(inputs[0], prompts.of(layer), prefix, drop), *inputs[1:])


def _leave(prefix: int, count: int, block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.cat([output[:, :prefix], output[:, prefix + count :]], dim=1)


def prompt_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a plain vision transformer in order. Raises UserError for other models."""
    blocks = getattr(model, "blocks", None)
    fits = isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) == len(transformer_blocks(blocks))
    if not fits or not len(blocks):  # type: ignore[arg-type]
        raise UserError(
            f"method.vpt needs a vision transformer with a row of blocks (model=vit, or timm's ViTs and DeiTs), "
            f"not {type(model).__name__}"
        )
    place_bound = ("relative_position_bias_table", "rel_pos_bias", "rel_pos", "rope")
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if m is not None}
    names |= {n.rpartition(".")[2] for n, _ in model.named_parameters()}
    if bound := names & set(place_bound):
        raise UserError(f"method.vpt cannot add tokens to {type(model).__name__}: its attention knows places ({bound})")
    return list(blocks)  # type: ignore[arg-type]


@dataclass
class VPT(Method):
    """Train prompt tokens of a frozen vision transformer (Jia et al., arXiv 2203.12119)."""

    tokens: int = opt(5, "prompt tokens p in each layer", low=1, source="code: NUM_TOKENS; the paper tries 1 to 200")
    deep: bool = opt(True, "new prompts in every block (VPT-Deep) or at the input only (VPT-Shallow)",
                     source="paper, section 3.2")  # fmt: skip
    project: int | None = opt(None, "learn prompts of this width and project them to the model's", low=1,
                              source="code: PROJECT")  # fmt: skip
    dropout: float = opt(0.0, "dropout on the prompts", low=0, high=0.99, source="code: DROPOUT")
    head: bool = opt(True, "also train the classification head, as the paper does", source="paper, eq. 3")

    trains: ClassVar = "part"
    tasks: ClassVar = ("classify",)
    identity_at_start: ClassVar[bool] = False
    paper: ClassVar[str] = "VPT, arXiv 2203.12119 (ECCV 2022)"

    def __post_init__(self) -> None:
        check_options(self, "method.vpt")
        self._held: list[nn.Module] = []

    def attach(self, model: nn.Module) -> VPT:
        """Freeze `model` and put trainable prompts into it; returns self.

        Raises UserError for a model that is no plain vision transformer.
        """
        self._hold(model)
        model.requires_grad_(False)
        self._insert(model)
        return self

    def _hold(self, model: nn.Module) -> None:
        """Keep dropout and stochastic depth of the backbone off, whatever ``model.train()`` says."""
        self._held = [m for m in model.modules() if isinstance(m, nn.Dropout) or type(m).__name__ == "DropPath"]
        for module in self._held:
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc]

    def _insert(self, model: nn.Module) -> None:
        blocks = prompt_blocks(model)
        prefix = int(getattr(model, "num_prefix_tokens", 1))  # type: ignore[arg-type]
        readers: list[Any] = image_layers(model)
        patch = readers[0].weight[0].numel() if readers else 0
        layers = len(blocks) if self.deep else 1
        self.prompts = Prompts(layers, self.tokens, mlp_width(blocks[0]), self.project, patch, self.dropout)
        where = next(model.parameters())
        model.add_module("prompts", self.prompts.to(where.device).train(model.training))
        for layer, block in enumerate(blocks[:layers]):
            drop = self.tokens if layer else 0
            block.register_forward_pre_hook(partial(_enter, self.prompts, layer, prefix, drop))
        blocks[-1].register_forward_hook(partial(_leave, prefix, self.tokens))

    # -- hooks -----------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        self._hold(run.model)  # before other methods put dropout of their own into it

    def edit_model(self, run: Run) -> None:
        self._insert(run.model)
        if self.head:
            train_head(run)

    def finish(self, run: Run) -> None:
        for module in self._held:
            module.__dict__.pop("train", None)
        self._held = []

    def report(self, run: Run) -> dict[str, float | int | str]:
        size = sum(p.numel() for p in self.prompts.parameters())
        layers = len(self.prompts.tokens)
        return {"prompt_tokens": self.tokens, "prompt_layers": layers, "prompt_params": size}
