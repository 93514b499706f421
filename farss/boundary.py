"""The first deep block, found by short fine-tuning probes (FARSS, section 3.1): makes the probes that `farss.search` asks for.

Every probe is planned from the one survey, starts from the run's own seed, and is a prefix of the next longer probe of its
candidate. docs/boundary.md says what K and T stand for here, and why.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from farss.artifacts import Plan, Survey
from farss.batches import Row, choose
from farss.config import Config, QuestionSet
from farss.data import Tokenized
from farss.errors import ConfigError, NumericalError
from farss.files import fingerprint, read_json, reading, write_json
from farss.jobs import Progress
from farss.memory import freed_memory_kept, memory_cure
from farss.plan import make_plan
from farss.search import Candidate, Found, ProbeOutcomes, Round, Schedule, candidates, fit, halved, search
from farss.tasks.likelihood import (
    FORWARD,
    LEAST,
    affordable,
    asked_or_shown,
    other_question_tokens,
    question_tokens,
    text_tokens,
    token_loglikelihoods,
    tokens_of,
)
from farss.train import train, training_steps

log = logging.getLogger(__name__)
SCORING = 0.25
"""Share of the budget that scoring may take: questions are left out until it does."""


@dataclass(frozen=True)
class Boundary:
    """What `boundary.json` says."""

    candidates: list[Candidate]
    """Each at the most steps that it was probed with; empty where there was nothing to choose from."""
    chosen: int
    margin: float
    """How much its KT exceeds that of the next best in the last round, and the paired 95 % interval."""
    margin_low: float
    margin_high: float
    steps_full: int
    """Optimiser steps of the training that was being prepared."""
    cost_share: float
    """What probes and scoring cost, as a share of them."""
    knowledge: str
    """What K was measured on, in words."""
    task: str
    """What T was measured on."""
    seconds: float = 0.0
    """Of training and scoring, loading the model each time included; summed over resumes."""
    notes: list[str] = dataclasses.field(default_factory=list)
    rounds: list[list[Candidate]] = dataclasses.field(default_factory=list)
    """Every round: all its candidates after the same number of steps."""

    def save(self, path: Path) -> None:
        """Write `boundary.json`."""
        write_json(path, {**dataclasses.asdict(self), "sentence": self.sentence})

    @classmethod
    def load(cls, path: Path) -> Boundary:
        """Read `boundary.json`."""
        values = read_json(path)
        with reading(path, "search for a boundary"):
            values.pop("sentence", None)  # it follows from the others
            values["candidates"] = [Candidate(**each) for each in values["candidates"]]
            values["rounds"] = [[Candidate(**each) for each in one] for one in values["rounds"]]
            return cls(**values)

    @property
    def sentence(self) -> str:
        """The choice, for people."""
        if not self.candidates:
            return f"Boundary {self.chosen} is the only candidate."
        between = f"{100 * self.margin_low:.1f} to {100 * self.margin_high:.1f}, with other questions"
        margin = f"{100 * self.margin:.1f} points of KT above the next best ({between})"
        told = "do not tell the two apart" if self.margin_low <= 0 else "are of one seed, and another may choose otherwise"
        return f"The search chose boundary {self.chosen}, {margin}, for {self.cost_share:.0%} of a training's steps. The probes {told}."


# --- what is compared, and on what -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Everything that is decided before the first probe."""

    schedule: Schedule
    knowledge: dict[str, list[Row]]
    """Questions (or general text) with their answers marked, by the name of their set."""
    task: list[Row]
    """Held-out training examples."""
    train: Tokenized
    """The training examples that are left for the probes."""
    knowledge_words: str
    task_words: str
    notes: list[str]

    @property
    def sentence(self) -> str:
        """The schedule, for people."""
        plan = self.schedule
        if not plan.rounds:
            return f"Boundary {plan.candidates[0]} is the only candidate: nothing is probed."
        first, *later = plan.rounds
        rounds = [f"{first.steps} steps each", *(f"then the best {each.size} to {each.steps}" for each in later)]
        named = ", ".join(map(str, plan.candidates))
        return f"Boundaries {named}: {', '.join(rounds)}. With scoring {plan.cost_share:.0%} of the training's {plan.steps_full} steps."


