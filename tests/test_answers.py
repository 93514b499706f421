"""Nothing is asked twice."""

import pytest

from farss.configfile import override
from farss.pipeline import Run


@pytest.mark.usefixtures("no_figures")
def test_general_text_alone_is_measured_too(config):
    run = Run(override(config, ["evaluate.knowledge=[]", "evaluate.task=[]"]))
    run.all()
    assert run.summarise(None).forgetting is not None


@pytest.mark.usefixtures("no_figures")
def test_what_changes_no_answer_asks_nothing_again(config):
    config = override(config, ["plan.method=lora", "evaluate.recovery=1"])
    Run(config).all()
    assert Run(override(config, ["evaluate.resamples=200", "evaluate.looks=0", "evaluate.batch_size=3"])).complete
    assert not Run(override(config, ["evaluate.recovery=2"])).complete


def test_another_precision_is_another_untouched_model(config):
    def base(*changes):
        run = Run(override(config, list(changes)))
        return run.evaluate_base(), (run.path / "base" / "scores.json").stat().st_mtime_ns

    first, written = base("model.dtype=float32")
    assert base("model.dtype=float32")[1] == written
    second, written_again = base("model.dtype=bfloat16")
    assert written_again > written
    assert second.knowledge["facts"].gold_loglikelihood != first.knowledge["facts"].gold_loglikelihood
