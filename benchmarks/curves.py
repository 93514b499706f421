"""What each method learned on Banking77 against what it kept: pictures and two short tables, read from the long one of every run.

    python benchmarks/curves.py

It reads `docs/results-banking77.md`, and writes `docs/banking77-scores.png` and `docs/banking77-likelihoods.png`, and the best balance
of each method and what it keeps at equal learning into `docs/results.md`.
"""

from __future__ import annotations

import re
import shutil
import statistics
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from common import DOCS, table, write_section

from farss.maths.frontier import kept_at
from farss.maths.metrics import balance
from farss.report.drawing import save_figures
from farss.report.figures import Figure
from farss.report.results import LEARNED, SCORES, Axes, frontier_choice

HEAD = "| Method | Learning rate | Loss |"
BESIDE = r", on 2( other)? cores|, seed \d"
"""What a row says of its machine and its seed, and not of its method."""
OUTSIDE = "kasa"
"""Would make the pictures too wide to read: 0 % kept, 61 nats lost."""
EQUAL = (75, 80, 85, 92.5, 97.5)
"""Where methods are compared, T in %."""
LOST = "right answers to knowledge: change of their log-likelihood, nats"
PICTURES = {
    "scores": SCORES._replace(factor=1),  # the page has percentages
    "likelihoods": Axes("likelihoods", "nats", "T", "", 1, (LOST, LEARNED)),
}


def main() -> None:
    found = curves((DOCS / "results-banking77.md").read_text())
    write_section("best balances", table(best(found)), "results.md")
    write_section("equal learning", table(equal(found)), "results.md")
    found.pop(OUTSIDE)
    choices = {name: frontier_choice(found, axes, "full fine-tuning") for name, axes in PICTURES.items()}
    with tempfile.TemporaryDirectory() as folder:
        higher = {"height": 640}
        save_figures([Figure(name, "", [one._replace(layout=one.layout | higher)]) for name, one in choices.items() if one], Path(folder))
        for name in choices:
            shutil.copyfile(Path(folder) / f"{name}.png", DOCS / f"banking77-{name}.png")


def curves(page: str) -> dict[str, list[dict[str, Any]]]:
    """The points of every method, of the runs that were asked everything: means over the seeds of a learning rate."""
    rows, method, base = [], "", 0.0
    for line in page[page.index(HEAD) :].partition("\n\n")[0].splitlines()[2:]:
        name, rate, _, kept, learned, both, *known, _, _ = (cell.strip(" *") for cell in line.strip("|").split("|"))
        method = method if name.startswith("the same") else re.sub(BESIDE, "", name)
        if method == "base":
            base = _nats(known)
        elif both:
            values = {"K": float(kept.split()[0]), "T": float(learned), "KT": float(both), "nats": _nats(known) - base}
            rows.append((method, float(rate), values))
    order = list(dict.fromkeys(method for method, _, _ in rows))
    found: dict[str, list[dict[str, Any]]] = {}
    for (method, rate), runs in groupby(sorted(rows, key=lambda row: (order.index(row[0]), row[1])), key=lambda row: row[:2]):
        seeds = [values for _, _, values in runs]
        means = {key: {"value": statistics.fmean(values[key] for values in seeds)} for key in seeds[0]}
        found.setdefault(method, []).append({"learning_rate": rate, "seeds": len(seeds), **means})
    return found


def _nats(cells: list[str]) -> float:
    """The mean of the log-likelihoods, each in brackets behind a percentage."""
    return statistics.fmean(float(cell.partition("(")[2].rstrip(")")) for cell in cells)


def best(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """Each method at the learning rate with its best balance, the best method first."""
    rows = []
    for method, points in found.items():
        point = max(points, key=_balance)
        facts = {"Method": method, "Rates": str(len(points)), "Best": f"{point['learning_rate']:g}", "Runs": str(point["seeds"])}
        scores = {"K %": point["K"]["value"], "T %": point["T"]["value"], "KT %": _balance(point)}
        facts |= {name: f"{value:.1f}" for name, value in scores.items()} | {"Right answers (nats)": f"{point['nats']['value']:+.1f}"}
        rows.append((scores["KT %"], facts))
    return [row for _, row in sorted(rows, key=lambda one: -one[0])]


def equal(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """What each method that was run at several learning rates keeps where it learned equally much."""
    rows = []
    for method, points in ((method, points) for method, points in found.items() if len(points) > 1):
        lines = [[(point["T"]["value"], point[kept]["value"]) for point in points] for kept in ("K", "nats")]
        cells = {"Method": method}
        for learned in EQUAL:
            kept, nats = (kept_at(line, learned) for line in lines)
            cells[f"at T {learned:g} %"] = "" if kept is None else f"{kept:.1f} ({nats:+.1f})"
        rows.append(cells)
    return rows


def _balance(point: dict[str, Any]) -> float:
    """KT: of the means of K and T, or of the one run."""
    kept, learned = point["K"]["value"], point["T"]["value"]
    return balance(kept, learned) if point["seeds"] > 1 else point["KT"]["value"]


if __name__ == "__main__":
    main()
