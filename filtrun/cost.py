"""What a run costs: parameters, memory, time, floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        output = probe()
    return counter.get_total_flops() / max(len(output), 1)


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
