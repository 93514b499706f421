"""What is done of what, and how long the rest takes: bars on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()


class Bars:
    """One progress bar a step, with the time left."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def tell(self, step: str, done: int, total: int, line: str) -> None:
        """Show that `done` of `total` parts of a step are done."""
        if step not in self.tasks:
            self.tasks[step] = self.progress.add_task(step, total=total, line="")
        task = self.progress.tasks[self.progress.task_ids.index(self.tasks[step])]
        if done < task.completed:  # a step may count several things, one after the other
            self.progress.reset(self.tasks[step], total=total)
        if done >= total and task.visible:  # a line above the bars: those of many steps would not fit on a screen
            self.progress.console.print(f"{escape(step)}: {total} of {total}, {_duration(task.elapsed or 0.0)}", highlight=False)
        self.progress.update(self.tasks[step], completed=done, total=total, line=escape(line), visible=done < total)


@contextmanager
def bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """Progress bars on a terminal; a line for each finished step elsewhere; nothing in any process but the first."""
    from farss import processes

    if processes.rank():
        yield lambda step, done, total, line: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[line]}"),
    )
    a_day = 24 * 60 * 60.0  # of what is done in it the time left is estimated: a step of a large model may take minutes
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=a_day) as progress:
        yield Bars(progress).tell if console.is_terminal else LogLines().tell


class LogLines:
    """Progress for log files: a line when a step starts, at every tenth of it, and when it is done."""

    def __init__(self) -> None:
        self.shown: dict[str, int] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.last: dict[str, int] = {}

    def tell(self, step: str, done: int, total: int, line: str) -> None:
        """Print a line if the step has come a tenth further."""
        if done < self.last.get(step, 0):  # a step may count several things, one after the other
            del self.begun[step]
        self.last[step] = done
        start, first = self.begun.get(step, (0.0, done))
        if done == first:  # preparations do not count
            start = time.monotonic()
            self.begun[step] = (start, first)
        tenth = 10 * done // max(total, 1)
        if self.shown.get(step) == tenth:
            return
        self.shown[step] = tenth
        parts = [f"{step}: {done} of {total}", *([escape(line)] if line else [])]
        if first < done < total:
            parts.append(f"{_duration((time.monotonic() - start) / (done - first) * (total - done))} left")
        console.print(", ".join(parts), highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
