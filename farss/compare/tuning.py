"""The learning rate of each method, chosen on questions that the table leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from farss.artifacts import Kind, held_out
from farss.compare.entrants import Entrant, has_own_full
from farss.config import Config, QuestionSet, is_reference
from farss.errors import ConfigError, FarssError
from farss.maths.metrics import balance
from farss.tasks.outcomes import Estimate, Only, outcomes_of, read_scores
from farss.tasks.questions import draw_from_files
from farss.tasks.standing import Entry, standings, task_score

FEWEST = 10
"""Questions of a task of lm_eval that choose, on average: which ones it has is not known before it is asked."""


def check_tuning(config: Config) -> None:
    """Refuse to tune by a measure that will not be there.

    Raises:
        ConfigError: KT needs full fine-tuning, and knowledge and task questions, of each of which some choose and some are left.
    """
    if not config.compare.tune:
        return
    if not config.evaluate.full_scores and not has_own_full(config):
        raise ConfigError(
            "compare.tune chooses by KT, which needs full fine-tuning: add full to compare.methods or, where it does not "
            "fit, name the scores.json of another run in evaluate.full_scores"
        )
    if not (config.evaluate.knowledge and config.evaluate.task):
        raise ConfigError("compare.tune chooses by KT: name questions in evaluate.knowledge and evaluate.task")
    chooses, limit = held_out(config.compare.held_out), config.evaluate.limit
    for entry in config.evaluate.asked:
        chosen_by = entry not in config.evaluate.other
        if isinstance(entry, str) and chosen_by and limit is not None and limit * config.compare.held_out < FEWEST:
            raise ConfigError(
                f"compare.held_out={config.compare.held_out} takes about {limit * config.compare.held_out:g} of the {limit} questions of "
                f"{entry!r} (evaluate.limit) to choose learning rates by: set "
                f"evaluate.limit={math.ceil(FEWEST / config.compare.held_out)}"
            )
        if isinstance(entry, QuestionSet):
            asked = draw_from_files(entry, config.seed).asked
            if (count := sum(chooses(str(row["id"])) for row in asked)) in ((0, len(asked)) if chosen_by else (len(asked),)):
                raise ConfigError(
                    f"compare.held_out={config.compare.held_out} takes {count} of the {len(asked)} questions of {entry.name!r} to choose "
                    "learning rates by, and the table needs the others: ask more questions, or change it"
                )


def the_rest(config: Config) -> Only | None:
    """Whether a question counts in the table; None: all do."""
    if not config.compare.tune:
        return None
    chooses = held_out(config.compare.held_out)
    return lambda key: not chooses(key)


def choose(config: Config, tried: dict[str, list[Entrant]]) -> tuple[dict[str, Entrant], str]:
    """The entrant of each label that is best on the held-out questions, and by what: by KT, and full fine-tuning by what it
    learned alone (of equal scores by the likelihood of the answers), since the others are measured by it. Of equal ones the smaller
    learning rate.

    Raises:
        FarssError: there is nothing to choose by on the held-out questions.
    """
    if not config.compare.tune:
        return {label: entrants[0] for label, entrants in tried.items()}, ""
    found = best_full(config, tried)
    full = full_folder(config, [*found.values()])
    assert full is not None  # `check_tuning`
    everyone = [one for group in tried.values() for one in group]
    known = _held_out_estimates(config, {one.run.path.name: one.run.path for one in everyone}, full)
    reference = _held_out_estimates(config, {"": full}, None, ("task",))[""]
    measure, values = measured(known, reference["learned"].value if "learned" in reference else 0.0)
    for label, group in tried.items():
        if label not in found:
            found[label] = max(_by_rate(group), key=lambda one: values[one.run.path.name])
    return {label: found[label] for label in tried}, measure


def best_full(config: Config, tried: dict[str, list[Entrant]]) -> dict[str, Entrant]:
    """Of each label that is full fine-tuning, the entrant that learned most of the task by the held-out questions."""
    groups = {label: _by_rate(group) for label, group in tried.items() if group and is_reference(label)}
    folders = {one.run.path.name: one.run.path for group in groups.values() for one in group}
    known = _held_out_estimates(config, folders, None, ("task",))
    learned = {name: each["learned"].value for name, each in known.items() if "learned" in each}
    only = held_out(config.compare.held_out)

    def learning(one: Entrant) -> tuple[float, float]:
        score, gain = task_score(one.run.path, only), learned.get(one.run.path.name, 0.0)
        return (gain, score) if config.evaluate.learned_by == "likelihood" else (score, gain)

    return {label: max(group, key=learning) for label, group in groups.items()}


def _by_rate(entrants: list[Entrant]) -> list[Entrant]:
    """The smallest learning rate first, which is taken of equal ones."""
    return sorted(entrants, key=lambda one: one.factor or 1.0)


def _held_out_estimates(
    config: Config, folders: dict[str, Path], full: Path | None, kinds: Sequence[Kind] = ("knowledge", "task")
) -> dict[str, dict[str, Estimate]]:
    entries = {name: [Entry(folder, full)] for name, folder in folders.items()}
    only = held_out(config.compare.held_out)
    known = standings(Path(config.out) / "base", entries, config, only, kinds)
    return {name: standing.estimates for name, standing in known.items()}


def measured(known: dict[str, dict[str, Estimate]], reach: float) -> tuple[str, dict[str, float]]:
    """What learning rates are chosen by, and its value for every run. `reach`: what full fine-tuning learned, in nats.

    Where the few questions that are held out have no ratio of scores, because the untouched model or full fine-tuning solves none of
    them, how much likelier their right answers became still says what was kept and what was learned.

    Raises:
        FarssError: the log-likelihoods say nothing either.
    """
    if all("KT" in each for each in known.values()):
        return "KT", {name: each["KT"].value for name, each in known.items()}
    if not all({"kept", "learned"} <= set(each) for each in known.values()) or reach <= 0:
        raise FarssError(
            "compare.tune cannot choose: the untouched model or full fine-tuning solves none of the held-out questions, and by the "
            "log-likelihoods of their answers full fine-tuning has learned nothing: train for longer, ask more questions, or leave out "
            "compare.tune"
        )
    scored = all("K" in each for each in known.values())

    def value(each: dict[str, Estimate]) -> float:
        kept = each["K"].value if scored else math.exp(each["kept"].value)
        return balance(max(0.0, kept), max(0.0, each["learned"].value / reach))

    return "log-likelihoods (too few are solved for KT)", {name: value(each) for name, each in known.items()}


def right_answers(config: Config) -> int:
    """How many of the held-out knowledge questions the untouched model answers: by K of these the learning rates are chosen."""
    run, only = read_scores(Path(config.out) / "base"), held_out(config.compare.held_out)
    return round(sum(float(outcomes_of(name, "knowledge", [run], only).scores.sum()) for name in run[0].knowledge))


def full_folder(config: Config, entrants: list[Entrant]) -> Path | None:
    """The reference of T: the full fine-tuning run among these, or the file that the configuration of a comparison without one names."""
    run = next((entrant.run.path for entrant in entrants if is_reference(entrant.label)), None)
    named = None if has_own_full(config) else config.evaluate.full_scores
    return run or (Path(named) if named else None)
