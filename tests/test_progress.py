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


def test_every_benchmark_has_its_own_time_left(monkeypatch):
    now, told = [0.0], []
    with Progress(console=Console(file=io.StringIO()), auto_refresh=False, get_time=lambda: now[0]) as shown:
        bars = progress.Bars(shown)
        for name in ("facts", "seals"):
            for done in (0, 50, 100, 200):
                bars.tell("evaluate", done, 200, name)
                told.append(shown.tasks[0].time_remaining)
                now[0] += 10
        assert shown.tasks[0].finished_time == 30
    assert told[2] == told[6] == 20


def test_the_time_left_is_known_where_a_step_takes_minutes(monkeypatch):
    now, tasks = [0.0], []
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=True, width=80))
    made = progress.Progress

    def with_clock(*columns, **options):
        tasks.append(made(*columns, **options, get_time=lambda: now[0], auto_refresh=False))
        return tasks[0]

    monkeypatch.setattr(progress, "Progress", with_clock)
    with progress.bars() as tell:
        for done in range(4):
            tell("train", done, 10, "")
            now[0] += 100
        assert tasks[0].tasks[0].time_remaining == 700
