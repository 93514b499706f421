"""Methods x learning rates x seeds -> one table. What the runs can share (surveys, the base's answers) is made once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from farss.artifacts import Plan, Scores, read_json, write_json, write_text
from farss.config import Config, from_dict, set_key, to_dict
from farss.errors import ConfigError
from farss.evaluate import Entry, Standing, Summary, differences, standings, task_score
from farss.folder import READING_KEYS, SURVEY_KEYS, Folder, options_of, resolve
from farss.jobs import do_all
from farss.maths.frontier import area, kept_at, learned_at
from farss.pipeline import Run, Tell, versions
from farss.plan import method_of
from farss.report import comparison_csv, comparison_markdown, write_report
from farss.train import TrainResult

LEVELS = 3
"""At how many levels of T (and of K) the frontiers are read off."""


def compare(config: Config, tell: Tell) -> Path:
    """Run every method of `compare.methods` for every seed, and write `comparison.json`, `.md`, `.csv` and the report.

    With `compare.tune`, every method is first run at each learning rate with the first seed (the frontier); the best on
    held-out questions is then run with every seed, and the table is made of the other questions. Each run lies in a folder
    of its own and is an ordinary run folder; whatever is complete there is not done again.

    Returns:
        The comparison's folder.
    """
    config = resolve(config)
    check_tuning(config)
    labels = config.compare.methods
    factors: list[float | None] = [*config.compare.tune] or [None]
    tried = {label: [Entrant(label, factor, seeds(config)[0], config, tell) for factor in factors] for label in labels}
    everyone = [entrant for entrants in tried.values() for entrant in entrants]
    for entrant in everyone:
        entrant.run.check_inputs()
        entrant.run.check_unchanged()
    Folder(config.out).claim(config, versions())
    _run_all(everyone)
    chosen = choose(config, tried)
    final = [Entrant(label, chosen[label].factor, seed, config, tell) for seed in seeds(config) for label in labels]
    _run_all(final)
    return _write(config, tried, chosen, final)


def _run_all(entrants: list[Entrant]) -> None:
    """Every run, as many at a time as `compare.jobs` says; what they share is made before."""
    config, tell = entrants[0].config, entrants[0].tell
    if config.compare.jobs > 1:
        for entrant in entrants:
            entrant.run.before_plan()
    do_all(_run_one, [(one.label, one.factor, one.seed, config) for one in entrants], config.compare.jobs, tell)


def _run_one(item: tuple[str, float | None, int, Config], tell: Tell) -> None:
    entrant = Entrant(*item, tell)
    entrant.run.all_but_report()
    if entrant.config.compare.keep == "scores":
        entrant.run.drop_weights()


def seeds(config: Config) -> list[int]:
    """The seeds of a comparison."""
    return config.compare.seeds or [config.seed]


def check_tuning(config: Config) -> None:
    """Refuse to tune by a measure that will not be there.

    Raises:
        ConfigError: KT needs full fine-tuning, and knowledge and task questions.
    """
    if not config.compare.tune:
        return
    if not config.evaluate.full_scores and "full" not in config.compare.methods:
        raise ConfigError("compare.tune chooses by KT, which needs full fine-tuning: add full to compare.methods")
    if not (config.evaluate.knowledge and config.evaluate.task):
        raise ConfigError("compare.tune chooses by KT: name questions in evaluate.knowledge and evaluate.task")


@dataclass
class Entrant:
    """One run of a comparison.

    A label is a method's name, or such a name with `@` and a word behind it for a variant, whose options are in
    `compare.settings`.
    """

    label: str
    factor: float | None
    """Of the learning rate; None: as it is configured."""
    seed: int
    config: Config
    """The comparison's."""
    tell: Tell

    def __post_init__(self) -> None:
        values = to_dict(self.config)
        changes = {"plan.method": self.label.partition("@")[0], "seed": self.seed, **self.config.compare.settings.get(self.label, {})}
        for key, value in changes.items():
            set_key(values, key, value)
        name = f"{self.label}-seed{self.seed}"
        if self.factor is not None:
            rate = values["train"]["learning_rate"] = values["train"]["learning_rate"] * self.factor
            name = f"{self.label}-lr{rate:g}-seed{self.seed}"
        values["out"] = str(Path(self.config.out) / name)
        values["compare"] = {}
        own = resolve(from_dict(values))
        keys = (*SURVEY_KEYS, *READING_KEYS["knowledge"])
        same = options_of(replace(own, seed=self.config.seed), keys) == options_of(self.config, keys)
        method = method_of(own.plan)
        common = {"survey", "evaluate base", "own text", getattr(method.needs, "name", "")} if same else {"evaluate base"}

        def named(step: str, done: int, total: int, line: str) -> None:
            self.tell(step if step in common else f"{name.rpartition('-')[0]} seed {self.seed}: {step}", done, total, line)

        out = Path(self.config.out)
        self.run = Run(own, shared=out, shared_seed=self.config.seed, statistics_folder=None if same else out / self.label, tell=named)

    @property
    def method(self) -> str:
        """The method's name."""
        return self.run.config.plan.method


