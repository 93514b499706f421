"""Which of a harness task's metrics is its score."""

from types import SimpleNamespace

import pytest

from farss.errors import ConfigError
from farss.tasks.records import Logged, main_metric, question_score


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
