"""The table of a comparison: its rows, who is ahead, and the frontier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from farss.artifacts import Plan
from farss.boundary import Boundary
from farss.compare.entrants import Entrant, seeds, settings_of
from farss.compare.tuning import full_folder, right_answers, the_rest
from farss.config import Config, is_reference, label_of_row, method_of_label
from farss.files import write_json, write_text
from farss.maths.frontier import Point, area, kept_at, learned_at
from farss.maths.metrics import interval
from farss.report import comparison_csv, comparison_markdown
from farss.tasks.outcomes import Estimate, Only
from farss.tasks.standing import Entry, Standing, differences, mean_scores, standings
from farss.tasks.summary import Summary
from farss.train import TrainResult

LEVELS = (0.1, 0.5, 0.9)
"""Where in the range of T (and of K) the frontiers are read off: not at its ends, which are those of a curve, and which half of the
resamples do not reach."""
REACHED = 0.95
"""In how many of the resamples a curve has to come so far."""


def table_of(
    config: Config,
    groups: dict[str, list[Entrant]],
    tried: dict[str, list[Entrant]],
    chosen: dict[str, Entrant],
    notes: list[str],
    missing: int = 0,
) -> dict[str, Any]:
    """The table, as `comparison.json` has it.

    Args:
        groups: the entrants of each row, one a seed.
        tried: those of each label with the first seed.
        chosen: of those, the chosen ones; T of the first seed is relative to the full fine-tuning among them, where there is any.
        missing: how many runs are not complete.
    """
    folder, only, asks = Path(config.out), the_rest(config), config.evaluate.asks
    named = [(name, one) for name, group in groups.items() for one in group]
    references = [*chosen.values(), *(one for _, one in named)]
    fulls = {seed: full_folder(config, [one for one in references if one.seed == seed]) for seed in seeds(config)}
    everyone = {one.run.path: one for one in (*(one for group in tried.values() for one in group), *(one for _, one in named))}
    summaries = {path: one.run.summarise(fulls[one.seed], only) for path, one in everyone.items() if asks}
    nothing = Summary(None, None, None, None)
    rows = [_row(name, one, summaries.get(one.run.path, nothing)) for seed in seeds(config) for name, one in named if one.seed == seed]
    entries = {name: [Entry(one.run.path, fulls[one.seed], one.seed) for one in group] for name, group in groups.items()}
    base = mean_scores(folder / "base", only) if asks else {}
    found = standings(folder / "base", entries, config, only) if base else {}
    # one learning rate of a method is no rival of another, and while seeds are missing means over other seeds are none either
    ranked = set(groups) <= set(tried) and (not missing or len(seeds(config)) == 1)
    lora = next((label for label in groups if method_of_label(label) == "lora"), "lora")
    gaps = differences(found, lora) if ranked else []
    return {
        "rows": rows,
        "base": base,
        "learned_by": config.evaluate.learned_by,
        "reference": next((summary.reference for summary in summaries.values()), None),
        "methods": {name: _estimates(standing) for name, standing in found.items()},
        "ranked": ranked,
        "differences": gaps,
        "frontier": _frontier(config, tried, chosen, fulls[seeds(config)[0]], only),
        "missing": missing,
        "notes": [*notes, *_notes_of_rows(rows), *_how_many(rows), *_how_sure(config, groups, gaps)],
    }


def write_table(folder: Path, comparison: dict[str, Any]) -> None:
    """Write it in every form."""
    write_json(folder / "comparison.json", comparison)
    write_text(folder / "comparison.md", comparison_markdown(comparison))
    write_text(folder / "comparison.csv", comparison_csv(comparison))


def _notes_of_rows(rows: list[dict[str, Any]]) -> list[str]:
    """The notes of the runs, each once: those of all, and those of some behind their methods' names."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for note in row["notes"]:
            found.setdefault(note, []).append(label_of_row(row["method"]))
    everyone = {label_of_row(row["method"]) for row in rows}
    return [note if set(of) == everyone else f"{', '.join(dict.fromkeys(of))}: {note}" for note, of in found.items()]


def _how_many(rows: list[dict[str, Any]]) -> list[str]:
    """Of how many questions the scores are made; all methods are asked the same."""
    found: dict[str, list[str]] = {}
    for name, entry in rows[0]["benchmarks"].items() if rows else ():
        found.setdefault(entry["kind"], []).append(f"{entry['questions']:,} of {name}")
    kinds = [f"{', '.join(texts)} ({kind})" for kind, texts in found.items()]
    return [f"Questions asked: {'; '.join(kinds)}."] if kinds else []