# --- the learning rate -----------------------------------------------------------------------------------------------


def held_out(share: float) -> Callable[[str], bool]:
    """Whether a question is held out to choose learning rates, by its id."""
    return lambda key: int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < share * 2**32


def the_rest(config: Config) -> Callable[[str], bool] | None:
    """Whether a question counts in the table; None: all do."""
    if not config.compare.tune:
        return None
    chooses = held_out(config.compare.held_out)
    return lambda key: not chooses(key)


def choose(config: Config, tried: dict[str, list[Entrant]]) -> dict[str, Entrant]:
    """The entrant of each label that is best on the held-out questions: by KT, and full fine-tuning by its task score
    alone, since the others are measured by it. Of equal ones the smaller learning rate."""
    if not config.compare.tune:
        return {label: entrants[0] for label, entrants in tried.items()}
    only = held_out(config.compare.held_out)
    ordered = {label: sorted(entrants, key=lambda one: one.factor or 1.0) for label, entrants in tried.items()}
    found = {label: max(group, key=lambda one: task_score(one.run.path, only)) for label, group in ordered.items() if _is_full(group)}
    full = _full_folder(config, [*found.values()])
    for label, group in ordered.items():
        if label not in found:
            runs = {str(place): [Entry(one.run.path, full)] for place, one in enumerate(group)}
            known = standings(Path(config.out) / "base", runs, config.evaluate.resamples, config.seed, only)
            scores = [known[name].estimates["KT"].value if "KT" in known[name].estimates else 0.0 for name in runs]
            found[label] = group[scores.index(max(scores))]
    return {label: found[label] for label in tried}


def _is_full(group: list[Entrant]) -> bool:
    return group[0].method == "full"


def _full_folder(config: Config, entrants: list[Entrant]) -> Path | None:
    """The reference of T: the full fine-tuning run among these, or the file that the configuration names."""
    run = next((entrant.run.path for entrant in entrants if entrant.method == "full"), None)
    return run or (Path(config.evaluate.full_scores) if config.evaluate.full_scores else None)


# --- the table -------------------------------------------------------------------------------------------------------


def _write(config: Config, tried: dict[str, list[Entrant]], chosen: dict[str, Entrant], final: list[Entrant]) -> Path:
    folder, only = Path(config.out), the_rest(config)
    fulls = {seed: _full_folder(config, [entrant for entrant in final if entrant.seed == seed]) for seed in seeds(config)}
    rows = [_row(entrant, fulls[entrant.seed], only) for entrant in final]
    entries = {label: [Entry(one.run.path, fulls[one.seed]) for one in final if one.label == label] for label in chosen}
    base = Scores.load(folder / "base" / "scores.json")
    found = standings(folder / "base", entries, config.evaluate.resamples, config.seed, only) if base.all else {}
    comparison = {
        "rows": rows,
        "base": {name: x.score for name, x in base.all.items()},
        "methods": {label: {name: asdict(x) for name, x in standing.estimates.items()} for label, standing in found.items()},
        "differences": differences(found),
        "frontier": _frontier(config, tried, chosen, only),
        "notes": _notes(config, chosen),
    }
    write_json(folder / "comparison.json", comparison)
    write_text(folder / "comparison.md", comparison_markdown(comparison))
    write_text(folder / "comparison.csv", comparison_csv(comparison))
    for entrant in {one.run.path: one for one in [*final, *(one for group in tried.values() for one in group)]}.values():
        entrant.run.report()
    write_report(folder)
    return folder


