"""Where adapters sit: layers chosen by kind, name or pattern; parts put behind or into them, and taken off again.

A layer is found by the base tensor it holds, so that its name is the one it had before any other method wrapped it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from filtrun.errors import UserError, closest
from filtrun.sparse_entries import keep_order

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.method import Method

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm)
Kinds = Mapping[str, tuple[type[nn.Module], ...]]


# -- which layers ------------------------------------------------------------------------------------------------------
def pick(
    model: nn.Module, layers: Mapping[str, nn.Module], targets: str | Collection[str], kinds: Kinds, where: str
) -> dict[str, nn.Module]:
    """Those of `layers` (name -> module) that `targets` names.

    Args:
        targets: a group (all, a key of `kinds`, attention), a layer's name or the end of one, a regular expression for
            the whole name, or several of these.
        where: the option's full name, for messages.

    Raises:
        UserError: one of them matches nothing, or is no regular expression.
    """
    holders = [name for name, m in model.named_modules() if "attention" in type(m).__name__.lower()]
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        if target == "all":
            found = set(layers)
        elif target == "attention":
            found = {n for n in layers for h in holders if n == h or n.startswith(f"{h}." if h else "")}
        elif target in kinds:
            found = {name for name, m in layers.items() if isinstance(m, kinds[target])}
        else:
            try:
                pattern = re.compile(target)
            except re.error as error:
                raise UserError(f"{where}={target!r} is no regular expression: {error}") from error
            found = {n for n in layers if pattern.fullmatch(n) or n == target or n.endswith(f".{target}")}
        if not found:
            shown = ", ".join(list(layers)[:12]) + (f", ... ({len(layers)} in all)" if len(layers) > 12 else "")
            groups = ("all", *kinds, "attention")
            raise UserError(
                f"{where}={target!r} matches no layer of {type(model).__name__}{closest(target, [*layers, *groups])}\n"
                f"groups: {', '.join(groups)}; layers: {shown or '(none)'}"
            )
        chosen |= found
    return {name: module for name, module in layers.items() if name in chosen}


def check_targets(targets: Any, kinds: Kinds, where: str) -> None:
    """Raise UserError unless `targets` is a text or a list of texts."""
    texts = [targets] if isinstance(targets, str) else targets
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) and t for t in texts):
        raise UserError(f"{where}={targets!r} must be a name, a group (all, {', '.join(kinds)}, attention) or a list")


def layers_of(
    model: nn.Module, kinds: Kinds, weights: Mapping[str, nn.Parameter] | None = None
) -> dict[str, nn.Module]:
    """Base name -> layer of one of the kinds that holds a base tensor as its weight, each tensor by one layer only.

    The output layer inside ``nn.MultiheadAttention`` belongs to that.

    Args:
        weights: the base tensors by name (`Run.weights`); None: those of the model as it is.

    Raises:
        UserError: another method holds the weight of such a layer outside of it.
    """
    names = {id(p): name for name, p in (dict(model.named_parameters()) if weights is None else weights).items()}
    inner = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    wanted = tuple(kind for group in kinds.values() for kind in group)
    found: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, wanted) and module not in inner:
            first = weight_names(module)[0]
            if first not in module._parameters and not parametrize.is_parametrized(module, first):
                raise UserError(
                    f"another method of this run has taken the weight out of a {type(module).__name__} layer; the two "
                    "do not go together: use one of them"
                )
            name = names.get(id(base_tensor(module, first)))
            if name is not None:
                found.setdefault(name.rpartition(".")[0], []).append(module)
    return {name: holders[0] for name, holders in found.items() if len(holders) == 1}  # tied weights are left alone


def base_tensor(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter `name` of a layer; under torch's parametrisations the original one; None when it has none."""
    if parametrize.is_parametrized(module, name):
        original = getattr(module.parametrizations[name], "original", None)  # type: ignore[index]
        return original if isinstance(original, nn.Parameter) else None
    return module._parameters.get(name)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a layer, without what torch's parametrisations make of it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def behaves(module: nn.Module, kinds: Collection[type[nn.Module]]) -> bool:
    """Whether a layer is exactly of one of torch's own classes, so that its forward pass is known."""
    return plain_type(module) in kinds


