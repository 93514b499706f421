"""Several pieces of work at a time, each in a fresh process with its share of the machine."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from farss import processes
from farss.errors import FarssError
from farss.memory import give_back

log = logging.getLogger(__name__)

VISIBLE = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
"""Which GPUs a process sees; on AMD's the former goes before the latter."""
Progress = Callable[[int, int, str], None]
"""Called with (done, of how many, a line to show)."""
Tell = Callable[[str, int, int, str], None]
"""Called with (step, done, total, a line to show)."""
Work = Callable[[Any, Tell], None]
"""A function of a module, called with one of the items and something to tell its progress to."""


def unseen(done: int, total: int, line: str) -> None:
    """Show no progress."""


def silent(step: str, done: int, total: int, line: str) -> None:
    """Tell nobody of any step."""


def do_all(work: Work, items: Sequence[Any], jobs: int, tell: Tell) -> None:
    """Call `work(item, tell)` for every item, `jobs` of them at a time.

    With one job everything happens here, one after the other. Otherwise every item gets a process of its own, with an
    equal share of the processor's threads and, where there are GPUs, with one of them.

    What one item cannot do stops no other: hours of work may wait behind it.

    Args:
        work: a function that another process can import.
        items: what can be pickled.
        tell: called from this process only.

    Raises:
        FarssError: what went wrong, when all others are done; at once that a process was killed. Where all errors are of one kind, so is
            this.
    """
    failed: list[FarssError] = []
    if jobs == 1:
        for left, item in zip(reversed(range(len(items))), items, strict=True):
            with _noting(failed, left):
                work(item, tell)
    else:
        _in_processes(work, items, jobs, tell, failed)
    raise_all(failed)


def raise_all(failed: Sequence[FarssError]) -> None:
    """Raise what went wrong as one error, of their kind where that is one; nothing where nothing did."""
    if failed:
        kinds = {type(error) for error in failed}
        raise (kinds.pop() if len(kinds) == 1 else FarssError)("; ".join(dict.fromkeys(map(str, failed))))


@contextmanager
def _noting(failed: list[FarssError], left: int) -> Iterator[None]:
    """Go on where something went wrong, and say so at once if there is anything left to do."""
    try:
        yield
    except FarssError as error:
        if left:
            log.warning(f"{error} (the others go on)")
        failed.append(bare(error))


def bare(error: FarssError) -> FarssError:
    """The same error without where it was raised, which would keep the model there in memory."""
    return type(error)(str(error))


def _in_processes(work: Work, items: Sequence[Any], jobs: int, tell: Tell, failed: list[FarssError]) -> None:
    context = multiprocessing.get_context("spawn")
    slots, told = context.Queue(), context.Queue()
    for slot in range(jobs):
        slots.put(slot)
    gpus, threads = _gpus(), max(1, torch.get_num_threads() // max(1, min(jobs, len(items))))
    give_back()
    with _listening(told, tell), processes.environment("OMP_NUM_THREADS", str(threads)):
        pool = ProcessPoolExecutor(jobs, context, _begin, (slots, told, os.getpid()), max_tasks_per_child=1)
        waiting, left = iter(items), len(items)  # no more are handed over than run: those could not be called back
        running = {pool.submit(_one, work, item, threads, gpus) for item in itertools.islice(waiting, jobs)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    left -= 1
                    with _noting(failed, left):
                        future.result()
                running |= {pool.submit(_one, work, item, threads, gpus) for item in itertools.islice(waiting, len(done))}
        except BrokenProcessPool as error:
            raise FarssError(
                "a process of the comparison was killed, most likely for its memory: set compare.jobs=1 or a smaller "
                "train.micro_batch_size, and start the same command again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that the driver knows them by."""
    named = os.environ.get(VISIBLE)
    return [str(index) for index in range(torch.cuda.device_count())] if named is None else [name for name in named.split(",") if name]


@contextmanager
def _listening(told: Any, tell: Tell) -> Iterator[None]:
    """Pass on what the processes tell."""

    def listen() -> None:
        while (message := told.get()) is not None:
            tell(*message)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        told.put(None)
        listener.join()


# --- in the process --------------------------------------------------------------------------------------------------

_queues: tuple[Any, Any] | None = None


def _begin(slots: Any, told: Any, parent: int) -> None:
    global _queues
    _queues = (slots, told)
    warnings.filterwarnings("ignore")  # as in the command line: those of libraries tell its user nothing
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A process whose parent was killed would work on, beside the next start of the same command."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _one(work: Work, item: Any, threads: int, gpus: list[str]) -> None:
    assert _queues is not None
    slots, told = _queues
    slot = slots.get()
    try:
        torch.set_num_threads(threads)
        if gpus:  # read when a GPU is first used, which is later
            os.environ[VISIBLE] = gpus[slot % len(gpus)]
        work(item, lambda *message: told.put(message))
    finally:
        slots.put(slot)
