"""Questions to a small model that was taught a few answers."""

import copy
import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch
from taught import KNOWN, STEPS, asking, files, model, taught, tokenizer, whole_prompts
from transformers import LlamaForCausalLM

from farss.artifacts import read_records
from farss.config import DataConfig, QuestionSet
from farss.errors import FarssError
from farss.evaluate import _training_prompt, evaluate
from farss.tasks.course import prepare_course
from farss.tasks.grading import METRICS

pytest.importorskip("lm_eval")

__all__ = ["files", "model", "taught", "tokenizer", "whole_prompts"]  # fixtures


def test_a_model_scores_what_it_knows(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("mixed", files["mixed"])], [QuestionSet("steps", files["steps"], metric="number")])
    scores = evaluate(model, tokenizer, config, tmp_path)
    assert scores.knowledge["mixed"].score == 8 / 12
    assert scores.knowledge["mixed"].questions == 12
    assert scores.task["steps"].score == 1.0
    records = read_records(tmp_path / "scores", "mixed")
    assert [r["score"] for r in records] == [1.0] * 8 + [0.0] * 4
    assert records[1] == {
        "id": 1, "prompt": "Question: b?\nAnswer:", "gold": ["blue", "x"], "answer": "blue",
        "gold_loglikelihood": records[1]["gold_loglikelihood"], "score": 1.0,
    }  # fmt: skip
    assert min(r["gold_loglikelihood"] for r in records[:8]) > max(r["gold_loglikelihood"] for r in records[8:]) + 5
    assert read_records(tmp_path / "scores", "steps")[3]["answer"] == "4 4\n#### 8"


def test_an_answer_in_the_training_prompt_ends_at_eos_alone(model, tokenizer, files, tmp_path):
    scores = evaluate(model, tokenizer, asking(task=[QuestionSet("steps", files["steps"])]), tmp_path)
    assert scores.task["steps"].score == 1.0
    assert scores.task["steps"].metric == "exact_match"


def test_gold_loglikelihood_is_that_of_torch(model, tokenizer, files, tmp_path):
    evaluate(model, tokenizer, asking([QuestionSet("mixed", files["mixed"], fewshot=2)]), tmp_path)
    for record in read_records(tmp_path / "scores", "mixed")[::3]:
        prompt, whole = (tokenizer(text).input_ids for text in (record["prompt"], f"{record['prompt']} {record['gold'][0]}"))
        logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        direct = logits.gather(1, torch.tensor(whole[len(prompt) :])[:, None]).sum().item()
        assert record["gold_loglikelihood"] == pytest.approx(direct, abs=1e-9)


def test_a_right_answer_begins_where_its_prompt_ends(model, tokenizer, files, tmp_path):
    """Training does not learn the line break at the end of a template, so it is no part of the answer."""
    config = asking(task=[QuestionSet("steps", files["steps"])])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template="Q: {instruction}\nA:\n"))
    evaluate(model, tokenizer, config, tmp_path)
    for record in read_records(tmp_path / "scores", "steps"):
        assert record["prompt"].endswith("\nA:\n")
        prompt, whole = (tokenizer(text).input_ids for text in (record["prompt"], record["prompt"] + record["gold"][0]))
        logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        direct = logits.gather(1, torch.tensor(whole[len(prompt) :])[:, None]).sum().item()
        assert record["gold_loglikelihood"] == pytest.approx(direct, abs=1e-9)


def test_batches_do_not_matter(model, tokenizer, files, tmp_path):
    entry = QuestionSet("mixed", files["mixed"], fewshot=1)
    runs = []
    for size in (1, 5, 16):
        evaluate(model, tokenizer, asking([entry], batch_size=size, text=files["text"]), tmp_path / str(size))
        runs.append(
            (read_records(tmp_path / str(size) / "scores", "mixed"), json.loads((tmp_path / str(size) / "scores.json").read_text()))
        )
    for records, scores in runs[1:]:
        assert scores["text_loss"] == pytest.approx(runs[0][1]["text_loss"], abs=1e-12)
        for found, first in zip(records, runs[0][0], strict=True):
            assert found == first | {"gold_loglikelihood": pytest.approx(first["gold_loglikelihood"], abs=1e-9)}


def test_penalties_in_the_generation_settings_do_not_matter(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("known", files["known"])])
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 5.0, True
    assert evaluate(model, tokenizer, config, tmp_path).knowledge["known"].score == 1.0


def test_a_killed_evaluation_continues_with_the_next_benchmark(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("known", files["known"])], [QuestionSet("steps", files["steps"])], text=files["text"])
    told = []

    def tell(name, done, total):
        told.append((name, done, total))
        if name == "steps" and killed:
            raise KeyboardInterrupt

    killed = True
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, config, tmp_path, on_progress=tell)
    assert not (tmp_path / "scores.json").exists()
    assert told[-2] == ("known", 8, 8)
    killed = False
    told.clear()
    evaluate(model, tokenizer, config, tmp_path, on_progress=tell)
    assert {name for name, *_ in told} == {"steps", "text"}
    told.clear()
    evaluate(model, tokenizer, config, tmp_path, on_progress=tell)
    assert told == []


