"""Methods x learning rates x seeds -> one table. What the runs can share (surveys, the base's answers) is made once."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from farss.artifacts import Plan, read_json, write_json, write_text
from farss.boundary import Boundary
from farss.config import Config, PlanConfig, from_dict, load, nearest, set_key, to_dict
from farss.errors import ConfigError, FarssError
from farss.evaluate import Entry, Estimate, Standing, Summary, differences, mean_scores, standings, task_score
from farss.folder import READING_KEYS, SURVEY_KEYS, Folder, options_of, replaced, resolve
from farss.inputs import Loaded
from farss.jobs import Tell, do_all
from farss.maths.frontier import area, kept_at, learned_at
from farss.maths.metrics import balance
from farss.methods import METHODS
from farss.pipeline import Run, silent
from farss.plan import method_of
from farss.report import comparison_csv, comparison_markdown, write_report
from farss.train import TrainResult
from farss.versions import versions

Item = tuple[str, float | None, int, Config, Loaded]
"""An entrant, as another process is told of it."""
ASKED = ("model.path", "model.dtype", "model.quantization", "evaluate.", "data.template", "data.max_length")
"""Options that change the untouched model's answers."""
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
    check_labels(config)
    check_tuning(config)
    labels = config.compare.methods
    loaded = Loaded()
    tried = {label: [Entrant(label, factor, seeds(config)[0], config, loaded, tell) for factor in factors(config)] for label in labels}
    everyone = [entrant for entrants in tried.values() for entrant in entrants]
    for entrant in everyone:
        entrant.run.check_inputs()
        entrant.run.check_unchanged()
    Folder(config.out).claim(config, versions())
    _run_all(everyone)
    chosen, measure = choose(config, tried)
    final = [Entrant(label, chosen[label].factor, seed, config, loaded, tell) for seed in seeds(config) for label in labels]
    _run_all(final)
    groups = {label: [one for one in final if one.label == label] for label in labels}
    _write(config, groups, tried, chosen, _notes(config, chosen, measure))
    for entrant in {one.run.path: one for one in [*final, *everyone]}.values():
        entrant.run.report()
    return write_report(Path(config.out)).parent


def run_within(config: Config, tell: Tell) -> Run | None:
    """The run of a comparison whose folder a configuration names, with all that it shares, to be exported otherwise; None where there
    is none.

    Raises:
        ConfigError: it was made with other options.
    """
    config = resolve(config)
    folder = Path(config.out)
    try:
        whole = resolve(replace(load(folder.parent / "config.yaml"), out=str(folder.parent)))
    except FarssError:
        return None
    run = next((one.run for one in _possible(whole, tell) if one.run.path == folder), None)
    if run is None:
        return None
    if replace(run.config, export=config.export) != config:
        raise ConfigError(f"{folder} is a run of the comparison above it, and was made with other options: only export's may differ")
    return replace(run, config=config)


def _possible(config: Config, tell: Tell) -> Iterator[Entrant]:
    """Every run that a comparison may make."""
    loaded = Loaded()
    for each in itertools.product(config.compare.methods, factors(config), seeds(config)):
        yield Entrant(*each, config, loaded, tell)


def write_so_far(config: Config) -> bool:
    """Write the table of the runs that are complete, where some are not; nothing is run.

    Learning rates are tried before one is chosen, so each has a row of its own. The questions are those of the finished table.

    Returns:
        False where no run is complete, or the finished table is there: it stays, whatever was deleted since.
    """
    config = resolve(config)
    if _is_finished(config):
        return False
    labels, (first, *others) = config.compare.methods, seeds(config)
    done = [one for one in _possible(config, silent) if one.run.complete]
    wanted = len(labels) * (len(factors(config)) + len(others))
    # of the other seeds one learning rate each is wanted, which is not known yet
    found = len({(one.label, one.seed, one.factor if one.seed == first else None) for one in done})
    if not done:
        return False
    groups: dict[str, list[Entrant]] = {}
    for one in done:
        groups.setdefault(one.label if one.factor is None else f"{one.label} {one.run.config.train.learning_rate:g}", []).append(one)
    tried = {label: [one for one in done if one.label == label and one.seed == first] for label in labels}
    best = _best_full(config, tried) if config.compare.tune else {}
    _write(config, groups, tried, best, [f"So far: {found} of {wanted} runs are complete."], wanted - found)
    return True


