"""Nothing is asked twice."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from farss.configfile import override
from farss.errors import FolderError
from farss.files import read_json
from farss.handover import delete_weights
from farss.pipeline import Run
from farss.tasks.grading import GRADING, METRICS


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


@pytest.mark.usefixtures("no_figures")
def test_other_rules_of_grading_need_no_model(config, monkeypatch):
    """Also where the weights are deleted: what was answered is there."""
    config = override(config, ["plan.method=lora", "evaluate.recovery=1"])
    run = Run(config)
    run.all()
    delete_weights(run.path)
    scores = [run.common.path / name / "scores.json" for name in ("base", ".", "base-recovered", "recovered")]
    before = [read_json(path) for path in scores]
    monkeypatch.setattr("farss.tasks.benchmarks.GRADING", GRADING + 1)
    monkeypatch.setitem(METRICS, "exact_match", lambda answer, accepted: 0.25)
    monkeypatch.setattr("farss.pipeline.load_model", None)
    again = Run(config)
    assert not again.complete
    again.evaluate()
    again.recover()
    assert again.complete
    for path, known in zip(scores, before, strict=True):
        found = read_json(path)
        assert found["meta"] == known["meta"]
        assert found["text_loss"] == known["text_loss"]
        assert {score["score"] for kind in ("knowledge", "task") for score in found[kind].values()} == {0.25}


def test_answers_of_another_base_are_not_compared(config, model_folder, tmp_path):
    """The weights in its place may be replaced between the two."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = override(config, [f"model.path={folder}", "plan.method=lora", "plan.boundary=null", "evaluate.looks=0"])
    Run(config).before_plan()
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.3 * weight for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FolderError, match=r"base holds the answers of other weights than those that .* was trained on"):
        Run(config).all()
