"""Before, after and full fine-tuning."""

import dataclasses
import json
from dataclasses import replace

import pytest
from taught import asking

from farss.artifacts import Scores, read_records
from farss.config import EvaluateConfig, QuestionSet
from farss.errors import FolderError
from farss.evaluate import evaluate
from farss.report.story import tiles
from farss.tasks.summary import summarise

pytest.importorskip("lm_eval")


def test_other_questions_are_asked_and_count_for_nothing(model, tokenizer, files, tmp_path):
    known, plain = QuestionSet("known", files["known"]), QuestionSet("plain", files["known"], prompt="{question}", metric="contains")
    config = replace(asking([known]), evaluate=EvaluateConfig(knowledge=[known], other=[plain], resamples=100))
    for folder in ("base", "after"):
        scores = evaluate(model, tokenizer, config, tmp_path / folder)
    assert (list(scores.knowledge), list(scores.other)) == (["known"], ["plain"])
    assert "a?" in [record["prompt"] for record in read_records(tmp_path / "base" / "scores", "plain")]
    summary = summarise(tmp_path / "base", tmp_path / "after", None, config)
    assert [(line.name, line.kind) for line in summary.benchmarks] == [("known", "knowledge"), ("plain", "other")]
    assert summary.K.value == 1


def test_summary(three, tmp_path):
    config, folder = three
    summary = summarise(folder / "base", folder / "after", folder / "full" / "scores.json", config)
    mixed, steps = summary.benchmarks
    assert summary.K.value == pytest.approx(mixed.after / mixed.before) == 6 / 8
    assert summary.K.low <= summary.K.value <= summary.K.high <= 1
    assert summary.T.value == 1.0
    assert summary.T.low == summary.T.high == 1.0  # paired: the same answers give the same ratio in every resample
    assert summary.KT.value == pytest.approx(2 * 0.75 / 1.75)
    after, before = (Scores.load(folder / name / "scores.json").text_loss for name in ("after", "base"))
    assert summary.forgetting == pytest.approx(after - before) != 0
    assert mixed.change.value == pytest.approx(-2 / 12)
    assert mixed.gold_change.value == pytest.approx(mixed.gold_after - mixed.gold_before)
    assert (steps.full, steps.full_low, mixed.full) == (1.0, 1.0, 8 / 12)
    summary.save(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == dataclasses.asdict(summary)


def test_few_right_answers_make_too_narrow_an_interval(three):
    config, folder = three
    notes = summarise(folder / "base", folder / "after", folder / "full", config).notes
    small = "is too narrow, and a comparison's p-values of it are too small"
    assert any(note.startswith(f"The interval of K {small}: the untouched model answers 8 of 12 questions of 'mixed'") for note in notes)
    assert any(f"The interval of T {small}: full fine-tuning answers" in note for note in notes)


def test_summary_without_full_fine_tuning(three):
    config, folder = three
    summary = summarise(folder / "base", folder / "after", None, config)
    assert summary.K is not None
    assert summary.T is summary.KT is None
    assert summary.benchmarks[1].full is None
    assert "evaluate.full_scores" in summary.notes[0]


def test_another_reference_than_full_fine_tuning_is_named(three):
    config, folder = three
    scores = Scores.load(folder / "full" / "scores.json")
    replace(scores, meta=scores.meta | {"method": "lora"}).save(folder / "full" / "scores.json")
    summary = summarise(folder / "base", folder / "after", folder / "full", config)
    assert summary.T is not None
    assert "T is relative to the run of lora that evaluate.full_scores names, and not to full fine-tuning." in summary.notes
    assert summary.reference == "the run of lora"
    assert [tile.meaning for tile in tiles(dataclasses.asdict(summary)) if tile.name == "T"] == ["learned, against the run of lora"]


@pytest.mark.parametrize("knowledge", ["none", "fewer"])
def test_full_fine_tuning_decides_nothing_of_k(three, model, tokenizer, files, knowledge):
    """It may have been asked the task alone, or other questions of knowledge."""
    config, folder = three
    asked = {"none": [], "fewer": [QuestionSet("mixed", files["mixed"], limit=3)]}[knowledge]
    evaluate(model, tokenizer, asking(asked, [QuestionSet("steps", files["steps"])]), folder / knowledge)
    summary = summarise(folder / "base", folder / "after", folder / knowledge, config)
    assert summary.K == summarise(folder / "base", folder / "after", folder / "full", config).K
    assert summary.T is not None
    assert summary.benchmarks[0].full is None


def test_other_questions_of_full_fine_tuning_decide_nothing(three, model, tokenizer, files):
    """It may have been asked fewer of those that count for neither K nor T."""
    config, folder = three
    for name, limit in (("base", None), ("after", None), ("full", 3)):
        plain = QuestionSet("plain", files["known"], prompt="{question}", metric="contains", limit=limit)
        evaluate(model, tokenizer, replace(config, evaluate=replace(config.evaluate, other=[plain])), folder / f"other-{name}")
    summary = summarise(folder / "other-base", folder / "other-after", folder / "other-full", config)
    assert summary.T is not None


def test_answers_to_other_prompts_are_not_compared(three):
    config, folder = three
    path = folder / "after" / "scores" / "mixed.jsonl"
    path.write_text("".join(json.dumps(json.loads(line) | {"prompt": "Q?"}) + "\n" for line in path.read_text().splitlines()))
    with pytest.raises(FolderError, match="answers to different questions of 'mixed': evaluate both with the same question file, prompt"):
        summarise(folder / "base", folder / "after", None, config)


def test_a_base_that_knows_nothing_has_no_k(three):
    config, folder = three
    path = folder / "base" / "scores" / "mixed.jsonl"
    path.write_text("".join(json.dumps(json.loads(line) | {"score": 0.0}) + "\n" for line in path.read_text().splitlines()))
    summary = summarise(folder / "base", folder / "after", folder / "full", config)
    assert summary.K is summary.KT is None
    assert summary.T is not None
    assert "the base model scores 0 on 'mixed'" in summary.notes[0]


def test_other_questions_cannot_be_compared(three, model, tokenizer, files):
    config, folder = three
    fewer = asking([QuestionSet("mixed", files["mixed"], limit=3)], [QuestionSet("steps", files["steps"])])
    evaluate(model, tokenizer, fewer, folder / "fewer")
    with pytest.raises(FolderError, match="answers to different questions of 'mixed'"):
        summarise(folder / "base", folder / "fewer", None, config)