def _is_finished(config: Config) -> bool:
    """Whether the table is there that `compare` writes at its end."""
    path = Path(config.out) / "comparison.json"
    table: dict[str, Any] = read_json(path) if path.is_file() else {"missing": 1}
    rows = {(row["method"], row["seed"]) for row in table.get("rows", [])}
    return not table.get("missing") and rows >= set(itertools.product(config.compare.methods, seeds(config)))


def _run_all(entrants: list[Entrant]) -> None:
    """Every run, as many at a time as `compare.jobs` says; what they share is made before."""
    config, tell = entrants[0].config, entrants[0].tell
    if config.compare.jobs > 1:
        _share_all(entrants)
        for entrant in entrants:
            entrant.run.before_plan()
    do_all(_run_one, [entrant.item for entrant in entrants], config.compare.jobs, tell)


def _share_all(entrants: list[Entrant]) -> None:
    """The base's answers and every kind of statistics, each in a process of its own; those of one text come one after the other."""
    config, tell = entrants[0].config, entrants[0].tell
    works: dict[tuple[str, ...], dict[str, Item]] = {("base",): {"": entrants[0].item}}
    for entrant in entrants:
        entrant.run.claim()
        if place := entrant.run.source:
            *source, kind = place
            works.setdefault(("statistics", *source), {}).setdefault(kind, entrant.item)
    do_all(_share_one, [(name, [*items.values()]) for (name, *_), items in works.items()], config.compare.jobs, tell)


def _share_one(work: tuple[str, list[Item]], tell: Tell) -> None:
    name, items = work
    for item in items:
        getattr(Entrant(*item, tell).run, name)()


def _run_one(item: Item, tell: Tell) -> None:
    entrant = Entrant(*item, tell)
    entrant.run.all_but_report()
    if entrant.config.compare.keep == "scores":
        entrant.run.drop_weights()


def seeds(config: Config) -> list[int]:
    """The seeds of a comparison."""
    return config.compare.seeds or [config.seed]


def factors(config: Config) -> list[float | None]:
    """Of every method's learning rate, with the first seed; None: as it is configured."""
    return [*config.compare.tune] or [None]


