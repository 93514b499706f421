"""How a model is asked: what reaches its forward, and what is as it was afterwards."""

import importlib.util
import json
import logging
from copy import deepcopy
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from taught import asking, recorded

from farss.artifacts import read_records
from farss.config import DataConfig, EvaluateConfig, QuestionSet
from farss.errors import ConfigError, FarssError
from farss.evaluate import evaluate

pytest.importorskip("lm_eval")


@pytest.mark.usefixtures("whole_prompts")
def test_bos_stands_in_front_exactly_once(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("known", files["known"], fewshot=2)], [QuestionSet("steps", files["steps"])])
    rows = recorded(model, lambda: evaluate(model, tokenizer, config, tmp_path))
    whole = [row for batch in rows if batch.shape[1] > 1 for row in batch]
    assert len(whole) == 2 * (6 + 4)
    for row in whole:
        assert (row == 1).sum() == 1
        assert row[row != 0][0] == 1


@pytest.mark.parametrize(("opening", "count"), [("<s>", 1), ("", 0)])
@pytest.mark.usefixtures("whole_prompts")
def test_a_chat_template_decides_about_bos_itself(opening, count, model, tokenizer, files, tmp_path):
    chatty = deepcopy(tokenizer)
    chatty.chat_template = opening + "{% for m in messages %}U{{ m['content'] }}{% endfor %}A"
    config = replace(asking(task=[QuestionSet("steps", files["steps"])]), data=DataConfig(template="chat"))
    rows = recorded(model, lambda: evaluate(model, chatty, config, tmp_path))
    assert {int((row == 1).sum()) for batch in rows if batch.shape[1] > 1 for row in batch} == {count}
    with pytest.raises(ConfigError, match="cannot be shown in a chat"):
        evaluate(model, chatty, replace(config, evaluate=EvaluateConfig(task=[QuestionSet("s", files["steps"], fewshot=1)])), tmp_path)


@pytest.mark.usefixtures("whole_prompts")
def test_generation_uses_the_cache_even_after_gradient_checkpointing(model, tokenizer, files, tmp_path):
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    rows = recorded(model, lambda: evaluate(model, tokenizer, asking([QuestionSet("known", files["known"])]), tmp_path))
    assert [batch.shape[1] for batch in rows[1:4]] == [1, 1, 1]
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.is_gradient_checkpointing


def test_a_models_own_settings_make_no_answer_longer_or_shorter(model, tokenizer, files, tmp_path):
    """Qwen's generation_config.json says max_new_tokens: 2048."""
    config = asking([QuestionSet("known", files["known"], max_tokens=2)])
    evaluate(model, tokenizer, config, tmp_path / "plain")
    model.generation_config.max_new_tokens, model.generation_config.min_new_tokens = 40, 30
    evaluate(model, tokenizer, config, tmp_path / "own")
    plain, own = ([row["answer"] for row in read_records(tmp_path / name / "scores", "known")] for name in ("plain", "own"))
    assert own == plain
    assert max(map(len, own)) == 1  # a token a character, of which the space before the answer is one


@pytest.mark.usefixtures("whole_prompts")
def test_a_peft_model_is_asked_without_a_merge(model, tokenizer, files, tmp_path):
    base = evaluate(model, tokenizer, asking([QuestionSet("mixed", files["mixed"])]), tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")).double()
    rows = recorded(model, lambda: evaluate(adapted, tokenizer, asking([QuestionSet("mixed", files["mixed"])]), tmp_path / "peft"))
    assert [batch.shape[1] for batch in rows[1:4]] == [1, 1, 1]
    found, expected = (read_records(tmp_path / folder / "scores", "mixed") for folder in ("peft", "base"))
    assert [r["answer"] for r in found] == [r["answer"] for r in expected]
    assert base.knowledge["mixed"].score == 8 / 12
    assert any("lora" in name for name, _ in adapted.named_parameters())


def test_nothing_is_changed(model, tokenizer, files, tmp_path):
    tokenizer._tokenizer.no_padding()  # what another test padded with would be taken for its padding token
    bare = tokenizer.__class__(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    level = logging.getLogger("lm_eval").level
    evaluate(model, bare, asking([QuestionSet("known", files["known"])]), tmp_path)
    assert bare.pad_token is None
    assert logging.getLogger("lm_eval").level == level


def test_a_right_answer_that_does_not_fit_is_not_cut(model, tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"question": "which?", "answers": "a" * 250}))
    with pytest.raises(ConfigError, match=r"'known': a prompt of 25 tokens and its right answer of 251 do not fit .* 256 tokens.*which"):
        evaluate(model, tokenizer, asking([QuestionSet("known", str(path), max_tokens=2)]), tmp_path)


def test_without_the_harness(monkeypatch, model, tokenizer, files, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FarssError, match=r"pip install -e '.\[eval\]'"):
        evaluate(model, tokenizer, asking(["triviaqa"]), tmp_path)
    assert evaluate(model, tokenizer, asking(text=files["text"]), tmp_path).text_loss > 0  # general text alone needs none


@pytest.mark.parametrize("room", [128, 300, 2000, 100_000])
def test_one_long_answer_makes_only_its_own_batches_small(model, tokenizer, tmp_path, monkeypatch, room):
    """Whatever the batches are: the same likelihoods, and never more logits at once than there is room for."""
    lengths = [1, 2, 2, 3, 3, 40, 5, 6, 60, 7]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"question": "q" * place, "answers": "a" * n}) + "\n" for place, n in enumerate(lengths, 1)))
    asks = asking([QuestionSet("known", str(path), max_tokens=2)])
    expected = [row["gold_loglikelihood"] for row in records(evaluate_once(model, tokenizer, asks, tmp_path / "whole"))]
    monkeypatch.setattr("farss.tasks.likelihood.LOGITS", room * len(tokenizer))
    seen, call = [], model.forward

    def forward(*ids, logits_to_keep=0, **options):
        seen.extend([part.shape[0] * logits_to_keep for part in ids])  # generation names its input_ids
        return call(*ids, logits_to_keep=logits_to_keep, **options)

    monkeypatch.setattr(model, "forward", forward)
    found = [row["gold_loglikelihood"] for row in records(evaluate_once(model, tokenizer, asks, tmp_path / "small"))]
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(seen) <= max(room, 61)


def evaluate_once(model, tokenizer, config, folder):
    evaluate(model, tokenizer, config, folder)
    return folder


def records(folder):
    return read_records(folder / "scores", "known")


def test_only_the_answers_positions_are_scored():
    from farss.tasks.live import answer_span

    answers = {(1, 2, 3, 4, 5): 2, (1, 2, 3): 1, (7, 8, 9, 0): 1}
    assert answer_span([[5, 2, 3, 4]], {(5, 2, 3, 4): 2}) == 2
    assert answer_span([[5, 2, 3, 4], [1, 2, 3, 0]], {(5, 2, 3, 4): 1, (1, 2, 3): 1}) == 2  # one position of padding
    assert answer_span([[1, 2, 3, 4, 5]], answers) == 5 - 3 + 1  # its beginning is a row of its own: the wider span is safe
    assert answer_span([[7, 8, 9, 0]], answers) == 1
    assert answer_span([[1, 2, 3, 4, 5], [6, 6, 6, 6, 6]], answers) == 5  # unknown: everything
