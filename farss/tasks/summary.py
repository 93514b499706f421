"""Before, after and full fine-tuning, question by question: what was kept, what was learned, and how sure that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from farss.artifacts import KINDS, Kind, Scores
from farss.config import REFERENCE, Config
from farss.errors import FolderError
from farss.files import write_json
from farss.maths.metrics import Array, bootstrap, interval, paired_difference
from farss.tasks.outcomes import Estimate, Only, Outcomes, outcomes_of, read_scores
from farss.tasks.standing import Entry, Standing, standings, stream_of

BEFORE, AFTER, FULL = 0, 1, 2
ENOUGH = 20
"""Right answers from which on the bootstrap's 95 % intervals hold the truth 92 times of 100 and more (`benchmarks/coverage.py`)."""
LEFT_OUT = 0.01
"""Share of the resamples that an interval may leave out unsaid."""


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
    reference: str = "full fine-tuning"
    """What T is relative to."""
    retained: Estimate | None = None
    """Of the knowledge questions that the base model answers right, the share that still are, mean over the benchmarks. K counts
    what is answered by chance, or in a better form, for what was lost; this does not. None where K has no value."""

    def save(self, path: Path) -> None:
        """Write `summary.json`."""
        write_json(path, asdict(self))


# --- summarising -----------------------------------------------------------------------------------------------------


def summarise(before: Path, after: Path, full: Path | None, config: Config, only: Only | None = None) -> Summary:
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
    notes = _unpaired(runs[0][0], runs[1][0]) + _unlike(runs[0][0], runs[1][0], reference[0][0] if reference else None)
    asked = {kind: [each for each in outcomes if each.kind == kind] for kind in KINDS}
    who = _named(reference[0][0].meta.get("method", REFERENCE)) if reference else _named(REFERENCE)
    no_k = _why_no("K", asked["knowledge"], BEFORE, "the base model", "ask easier questions, or more, or show it examples (fewshot)")
    no_t = _why_no_t(asked["task"], bool(reference), who, config)
    stands = standings(before, {"run": [Entry(after, None if no_t else full)]}, config, only)["run"]
    found = stands.estimates
    notes += [*no_k, *no_t, *(_about_t(reference[0][0], config) if "T" in found else []), *_few(stands)]
    notes += _narrow("K", asked["knowledge"], BEFORE, "the untouched model") if "K" in found else []
    notes += _narrow("T", asked["task"], FULL, who) if "T" in found and config.evaluate.learned_by == "score" else []
    resamples, seed = config.evaluate.resamples, config.seed
    # each kind anew, as in `standings`, so that a benchmark's interval does not depend on what else is asked
    draws = [
        drawn for kind, of_kind in asked.items() for drawn in bootstrap([each.scores for each in of_kind], resamples, stream_of(seed, kind))
    ]
    losses = (runs[0][0].text_loss, runs[1][0].text_loss)
    return Summary(
        **{metric: found.get(metric) for metric in ("K", "T", "KT", "retained")},  # type: ignore[arg-type]
        forgetting=losses[1] - losses[0] if losses[0] is not None and losses[1] is not None else None,
        benchmarks=[_line(each, drawn, resamples, seed) for each, drawn in zip(outcomes, draws, strict=True)],
        resamples=resamples,
        seed=seed,
        notes=notes,
        learned_by=config.evaluate.learned_by,
        reference=who,
    )


def _named(method: str) -> str:
    """The reference of T in words."""
    return "full fine-tuning" if method == REFERENCE else f"the run of {method}"


def _beside(name: str, kind: Kind, runs: list[tuple[Scores, Path]], reference: list[tuple[Scores, Path]], only: Only | None) -> Outcomes:
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


def _why_no(letter: str, outcomes: list[Outcomes], reference: int, who: str, cure: str) -> list[str]:
    """Why a ratio of scores has no value, if it has none."""
    for each in outcomes:
        if (value := float(each.scores[reference].mean())) <= 0:
            name = each.score.name
            means_nothing = f"so a ratio to it means nothing: leave {name!r} out, or {cure}"
            return [f"{letter} is not computed: {who} scores {value:.3g} on {name!r}, {means_nothing}."]
    return []


def _why_no_t(tasks: list[Outcomes], has_full: bool, who: str, config: Config) -> list[str]:
    if not tasks:
        return []
    if not has_full and config.plan.method == REFERENCE:
        return ["T is not computed: this run is what it is relative to. Other runs name its scores.json in evaluate.full_scores."]
    if not has_full:
        return [
            "T is not computed: it is relative to full fine-tuning, of which there is no run yet: compare with full, or name its scores in "
            "evaluate.full_scores."
        ]
    if lacking := [each.score.name for each in tasks if len(each.scores) <= FULL]:
        return [f"T is not computed: {who} was not asked {lacking[0]!r}."]
    if config.evaluate.learned_by == "score":
        return _why_no("T", tasks, FULL, who, "ask more, or measure T by likelihoods (evaluate.learned_by=likelihood)")
    if silent := [each.score.name for each in tasks if not each.gains.size or each.gains[FULL].mean() <= 0]:
        return [f"T is not computed: {who} made the right answers of {silent[0]!r} no likelier, or they have no likelihood."]
    return []


def _few(stands: Standing) -> list[str]:
    """Whose interval leaves resamples out, because what it is relative to is nought in them."""
    missing = {metric: 1 - np.isfinite(stands.draws[metric]).mean() for metric in ("K", "T") if metric in stands.draws}
    return [
        f"The interval of {metric} leaves {share:.0%} of the resamples out, in which what it is relative to is nought: ask more questions."
        for metric, share in missing.items()
        if share > LEFT_OUT
    ]


def _narrow(letter: str, outcomes: list[Outcomes], reference: int, who: str) -> list[str]:
    """Whose interval is too narrow, because what it is relative to are a few right answers: of 10 it holds the truth 88 times of 100."""
    return [
        f"The interval of {letter} is too narrow, and a comparison's p-values of it are too small: {who} answers {right:.0f} of "
        f"{len(each.scores[reference]):,} questions of {each.score.name!r} right, and fewer than {ENOUGH} say little: ask more questions."
        for each in outcomes
        if (right := each.scores[reference].sum()) < ENOUGH
    ]


def _about_t(full: Scores, config: Config) -> list[str]:
    """What T is, where that is not plain."""
    notes = []
    if config.evaluate.learned_by == "likelihood":
        notes.append(
            "T says how much likelier right answers became, relative to its reference (evaluate.learned_by), and not how many are given."
        )
    if (method := full.meta.get("method", REFERENCE)) != REFERENCE:
        notes.append(f"T is relative to the run of {method} that evaluate.full_scores names, and not to full fine-tuning.")
    return notes


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