def weight_names(layer: nn.Module) -> list[str]:
    """Dotted names, inside a layer, of the matrices it multiplies with."""
    if not isinstance(layer, nn.MultiheadAttention):
        return ["weight"]
    separate = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]  # where keys or values have a width of their own
    joint = layer._qkv_same_embed_dim
    return [*(["in_proj_weight"] if joint else separate), "out_proj.weight"]


def choose(
    model: nn.Module, targets: str | Collection[str], kinds: Kinds, where: str, skip: Collection[nn.Parameter] = (),
    weights: Mapping[str, nn.Parameter] | None = None,
) -> dict[str, nn.Module]:  # fmt: skip
    """Base name -> layer that `targets` names (see `pick`), without those that hold a tensor of `skip`.

    Raises:
        UserError: nothing is left, or see `pick` and `layers_of`.
    """
    left = {id(p) for p in skip}
    found = pick(model, layers_of(model, kinds, weights), targets, kinds, where)
    found = {n: m for n, m in found.items() if not any(id(p) in left for p in m.parameters())}
    if not found:
        raise UserError(f"{where}={targets!r} leaves no layer to adapt beside the trained head")
    return found


def matrices(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(full name, module that holds it, its name there, base tensor) of every matrix the layers multiply with."""
    for name, layer in layers.items():
        for full in weight_names(layer):
            path, _, tensor = full.rpartition(".")
            owner = layer.get_submodule(path)
            yield f"{name}.{full}".lstrip("."), owner, tensor, cast(nn.Parameter, base_tensor(owner, tensor))


# -- parts -------------------------------------------------------------------------------------------------------------
def put_behind(layer: nn.Module, name: str, part: Any) -> Any:
    """Make `part` a child of `layer` and let ``part.behind(layer, inputs, output)`` change its output.

    Returns the hook that does it. A later part acts before an earlier one, so that each can be merged into the weights
    in the reverse order.
    """
    if name in layer._modules:
        raise UserError(f"this {type(layer).__name__} has a part called {name!r} already: attach the method only once")
    layer.add_module(name, part)
    return layer.register_forward_hook(part.behind, prepend=True)


def take_off(layer: nn.Module, name: str, hook: Any) -> None:
    """Undo `put_behind`."""
    hook.remove()
    del layer._modules[name]


def put_into(owner: nn.Module, tensor: str, part: nn.Module) -> list[str]:
    """Let the layer see ``part(tensor)`` in place of its tensor; returns the order of its parameters before."""
    order = list(owner._parameters)
    parametrize.register_parametrization(owner, tensor, part)
    return order


def take_out(owner: nn.Module, tensor: str, part: nn.Module, order: list[str]) -> nn.Parameter | None:
    """Undo `put_into` and return the base tensor; None where another method has written the result into it already."""
    if not parametrize.is_parametrized(owner, tensor):
        return None
    parts: Any = owner.parametrizations[tensor]  # type: ignore[index]
    place = next((i for i, p in enumerate(parts) if p is part), None)
    if place is None:
        return None
    base = base_tensor(owner, tensor)
    if len(parts) > 1:
        del parts[place]
    else:
        parametrize.remove_parametrizations(owner, tensor, leave_parametrized=False)
        keep_order(owner, order)
    return base


@torch.no_grad()
def write(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter new values in its own type; `value` may be wider, so that a sum is rounded once."""
    parameter.copy_(value)


def check_trains(run: Run, method: Method, parameters: Collection[nn.Parameter]) -> None:
    """Raise UserError when another method of the run has frozen the trained tensors or taken them away."""
    present = {id(p) for p in run.model.parameters()}
    if any(not p.requires_grad or id(p) not in present for p in parameters):
        others = ", ".join(f"method={m.slug}" for m in run.methods if m is not method)
        raise UserError(f"method={method.slug} and {others} do not go together: the trained tensors of one are frozen")
