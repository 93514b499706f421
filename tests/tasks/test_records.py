"""Which of a harness task's metrics is its score."""

from types import SimpleNamespace

import pytest

from farss.errors import ConfigError
from farss.tasks.records import Logged, main_metric, question_score, records_of


def logged(*samples):
    names = list(samples[0])
    task = SimpleNamespace(higher_is_better=lambda: {"loss": False})
    return Logged("task", task, [{"filter": "none", "metrics": names, **sample} for sample in samples])


def test_the_first_metric_that_every_question_has():
    assert main_metric(logged({"loss": 1.0, "acc": 1.0}, {"loss": 2.0, "acc": 0.0})) == "acc"
    assert main_metric(logged({"bleu": 1.0, "acc": 1.0}, {"bleu": float("nan"), "acc": 0.0})) == "acc"
    with pytest.raises(ConfigError, match=r"lm_eval's task 'task' has no score for each question \(it reports bleu\)"):
        main_metric(logged({"bleu": 1.0}, {"bleu": float("nan")}))


def test_only_the_first_filter_counts():
    both = logged({"acc": 1.0}, {"acc": None})
    both.samples[1]["filter"] = "strict"
    assert main_metric(both) == "acc"


@pytest.mark.parametrize(
    ("value", "score"),
    [(True, 1.0), (0.25, 0.25), ([True, False], 0.5), ((1, 1), 1.0), ((1, 0), 0.0), ("text", None), ([], None), (float("nan"), None)],
)
def test_metric_values_become_question_scores(value, score):
    assert question_score(value) == score


def choice(target, likelihoods, arguments, **task):
    known = SimpleNamespace(**{"OUTPUT_TYPE": "multiple_choice", "multiple_input": False} | task)
    sample = {"doc_id": 3, "filter": "none", "metrics": ["acc"], "acc": 0.0, "doc": {}, "target": target, "arguments": arguments}
    return records_of(Logged("choices", known, [sample | {"resps": [[(each, False)] for each in likelihoods]}]), "acc")[0]


def test_the_right_choice_need_not_be_the_likeliest():
    found = choice(2, [-5.0, -1.0, -2.0], [("Q:", f" {letter}") for letter in "abc"])
    assert (found["gold"], found["answer"], found["gold_loglikelihood"]) == (["c"], "b", -2.0)
    several = choice([2, 0], [-5.0, -1.0, -2.0], [("Q:", f" {letter}") for letter in "abc"])
    assert (several["gold"], several["gold_loglikelihood"]) == (["c", "a"], -2.0)
    arguments = [("Ann", "sat."), ("Bo", "sat.")]  # WinoGrande puts the choice into the prompt
    found = choice("sat.", [-1.0, -3.0], arguments, multiple_input=True, doc_to_text=lambda doc: 1)
    assert (found["gold"], found["answer"], found["gold_loglikelihood"]) == (["Bo"], "Ann", -3.0)