def prepare(config: Config, examples: Tokenized, tokenizer: Any, blocks: int) -> Setting:
    """Draw the questions and hold out the examples on which probes are scored, and fit the rounds into the budget.

    Args:
        config: `train`, `boundary`, `evaluate.knowledge`, `evaluate.text` and the seed are used.
        examples: the tokenised training examples.
        blocks: of the model.

    Raises:
        ConfigError: there is nothing to measure K on, too few examples, or too few steps.
    """
    wanted, options = candidates(blocks), config.boundary
    steps_full = training_steps(config.train, len(examples.rows))
    step = config.train.batch_size * examples.tokens / len(examples.rows)  # tokens
    scorings = sum(halved(len(wanted))) + 1
    room = options.budget * steps_full * SCORING * step / FORWARD / scorings / 2  # tokens of knowledge, and as many of the task
    notes: list[str] = []
    knowledge, knowledge_words = knowledge_rows(config, tokenizer, room, notes)
    task, rest = hold_out(examples.rows, options.questions, room, config.seed)
    scored = tokens_of(task) + sum(tokens_of(rows) for rows in knowledge.values())
    schedule = fit(wanted, steps_full, options.probe, options.budget, FORWARD * scored / step)
    left = sorted(set(wanted) - set(schedule.candidates))
    if left:
        notes.append(f"The budget leaves no room for boundary {', '.join(map(str, left))}.")
    task_words = f"loss of the answers of {len(task)} training examples that no probe trains on"
    return Setting(schedule, knowledge, task, Tokenized(rest), knowledge_words, task_words, notes)


