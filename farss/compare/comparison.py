"""Methods x learning rates x seeds -> one table. What the runs can share (surveys, the base's answers) is made once."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from farss.compare.entrants import Entrant, Item, check_labels, factors, seeds
from farss.compare.table import notes_of, table_of, write_table
from farss.compare.tuning import best_full, check_tuning, choose
from farss.config import Config
from farss.configfile import CONFIG, load
from farss.errors import ConfigError, FarssError, NumericalError
from farss.files import read_json
from farss.folder import Folder, resolve
from farss.handover import delete_weights
from farss.inputs import Loaded
from farss.jobs import Tell, bare, do_all, raise_all, silent
from farss.options import difference, table_options
from farss.pipeline import Run
from farss.report import write_report
from farss.versions import versions

log = logging.getLogger(__name__)


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
    for entrant in _possible(config, tell, loaded):  # of the other seeds too, whose learning rate may not be known yet
        entrant.run.check_unchanged()
        entrant.run.check_weights()
        if not entrant.run.has_trained:
            _ = entrant.run.inputs.examples  # another seed may draw rows that cannot be used
    _warn_of_others(config)
    Folder(config.out).claim(config, versions())
    _remove_other_table(config)
    if not all(entrant.run.has_trained for entrant in everyone):
        replace(everyone[0].run, config=config).warn()
    diverged, done = list[str](), set[Path]()
    with _table_in_any_case(config):
        if config.compare.tune:
            try:
                _run_all(everyone)
            except NumericalError as error:  # of a rate that is too high, beside which others of the method are there to be chosen
                tried = {label: [entrant for entrant in group if entrant.run.complete] for label, group in tried.items()}
                if not all(tried.values()):
                    raise
                everyone = [entrant for entrants in tried.values() for entrant in entrants]
                diverged = [f"Left out, as no training came to its end: {error}."]
            done = {entrant.run.path for entrant in everyone}
        chosen, measure = choose(config, tried)
        final = [Entrant(label, chosen[label].factor, seed, config, loaded, tell) for seed in seeds(config) for label in labels]
        _run_all([entrant for entrant in final if entrant.run.path not in done])
    groups = {label: [one for one in final if one.label == label] for label in labels}
    with Folder(config.out).step("table", table_options(config)):
        write_table(Path(config.out), table_of(config, groups, tried, chosen, [*notes_of(config, chosen, measure), *diverged]))
    for entrant in {one.run.path: one for one in [*final, *everyone]}.values():
        entrant.run.report()
    return write_report(Path(config.out)).parent


def _warn_of_others(config: Config) -> None:
    """Say which runs of the folder will not stand in its table."""
    try:
        before = load(Path(config.out) / CONFIG)
    except FarssError:
        return
    kinds = (("methods", before.compare.methods, config.compare.methods), ("seeds", seeds(before), seeds(config)))
    for name, were, now in kinds if before.compare.methods else ():
        if others := [each for each in were if each not in now]:
            told = f"compare.{name} was {were} in {config.out}, and is {now}"
            log.warning(f"{told}: the table will be without {', '.join(map(str, others))}. Name them too, and nothing is done twice.")


def _remove_other_table(config: Config) -> None:
    """A table of other options is none of the configuration that lies beside it now."""
    record = Folder(config.out).record("table")
    if record and difference(record["options"], table_options(config)):
        for kind in ("json", "md", "csv"):
            (Path(config.out) / f"comparison.{kind}").unlink(missing_ok=True)


def run_within(config: Config, tell: Tell) -> Run | None:
    """The run of a comparison whose folder a configuration names, with all that it shares, to be exported otherwise; None where there
    is none.

    Raises:
        ConfigError: it was made with other options.
    """
    config = resolve(config)
    folder = Path(config.out)
    try:
        whole = resolve(replace(load(folder.parent / CONFIG), out=str(folder.parent)))
        check_labels(whole)
    except FarssError:  # what lies there is no concern of this run
        return None
    run = next((one.run for one in _possible(whole, tell, Loaded()) if one.run.path == folder), None)
    if run is None:
        return None
    if replace(run.config, export=config.export) != config:
        raise ConfigError(f"{folder} is a run of the comparison above it, and was made with other options: only export's may differ")
    return replace(run, config=config)


@contextmanager
def _table_in_any_case(config: Config) -> Iterator[None]:
    """Where a run fails, leave the table and the page of those that are complete."""
    try:
        yield
    except FarssError:
        if write_so_far(config):
            write_report(Path(config.out))
        raise


def _possible(config: Config, tell: Tell, loaded: Loaded) -> Iterator[Entrant]:
    """Every run that a comparison may make."""
    for each in itertools.product(config.compare.methods, factors(config), seeds(config)):
        yield Entrant(*each, config, loaded, tell)


def write_so_far(config: Config) -> bool:
    """Write the table of the runs that are complete, where some are not; nothing is run.

    Learning rates are tried before one is chosen, so each has a row of its own. The questions are those of the finished table.

    Returns:
        False where no run is complete, or the finished table is there: it stays, whatever was deleted since.
    """
    config = resolve(config)
    check_labels(config)
    if _is_finished(config):
        return False
    labels, (first, *others) = config.compare.methods, seeds(config)
    done = [one for one in _possible(config, silent, Loaded()) if one.run.complete]
    wanted = len(labels) * (len(factors(config)) + len(others))
    # of the other seeds one learning rate each is wanted, which is not known yet
    found = len({(one.label, one.seed, one.factor if one.seed == first else None) for one in done})
    if not done:
        return False
    groups: dict[str, list[Entrant]] = {}
    for one in done:
        groups.setdefault(one.label if one.factor is None else f"{one.label} {one.run.config.train.learning_rate:g}", []).append(one)
    tried = {label: [one for one in done if one.label == label and one.seed == first] for label in labels}
    best = best_full(config, tried) if config.compare.tune else {}
    table = table_of(config, groups, tried, best, [f"So far: {found} of {wanted} runs are complete."], wanted - found)
    if _is_finished(config):  # in the meantime, which may be minutes
        return False
    Folder(config.out).begin("table", table_options(config))
    write_table(Path(config.out), table)
    return True


def _is_finished(config: Config) -> bool:
    """Whether the table is there that `compare` writes at its end, with these options."""
    path = Path(config.out) / "comparison.json"
    table: dict[str, Any] = read_json(path) if path.is_file() else {"missing": 1}
    rows = {(row["method"], row["seed"]) for row in table.get("rows", [])}
    folder = Folder(config.out)
    same = folder.record("table") is None or folder.is_done("table", table_options(config))
    return same and not table.get("missing") and rows >= set(itertools.product(config.compare.methods, seeds(config)))


def _run_all(entrants: list[Entrant]) -> None:
    """Every run, as many at a time as `compare.jobs` says; what they share is made before."""
    if not entrants:
        return
    config, tell = entrants[0].config, entrants[0].tell
    failed = _share_all(entrants) if config.compare.jobs > 1 else {}
    errors = [*failed.values()]
    try:
        do_all(_run_one, [entrant.item for entrant in entrants if entrant.label not in failed], config.compare.jobs, tell)
    except FarssError as error:
        errors.append(error)
    raise_all(errors)


def _share_all(entrants: list[Entrant]) -> dict[str, FarssError]:
    """The base's answers and every kind of statistics, each in a process of its own; those of one text come one after the other. Then the
    searches for boundaries.

    Returns:
        For each label that lacks something of it, why.
    """
    config, tell = entrants[0].config, entrants[0].tell
    works: dict[tuple[Any, ...], dict[str, Item]] = {} if entrants[0].run.answers.base_is_known else {(Run.base,): {"": entrants[0].item}}
    for entrant in entrants:
        entrant.run.claim()
        if place := entrant.run.source:
            *source, kind = place
            works.setdefault((Run.statistics, *source), {}).setdefault(kind, entrant.item)
    failed: dict[str, FarssError] = {}
    jobs = max(2, min(config.compare.jobs, len(works)))  # fewer, which have more threads each; in processes of their own
    try:
        do_all(_share_one, [(make, [*items.values()]) for (make, *_), items in works.items()], jobs, tell)
    except FarssError as error:
        failed = {entrant.label: bare(error) for entrant in entrants if not entrant.run.has_shared}
    for entrant in entrants:
        if entrant.label not in failed:
            try:
                entrant.run.before_plan()
            except FarssError as error:
                failed[entrant.label] = bare(error)
    return failed


def _share_one(work: tuple[Callable[[Run], Any], list[Item]], tell: Tell) -> None:
    make, items = work
    for item in items:
        make(Entrant(*item, tell).run)


def _run_one(item: Item, tell: Tell) -> None:
    entrant = Entrant(*item, tell)
    run = entrant.run
    if not (run.complete and run.has_shared) or run.has_lost_weights:  # where nothing is missing, it stays in the form that it has
        try:
            run.all_but_report()
        except FarssError as error:
            raise type(error)(f"{run.path.name}: {error}") from error
    if entrant.config.compare.keep == "scores" and entrant.config.evaluate.asks:
        delete_weights(run.path)