def _how_sure(config: Config, groups: dict[str, list[Entrant]], gaps: list[dict[str, Any]]) -> list[str]:
    """What intervals and p-values hold, and what they leave out."""
    if not config.evaluate.asks:
        return []
    alone = [name for name, group in groups.items() if len(group) == 1]
    whose = "" if len(alone) == len(groups) else f" of {', '.join(alone)}"
    what = "intervals and p-values say" if gaps else "intervals say"
    notes = [f"One seed{whose}: the {what} what other questions might have given, and nothing of another training."] if alone else []
    many = (
        "A difference is a result where its p-value, which holds for all methods at once, is below 0.05. The intervals are those of one "
        "difference alone."
    )
    alike = " Both suppose that the seeds scatter all methods alike." if any(len(group) > 1 for group in groups.values()) else ""
    return [*notes, many + alike] if gaps else notes


def _estimates(standing: Standing) -> dict[str, dict[str, float]]:
    """As the table has them: a benchmark's score beside the metrics, by the name of its column."""
    named = standing.estimates | {f"benchmarks.{name}": each for name, each in standing.benchmarks.items()}
    return {name: asdict(each) for name, each in named.items()}


def _row(name: str, entrant: Entrant, summary: Summary) -> dict[str, Any]:
    """One line of the table."""
    run = entrant.run
    plan, trained = Plan.load(run.path / "plan.json"), TrainResult.load(run.path / "train.json")
    values = asdict(summary)
    before = [record for step in run.steps_before if (record := run.place.record(step))]
    return {
        "method": name,
        "seed": run.config.seed,
        "folder": run.path.name,
        "rank": plan.rank,
        "learning_rate": run.config.train.learning_rate,
        "parameters": trained.parameters,
        "effective_rank": (run.folder.record("export") or {}).get("effective_rank"),
        **{key: values[key] for key in ("K", "T", "KT", "retained", "recovered", "forgetting")},
        **{name: _nats(summary, kind) for kind, name in (("knowledge", "kept"), ("task", "learned"))},
        "seconds_init": sum(record.get("seconds", 0.0) for record in before),
        "seconds_train": trained.seconds,
        "peak_memory_init_gib": max((record["peak_memory_gib"] for record in before if "peak_memory_gib" in record), default=None),
        "peak_memory_gib": trained.peak_memory_gib,
        "benchmarks": {
            entry["name"]: {"score": entry["after"]} | {key: entry[key] for key in ("low", "high", "kind", "questions")}
            for entry in values["benchmarks"]
        },
        "gold_loglikelihood": {entry["name"]: entry["gold_after"] for entry in values["benchmarks"]},
        "notes": list(plan.notes) + list(summary.notes),
    }


def _nats(summary: Summary, kind: str) -> float | None:
    """How much likelier the right answers became, mean over the benchmarks of a kind."""
    found = [each.gold_change.value for each in summary.benchmarks if each.kind == kind and each.gold_change]
    return sum(found) / len(found) if found else None


def _frontier(
    config: Config, tried: dict[str, list[Entrant]], chosen: dict[str, Entrant], full: Path | None, only: Only | None
) -> dict[str, Any] | None:
    """Every method at every learning rate: its curve of K against T, and what it says where methods are equal."""
    if not config.compare.tune:
        return None
    runs = {one.run.path.name: [Entry(one.run.path, full)] for group in tried.values() for one in group}
    known = standings(Path(config.out) / "base", runs, config, only)
    curves = {
        label: [_point(one, known[one.run.path.name], one is chosen.get(label)) for one in group] for label, group in tried.items() if group
    }
    found = {label: [known[one.run.path.name] for one in group] for label, group in tried.items() if group}
    return {"curves": curves, "scores": equals(found, "T", "K"), "likelihoods": equals(found, "learned", "kept")}


