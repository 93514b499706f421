"""A reference that was asked something else is refused before hours of training."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
from taught import asking

from farss.artifacts import Scores
from farss.config import DataConfig, QuestionSet
from farss.errors import FolderError
from farss.evaluate import evaluate
from farss.tasks.grading import GRADING
from farss.tasks.outcomes import read_scores
from farss.tasks.reference import check_reference
from farss.tasks.summary import summarise

pytest.importorskip("lm_eval")


def test_full_fine_tuning_that_was_asked_another_task_is_refused_at_the_start(three, tokenizer, files):
    config, folder = three
    named = replace(config.evaluate, full_scores=str(folder / "full"))
    check_reference(replace(config, evaluate=named), tokenizer)
    for task, message, options in (
        ("steps", "other questions of 'steps'", {"limit": 2}),
        ("steps", "with another prompt", {"prompt": "Q: {question}\nA:"}),
        ("steps", "other questions of 'steps'", {"fewshot": 1}),
        ("others", "was not asked the task 'others'", {}),
    ):
        asks = replace(named, task=[QuestionSet(task, files["steps"], **options)])
        with pytest.raises(FolderError, match=message):
            check_reference(replace(config, evaluate=asks), tokenizer)


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ({}, {}, ""),
        ({"fewshot": 1}, {"fewshot": 1}, ""),
        ({"fewshot": 1, "examples": "here"}, {}, r"'known' with fewshot=1, and now fewshot=0, so T would be a ratio of unlike things"),
        ({"max_tokens": 7}, {"max_tokens": 8}, r"with max_tokens=7, and now max_tokens=8"),
        ({"prompt": "{question} A:"}, {}, r"with another prompt, template or other examples than now"),
        ({"fewshot": 1, "examples": "here"}, {"fewshot": 1, "examples": "there"}, r"with another prompt"),
    ],
)
def test_full_fine_tuning_that_was_asked_otherwise_is_refused(was, now, message, model, tokenizer, files, tmp_path):
    """T is a ratio of what is alike; at the start of a run, and where a finished one is compared with it."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shown.jsonl").write_text(json.dumps({"question": f"what is {name}?", "answers": ["this"]}))
    for name, own in (("full", was), ("now", now)):
        own = own | ({"examples": str(tmp_path / own["examples"] / "shown.jsonl")} if "examples" in own else {})
        config = asking(task=[QuestionSet("known", files["known"], limit=4, **own)], full_scores=str(tmp_path / "full"), resamples=100)
        evaluate(model, tokenizer, config, tmp_path / name)
    if not message:
        check_reference(config, tokenizer)
        line = summarise(tmp_path / "now", tmp_path / "now", tmp_path / "full", config).benchmarks[0]
        assert line.full == line.after
        return
    with pytest.raises(FolderError, match=message):
        check_reference(config, tokenizer)
    differs = r"different questions of 'known': evaluate both with the same question file, prompt"
    differs = (
        r"full/scores holds answers to 'known' with max_tokens=7, and .*now/scores with 8: ask both" if "max_tokens" in was else differs
    )
    with pytest.raises(FolderError, match=differs):
        summarise(tmp_path / "now", tmp_path / "now", tmp_path / "full", config)


def test_a_reference_that_was_graded_by_older_rules_is_refused(three, tokenizer):
    """Before the training, and where a finished run is compared with it."""
    config, folder = three
    file = folder / "full" / "scores" / "steps.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"grading": 9}))
    with pytest.raises(FolderError, match=r"answers to 'steps' with grading=9, and .*: start the older run again, which grades it anew"):
        summarise(folder / "base", folder / "after", folder / "full", config)
    named = replace(config, evaluate=replace(config.evaluate, full_scores=str(folder / "full")))
    with pytest.raises(FolderError, match=rf"'steps' with grading=9, and now grading={GRADING}"):
        check_reference(named, tokenizer)


def test_a_reference_that_was_asked_in_another_chat_is_refused(model, tokenizer, files, tmp_path):
    chatty = deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}U{{ m['content'] }}{% endfor %}A"
    config = replace(asking(task=[QuestionSet("steps", files["steps"])], full_scores=str(tmp_path)), data=DataConfig(template="chat"))
    evaluate(model, chatty, config, tmp_path)
    check_reference(config, chatty)
    chatty.chat_template = "System: count. " + chatty.chat_template
    with pytest.raises(FolderError, match="with another prompt, template"):
        check_reference(config, chatty)


def test_a_reference_is_a_scores_file_or_the_folder_of_one(three, tokenizer):
    config, folder = three
    for path in ("full", "full/scores.json"):
        assert read_scores(folder / path)[1] == folder / "full" / "scores"
    for path, message in (("full/scores/steps.jsonl", "holds no scores: name a scores.json"), ("elsewhere", "there is no .*scores.json")):
        with pytest.raises(FolderError, match=message):
            check_reference(replace(config, evaluate=replace(config.evaluate, full_scores=str(folder / path))), tokenizer)


@pytest.mark.parametrize("text", ["[]", '{"rows": []}', '{"knowledge": {"facts": {"K": 1}}}'])
def test_another_file_than_scores_is_refused(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(FolderError, match=r"comparison.json holds no scores: name another file"):
        Scores.load(tmp_path / "comparison.json")