def _row(entrant: Entrant, full: Path | None, only: Callable[[str], bool] | None) -> dict[str, Any]:
    """One line of the table."""
    run = entrant.run
    summary: Summary = run.summarise(full, only)
    plan, trained, scores = (
        Plan.load(run.path / "plan.json"),
        TrainResult.load(run.path / "train.json"),
        Scores.load(run.path / "scores.json"),
    )
    values = read_json(run.path / "summary.json")
    before = [run.place.record(step) for step in run.steps_before]
    return {
        "method": entrant.label,
        "seed": run.config.seed,
        "folder": run.path.name,
        "rank": plan.rank,
        "learning_rate": run.config.train.learning_rate,
        "parameters": trained.parameters,
        **{key: values[key] for key in ("K", "T", "KT", "recovered", "forgetting")},
        **{name: _nats(summary, kind) for kind, name in (("knowledge", "kept"), ("task", "learned"))},
        "seconds_init": sum(record["seconds"] for record in before if record),
        "seconds_train": trained.seconds,
        "peak_memory_gib": trained.peak_memory_gib,
        "benchmarks": {
            entry["name"]: {"score": entry["after"], "low": entry.get("low"), "high": entry.get("high"), "kind": entry["kind"]}
            for entry in values["benchmarks"]
        },
        "gold_loglikelihood": {name: x.gold_loglikelihood for name, x in scores.all.items()},
        "notes": list(plan.notes) + list(summary.notes),
    }


def _nats(summary: Summary, kind: str) -> float | None:
    """How much likelier the right answers became, mean over the benchmarks of a kind."""
    found = [each.gold_change.value for each in summary.benchmarks if each.kind == kind and each.gold_change]
    return sum(found) / len(found) if found else None


def _frontier(
    config: Config, tried: dict[str, list[Entrant]], chosen: dict[str, Entrant], only: Callable[[str], bool] | None
) -> dict[str, Any] | None:
    """Every method at every learning rate: its curve of K against T, and what it says where methods are equal."""
    if not config.compare.tune:
        return None
    full = _full_folder(config, [*chosen.values()])
    runs = {one.run.path.name: [Entry(one.run.path, full)] for group in tried.values() for one in group}
    known = standings(Path(config.out) / "base", runs, config.evaluate.resamples, config.seed, only)
    curves = {label: [_point(one, known[one.run.path.name], one is chosen[label]) for one in group] for label, group in tried.items()}
    return {"curves": curves, "scores": _equals(curves, "T", "K"), "likelihoods": _equals(curves, "learned", "kept")}


def _equals(curves: dict[str, list[dict[str, Any]]], learned: str, kept: str) -> dict[str, Any]:
    """What each curve says where methods are equal, by two of its metrics."""
    pairs = {
        label: [(p[learned]["value"], p[kept]["value"]) for p in curve if {learned, kept} <= set(p)] for label, curve in curves.items()
    }
    at, of = (_levels([[pair[axis] for pair in points] for points in pairs.values() if points]) for axis in (0, 1))
    return {
        "learned": at,
        "kept": of,
        "methods": {
            label: {
                "kept at learned": [kept_at(points, t) for t in at],
                "learned at kept": [learned_at(points, k) for k in of],
                "area": area(points, at[0], at[-1]) if at else None,
            }
            for label, points in pairs.items()
        },
    }


def _point(entrant: Entrant, standing: Standing, is_chosen: bool) -> dict[str, Any]:
    rate = entrant.run.config.train.learning_rate
    return {"learning_rate": rate, "chosen": is_chosen, **{name: asdict(x) for name, x in standing.estimates.items()}}


def _levels(values: list[list[float]]) -> list[float]:
    """Levels that every curve spans, evenly; none where there is no such range."""
    if not values:
        return []
    low, high = max(map(min, values)), min(map(max, values))
    return [low + (high - low) * step / (LEVELS - 1) for step in range(LEVELS)] if high > low else []


def _notes(config: Config, chosen: dict[str, Entrant]) -> list[str]:
    """What a reader must know to judge the table."""
    settings = config.compare.settings
    notes = [f"{label}: {', '.join(f'{key}={value}' for key, value in settings[label].items())}" for label in chosen if settings.get(label)]
    if not config.compare.tune:
        return [f"Learning rate {config.train.learning_rate:g} for every method unless its own settings say otherwise.", *notes]
    rates = ", ".join(f"{label} {one.run.config.train.learning_rate:g}" for label, one in chosen.items())
    tried = ", ".join(f"{factor:g}" for factor in config.compare.tune)
    return [
        f"Learning rates, each chosen on {config.compare.held_out:.0%} of the questions, which the table leaves out, "
        f"among {tried} times its own: {rates}.",
        *notes,
    ]