def equals(curves: dict[str, list[Standing]], learned: str, kept: str) -> dict[str, Any]:
    """What each curve says where methods are equal, by two of its metrics: each value with its 95 % interval over the questions.

    Full fine-tuning, whose T begins where that of others ends, has no part in where that is.
    """
    pairs = {
        label: [
            [(one.estimates[metric].value, *one.draws[metric]) for metric in (learned, kept)]
            for one in curve
            if {learned, kept} <= set(one.estimates)
        ]
        for label, curve in curves.items()
    }
    points = {label: np.array(own).transpose(2, 0, 1) for label, own in pairs.items() if own}  # [1 + resamples, runs, 2]
    rivals = [own[0] for label, own in points.items() if not is_reference(label)] or [own[0] for own in points.values()]
    at, of = (levels([own[:, axis].tolist() for own in rivals]) for axis in (0, 1))
    ways: dict[str, list[Callable[[list[Point]], float | None]]] = {
        "kept at learned": [partial(kept_at, t=t) for t in at],
        "learned at kept": [partial(learned_at, k=k) for k in of],
        "area": [partial(area, low=at[0], high=at[-1])] if at else [],
    }
    draws = {label: [[*map(tuple, one.tolist())] for one in own if np.isfinite(one).all()] for label, own in points.items()}
    methods = {label: {name: [_over_draws(draws.get(label), way) for way in own] for name, own in ways.items()} for label in curves}
    return {"learned": at, "kept": of, "methods": methods}


def _over_draws(draws: list[list[Point]] | None, way: Callable[[list[Point]], float | None]) -> dict[str, float] | None:
    """A value that is read off a curve, the first of these, and its interval over the resamples, the others; None where it does not come so
    far, or not surely."""
    if draws is None:
        return None
    value, *drawn = map(way, draws)
    known = [each for each in drawn if each is not None]
    return asdict(Estimate(value, *interval(known))) if value is not None and len(known) >= REACHED * len(drawn) else None


def _point(entrant: Entrant, standing: Standing, is_chosen: bool) -> dict[str, Any]:
    named = {"learning_rate": entrant.run.config.train.learning_rate, "folder": entrant.run.path.name, "chosen": is_chosen}
    return named | {name: asdict(x) for name, x in standing.estimates.items()}


def levels(curves: list[list[float]]) -> list[float]:
    """Levels inside a range that many of the curves span: that with the largest product of its width and their number; none where no
    two overlap. A method that never comes so far, or begins beyond, does not take the others' range away."""
    ranges = [(min(curve), max(curve)) for curve in curves]
    spans = [(low, high) for low, _ in ranges for _, high in ranges if low < high]
    numbers = {(low, high): sum(first <= low and high <= last for first, last in ranges) for low, high in spans}
    shared = [span for span in spans if numbers[span] >= min(2, len(curves))]
    if not shared:
        return []
    low, high = max(shared, key=lambda span: numbers[span] * (span[1] - span[0]))
    return [low * (1 - share) + high * share for share in LEVELS]


def notes_of(config: Config, chosen: dict[str, Entrant], measure: str) -> list[str]:
    """What a reader must know to judge the table."""
    own = {label: settings for label in chosen if (settings := settings_of(config, label))}
    notes = [f"{label}: {', '.join(f'{key}={value}' for key, value in settings.items())}" for label, settings in own.items()]
    searched = {label: one.run.path / "boundary.json" for label, one in chosen.items()}
    notes += [f"{label}: {Boundary.load(path).sentence}" for label, path in searched.items() if path.is_file()]
    if len(fulls := [label for label in chosen if is_reference(label)]) > 1:
        notes.append(f"T is relative to {fulls[0]}, the first of {', '.join(fulls)}.")
    if not config.compare.tune:
        return [f"Learning rate {config.train.learning_rate:g} for every method unless its own settings say otherwise.", *notes]
    rates = ", ".join(
        f"{label} {one.run.config.train.learning_rate:g}{' (by what it learned alone)' if is_reference(label) else ''}"
        for label, one in chosen.items()
    )
    tried = ", ".join(f"{factor:g}" for factor in config.compare.tune)
    return [
        f"Learning rates, each chosen by {measure} on {config.compare.held_out:.0%} of the questions, which the table leaves out (the "
        f"untouched model answers {right_answers(config)} of those about knowledge), among {tried} times its own: {rates}.",
        *_at_the_edge(config, chosen),
        *notes,
    ]


def _at_the_edge(config: Config, chosen: dict[str, Entrant]) -> list[str]:
    """Whose best learning rate is the smallest or the largest that was tried."""
    notes = []
    for end, beyond, factor in (("smallest", "smaller", min(config.compare.tune)), ("largest", "larger", max(config.compare.tune))):
        labels = ", ".join(label for label, one in chosen.items() if one.factor == factor)
        notes += [f"The {end} rate that was tried is the best of {labels}: a {beyond} one might be better still."] if labels else []
    return notes
