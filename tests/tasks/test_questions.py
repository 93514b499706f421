"""Which questions are asked, and with which prompt."""

import json
from dataclasses import replace

import pytest
from taught import KNOWN, TEMPLATE, UNKNOWN, asking

from farss.artifacts import read_records
from farss.config import DataConfig, QuestionSet
from farss.errors import ConfigError, DataError
from farss.evaluate import evaluate
from farss.tasks.questions import draw, prompt_of, prompts_of

pytest.importorskip("lm_eval")


def test_examples_are_shown_and_never_asked():
    rows = [*KNOWN, KNOWN[0]]
    for seed in range(5):
        drawn = draw(QuestionSet("q", "q.jsonl", fewshot=3), rows, seed)
        shown = {row["question"] for row in drawn.shown}
        assert len(drawn.shown) == 3
        assert not shown & {row["question"] for row in drawn.asked}
        assert [row["id"] for row in drawn.asked] == sorted(row["id"] for row in drawn.asked)


def test_examples_may_come_from_a_file_of_their_own(model, tokenizer, files, tmp_path):
    shown = [{"question": "a?", "answers": ["red"]}, {"question": "over there?", "answers": ["here"]}]
    (tmp_path / "shown.jsonl").write_text("\n".join(map(json.dumps, shown)))
    entry = QuestionSet("known", files["known"], fewshot=2, examples=str(tmp_path / "shown.jsonl"))
    evaluate(model, tokenizer, asking([entry]), tmp_path)
    prompts = [record["prompt"] for record in read_records(tmp_path / "scores", "known")]
    assert len(prompts) == len(KNOWN) - 1, "what is shown is not asked"
    assert all("Question: over there?\nAnswer: here\n\n" in prompt and "Question: a?\nAnswer: red\n\n" in prompt for prompt in prompts)
    with pytest.raises(ConfigError, match=r"shown.jsonl has 2 questions, and fewshot=3 are to be shown"):
        evaluate(model, tokenizer, asking([replace(entry, fewshot=3)]), tmp_path)


def test_the_prompt_shows_answered_examples(model, tokenizer, files, tmp_path):
    evaluate(model, tokenizer, asking([QuestionSet("known", files["known"], fewshot=2, limit=3)]), tmp_path)
    records = read_records(tmp_path / "scores", "known")
    shown = {record["prompt"].rsplit("\n\n", 1)[0] for record in records}
    assert len(records) == 3
    assert len(shown) == 1
    assert shown.pop().count("Answer: ") == 2


def test_the_seed_chooses_the_questions():
    entry = QuestionSet("q", "q.jsonl", limit=4)
    rows = KNOWN + UNKNOWN
    assert draw(entry, rows, 1) == draw(entry, rows, 1)
    assert draw(entry, rows, 1) != draw(entry, rows, 2)
    assert {row["id"] for row in draw(entry, rows, 1).asked} < {row["id"] for row in draw(replace(entry, limit=8), rows, 1).asked}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fewshot": 8}, ConfigError, "8 questions, none is left to ask after showing fewshot=8"),
        ({"prompt": "Q: "}, ConfigError, "has no {question} in it"),
        ({"metric": "number"}, DataError, "the answer 'red' of question 1"),
        ({"max_tokens": 250}, ConfigError, "do not fit into the model's 256 tokens"),
        ({"max_tokens": 250}, ConfigError, "or leave out the question that ends in"),
        ({"answers": "replies"}, DataError, "replies"),
    ],
)
def test_question_sets_that_cannot_be_asked(options, error, text, model, tokenizer, files, tmp_path):
    with pytest.raises(error) as caught:
        evaluate(model, tokenizer, asking([QuestionSet("known", files["known"], **options)]), tmp_path)
    assert text in str(caught.value)


@pytest.mark.parametrize("fewshot", [0, 2])
def test_prompts_are_known_before_they_are_asked(fewshot, model, tokenizer, files, tmp_path):
    config = asking(task=[entry := QuestionSet("known", files["known"], fewshot=fewshot, limit=3)])
    evaluate(model, tokenizer, config, tmp_path)
    drawn = draw(entry, KNOWN, config.seed)
    expected = prompts_of(drawn, prompt_of(entry, "task", DataConfig(template=TEMPLATE), tokenizer))
    assert {str(record["id"]): record["prompt"] for record in read_records(tmp_path / "scores", "known")} == expected
