"""How far a step is, and how long the rest takes."""

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
