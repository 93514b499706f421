"""Several processes, as `torchrun` starts them, and what a process finds in its environment. One process is the ordinary case, and every
call is then free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def started_as_several() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


_group: Any = None
"""Ours, beside the default one."""
_beside: Any = None
"""The default one that it was made beside: a trainer may end it and begin another."""


def join() -> bool:
    """Join the other processes, if there are any and nobody did yet, each with its own GPU where there are GPUs. They wait for each
    other for a day, in a group of ours: one may decompose a layer, or write text, for long. The default one, which is a trainer's too,
    keeps its few minutes.

    Returns:
        Whether this began the default one.
    """
    global _group, _beside
    if not (started_as_several() or size() > 1) or (_several() and _beside is dist.group.WORLD):
        return False
    backend, begins = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", not _several()
    if begins:
        if torch.cuda.is_available():
            # a launcher may let each see its own alone
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group(backend)
    _group, _beside = dist.new_group(backend=backend, timeout=timedelta(days=1)), dist.group.WORLD
    return begins


@contextmanager
def joined() -> Iterator[None]:
    """Be one of several processes for a while, if they were started."""
    global _group, _beside
    begun = join()
    try:
        yield
    finally:
        if begun and _several():  # a trainer's stays
            dist.destroy_process_group()
            _group = _beside = None


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if _several() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _several() else 1


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the processes."""
    if _several():
        dist.all_reduce(tensor, group=_group)


def shared(value: Any, source: int = 0) -> Any:
    """The value that process `source` holds."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=_group)
    return box[0]


def shared_tensor(tensor: Tensor, source: int) -> Tensor:
    """The tensor that process `source` holds; the others give one of the same shape to be filled."""
    if _several():
        dist.broadcast(tensor, src=source, group=_group)
    return tensor


def gathered(value: Any) -> list[Any]:
    """The values of all processes, on process 0; nothing on the others."""
    if not _several():
        return [value]
    box: list[Any] = [None] * size()
    dist.gather_object(value, box if rank() == 0 else None, group=_group)
    return box if rank() == 0 else []


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while: some libraries, and processes that are started meanwhile, read nothing else."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def wait() -> None:
    """Go on when every process has come here."""
    if _several():
        dist.barrier(group=_group)
