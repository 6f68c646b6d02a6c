"""Which layers share their channels, and taking channels out of all of them: torch-pruning's DependencyGraph inside.

>>> channels = Channels(model, images[:1])  # doctest: +SKIP
>>> scores = channels.importance("l1")  # one tensor for each group of coupled layers  # doctest: +SKIP
>>> removal = channels.remove(select(scores, ratio=0.5))  # doctest: +SKIP
>>> removal.apply(model)  # physically smaller and faster  # doctest: +SKIP

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (arXiv 2301.12900); the library is the optional extra
``pip install 'filtrun[pruning]'``. Only channels whose removal gives what zeroing them gives are offered:

- not those of the model's output, nor those that layer norm, group norm or attention mix;
- not those that meet a parameter-free shortcut with other channel counts (option-A ResNets: inner channels only).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from filtrun.cost import layer_macs
from filtrun.errors import Unfit, UserError, closest
from filtrun.methods.pruning.channel_groups import LAYERS, group_of, library, mixes_channels
from filtrun.methods.pruning.forward_inputs import output_of
from filtrun.methods.pruning.index_codes import codes, decode, sizes_of
from filtrun.methods.pruning.removal import Removal, tensors_of


class Channels:
    """The groups of removable channels of a model, traced once on a copy; the model itself is not touched.

    Args:
        model: any module; gradients lying in its parameters are copied along (Taylor importance needs them).
        args: positional inputs of one forward pass, small.
        kwargs: named inputs.
        ignore: names of layers whose output channels stay.

    Attributes:
        groups: what can be removed, in the order of the graph.

    Raises:
        UserError: the extra is missing or `ignore` names no layer.
        Unfit: the model cannot be traced, or no channel of it can go.
    """

    def __init__(
        self, model: nn.Module, *args: Any, kwargs: Mapping[str, Any] | None = None, ignore: Sequence[str] = ()
    ) -> None:
        tp = library()
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self.copy = copy.deepcopy(model).eval()
        for mine, theirs in zip(self.copy.parameters(), model.parameters(), strict=True):
            mine.requires_grad_(mine.is_floating_point())
            mine.grad = None if theirs.grad is None else theirs.grad.detach().clone()
        modules = dict(self.copy.named_modules())
        for name in ignore:
            if name not in modules:
                raise UserError(f"ignore={name} names no module of the model{closest(name, list(modules))}")
        kept = [m for name in ignore for m in modules[name].modules() if isinstance(m, LAYERS)]
        kept += [m for a in modules.values() if mixes_channels(a) for m in a.modules() if isinstance(m, LAYERS)]
        try:
            with torch.enable_grad(), _quiet():
                self.graph = tp.DependencyGraph().build_dependency(
                    self.copy, self.args, forward_fn=lambda m, _: m(*self.args, **self.kwargs), verbose=False
                )
                raw = list(self.graph.get_all_groups(ignored_layers=kept, root_module_types=LAYERS))
        except Exception as error:
            raise Unfit(f"this model's layers cannot be traced for pruning: {str(error).splitlines()[0]}") from error
        names = {module: name for name, module in self.copy.named_modules()}
        self.groups = [group for found in raw if (group := group_of(found, self.graph, names)) is not None]
        if not self.groups:
            raise Unfit(
                "this model has no channels that can be taken out: its layers meet layer norm, group norm, attention "
                "or the output; granularity=weight works on any model"
            )

    def importance(self, kind: str | Any) -> list[Tensor]:
        """Scores (size,) of every group, higher = keep.

        Args:
            kind: ``random`` (torch's generator), ``l1``, ``l2``, ``taylor`` (needs gradients in the model) or
                ``bn_scale``; or any importance of torch-pruning. The norms and Taylor scores are means over the coupled
                layers, divided by each group's mean so that groups can be ranked together; scales are compared as
                they are.
        """
        tp = library()
        made = {
            "random": tp.importance.RandomImportance,
            "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
            "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
            "taylor": tp.importance.GroupTaylorImportance,
            "bn_scale": lambda: tp.importance.BNScaleImportance(normalizer=None),
        }
        rule = made[kind]() if isinstance(kind, str) else kind
        scores = []
        for group in self.groups:
            found = rule(group.raw)
            if found is None:
                raise UserError(f"{group.name} has nothing that {kind} could judge; name it in ignore")
            scores.append(found.detach().float().cpu())
        return scores

    def layer_macs(self) -> dict[str, float]:
        """Layer name -> multiply-adds of one forward pass of the example inputs."""
        training = self.model.training
        with torch.no_grad():
            found = layer_macs(self.model.eval(), lambda: output_of(self.model, self.args, self.kwargs))
        self.model.train(training)
        return found

    def macs(self, drop: Sequence[Tensor], dense: Mapping[str, float]) -> float:
        """Multiply-adds left when the channels `drop` go; `dense` has those of each layer now (`layer_macs`)."""
        lost: dict[tuple[str, str], int] = {}
        sizes: dict[str, nn.Module] = {}
        for group, gone in zip(self.groups, drop, strict=True):
            for part in group.parts:
                sizes[part.layer] = part.module
                count = int(torch.isin(part.root, gone).sum())
                lost[part.layer, part.side] = lost.get((part.layer, part.side), 0) + count
        total = sum(dense.values())
        for name, module in sizes.items():
            if name in dense:
                outs, ins = self.graph.get_out_channels(module), self.graph.get_in_channels(module)
                depthwise = getattr(module, "groups", 1) > 1
                left = 1 - lost.get((name, "out"), 0) / outs
                left *= 1.0 if depthwise else 1 - lost.get((name, "in"), 0) / ins
                total -= dense[name] * (1 - left)
        return total

    @torch.no_grad()
    def remove(self, drop: Sequence[Tensor]) -> Removal:
        """What goes when the channels `drop` (int64, one tensor a group) do. Uses the traced copy up: call it once.

        Raises UserError when the model does not run without them.
        """
        before = {name: sizes_of(module) for name, module in self.copy.named_modules()}
        with torch.no_grad():
            shape = output_of(self.copy, self.args, self.kwargs).shape
        old = {name: tensor.shape for name, tensor in tensors_of(self.copy).items()}
        for tensor in tensors_of(self.copy).values():
            tensor.grad = None
            if tensor.ndim:
                tensor.data = codes(tensor.shape, tensor.device)
        with _quiet():
            for group, gone in zip(self.groups, drop, strict=True):
                if len(gone):
                    root = group.raw[0].dep
                    self.graph.get_pruning_group(root.target.module, root.handler, gone.tolist()).prune()
        removal = Removal()
        for name, tensor in tensors_of(self.copy).items():
            if tensor.shape != old[name]:
                removal.keep[name] = decode(tensor, old[name])
        for name, module in self.copy.named_modules():
            changed = {key: value for key, value in sizes_of(module).items() if value != before[name].get(key)}
            if changed:
                removal.attributes[name] = changed
        self._try(removal, shape)
        return removal

    def _try(self, removal: Removal, shape: torch.Size) -> None:
        trial = copy.deepcopy(self.model).eval()
        removal.apply(trial)
        masked = copy.deepcopy(self.model).eval()
        removal.mask(masked)
        try:
            output = output_of(trial, self.args, self.kwargs)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the model does not run without the chosen channels ({str(error).splitlines()[0]}); name layers to "
                "leave alone in ignore"
            ) from error
        if output.shape != shape:
            raise UserError(f"removing channels changes the output from {tuple(shape)} to {tuple(output.shape)}")
        removal.gap = (output - output_of(masked, self.args, self.kwargs)).abs().max().item()


def _quiet() -> Any:
    """Warnings of the tracer about what it guesses are not the user's business: the result is tried."""
    import warnings

    return warnings.catch_warnings(action="ignore")
