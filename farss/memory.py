"""How much memory this process uses."""

from __future__ import annotations

import sys

import torch


def used_gib(device: torch.device) -> float:
    """Memory in use now: of the GPU, or of this process without the files that are mapped into it."""
    import psutil

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    info = psutil.Process().memory_info()
    used: int = info.rss - getattr(info, "shared", 0)
    return used / 2**30


def peak_gib(device: torch.device) -> float:
    """Most memory that was in use at once: of the GPU, or of this process with the files that are mapped into it."""
    import resource

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB
