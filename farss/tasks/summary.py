"""Before, after and full fine-tuning, question by question: what was kept, what was learned, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from farss.artifacts import KINDS, Kind, Scores, TaskScore, questions, write_json
from farss.config import Config
from farss.errors import FarssError, FolderError
from farss.maths.metrics import (
    Array,
    balance,
    balances,
    bootstrap,
    interval,
    knowledge_kept,
    mean_ratios,
    paired_difference,
    task_learned,
)

BEFORE, AFTER, FULL = 0, 1, 2


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchmarkSummary:
    """One benchmark before and after, on the same questions."""

    name: str
    kind: Kind
    metric: str
    questions: int
    fewshot: int
    before: float
    """Mean score of the base model, 0 .. 1, and its 95 % interval."""
    before_low: float
    before_high: float
    after: float
    """Mean score of the trained model and its interval."""
    low: float
    high: float
    full: float | None
    """Full fine-tuning's score and its interval; None where there is no such run or it was not asked."""
    full_low: float | None
    full_high: float | None
    change: Estimate
    """After minus before."""
    gold_before: float | None
    """Mean log-likelihood (nats) of the gold answer before; None where there is no single gold answer."""
    gold_after: float | None
    gold_change: Estimate | None
    """After minus before; it moves long before the score does."""


@dataclass(frozen=True)
class Summary:
    """What `summary.json` says."""

    K: Estimate | None
    """Knowledge kept (eq. 36); None when nothing was asked or the base model scores 0 somewhere: see `notes`."""
    T: Estimate | None
    """Task learned, relative to full fine-tuning (eq. 37), by scores or by likelihoods: see `learned_by`. None without its scores:
    see `notes`."""
    KT: Estimate | None
    """Harmonic mean of K and T (eq. 38)."""
    forgetting: float | None
    """Mean token loss (nats) on general text, after minus before."""
    benchmarks: list[BenchmarkSummary] = field(default_factory=list)
    resamples: int = 0
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    recovered: Estimate | None = None
    """K after a few steps of question answering, relative to the base after the same: what is missing here is lost and not
    only masked. None where it was not asked."""
    learned_by: str = "score"
    """What T is made of (`evaluate.learned_by`)."""
    retained: Estimate | None = None
    """Of the knowledge questions that the base model answers right, the share that still are, mean over the benchmarks. K counts
    what is answered by chance, or in a better form, for what was lost; this does not. None where K has no value."""

    def save(self, path: Path) -> None:
        """Write `summary.json`."""
        write_json(path, asdict(self))


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcomes:
    """One benchmark's outcomes, row by row of the same questions."""

    score: TaskScore
    kind: Kind
    scores: Array
    """`[models, questions]`, in the order of the runs: before, after and, where it was asked, full fine-tuning."""
    gold: Array
    """`[models, questions]` gold log-likelihoods; NaN where there is none."""

    @property
    def still(self) -> Array:
        """`scores`, of what the first model answers right."""
        return self.scores * self.scores[:1]

    @property
    def known(self) -> Array:
        """`gold` of the questions where every model has one."""
        found: Array = self.gold[:, np.isfinite(self.gold).all(axis=0)]
        return found

    @property
    def gains(self) -> Array:
        """How much likelier (nats) the right answers of these are than before."""
        return self.known - self.known[:1]


def read_scores(folder: Path) -> tuple[Scores, Path]:
    """The scores and the folder of the per-question records; `folder` may also be the scores.json itself.

    Raises:
        FolderError: it is neither.
    """
    if folder.is_file() and folder.suffix != ".json":
        raise FolderError(f"{folder} holds no scores: name a scores.json, or the folder of one")
    path = folder if folder.suffix == ".json" else folder / "scores.json"
    return Scores.load(path), path.parent / "scores"


def outcomes_of(name: str, kind: Kind, runs: Sequence[tuple[Scores, Path]], only: Callable[[str], bool] | None = None) -> Outcomes:
    """Line up one benchmark's records of several runs.

    Args:
        only: which questions count, by their ids; None: all.

    Raises:
        FolderError: the runs answered different questions, or were scored differently.
    """
    tables = []
    for scores, folder in runs:
        records = {str(record["id"]): record for record in questions(folder, name)}
        tables.append({key: record for key, record in records.items() if only is None or only(key)})
        metric, first = getattr(scores, kind)[name].metric, getattr(runs[0][0], kind)[name].metric
        asked, here = ({key: (record.get("prompt"), record["gold"]) for key, record in table.items()} for table in (tables[0], tables[-1]))
        if metric != first or list(asked.items()) != list(here.items()):
            raise FolderError(
                f"{folder} and {runs[0][1]} hold answers to different questions of {name!r}: evaluate both with the "
                "same question file, prompt, examples, limit, metric and seed"
            )
    if not tables[0]:
        raise FolderError(f"no question of {name!r} is left to be scored: ask more questions, or change compare.held_out")
    scored = [[record["score"] for record in table.values()] for table in tables]
    gold_likelihoods = [[record["gold_loglikelihood"] for record in table.values()] for table in tables]
    return Outcomes(getattr(runs[0][0], kind)[name], kind, np.array(scored, float), np.array(gold_likelihoods, float))


# --- summarising -----------------------------------------------------------------------------------------------------


def summarise(before: Path, after: Path, full: Path | None, config: Config, only: Callable[[str], bool] | None = None) -> Summary:
    """Compare two evaluations question by question, with full fine-tuning as the reference of T.

    Args:
        before, after, full: folders that `evaluate` wrote to, or their scores.json.
        only: which questions count, by their ids; None: all.

    Raises:
        FolderError: scores are missing, or the runs answered different questions.
    """
    runs = [read_scores(before), read_scores(after)]
    reference = [read_scores(full)] if full is not None else []
    outcomes = [
        _beside(name, kind, runs, [each for each in reference if name in getattr(each[0], kind)], only)
        for kind in KINDS
        for name in getattr(runs[0][0], kind)
        if name in getattr(runs[1][0], kind)
    ]
    resamples, seed = config.evaluate.resamples, config.seed
    # Each kind anew, as in `standings`: a run's intervals are those of its row in a comparison.
    of_kinds = [[each.scores for each in outcomes if each.kind == kind] for kind in KINDS]
    draws = [drawn for scores in of_kinds for drawn in bootstrap(scores, resamples, seed)]
    notes = _unpaired(runs[0][0], runs[1][0]) + _unlike(runs[0][0], runs[1][0], reference[0][0] if reference else None)
    k, k_draws = _kept(outcomes, draws, notes)
    still = {each.score.name: each.still for each in outcomes if each.kind == "knowledge"}
    drawn_still = bootstrap([*still.values()], resamples, seed)
    retained = _ratio(still, drawn_still, BEFORE, "retained", knowledge_kept, [])[0] if k is not None else None
    t, t_draws = _learned(outcomes, draws, full is not None, config, notes)
    if t is not None and (method := reference[0][0].meta.get("method", "full")) != "full":
        notes.append(f"T is relative to the run of {method} that evaluate.full_scores names, and not to full fine-tuning.")
    kt = None
    if k is not None and t is not None and k_draws is not None and t_draws is not None:
        kt = Estimate(balance(k.value, t.value), *interval(balances(k_draws, t_draws)))
    losses = (runs[0][0].text_loss, runs[1][0].text_loss)
    forgetting = losses[1] - losses[0] if losses[0] is not None and losses[1] is not None else None
    lines = [_line(each, drawn, resamples, seed) for each, drawn in zip(outcomes, draws, strict=True)]
    return Summary(k, t, kt, forgetting, lines, resamples, seed, notes, learned_by=config.evaluate.learned_by, retained=retained)


def _beside(
    name: str, kind: Kind, runs: list[tuple[Scores, Path]], reference: list[tuple[Scores, Path]], only: Callable[[str], bool] | None
) -> Outcomes:
    """One benchmark's outcomes, full fine-tuning's beside them. T needs it; of knowledge it may have been asked other questions."""
    try:
        return outcomes_of(name, kind, [*runs, *reference], only)
    except FolderError:
        if kind == "task" or not reference:
            raise
        return outcomes_of(name, kind, runs, only)


def _unpaired(before: Scores, after: Scores) -> list[str]:
    """A note for every benchmark that only one of the two runs was asked."""
    both: list[str] = []
    for kind in KINDS:
        only = set(getattr(before, kind)) ^ set(getattr(after, kind))
        both += [f"{name!r} was asked only before or only after, so it is left out." for name in sorted(only)]
    return both


def _unlike(before: Scores, after: Scores, full: Scores | None) -> list[str]:
    """What makes the runs' answers differ beside the training."""
    computed = [scores.meta.get("dtype") for scores in (before, after)]
    found = []
    if all(computed) and computed[0] != computed[1]:
        found.append(f"The untouched model answered in {computed[0]} and the trained one in {computed[1]}, on another machine or device.")
    models = [scores.meta.get("path") for scores in (after, *([full] if full else []))]
    if all(models) and models[0] != models[-1]:
        found.append(
            f"T is relative to the model in {models[-1]}, and this one is that in {models[0]}: T says nothing unless they are one."
        )
    return found


