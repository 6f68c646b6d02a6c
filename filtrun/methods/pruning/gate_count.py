"""Counts, sample by sample, what the gates of a model leave to compute."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from filtrun.methods.pruning.gate_places import Flow, Unit
from filtrun.methods.pruning.gates import Gate, executable_macs, official_macs

if TYPE_CHECKING:
    from filtrun.context import Run


class GateCounter:
    """Sums over samples of the multiply-adds left in gated layers, by both rules, while `active`.

    No biases, no predictors, no classifier. A hook behind the whole model takes what its gates decided.

    Attributes:
        images: samples counted.
        dense: multiply-adds of the gated layers for one sample with all gates open.
        official, executable: int64 (N,) of the last forward counted.
    """

    NAMES = ("images", "official", "executable", "kept", "right")

    def __init__(self, model: nn.Module, units: Sequence[Unit], flow: Flow, gates: Sequence[Gate]) -> None:
        self.gates, self.flow = list(gates), flow
        self.inputs = [unit.input_node for unit in units]
        self.order = flow.needed(self.inputs)
        self.layers = [(u.conv.groups, u.conv.kernel_size[0] * u.conv.kernel_size[1]) for u in units]
        self.channels = [(u.conv.in_channels, u.conv.out_channels) for u in units]
        self.dense = sum(
            out * p * (into // g) * k
            for (into, out), (g, k), p in zip(self.channels, self.layers, (u.positions for u in units), strict=True)
        )
        self.active = False
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.int64)
        self.official = self.executable = torch.zeros(0, dtype=torch.int64)
        model.register_forward_hook(self.count)

    @property
    def images(self) -> int:
        return int(self.sums[0])

    def start(self) -> None:
        """Count from zero."""
        self.active, self.sums = True, torch.zeros_like(self.sums)

    def stop(self) -> None:
        """Leave the sums as they are."""
        self.active = False

    def copy(self) -> GateCounter:
        """One with sums of its own."""
        other = copy.copy(self)
        other.sums = self.sums.clone()
        return other

    def reduce(self, run: Run) -> None:
        """Add up the sums of all processes."""
        self.sums = run.reduce(self.sums.to(run.device), "sum")

    @torch.no_grad()
    def count(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model."""
        if not self.active or any(gate.keep is None for gate in self.gates):
            return
        keeps = [gate.keep.flatten(1) > 0 for gate in self.gates if gate.keep is not None]
        self.official, self.executable = self.macs(keeps, [gate.positions for gate in self.gates])
        right = [(k == (g.target.flatten(1) > 0)).sum() for k, g in zip(keeps, self.gates, strict=True)
                 if g.target is not None]  # fmt: skip
        sums = torch.stack([
            torch.full_like(self.official.sum(), len(keeps[0])), self.official.sum(), self.executable.sum(),
            torch.stack([k.sum() for k in keeps]).sum(), torch.stack(right).sum(),
        ])  # fmt: skip
        self.sums = self.sums.to(sums.device) + sums

    def macs(self, keeps: Sequence[Tensor], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(official, executable) multiply-adds of each sample, int64 (N,), for masks `keeps`, each (N, C) bool."""
        alive = self.flow.alive(keeps, self.order)
        previous = torch.full((len(keeps[0]),), self.channels[0][0], device=keeps[0].device)
        official, executable = torch.zeros_like(previous), torch.zeros_like(previous)
        for keep, node, (groups, kernel), size in zip(keeps, self.inputs, self.layers, positions, strict=True):
            kept = keep.sum(1)
            official = official + official_macs(kept, previous, size, groups, kernel)
            executable = executable + executable_macs(keep, alive[node], size, groups, kernel)
            previous = kept
        return official, executable

    def result(self) -> dict[str, float]:
        """Means over the samples counted: multiply-adds, shares of `dense` saved, filters kept, right guesses."""
        images, official, executable, kept, right = self.sums.tolist()
        images, filters = max(images, 1), sum(out for _, out in self.channels)
        return {
            "flops_official": official / images,
            "flops_executable": executable / images,
            "reduction_official": 1 - official / images / self.dense,
            "reduction_executable": 1 - executable / images / self.dense,
            "kept_share": kept / images / filters,
            "mask_accuracy": right / images / filters,
            "counted_images": images,
        }
