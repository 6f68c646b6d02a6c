"""LoRA: Low-Rank Adaptation of Large Language Models (ICLR 2022, arXiv 2106.09685; official code microsoft/LoRA).

A frozen weight W gets a trained product of low rank beside it, h = W x + alpha/r B A x (eq. 3), with A random and B
zero, so that training starts from the base; at the end the product is added to W and nothing is left.

Linear layers, plain convolutions and embeddings are wrapped by the peft library. What it cannot merge or does not know
is done here by a parametrised weight, W + alpha/r B A with A of (r, columns) and the weight read as a matrix of one row
per first index: grouped, dilated and transposed convolutions, other padding than zeros, ``nn.MultiheadAttention`` (its
joint projection counts as one matrix) and sub-classes that treat their weight before use. There dropout acts on the
columns of A, so on input features of the whole batch at once.

Alone, on any model:

>>> lora = LoRA(rank=4, targets="attention").attach(model)  # doctest: +SKIP
>>> ...                                                     # train the parameters that require a gradient
>>> lora.merge()                                            # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from filtrun.errors import UserError
from filtrun.method import Method, train_head
from filtrun.options import check_options, opt
from filtrun.sparse_entries import keep_order, owners_of
from filtrun.surgery import CONVS, base_tensor, check_targets, pick, weight_names

if TYPE_CHECKING:
    from filtrun.context import Run

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear, nn.MultiheadAttention),
    "conv": CONVS,
    "embedding": (nn.Embedding,),
}
GROUPS = ("all", *KINDS, "attention")


def low_rank_delta(a: Tensor, b: Tensor, scale: float, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """scale * B A in the shape of a weight: `a` (r, columns), `b` (rows, r), rows * columns = product of `shape`."""
    return (scale * (b @ a)).reshape(shape)


class LowRankWeight(nn.Module):
    """Parametrisation of one weight: adds the low-rank product (A as torch initialises linear layers, B zero)."""

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        rows = weight.shape[0]
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight.numel() // rows))
        self.lora_B = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as peft starts its A

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum is rounded once, by the layer that uses it
            a = self.lora_A
            if self.dropout and self.training:
                a = a * F.dropout(torch.ones_like(a[:1]), self.dropout)
            return weight + low_rank_delta(a, self.lora_B, self.scale, weight.shape)


def covered_by_peft(module: nn.Module) -> bool:
    """Whether peft both adapts and merges this layer: it ignores dilation and padding modes and cannot merge groups."""
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        conv: Any = module
        return conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    return type(module) in (nn.Linear, nn.Embedding)


def wrap_with_peft(module: nn.Module, rank: int, alpha: float, dropout: float) -> nn.Module:
    """peft's LoRA layer around `module`, whose tensors keep their `requires_grad`.

    Raises UserError when peft is not installed.
    """
    from filtrun.compat import torchvision

    torchvision()  # transformers, which peft imports, may import it
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("method=lora needs the peft library: pip install 'filtrun[peft]'") from error
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    holder = nn.Module()
    holder.layer = module
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["layer"])  # type: ignore[arg-type]
    inject_adapter_in_model(config, holder)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    wrapped = holder.layer
    assert isinstance(wrapped, nn.Module)
    wrapped._forward_hooks.update(module._forward_hooks)  # what others do to this layer's output comes after the sum
    module._forward_hooks.clear()
    return wrapped.train(module.training)


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer LoRA can adapt; the output layer inside ``nn.MultiheadAttention`` belongs to that."""
    inner = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    kinds = tuple(kind for group in KINDS.values() for kind in group)
    found = {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m not in inner}
    # an embedding with max_norm rewrites its own weight in the forward pass: nothing can be merged into it
    return {name: m for name, m in found.items() if getattr(m, "max_norm", None) is None}


def choose(model: nn.Module, targets: str | Collection[str]) -> dict[str, nn.Module]:
    """The layers of `model` that `targets` names (see `filtrun.surgery.pick`).

    Raises:
        UserError: one of them matches nothing, or is no regular expression.
    """
    return pick(model, adaptable(model), targets, KINDS, "method.lora.targets")


