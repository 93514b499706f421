"""What lm_eval logged about each question, as our per-question records `{id, prompt, gold, answer, score, ...}`."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

from farss.errors import ConfigError

QuestionRecord = dict[str, Any]


class Logged(NamedTuple):
    """One harness task and the samples it logged."""

    name: str
    task: Any
    """lm_eval's `ConfigurableTask`."""
    samples: list[dict[str, Any]]


def main_metric(logged: Logged) -> str:
    """The first metric of the task that has a value for every question, the higher the better.

    Raises:
        ConfigError: the task has none (perplexities, for example).
    """
    sample = logged.samples[0]
    better, counted = logged.task.higher_is_better(), _of_first_filter(logged)
    for metric in sample["metrics"]:
        if better.get(metric, True) and all(question_score(each[metric]) is not None for each in counted):
            return str(metric)
    raise ConfigError(
        f"evaluate: lm_eval's task {logged.name!r} has no score for each question (it reports "
        f"{', '.join(sample['metrics'])}), so it cannot be compared question by question: choose another"
    )


def metric_label(logged: Logged, metric: str) -> str:
    """How a metric is called in the table: by its name, or `acc` where pairs of label and prediction are counted."""
    return "acc" if isinstance(logged.samples[0][metric], tuple) else metric


def question_score(value: Any) -> float | None:
    """A metric's value for one question as a number; None where it is none.

    A list of yes and no (IFEval's instructions) is averaged; a pair of label and prediction (F1 and Matthews
    correlation keep those) counts as right when both are the same.
    """
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(each, (bool, int)) for each in value):
        return sum(value) / len(value)
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, numbers.Integral) for each in value):
        return float(value[0] == value[1])
    return None


def records_of(logged: Logged, metric: str, prefix: str = "") -> list[QuestionRecord]:
    """One record a question, in the order of the data.

    Args:
        prefix: put before the ids, where a benchmark is made of several tasks.
    """
    make = _choice_record if logged.task.OUTPUT_TYPE == "multiple_choice" else _answer_record
    records = []
    for sample in _of_first_filter(logged):
        place = f"{prefix}{sample['doc_id']}" if prefix else sample["doc_id"]
        records.append({"id": place, **make(logged.task, sample), "score": question_score(sample[metric])})
    return records


def _of_first_filter(logged: Logged) -> list[dict[str, Any]]:
    """A task with several filters logs each question once a filter; the first filter is the task's main one."""
    return [sample for sample in logged.samples if sample["filter"] == logged.samples[0]["filter"]]


def _answer_record(task: Any, sample: dict[str, Any]) -> QuestionRecord:
    """A generated answer. Its gold log-likelihood is asked for afterwards."""
    target = sample["target"]
    if task.config.doc_to_choice is not None and isinstance(target, int):
        target = task.doc_to_choice(sample["doc"])[target]
    gold = [target] if isinstance(target, str) else target
    # Code tasks name their tests as target, IFEval a placeholder: neither is an answer.
    has_gold = isinstance(gold, list) and gold and all(isinstance(each, str) for each in gold)
    response = sample["resps"][0][0]
    if task.OUTPUT_TYPE == "loglikelihood":  # such tasks (LAMBADA) ask for the target's likelihood, not for an answer
        return {"prompt": sample["arguments"][0][0], "gold": gold, "answer": "", "gold_loglikelihood": float(response[0])}
    return {
        "prompt": sample["arguments"][0][0],
        "gold": gold if has_gold and not task.config.unsafe_code else [],
        "answer": response.strip() if isinstance(response, str) else str(response),
        "gold_loglikelihood": None,
    }


def _choice_record(task: Any, sample: dict[str, Any]) -> QuestionRecord:
    """The most likely of several choices."""
    arguments = sample["arguments"]
    likelihoods = [float(response[0][0]) for response in sample["resps"]]
    which = 0 if task.multiple_input else 1  # such tasks (WinoGrande) put the choice into the prompt
    choices = [str(pair[which]).strip() for pair in arguments]
    target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(target, str):
        target = task.doc_to_choice(sample["doc"]).index(target)
    gold = [int(each) for each in (target if isinstance(target, list) else [target])]
    best = max(range(len(choices)), key=likelihoods.__getitem__)
    return {
        "prompt": arguments[0][0],
        "gold": [choices[each] for each in gold],
        "answer": choices[best],
        "gold_loglikelihood": likelihoods[gold[0]],
    }