def knowledge_rows(config: Config, tokenizer: Any, room: float, notes: list[str]) -> tuple[dict[str, list[Row]], str]:
    """What K is measured on, within so many tokens: the question sets, or general text where there are none.

    Raises:
        ConfigError: there is neither.
    """
    sets = [entry for entry in config.evaluate.knowledge if isinstance(entry, QuestionSet)]
    names = [entry for entry in config.evaluate.knowledge if isinstance(entry, str)]
    if names and (sets or config.evaluate.text):
        notes.append(f"K leaves out {', '.join(names)}: the search scores question files, not tasks of lm_eval.")
    limit = config.boundary.questions
    if sets:
        share = max(LEAST, limit // len(sets))
        taken = asked_or_shown(config)
        rows = {entry.name: _questions(entry, taken, config, tokenizer, share, room / len(sets), notes) for entry in sets}
        return rows, "probability of the answers to " + ", ".join(f"{len(each)} questions of {name}" for name, each in rows.items())
    if config.evaluate.text:
        text = text_tokens(config, tokenizer, limit)
        text = choose(text, affordable(text, limit, room), config.seed)
        notes.append("No knowledge questions are given (evaluate.knowledge), so K is measured on general text.")
        return {"text": text}, f"probability of the tokens of {len(text)} rows of general text ({Path(config.evaluate.text).name})"
    raise ConfigError(
        "plan.boundary=auto needs something to measure forgetting on: give a file of questions (evaluate.knowledge: "
        "[{name: facts, data: questions.jsonl}]) or of general text (evaluate.text), or give plan.boundary a number"
    )


def _questions(entry: QuestionSet, taken: set[str], config: Config, tokenizer: Any, limit: int, room: float, notes: list[str]) -> list[Row]:
    """Questions that the evaluation does not ask or show (not `taken`), so that no boundary is chosen by those that judge it; where
    the file has too few of them, asked ones too."""
    fresh = other_question_tokens(entry, "knowledge", config, tokenizer, limit, taken)
    asked = question_tokens(entry, "knowledge", config, tokenizer, limit) if len(fresh) < limit else []
    if not fresh and not asked and config.data.thinking and entry.prompt == "train":
        raise ConfigError(
            f"question set {entry.name!r} is asked in the training's prompt, where with data.thinking=true a model thinks first, and how "
            "likely a bare right answer is says nothing: leave its prompt out, or give plan.boundary a number"
        )
    if not fresh and not asked:
        raise ConfigError(f"question set {entry.name!r}: every question is longer than data.max_length={config.data.max_length}: raise it")
    count = min(affordable([*fresh, *asked], limit, room), len(fresh) + len(asked))
    if count > len(fresh):
        notes.append(
            f"K is measured on {count} questions of {entry.name}, of which {count - len(fresh)} are asked in the evaluation too: the "
            "file has no others (a smaller limit would leave some)."
        )
    return [*choose(fresh, count, config.seed), *choose(asked, max(0, count - len(fresh)), config.seed)]


def hold_out(rows: list[Row], limit: int, room: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Examples that no probe trains on, a fifth of them at most, and the others.

    Raises:
        ConfigError: there are too few.
    """
    most = min(limit, len(rows) // 5)
    if most < LEAST:
        raise ConfigError(
            f"plan.boundary=auto holds out a fifth of the training examples, and {len(rows)} are too few for that: "
            f"give {5 * LEAST} or more, or give plan.boundary a number"
        )
    # not the run's own seed: it would hold out just the examples that the statistics were estimated on
    held = set(choose(range(len(rows)), affordable(rows, most, room), seed + 1))
    return [row for place, row in enumerate(rows) if place in held], [row for place, row in enumerate(rows) if place not in held]


# --- probing ---------------------------------------------------------------------------------------------------------


@dataclass
class Prober:
    """Makes probes, and remembers their outcomes: what is in its folder is not probed again."""

    setting: Setting
    config: Config
    tokenizer: Any
    survey: Survey
    """From which every candidate is planned."""
    untouched: Callable[[], Any]
    """Loads the base model."""
    adapted: Callable[[Plan], Any]
    """Loads it with a plan's adapters."""
    folder: Path
    """Checkpoints lie here while they may be continued, outcomes for good."""
    tell: Progress
    seconds: float = 0.0
    reached: dict[int, int] = dataclasses.field(default_factory=dict)
    """Steps of every candidate so far."""

    def start_over_unless_the_same(self, options: dict[str, Any]) -> None:
        """Forget outcomes that are of other questions or options: a killed search goes on only with the same."""
        setting, path = self.setting, self.folder / "key.json"
        # the text is among what is scored, if it counts at all, and how many draws an interval has is no matter of the probes
        probed = {name: value for name, value in options.items() if not name.endswith(("evaluate.text", "evaluate.resamples"))}
        key = {"key": fingerprint([setting.knowledge, setting.task, probed])}
        if not path.is_file() or read_json(path) != key:
            if path.is_file():
                log.warning(f"The probes in {self.folder} are of other options or questions: the search begins again.")
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(path, key)

    def base(self) -> ProbeOutcomes:
        """The untouched model's outcomes."""
        return self._remembered("base", lambda: self._outcomes(self.untouched(), 0))

    def __call__(self, boundary: int, steps: int) -> ProbeOutcomes:
        """The outcomes of one candidate after so many steps; its training goes on from where its last probe ended."""
        found = self._remembered(f"boundary-{boundary}-step-{steps}", lambda: self._probe(boundary, steps))
        self.reached[boundary] = steps
        return found

    def forget(self, left: list[int]) -> None:
        """Delete the checkpoints of the candidates that do not go on: they are as large as those of a whole run."""
        for boundary in set(self.reached) - set(left):
            shutil.rmtree(self._place(boundary), ignore_errors=True)

    def _place(self, boundary: int) -> Path:
        return self.folder / f"boundary-{boundary}"

    def _probe(self, boundary: int, steps: int) -> ProbeOutcomes:
        rounds = self.setting.schedule.rounds
        done, total = sum(self.reached.values()) - self.reached.get(boundary, 0), self.setting.schedule.training
        plan = make_plan(replace(self.config.plan, boundary=boundary), self.survey)
        model = self.adapted(plan)
        try:
            train(
                *(model, self.tokenizer, self.setting.train, probe_config(self.config, rounds), self._place(boundary)),
                on_progress=lambda step, _, loss: self.tell(done + step, total, f"boundary {boundary}, step {step} of {steps}"),
                stop_at=steps,
                cycles=rounds[-1].steps // rounds[0].steps,
            )
        except NumericalError as error:
            raise NumericalError(
                f"the probe of boundary {boundary} failed at {self.config.boundary.rate:g} times the training's learning rate, "
                f"so boundary.rate={self.config.boundary.rate:g} may be what is too high: {error}"
            ) from error
        return self._outcomes(model, plan.parameters)

    def _outcomes(self, model: Any, parameters: int) -> ProbeOutcomes:
        rows = [*self.setting.knowledge.values(), self.setting.task]
        size, pad = self.config.evaluate.batch_size, self.tokenizer.pad_token_id
        with freed_memory_kept(model.device), memory_cure(size, "answers at a time", "evaluate.batch_size"):
            *known, learned = (np.array(token_loglikelihoods(model, each, size, pad)) for each in rows)
        return ProbeOutcomes([np.exp(each) for each in known], learned, parameters)

    def _remembered(self, name: str, make: Callable[[], ProbeOutcomes]) -> ProbeOutcomes:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            begun = time.monotonic()
            found = make()
            lists = {"knowledge": [each.tolist() for each in found.knowledge], "task": found.task.tolist()}
            write_json(path, {"seconds": time.monotonic() - begun, "parameters": found.parameters, **lists})
        values = read_json(path)
        self.seconds += values["seconds"]
        return ProbeOutcomes([np.array(each) for each in values["knowledge"]], np.array(values["task"]), values["parameters"])


def find(prober: Prober, options: dict[str, Any]) -> Boundary:
    """Probe every candidate as far as it may still win, and choose.

    Args:
        options: on which the probes depend.

    Raises:
        FarssError: the probes learn nothing, or a loss is not finite.
    """
    setting, plan, config = prober.setting, prober.setting.schedule, prober.config
    prober.start_over_unless_the_same(options)
    prober.tell(0, plan.training, setting.sentence)
    found = Found(plan.candidates[0], [], 0.0, 0.0, 0.0, [])
    if plan.rounds:
        found = search(plan, prober.base(), prober, config.evaluate.resamples, config.seed, prober.forget)
    prober.forget([])
    return Boundary(
        **found._asdict(),
        steps_full=plan.steps_full,
        cost_share=round(plan.cost_share, 4),
        knowledge=setting.knowledge_words,
        task=setting.task_words,
        seconds=round(prober.seconds, 1),
        notes=setting.notes,
    )


def probe_config(config: Config, rounds: list[Round]) -> Config:
    """The run's configuration with the learning rates of its probes.

    A model is scored best where its learning rate has fallen to zero, as it has at the end of a run: in the middle of a
    training knowledge seems lost that the end of it brings back. But a probe shall also go on from where the shorter one
    before it ended. So the rate falls once for every first probe's length and starts anew (SGDR, Loshchilov & Hutter,
    2017); as each round has twice the steps, every round ends at the end of a fall. There is no warm-up: it is a step at least, of rate
    zero, by which every fall would end later than its round.
    """
    rate = config.train.learning_rate * config.boundary.rate
    falls = replace(config.train, learning_rate=rate, scheduler="cosine_with_restarts", warmup_ratio=0.0)
    return replace(config, train=replace(falls, max_steps=rounds[-1].steps, report_to=[]))