@dataclass
class LoRA(Method):
    """Train a low-rank product beside each chosen weight, then add it to the weight (Hu et al., arXiv 2106.09685)."""

    rank: int = opt(4, "rank r of the trained product", low=1, source="paper, Table 6: 4 of 1 to 64")
    alpha: float | None = opt(None, "the product is scaled by alpha / rank; null: alpha = rank", low=0,
                              source="paper, section 4.1: the first rank tried")  # fmt: skip
    dropout: float = opt(0.0, "dropout on the input of the trained product", low=0, high=0.99,
                         source="loralib: 0")  # fmt: skip
    targets: Any = opt("all", "layers to adapt: all, linear, conv, embedding, attention, a name, the end of one, "
                       "a regular expression, or a list of these", source="paper: attention only")  # fmt: skip
    head: bool = opt(True, "train the classification head itself instead of adapting it, as PEFT protocols do",
                     source="VPT code")  # fmt: skip

    trains: ClassVar = "part"
    paper: ClassVar[str] = "LoRA, arXiv 2106.09685 (ICLR 2022)"

    def __post_init__(self) -> None:
        check_targets(self.targets, KINDS, "method.lora.targets")
        check_options(self, "method.lora")
        self.wrapped: dict[str, tuple[nn.Module, list[tuple[nn.Module, str]]]] = {}
        self.parametrised: list[tuple[str, nn.Module, str]] = []
        self.orders: list[tuple[nn.Module, list[str]]] = []

    @property
    def scale(self) -> float:
        """Factor alpha / r of the product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def layers(self, model: nn.Module, skip: Collection[nn.Parameter] = ()) -> dict[str, nn.Module]:
        """The layers to adapt, without those that hold a tensor of `skip` or share their weight with another layer.

        Raises UserError when nothing is left, or a layer asked for by name shares its weight.
        """
        chosen = choose(model, self.targets)
        left, owners = {id(p) for p in skip}, owners_of(model)
        groups = isinstance(self.targets, str) and self.targets in GROUPS
        result = {}
        for name, module in chosen.items():
            own = [id(p) for p in module.parameters()]
            if any(i in left for i in own):
                continue
            tied = len(owners.get(id(module._parameters.get("weight")), ())) > 1
            if tied and not groups:
                raise UserError(f"method.lora.targets: {name} shares its weight with a layer that would change too")
            if not tied:
                result[name] = module
        if not result:
            raise UserError(
                f"method.lora.targets={self.targets!r} leaves no layer to adapt: {', '.join(list(chosen)[:6])} "
                "is the trained head, or shares its weight with another layer"
            )
        return result

    def attach(self, model: nn.Module, skip: Collection[nn.Parameter] = ()) -> LoRA:
        """Freeze `model` and put trainable adapters into it; returns self. `skip`: tensors of layers to leave alone."""
        model.requires_grad_(False)
        self._insert(model, self.layers(model, skip))
        return self

    def _insert(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        alpha = self.rank if self.alpha is None else self.alpha
        for name, module in layers.items():
            places = [(m, a) for m in model.modules() for a, child in m._modules.items() if child is module]
            if covered_by_peft(module) and places:
                wrapped = wrap_with_peft(module, self.rank, alpha, self.dropout)
                for parent, attribute in places:  # several where one layer is used twice
                    setattr(parent, attribute, wrapped)
                self.wrapped[name] = wrapped, places
                continue
            for full in weight_names(module):
                path, _, tensor = full.rpartition(".")
                owner = module.get_submodule(path)
                self.orders.append((owner, list(owner._parameters)))
                made = LowRankWeight(getattr(owner, tensor), self.rank, self.scale, self.dropout).train(module.training)
                parametrize.register_parametrization(owner, tensor, made)
                self.parametrised.append((f"{name}.{full}".lstrip("."), owner, tensor))

    @torch.no_grad()
    def merge(self) -> None:
        """Add every product to its weight and put the plain layers back; the adapters are gone."""
        for wrapped, places in self.wrapped.values():
            layer: Any = wrapped
            layer.merge()
            plain = layer.get_base_layer().train(layer.training)
            plain._forward_hooks.update(layer._forward_hooks)
            for parent, attribute in places:
                setattr(parent, attribute, plain)
        for _, owner, tensor in self.parametrised:
            made: Any = owner.parametrizations
            made[tensor].eval()
            parametrize.remove_parametrizations(owner, tensor, leave_parametrized=True)
        for owner, order in self.orders:
            keep_order(owner, order)
        self.wrapped, self.parametrised, self.orders = {}, [], []

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """(weight's name, what would be added to it) for every adapted weight."""
        for name, (wrapped, _) in self.wrapped.items():
            layer: Any = wrapped
            yield f"{name}.weight", layer.get_delta_weight("default").detach()
        for name, owner, tensor in self.parametrised:
            held: Any = owner.parametrizations
            made, shape = held[tensor][0], held[tensor].original.shape
            yield name, low_rank_delta(made.lora_A, made.lora_B, made.scale, shape).detach()

    def adapter_params(self) -> int:
        """Trained scalars, without a head."""
        modules = [w for w, _ in self.wrapped.values()]
        modules += [o.parametrizations[t] for _, o, t in self.parametrised]  # type: ignore[index, union-attr, misc]
        return sum(p.numel() for m in modules for name, p in m.named_parameters() if "lora_" in name)

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        head = run.task.head(run.model) if self.head else []
        for name, module in choose(run.model, self.targets).items():
            for full in weight_names(module):
                path, _, tensor = full.rpartition(".")
                held = module.get_submodule(path)._parameters.get(tensor)
                if held is None:  # another method has taken it out of the module
                    held = run.weights.get(f"{name}.{full}".lstrip("."))
                if held is not None and not any(held is p for p in head):
                    run.claim(self, [held], "merge")
        base = {id(p) for p in run.weights.values()}
        found = self.layers(run.model, head)
        first = {name: base_tensor(m, weight_names(m)[0]) for name, m in found.items()}
        # layers that another method has put in are not the base's
        own = {name: m for name, m in found.items() if (w := first[name]) is None or id(w) in base}
        self._insert(run.model, own)
        if self.head:
            train_head(run)

    def finish(self, run: Run) -> None:
        self.merge()

    def verify(self, run: Run) -> None:
        """Raise ValueError unless every product, as a matrix, has at most the stated rank."""
        for name, delta in self.deltas():
            # peft's product for a k x k convolution runs over (channels x k x k), as here
            rank = int(torch.linalg.matrix_rank(delta.flatten(1).double(), rtol=1e-5))
            if rank > self.rank:
                raise ValueError(f"the product of {name} has rank {rank}, not {self.rank}")

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {
            "rank": self.rank,
            "alpha": self.rank * self.scale,
            "adapted_weights": len(self.wrapped) + len(self.parametrised),
            "adapter_params": self.adapter_params(),
        }