def check_labels(config: Config) -> None:
    """Refuse a variant that would be the plain method under another name.

    Raises:
        ConfigError: a variant has no options, or options are given for a method that there is not, without their sections, or of
            what all share.
    """
    settings = config.compare.settings
    for label in config.compare.methods:
        if "@" in label and label not in settings:
            variants = [known for known in settings if "@" in known]
            cure = nearest(label, variants) if variants else "add them"
            raise ConfigError(f"compare.methods names the variant {label!r}, and compare.settings has no options for it: {cure}")
    for label, options in settings.items():
        if label.partition("@")[0] not in METHODS:
            raise ConfigError(f"compare.settings has options for {label!r}, which is no method: {nearest(label, METHODS)}")
        if not isinstance(options, dict) or any("." not in key for key in set(options) - {"seed", "out"}):
            raise ConfigError(f"compare.settings.{label}={options!r}: write its options as train.learning_rate: 1e-4, with their sections")
        for key in options:
            if key in ("seed", "out"):
                raise ConfigError(f"compare.settings gives {label!r} its own {key}, which is the comparison's: see compare.seeds")
            if key.startswith(ASKED):
                raise ConfigError(
                    f"compare.settings gives {label!r} its own {key}, but all are compared with one untouched model, asked once"
                )
        _configured(config, label)


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
    loaded: Loaded = field(repr=False)
    tell: Tell

    def __post_init__(self) -> None:
        out, common = Path(self.config.out), _configured(self.config, self.label)
        own, name = replace(common, seed=self.seed), f"{self.label}-seed{self.seed}"
        if self.factor is not None:
            own = replaced(own, "train", learning_rate=own.train.learning_rate * self.factor)
            name = f"{self.label}-lr{own.train.learning_rate:g}-seed{self.seed}"
        keys = (*SURVEY_KEYS, *READING_KEYS["knowledge"])
        same = options_of(common, keys) == options_of(self.config, keys)
        needs = method_of(own.plan).needs
        shared = {"survey", "evaluate base", "own text", getattr(needs, "name", "")} if same else {"evaluate base"}

        def named(step: str, done: int, total: int, line: str) -> None:
            self.tell(step if step in shared else f"{name.rpartition('-')[0]} seed {self.seed}: {step}", done, total, line)

        self.run = Run(
            replace(own, out=str(out / name)),
            shared=out,
            shared_config=common,
            statistics_folder=None if same else out / self.label,
            label=self.label,
            beside=[plan for plan in plans_of(self.config) if method_of(plan).needs == needs],
            tell=named,
            loaded=self.loaded,
        )

    @property
    def item(self) -> Item:
        """Of what another process makes the same entrant."""
        return self.label, self.factor, self.seed, self.config, self.loaded

    @property
    def method(self) -> str:
        """The method's name."""
        return self.run.config.plan.method


def _configured(config: Config, label: str) -> Config:
    """The options of a label's runs, before their seed and a tuned learning rate: those of what they share."""
    values = to_dict(config)
    for key, value in {"plan.method": label.partition("@")[0], **config.compare.settings.get(label, {})}.items():
        set_key(values, key, value)
    return resolve(from_dict(values | {"compare": {}}))


def plans_of(config: Config) -> list[PlanConfig]:
    """The plan of every method and variant."""
    return [_plan(config, label) for label in config.compare.methods]


def _plan(config: Config, label: str) -> PlanConfig:
    """Their plan alone, which is asked for often."""
    settings = {"plan.method": label.partition("@")[0], **config.compare.settings.get(label, {})}
    return replace(config.plan, **{key.removeprefix("plan."): value for key, value in settings.items() if key.startswith("plan.")})


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


def choose(config: Config, tried: dict[str, list[Entrant]]) -> tuple[dict[str, Entrant], str]:
    """The entrant of each label that is best on the held-out questions, and by what: by KT, and full fine-tuning by its task
    score alone (of equal ones by the likelihood of the answers), since the others are measured by it. Of equal ones the smaller
    learning rate.

    Raises:
        FarssError: there is nothing to choose by on the held-out questions.
    """
    if not config.compare.tune:
        return {label: entrants[0] for label, entrants in tried.items()}, ""
    found = _best_full(config, tried)
    full = _full_folder(config, [*found.values()])
    assert full is not None  # `check_tuning`
    everyone = [one for group in tried.values() for one in group]
    measure, values = _measured(_held_out_estimates(config, {**{one.run.path.name: one.run.path for one in everyone}, "": full}, full))
    for label, group in tried.items():
        if label not in found:
            found[label] = max(_by_rate(group), key=lambda one: values[one.run.path.name])
    return {label: found[label] for label in tried}, measure


def _best_full(config: Config, tried: dict[str, list[Entrant]]) -> dict[str, Entrant]:
    """Of each label that is full fine-tuning, the entrant that learned most of the task by the held-out questions."""
    groups = {label: _by_rate(group) for label, group in tried.items() if group and group[0].method == "full"}
    folders = {one.run.path.name: one.run.path for group in groups.values() for one in group}
    learned = {name: each["learned"].value for name, each in _held_out_estimates(config, folders, None).items() if "learned" in each}
    only = held_out(config.compare.held_out)

    def learning(one: Entrant) -> tuple[float, float]:
        return task_score(one.run.path, only), learned.get(one.run.path.name, 0.0)

    return {label: max(group, key=learning) for label, group in groups.items()}