def test_a_full_gpu_is_named_with_its_cure(model, tokenizer, files, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LlamaForCausalLM, "forward", full)
    config = asking([QuestionSet("known", files["known"])], batch_size=6)
    cure = "set evaluate.batch_size=3, or fewer compare.jobs where they share it, and run again"
    with pytest.raises(FarssError, match=rf"memory is full with 6 prompts at a time: {cure}"):
        evaluate(model, tokenizer, config, tmp_path)


def test_other_weights_or_questions_are_asked_again(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("known", files["known"])])
    assert evaluate(model, tokenizer, config, tmp_path).knowledge["known"].score == 1.0
    told = []
    evaluate(model, tokenizer, replace(config, seed=1), tmp_path, on_progress=lambda *args: told.append(args))
    assert told
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert evaluate(model, tokenizer, config, tmp_path).knowledge["known"].score == 0.0


@pytest.mark.parametrize(("metric", "rules"), [("exact_match", {}), ("exact_match", {"grading": 3}), ("number", {"grading": 2})])
def test_answers_are_graded_again_and_not_asked_again_when_the_rules_change(metric, rules, model, tokenizer, files, tmp_path, monkeypatch):
    """By today's rules a folder is as if it had been asked today; answers of other weights are asked for all the same."""
    config = asking(task=[QuestionSet("steps", files["steps"], metric=metric)])
    monkeypatch.setattr("farss.tasks.benchmarks.grading", lambda entries: rules)
    monkeypatch.setitem(METRICS, metric, lambda answer, accepted: 0.25)
    assert evaluate(model, tokenizer, config, tmp_path / "old").task["steps"].score == 0.25
    monkeypatch.undo()
    told = []
    scores = evaluate(model, tokenizer, config, tmp_path / "old", on_progress=lambda *args: told.append(args))
    assert told == []
    new = evaluate(model, tokenizer, config, tmp_path / "new")
    assert replace(scores.task["steps"], seconds=0) == replace(new.task["steps"], seconds=0)
    old_key, new_key = (json.loads((tmp_path / each / "scores" / "steps.json").read_text())["key"] for each in ("old", "new"))
    assert old_key == new_key
    assert read_records(tmp_path / "old" / "scores", "steps") == read_records(tmp_path / "new" / "scores", "steps")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    evaluate(model, tokenizer, config, tmp_path / "old", on_progress=lambda *args: told.append(args))
    assert told


def test_answers_are_asked_again_where_something_else_stands_before_them(model, tokenizer, files, tmp_path, monkeypatch):
    config = asking([QuestionSet("known", files["known"], prompt="Q: {question}\nA:\n")])
    monkeypatch.setattr("farss.tasks.benchmarks.grading", lambda entries: {"grading": 2})
    evaluate(model, tokenizer, config, tmp_path)
    monkeypatch.undo()
    told = []
    evaluate(model, tokenizer, config, tmp_path, on_progress=lambda *args: told.append(args))
    assert told
    record = read_records(tmp_path / "scores", "known")[0]
    prompt, whole = (tokenizer(text).input_ids for text in (record["prompt"], f"{record['prompt']}{record['gold'][0]}"))
    logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    direct = logits.gather(1, torch.tensor(whole[len(prompt) :])[:, None]).sum().item()
    assert record["gold_loglikelihood"] == pytest.approx(direct, abs=1e-9)  # as in training: no space behind the line break


@pytest.fixture
def hub(monkeypatch):
    """A hub that has a few rows of everything."""
    import datasets

    rows = {
        "google-research-datasets/nq_open": [{"question": r["question"], "answer": r["answers"]} for r in KNOWN],
        "stanfordnlp/web_questions": KNOWN,
        "openai/gsm8k": [{"question": r["question"], "answer": r["answers"][0]} for r in STEPS],
        "EleutherAI/hendrycks_math": [{"problem": "1", "solution": "It is $\\boxed{2}$."}, {"problem": "2", "solution": "$\\boxed{5}$"}],
    }

    def load_dataset(path, name=None, **_):
        table = datasets.Dataset.from_list(rows[path])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), table))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_harness_tasks_by_name(hub, model, tokenizer, tmp_path):
    model.config.max_position_embeddings = 2048
    config = asking(["nq_open", "webqs"], limit=5)
    scores = evaluate(model, tokenizer, config, tmp_path)
    assert scores.knowledge["nq_open"].questions == scores.knowledge["webqs"].questions == 5
    assert scores.knowledge["webqs"].score == 1.0  # its prompt is the one that was taught
    assert "lm_eval" in scores.knowledge["webqs"].version
    records = read_records(tmp_path / "scores", "webqs")
    assert all(record["answer"] == record["gold"][0] for record in records)
    assert all(math.isfinite(record["gold_loglikelihood"]) for record in records)
    assert [r["id"] for r in records] == [r["id"] for r in read_records(tmp_path / "scores", "nq_open")]