def _kept(outcomes: list[Outcomes], draws: list[Array], notes: list[str]) -> tuple[Estimate | None, Array | None]:
    """K and its draws; None and a note where it has no value."""
    marks, drawn = _of_kind("knowledge", outcomes, draws)
    if not marks:
        return None, None
    return _ratio(marks, drawn, BEFORE, "K", knowledge_kept, notes)


def _learned(
    outcomes: list[Outcomes], draws: list[Array], has_full: bool, config: Config, notes: list[str]
) -> tuple[Estimate | None, Array | None]:
    """T and its draws; None and a note where it has no value."""
    marks, drawn = _of_kind("task", outcomes, draws)
    if not marks:
        return None, None
    if not has_full:
        notes.append(
            "T is not computed: it is relative to full fine-tuning, of which there is no run yet: compare with full, or name its scores in "
            "evaluate.full_scores."
        )
        return None, None
    lacking = [name for name, each in marks.items() if len(each) <= FULL]
    if lacking:
        notes.append(f"T is not computed: the full fine-tuning run was not asked {lacking[0]!r}.")
        return None, None
    if config.evaluate.learned_by == "likelihood":
        marks = {each.score.name: each.gains for each in outcomes if each.kind == "task"}
        silent = [name for name, each in marks.items() if not each.size or each[FULL].mean() <= 0]
        if silent:
            notes.append(
                f"T is not computed: full fine-tuning made the right answers of {silent[0]!r} no likelier, or they have no likelihood."
            )
            return None, None
        drawn = bootstrap([*marks.values()], config.evaluate.resamples, config.seed)
        notes.append(
            "T says how much likelier right answers became, against full fine-tuning (evaluate.learned_by), and not how many are given."
        )
    return _ratio(marks, drawn, FULL, "T", task_learned, notes)


def _of_kind(kind: Kind, outcomes: list[Outcomes], draws: list[Array]) -> tuple[dict[str, Array], list[Array]]:
    """The scores of the benchmarks of a kind, and their draws."""
    chosen = [(each, drawn) for each, drawn in zip(outcomes, draws, strict=True) if each.kind == kind]
    return {each.score.name: each.scores for each, _ in chosen}, [drawn for _, drawn in chosen]


def _ratio(
    marks: dict[str, Array],
    draws: list[Array],
    bottom: int,
    letter: str,
    metric: Callable[[dict[str, float], dict[str, float]], float],
    notes: list[str],
) -> tuple[Estimate | None, Array | None]:
    tops, bottoms = ({name: float(each[model].mean()) for name, each in marks.items()} for model in (AFTER, bottom))
    try:
        value = metric(tops, bottoms)
    except FarssError as error:
        notes.append(f"{letter} is not computed: {error}.")
        return None, None
    # Resamples in which a reference happens to score 0 have no ratio; the interval is that of the others.
    drawn = mean_ratios(draws, AFTER, bottom)
    return Estimate(value, *interval(drawn)), drawn


def _line(each: Outcomes, drawn: Array, resamples: int, seed: int) -> BenchmarkSummary:
    ends = [interval(drawn[:, place]) for place in range(len(each.scores))]
    has_full = len(each.scores) > FULL
    change = paired_difference(each.scores[AFTER], each.scores[BEFORE], resamples, seed)
    gold = each.known
    gold_change = paired_difference(gold[AFTER], gold[BEFORE], resamples, seed) if gold.size else None
    return BenchmarkSummary(
        name=each.score.name,
        kind=each.kind,
        metric=each.score.metric,
        questions=each.scores.shape[1],
        fewshot=each.score.fewshot,
        before=float(each.scores[BEFORE].mean()),
        before_low=ends[BEFORE][0],
        before_high=ends[BEFORE][1],
        after=float(each.scores[AFTER].mean()),
        low=ends[AFTER][0],
        high=ends[AFTER][1],
        full=float(each.scores[FULL].mean()) if has_full else None,
        full_low=ends[FULL][0] if has_full else None,
        full_high=ends[FULL][1] if has_full else None,
        change=Estimate(*change),
        gold_before=float(gold[BEFORE].mean()) if gold.size else None,
        gold_after=float(gold[AFTER].mean()) if gold.size else None,
        gold_change=Estimate(*gold_change) if gold_change is not None else None,
    )
