"""What a run costs: parameters, memory, time, floating-point operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident set's high-water mark starts anew
    except OSError:
        pass


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since the reset: allocated by torch on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def forward_flops(probe: Callable[[], Tensor]) -> float | None:
    """Floating-point operations of one sample's forward pass: torch's counter over `probe`, by its batch size."""
    return operations(probe)["flops"]


def operations(probe: Callable[[], Tensor]) -> dict[str, float]:
    """What one sample's forward pass computes, counted over `probe` and divided by its batch size.

    ``flops`` is torch's count: two for every multiply-add of convolutions and matrix products. ``macs`` are the
    multiply-adds of convolutions and linear layers alone, as pruning papers count: no bias, no batch norm, no product
    of two activations (attention).
    """
    counts, images = _counted(probe)
    whole = counts.get("Global", {})
    return {"flops": sum(whole.values()) / images, "macs": _weighted(whole) / images}


def layer_macs(model: nn.Module, probe: Callable[[], Tensor]) -> dict[str, float]:
    """Layer name -> multiply-adds of its forward for one sample, for every convolution and linear layer of `model`."""
    counts, images = _counted(probe)
    root, found = type(model).__name__, {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            macs = _weighted(counts.get(f"{root}.{name}" if name else root, {}))
            if macs:
                found[name] = macs / images
    return found


def sparse_macs(dense: Mapping[str, float], alive: Mapping[str, float]) -> float:
    """Multiply-adds left when of the weight of each layer only a share is `alive` ({``layer.weight``: share})."""
    return sum(macs * alive.get(f"{name}.weight", 1.0) for name, macs in dense.items())


def _counted(probe: Callable[[], Tensor]) -> tuple[dict[str, dict[Any, int]], int]:
    """(operations by module and kind, samples) of one call of `probe`."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts what a GPU runs, not this
    with FlopCounterMode(display=False, custom_mapping={flash: attention}) as counter:
        output = probe()
    return counter.get_flop_counts(), max(len(output), 1)


def _weighted(counts: Mapping[Any, int]) -> float:
    """Multiply-adds of the operations that apply weights."""
    kinds = ("convolution", "_convolution", "addmm", "mm")
    return sum(n for kind, n in counts.items() if str(kind).rpartition(".")[2].strip("')>") in kinds) / 2


def latency(probe: Callable[[], Tensor], device: torch.device, budget: float = 0.1) -> float:
    """Median seconds of a call of `probe`, after one to warm up: as many of at least 3 as `budget` seconds allow."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        probe()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    left = budget - once()
    times: list[float] = []
    least = 3 if left > 0 else 1  # what takes long need not be repeated
    while len(times) < least or (left > 0 and len(times) < 50):
        times.append(once())
        left -= times[-1]
    return statistics.median(times)


def environment(device: torch.device) -> dict[str, Any]:
    """Where a run ran: versions, device, and the commit if the code is a git checkout."""
    import platform
    import subprocess

    import filtrun

    root = Path(filtrun.__file__).parent.parent
    commit = None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
        except (OSError, subprocess.SubprocessError):
            commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "filtrun": filtrun.__version__,
        "git": commit,
        "platform": platform.platform(),
    }


def saved_for_backward(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes autograd keeps for the backward pass of what `forward` computes: each block of memory once.

    Parameters and buffers of `model` are there anyway and do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    blocks: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            blocks[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # holds all that was saved, so that no block is counted twice
    del output
    return sum(blocks.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors an optimizer keeps from step to step (two moments for each trained scalar of Adam)."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
