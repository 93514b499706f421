"""How far a step is, and how long the rest takes."""

import io

from rich.console import Console
from rich.progress import Progress

from farss import progress


def test_the_time_left_is_that_of_what_is_counted_now(monkeypatch):
    """An evaluation counts the questions of one benchmark after the other."""
    clock, shown = iter(range(0, 10_000, 100)), []
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.console, "print", lambda text, **_: shown.append(text))
    lines = progress.LogLines()
    for done in (10, 100):
        lines.tell("evaluate", done, 200, "facts")
    for done in (5, 20, 50):  # another benchmark, whose first count is smaller
        lines.tell("evaluate", done, 100, "seals")
    assert shown[1] == "evaluate: 100 of 200, facts, 111 s left"
    assert shown[-1] == "evaluate: 50 of 100, seals, 4 min left"


def test_what_is_done_leaves_the_bars():
    """A comparison has more steps than a screen has lines."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Progress(console=screen, auto_refresh=False) as shown:
        bars = progress.Bars(shown)
        for step in ("survey", "train"):
            bars.tell(step, 1, 2, "")
        bars.tell("survey", 2, 2, "")
        bars.tell("survey", 2, 2, "")
        assert [task.visible for task in shown.tasks] == [False, True]
        bars.tell("survey", 1, 2, "")  # it counts something else now
        assert [task.visible for task in shown.tasks] == [True, True]
    assert screen.file.getvalue().count("survey: 2 of 2, 0 s") == 1