def test_the_shipped_tasks_use_the_training_prompt(hub, model, tokenizer, tmp_path):
    model.config.max_position_embeddings = 2048
    scores = evaluate(model, tokenizer, asking(task=["farss_gsm8k", "farss_math"], limit=3), tmp_path)
    assert scores.task["farss_math"].questions == 3
    records = read_records(tmp_path / "scores", "farss_gsm8k")
    assert records[0]["prompt"].startswith("Do ")
    assert records[0]["prompt"].endswith("\nR: Let's think step by step.")
    assert all("farss_math_" in r["id"] for r in read_records(tmp_path / "scores", "farss_math"))
    assert (
        _training_prompt("question", DataConfig(template="{instruction}\nA:\n"), tokenizer)({"question": "2 + 2?"})
        == "2 + 2?\nA:\nLet's think step by step."
    )


def test_a_changed_chat_template_asks_the_shipped_tasks_again(hub, model, tokenizer, tmp_path):
    model.config.max_position_embeddings = 2048
    config = dataclasses.replace(asking(task=["farss_gsm8k"], limit=3), data=DataConfig(template="chat"))
    first = evaluate(model, in_chat(tokenizer), config, tmp_path)
    assert evaluate(model, in_chat(tokenizer), config, tmp_path).task["farss_gsm8k"].seconds == first.task["farss_gsm8k"].seconds
    mended = in_chat(tokenizer)
    mended.chat_template = mended.chat_template.replace("Do ", "Please ")
    evaluate(model, mended, config, tmp_path)
    assert all(record["prompt"].startswith("Please ") for record in read_records(tmp_path / "scores", "farss_gsm8k"))


def in_chat(tokenizer, end=""):
    """The same prompts as a chat's."""
    turn = "{% if m.role == 'user' %}Do {{ m.content }}\nR:{% else %} {{ m.content }}" + end + "{% endif %}"
    chats = copy.deepcopy(tokenizer)
    chats.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    return chats


def test_what_a_chat_template_writes_behind_an_answer_is_no_part_of_it(model, tokenizer, files, tmp_path):
    """ChatML on a base model: `<|im_end|>` is no special token, and a trained model writes it letter by letter."""
    config = dataclasses.replace(asking(task=[QuestionSet("steps", files["steps"])]), data=DataConfig(template="chat"))
    assert evaluate(model, in_chat(tokenizer), config, tmp_path / "plain").task["steps"].score == 1.0
    evaluate(model, in_chat(tokenizer, "\n####</s>\n"), config, tmp_path / "marked")
    assert [record["answer"] for record in read_records(tmp_path / "marked" / "scores", "steps")] == ["1 1", "2 2", "3 3", "4 4"]


def test_a_model_that_thinks_first_is_not_asked_how_likely_bare_answers_are(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("mixed", files["mixed"])], [QuestionSet("steps", files["steps"])])
    config = dataclasses.replace(config, data=DataConfig(template="chat", thinking=True))
    scores = evaluate(model, in_chat(tokenizer), config, tmp_path)
    assert scores.task["steps"].score == 1.0
    assert scores.task["steps"].gold_loglikelihood is None
    assert scores.knowledge["mixed"].gold_loglikelihood is not None
    assert [watched.name for watched in prepare_course(config, in_chat(tokenizer), 1e6).sets] == ["mixed"]


def test_questions_are_asked_again_in_another_chat(model, tokenizer, files, tmp_path):
    """The chat template writes the prompts."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}U{{ m['content'] }}{% endfor %}A"
    config = replace(asking(task=[QuestionSet("steps", files["steps"])]), data=DataConfig(template="chat"))
    for begin in ("", "System: count. "):
        chatty.chat_template = begin + chatty.chat_template
        evaluate(model, chatty, config, tmp_path)
        assert read_records(tmp_path / "scores", "steps")[0]["prompt"].startswith(begin or "U")
    evaluate(model, chatty, config, tmp_path, on_progress=pytest.fail)


def test_what_has_no_right_answer_to_score_is_counted_to_its_end(model, tokenizer, files, tmp_path):
    """After thoughts the right answer is not scored by itself."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}U{{ m['content'] }}{% endfor %}A"
    config = replace(asking(task=[QuestionSet("steps", files["steps"])]), data=DataConfig(template="chat", thinking=True))
    told = []
    evaluate(model, chatty, config, tmp_path, on_progress=lambda *args: told.append(args))
    assert told[-1] == ("steps", 4, 4)


def test_a_score_never_stands_beside_other_answers(model, tokenizer, files, tmp_path, monkeypatch):
    """An evaluation may be killed between the two files, and the folder be used for its first options again."""
    config = asking([QuestionSet("known", files["known"])])
    evaluate(model, tokenizer, config, tmp_path)

    def stopped(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr("farss.evaluate.write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, replace(config, seed=1), tmp_path)
    monkeypatch.undo()
    told = []
    evaluate(model, tokenizer, config, tmp_path, on_progress=lambda *args: told.append(args))
    assert told
