"""N:M masks with gradients that fade: "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers".

Bambhaniya et al., CPAL 2025 (arXiv 2402.04744); official code abhibambhaniya/progressive_gradient_flow_nm_sparsity. At
high sparsity the gradients that reach pruned weights are mostly noise. Either what is seen of pruned weights decays
from 1 to 0 (MdGf), or the pattern tightens in steps (SdGf). Masks are taken anew in every forward pass, so a weight can
come back; the optimizer's weight decay keeps acting on pruned weights.

Where this differs from the official code, on purpose: t counts updates since the dense phase ended (there a factor of
100 makes it count from the start), fine-tuning starts on time, and a bias stays in a sparse layer.

Alone, on any model, in a few lines:

>>> method = NMProgressive(pattern="2:4", location=["linear"]).attach(model)  # doctest: +SKIP
>>> for step in range(total):  # doctest: +SKIP
...     method.place(step, total); loss(model).backward(); optimizer.step()
>>> method.merge()  # doctest: +SKIP
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.cost import layer_macs, sparse_macs
from filtrun.errors import Unfit, UserError
from filtrun.methods.pruning.base import Pruning, total_steps
from filtrun.methods.pruning.nm import DENSE, NMWeight, Pattern, decay_at, frame_at, grouped_axis, patterns
from filtrun.options import opt
from filtrun.surgery import base_tensor, layers_of, pick, put_into, take_out

if TYPE_CHECKING:
    from filtrun.context import Run

KINDS: dict[str, tuple[type[nn.Module], ...]] = {"linear": (nn.Linear,), "conv": (nn.Conv2d,)}
PLACES = {
    "ff": r"(.*\.)?(mlp|ff|ffn|feed_forward)\..*|(.*\.)?(fc1|fc2)",
    "qkv": r"(.*\.)?(q|k|v|qkv|to_q|to_k|to_v|query|key|value|q_proj|k_proj|v_proj|in_proj)",
}
RECIPES = ("mdgf_exp", "mdgf_linear", "sdgf_stepwise", "sdgf_geometric", "sdgf_densify", "srste", "step")


@dataclass
class NMProgressive(Pruning):
    """Train under N:M masks from the first step or after a dense phase, and end with exactly N of every M weights."""

    pattern: str = opt("1:16", "N:M, weights kept of every M", source="paper: 2:4, 1:8, 1:16, 1:32; yaml: 1:32")
    recipe: str = opt("mdgf_exp", "how pruned weights fade; step and srste are the baselines", choices=RECIPES)
    rate: float = opt(1e-4, "c of the decay, for each update", low=0, source="vit_base_training.yaml (200,000 updates)")
    location: list[str] = opt(["ff"], "ff (both layers of an MLP), qkv, linear, conv, all, or names of layers")
    axis: str = opt("row", "groups of M inputs, or of M outputs", choices=("row", "column"))
    dense_share: float = opt(0.0, "share of the steps without masks, first", low=0, high=1)
    finetune_share: float = opt(0.1, "share of the steps with a binary mask, last", low=0, high=1)
    t0: int = opt(0, "updates that t starts at when sparsification begins", low=0)
    pull: float = opt(2e-4, "SR-STE's decay of pruned weights (recipe srste)", low=0, source="sparse_functions.py")
    structured: bool = opt(True, "false: the N / M largest of a whole tensor instead, the unstructured control")

    paper: ClassVar[str] = "Progressive Gradient Flow for Robust N:M Sparsity, CPAL 2025 (arXiv 2402.04744)"

    def __post_init__(self) -> None:
        super().__post_init__()
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise UserError(f"pattern={self.pattern!r} must read N:M with 0 < N < M, such as 2:4 or 1:16")
        if self.dense_share + self.finetune_share > 1:
            raise UserError(
                f"finetune_share={self.finetune_share} and dense_share={self.dense_share} must not sum to more than 1"
            )
        self.goal: Pattern = int(found[1]), int(found[2])
        self.frames = patterns(self.recipe, *self.goal)
        self.parts: list[tuple[str, nn.Module, NMWeight, list[str]]] = []
        self.left_dense: list[str] = []
        self.now, self.total = 0, 1
        self.noise: list[Tensor] = []
        self.work, self.fading = 0.0, True

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module, weights: dict[str, nn.Parameter] | None = None) -> NMProgressive:
        """Put the chosen layers' weights behind masks, dense for now; returns self.

        Layers whose grouped axis is no multiple of every M of the recipe stay dense (`left_dense`).

        Raises:
            UserError: a location matches no layer; Unfit: no layer has a fitting size.
        """
        layers = layers_of(model, KINDS, weights)
        for place in set(self.location) & PLACES.keys():
            if not any(re.fullmatch(PLACES[place], name) for name in layers):
                raise Unfit(f"location={place} is for transformers, and {type(model).__name__} has no such layers")
        targets = [PLACES.get(place, place) for place in self.location]
        widest = max(m for _, m in self.frames) if self.structured else 1
        for name, layer in pick(model, layers, targets, KINDS, "method.nm_progressive.location").items():
            weight = base_tensor(layer, "weight")
            assert weight is not None
            if grouped_axis(weight.shape, self.axis) % widest:
                self.left_dense.append(name)
                continue
            part = NMWeight(DENSE, self.axis, self.structured, self.pull if self.recipe == "srste" else 0.0)
            self.parts.append((f"{name}.weight", layer, part.to(weight.device), put_into(layer, "weight", part)))
        if not self.parts:
            raise Unfit(
                f"pattern {self.pattern} ({self.recipe}) needs layers with a multiple of {widest} "
                f"{'inputs' if self.axis == 'row' else 'outputs'}; of {', '.join(self.left_dense[:6])} none has"
            )
        return self

    def place(self, step: int, total: int) -> None:
        """Set pattern and decay for the update number `step` (from 0) of `total`; at `total` the mask is binary."""
        self.now, self.total = step, total
        first, last = int(self.dense_share * total), total - int(self.finetune_share * total)
        pattern, decay = DENSE, 1.0
        if step >= first:
            pattern, decay = self.goal, 0.0
            if step < last:
                frame = frame_at(step - first, last - first, len(self.frames))
                pattern, decay = self.frames[frame], decay_at(self.recipe, self.rate, self.t0 + step - first)
        self.fading = decay > 0
        for _, _, part, _ in self.parts:
            part.pattern = pattern
            part.decay.fill_(decay)

    @torch.no_grad()
    def zero(self) -> None:
        """Zero what the mask of now drops, for good."""
        for _, layer, part, _ in self.parts:
            weight = base_tensor(layer, "weight")
            if weight is not None:
                weight.masked_fill_(~part.mask(weight), 0)

    def merge(self) -> None:
        """Leave plain layers with N of every M weights; their masks are in `masks`."""
        self.place(self.total, self.total)
        self.zero()
        for name, layer, part, order in self.parts:
            mask = part.mask(weight) if (weight := base_tensor(layer, "weight")) is not None else None
            base = take_out(layer, "weight", part, order)
            if base is not None and mask is not None:
                self.masks.set(name, base, mask, self.pattern if self.structured else "weight")
        self.parts = []
        self.masks.apply()

    # -- hooks -------------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        self.attach(run.model, run.weights)
        run.claim(self, [w for _, m, _, _ in self.parts if (w := base_tensor(m, "weight")) is not None], "entries")
        self.place(0, total_steps(run))

    def after_backward(self, run: Run) -> None:
        n, m = self.parts[0][2].pattern
        self.work += 1.0 if self.fading else n / m  # what fades is still multiplied
        if n < m and run.step % 20 == 0:  # the paper's measure of noise: variance at pruned over that at kept weights
            pairs = [(base_tensor(layer, "weight"), part) for _, layer, part, _ in self.parts]
            grads = [(w.grad, part.mask(w)) for w, part in pairs if w is not None and w.grad is not None]
            if grads:
                pruned, kept = (torch.cat([g[mask == on] for g, mask in grads]).var() for on in (False, True))
                self.noise.append(pruned / kept.clamp(min=1e-30))

    def after_step(self, run: Run) -> None:
        self.place(run.step, total_steps(run))
        if run.step >= total_steps(run):
            self.zero()

    def finish(self, run: Run) -> None:
        self.merge()

    def report(self, run: Run) -> dict[str, float | int | str]:
        weights = {name: w for name, layer, _, _ in self.parts if (w := base_tensor(layer, "weight")) is not None}
        part = {name: p for name, _, p, _ in self.parts}
        alive = {name: int(part[name].mask(w).sum()) / w.numel() for name, w in weights.items()}
        total = sum(w.numel() for w in weights.values())
        with run.plainly():
            layers = layer_macs(run.model, lambda: run.task.probe(run))
        found: dict[str, float | int | str] = {
            "pattern": self.pattern,
            "layers": len(weights),
            "dense_layers": len(self.left_dense),
            "sparsity": 1 - sum(alive[name] * w.numel() for name, w in weights.items()) / total,
            "macs": sparse_macs(layers, alive),
            "training_share": self.work / max(1, self.now),  # of a dense training's work in these layers
        }
        if self.noise:
            found |= {"gradient_noise_first": self.noise[0].item(), "gradient_noise_last": self.noise[-1].item()}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "now": self.now, "total": self.total, "work": self.work}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.work = state["work"]
        self.place(state["now"], state["total"])
