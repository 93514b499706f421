"""How much memory this process uses."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from farss.errors import FarssError

STATUS = Path("/proc/self/status")
"""What Linux says of this process."""
GROUPS, CONTROL = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Which control groups it is in, and where they lie."""
OF_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files and a word of theirs, by the names of cgroups version 1."""


def used_gib(device: torch.device) -> float:
    """Memory in use now: of the GPU, or of this process without the files that are mapped into it."""
    import psutil

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    info = psutil.Process().memory_info()
    used: int = info.rss - getattr(info, "shared", 0)
    return used / 2**30


def peak_gib(device: torch.device) -> float:
    """Most memory that was in use at once since `reset_peak`: of the GPU, or of this process with the files that are mapped into
    it."""
    import psutil

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if STATUS.is_file():  # getrusage has the peak of the process that started this one in it, too
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")) / 2**20
    if (windows := getattr(psutil.Process().memory_info(), "peak_wset", None)) is not None:
        return float(windows) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, others KiB


def reset_peak(device: torch.device) -> None:
    """Let `peak_gib` begin anew: otherwise every run in this process has the peak of the largest before it."""
    give_back()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not every system has this file, and not every container lets us write to it
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Let the C library keep freed memory for reuse for a while, instead of giving it back to the system each time.

    Logits over a large vocabulary are gigabytes that are freed and asked for again every step, and each time the system
    clears every page: a twelfth of a training step with long answers on a CPU. Only glibc can be told so; elsewhere nothing happens.
    """
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)  # the defaults of mallopt(3)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


def give_back_if_scarce(device: torch.device) -> None:
    """Inside `freed_memory_kept`: give freed memory back to the system once less than a quarter of it is left.

    Batches of many lengths leave holes that fit nothing else: scoring the solutions of GSM8K with a vocabulary of 262,144 filled 24 GiB.
    """
    if device.type != "cpu":
        return
    available, total = memory_of_machine()
    if available < total / 4 and (libc := _glibc()):
        libc.malloc_trim(0)


def memory_of_machine() -> tuple[int, int]:
    """Bytes of memory that are available, and of all: of the machine, or of what a container or a cluster's job may use of it."""
    import psutil

    machine = psutil.virtual_memory()
    available, total = machine.available, machine.total
    for group in _control_groups():
        for limit, used, cached in (("memory.max", "memory.current", "inactive_file"), OF_VERSION_1):
            with suppress(OSError, ValueError):  # there is no such file, or "max" in it
                most = int((group / limit).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                taken = int((group / used).read_text()) - int(stat.get(cached, 0))  # read files are let go of first
                available, total = min(available, most - taken), min(total, most)
    return available, total


def _control_groups() -> Iterator[Path]:
    """Linux's control groups that this process is in, from the innermost: a limit holds for all within."""
    try:
        lines = [line.split(":", 2) for line in GROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, kinds, path in lines:
        if not kinds or "memory" in kinds.split(","):
            root = CONTROL / kinds
            inner = root / path.lstrip("/")
            yield from (each for each in (inner, *inner.parents) if each == root or root in each.parents)


def give_back() -> None:
    """Give what nothing refers to any more back to the system: models and trainers refer to each other, and wait for that."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if libc := _glibc():
        libc.malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of the parameters in glibc's malloc.h."""


def _glibc() -> Any:
    import ctypes

    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


@contextmanager
def memory_cure(count: int, what: str, key: str, of: int = 0, besides: str = "", last: str = "lower data.max_length") -> Iterator[None]:
    """Say what filled the GPU's memory, and what can be done.

    Args:
        count: how many are computed at a time.
        what: they are.
        key: the option that says how many.
        of: what it has to divide; 0: anything is allowed.
        besides: what else may help.
        last: what is left where no fewer can be computed at a time.

    Raises:
        FarssError: with both.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        fewer = next((each for each in range(count // 2, 0, -1) if of % each == 0), 0)
        cure = f"set {key}={fewer}" if fewer else last
        raise FarssError(
            f"the GPU's memory is full with {count} {what}: {cure}{besides}, or fewer compare.jobs where they share it, and run again"
        ) from error