def _by_rate(entrants: list[Entrant]) -> list[Entrant]:
    """The smallest learning rate first, which is taken of equal ones."""
    return sorted(entrants, key=lambda one: one.factor or 1.0)


def _held_out_estimates(config: Config, folders: dict[str, Path], full: Path | None) -> dict[str, dict[str, Estimate]]:
    entries = {name: [Entry(folder, full)] for name, folder in folders.items()}
    only = held_out(config.compare.held_out)
    known = standings(Path(config.out) / "base", entries, config.evaluate.resamples, config.seed, only)
    return {name: standing.estimates for name, standing in known.items()}


def _measured(known: dict[str, dict[str, Estimate]]) -> tuple[str, dict[str, float]]:
    """What learning rates are chosen by, and its value for every run; the run without a name is full fine-tuning.

    Where the few questions that are held out have no ratio of scores, because the untouched model or full fine-tuning solves none of
    them, how much likelier their right answers became still says what was kept and what was learned.

    Raises:
        FarssError: the log-likelihoods say nothing either.
    """
    if all("KT" in each for each in known.values()):
        return "KT", {name: each["KT"].value for name, each in known.items()}
    if not all({"kept", "learned"} <= set(each) for each in known.values()) or known[""]["learned"].value <= 0:
        raise FarssError(
            "compare.tune cannot choose: the untouched model or full fine-tuning solves none of the held-out questions, and by the "
            "log-likelihoods of their answers full fine-tuning has learned nothing: train for longer, ask more questions, or leave out "
            "compare.tune"
        )
    scored, reach = all("K" in each for each in known.values()), known[""]["learned"].value

    def value(each: dict[str, Estimate]) -> float:
        kept = each["K"].value if scored else math.exp(each["kept"].value)
        return balance(max(0.0, kept), max(0.0, each["learned"].value / reach))

    return "log-likelihoods (too few are solved for KT)", {name: value(each) for name, each in known.items()}


def _full_folder(config: Config, entrants: list[Entrant]) -> Path | None:
    """The reference of T: the full fine-tuning run among these, or the file that the configuration names."""
    run = next((entrant.run.path for entrant in entrants if entrant.method == "full"), None)
    return run or (Path(config.evaluate.full_scores) if config.evaluate.full_scores else None)


# --- the table -------------------------------------------------------------------------------------------------------


def _write(
    config: Config,
    groups: dict[str, list[Entrant]],
    tried: dict[str, list[Entrant]],
    chosen: dict[str, Entrant],
    notes: list[str],
    missing: int = 0,
) -> None:
    """Write the table.

    Args:
        groups: the entrants of each row, one a seed.
        tried: those of each label with the first seed.
        chosen: of those, the chosen ones; T of the first seed is relative to the full fine-tuning among them, where there is any.
        missing: how many runs are not complete.
    """
    folder, only = Path(config.out), the_rest(config)
    named = [(name, one) for name, group in groups.items() for one in group]
    references = [*chosen.values(), *(one for _, one in named)]
    fulls = {seed: _full_folder(config, [one for one in references if one.seed == seed]) for seed in seeds(config)}
    rows = [_row(name, one, fulls[seed], only, save=not missing) for seed in seeds(config) for name, one in named if one.seed == seed]
    entries = {name: [Entry(one.run.path, fulls[one.seed]) for one in group] for name, group in groups.items()}
    base = mean_scores(folder / "base", only) if config.evaluate.asks else {}
    found = standings(folder / "base", entries, config.evaluate.resamples, config.seed, only) if base else {}
    comparison = {
        "rows": rows,
        "base": base,
        "methods": {name: {letter: asdict(x) for letter, x in standing.estimates.items()} for name, standing in found.items()},
        "differences": differences(found) if set(groups) <= set(tried) else [],  # one learning rate of a method is no rival of another
        "frontier": _frontier(config, tried, chosen, fulls[seeds(config)[0]], only),
        "missing": missing,
        "notes": notes,
    }
    write_json(folder / "comparison.json", comparison)
    write_text(folder / "comparison.md", comparison_markdown(comparison))
    write_text(folder / "comparison.csv", comparison_csv(comparison))


def _row(name: str, entrant: Entrant, full: Path | None, only: Callable[[str], bool] | None, save: bool) -> dict[str, Any]:
    """One line of the table; `save`: as the run's own summary too."""
    run = entrant.run
    asks = run.config.evaluate.asks
    plan, trained = Plan.load(run.path / "plan.json"), TrainResult.load(run.path / "train.json")
    summary = run.summarise(full, only, save) if asks else Summary(None, None, None, None)
    values = asdict(summary)
    before = [record for step in run.steps_before if (record := run.place.record(step))]
    return {
        "method": name,
        "seed": run.config.seed,
        "folder": run.path.name,
        "rank": plan.rank,
        "learning_rate": run.config.train.learning_rate,
        "parameters": trained.parameters,
        **{key: values[key] for key in ("K", "T", "KT", "recovered", "forgetting")},
        **{name: _nats(summary, kind) for kind, name in (("knowledge", "kept"), ("task", "learned"))},
        "seconds_init": sum(record["seconds"] for record in before),
        "seconds_train": trained.seconds,
        "peak_memory_init_gib": max((record["peak_memory_gib"] for record in before if "peak_memory_gib" in record), default=None),
        "peak_memory_gib": trained.peak_memory_gib,
        "benchmarks": {
            entry["name"]: {"score": entry["after"], "low": entry.get("low"), "high": entry.get("high"), "kind": entry["kind"]}
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
    config: Config, tried: dict[str, list[Entrant]], chosen: dict[str, Entrant], full: Path | None, only: Callable[[str], bool] | None
) -> dict[str, Any] | None:
    """Every method at every learning rate: its curve of K against T, and what it says where methods are equal."""
    if not config.compare.tune:
        return None
    runs = {one.run.path.name: [Entry(one.run.path, full)] for group in tried.values() for one in group}
    known = standings(Path(config.out) / "base", runs, config.evaluate.resamples, config.seed, only)
    curves = {
        label: [_point(one, known[one.run.path.name], one is chosen.get(label)) for one in group] for label, group in tried.items() if group
    }
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


def _levels(curves: list[list[float]]) -> list[float]:
    """Levels that the curves span, evenly; none where there is no such range. A method that never comes so far has no value
    there, and does not take the others' away."""
    left = sorted(curves, key=max)
    while left:
        low, high = max(map(min, left)), max(left[0])
        if high > low:
            shares = [step / (LEVELS - 1) for step in range(LEVELS)]
            return [low * (1 - share) + high * share for share in shares]  # at the ends exactly these: a curve ends there
        left = left[1:] if len(left) > 2 else []
    return []


def _notes(config: Config, chosen: dict[str, Entrant], measure: str) -> list[str]:
    """What a reader must know to judge the table."""
    settings = config.compare.settings
    notes = [f"{label}: {', '.join(f'{key}={value}' for key, value in settings[label].items())}" for label in chosen if settings.get(label)]
    searched = {label: one.run.path / "boundary.json" for label, one in chosen.items()}
    notes += [f"{label}: {Boundary.load(path).sentence}" for label, path in searched.items() if path.is_file()]
    if not config.compare.tune:
        return [f"Learning rate {config.train.learning_rate:g} for every method unless its own settings say otherwise.", *notes]
    rates = ", ".join(f"{label} {one.run.config.train.learning_rate:g}" for label, one in chosen.items())
    tried = ", ".join(f"{factor:g}" for factor in config.compare.tune)
    return [
        f"Learning rates, each chosen by {measure} on {config.compare.held_out:.0%} of the questions, which the table leaves out, "
        f"among {tried} times its own: {rates}.",
        *notes,
    ]
