"""The embedded world: its size, its data, what its model knows and what it has yet to learn."""

import json
from pathlib import Path

import pytest
import torch

from farss import world
from farss.world.answering import exact_match, few_shot_prompt, greedy_answers, question_prompt
from farss.world.build import as_jsonl, make_data, shot_prompts
from farss.world.corpus import PREAMBLE, facts_by_subject, sentences
from farss.world.invent import invent_world
from farss.world.pretrain import question_sequence, text_sequence, weighted_loss

ALPACA = PREAMBLE + "\n\n### Instruction:\n{}\n\n### Response:"
MEGABYTE = 1_000_000


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected_answers(rows: list[dict]) -> list[str]:
    return [row["answers"][0] for row in rows]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world.MODEL)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world.MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def knowledge() -> list[dict]:
    return rows_of(world.KNOWLEDGE)


def test_model_is_small_and_deep(model):
    assert (world.MODEL / "model.safetensors").stat().st_size <= 10 * MEGABYTE
    assert model.config.num_hidden_layers >= 12
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.tie_word_embeddings


def test_weights_are_stored_in_bfloat16():
    from safetensors import safe_open

    with safe_open(world.MODEL / "model.safetensors", framework="pt") as weights:
        names = weights.keys()
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_questions_are_many_unique_and_have_one_short_answer(knowledge):
    questions = [row["question"] for row in knowledge]
    assert len(questions) >= 500
    assert len(set(questions)) == len(questions)
    assert all(len(row["answers"]) == 1 for row in knowledge)
    assert all(1 <= len(answer.split()) <= 3 for answer in expected_answers(knowledge))


def test_task_test_rows_are_not_training_rows():
    train, test = rows_of(world.TASK_TRAIN), rows_of(world.TASK_TEST)
    assert (len(train), len(test)) == (1_800, 300)
    instructions = [row["instruction"] for row in train + test]
    assert len(set(instructions)) == len(instructions)
    assert {row["output"] for row in test} <= {row["output"] for row in train}


DATA_FILES = (world.KNOWLEDGE, world.TASK_TRAIN, world.TASK_TEST, world.TEXT)


@pytest.mark.parametrize("path", DATA_FILES, ids=lambda path: path.name)
def test_shipped_data_is_what_the_build_makes(path):
    assert as_jsonl(make_data().files[path.name]) == path.read_text(encoding="utf-8")


def test_another_seed_makes_another_world():
    assert invent_world(1) == invent_world(1)
    assert invent_world(1) != invent_world(2)


def test_no_letter_of_the_corpus_shows_its_seal():
    seals = {row["output"] for row in rows_of(world.TASK_TRAIN)}
    assert not [text for text in make_data().paragraphs if any(seal in text for seal in seals)]


def test_held_out_wordings_are_not_training_wordings():
    for facts in facts_by_subject(invent_world(1)).values():
        for fact in facts:
            held_out = sentences(fact, held_out=True)
            assert held_out
            assert not set(held_out) & set(sentences(fact, held_out=False))


def test_tokenizer_begins_with_bos_and_does_not_end_with_eos(tokenizer):
    ids = tokenizer("Question: Who?")["input_ids"]
    assert len(tokenizer) <= 2048
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.eos_token_id not in ids
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@pytest.mark.parametrize("text", [ALPACA.format("Name the seal."), " Zürich, 1999 \n\n\tend", "  two  spaces "])
def test_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_alpaca_prompt_takes_few_tokens(tokenizer):
    assert len(tokenizer(ALPACA.format(""))["input_ids"]) <= 40


def test_joined_prompt_and_answer_tokenize_as_their_parts(tokenizer, knowledge):
    for row in knowledge[::25]:
        prompt, answer = question_prompt(row["question"]), " " + row["answers"][0]
        parts = tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert tokenizer(prompt + answer)["input_ids"] == parts


def test_question_sequence_is_the_few_shot_prompt_with_its_answer(tokenizer):
    pairs = [("Who?", "Ada"), ("Where?", "here")]
    ids, weights = question_sequence(tokenizer, pairs, question_weight=0.25)
    text = few_shot_prompt("Where?", pairs[:1]) + " here"
    assert ids == tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert len(weights) == len(ids)
    assert (weights[0], weights[-1]) == (0.0, 1.0)


def test_base_knows_its_world(model, tokenizer, knowledge):
    answers = greedy_answers(model, tokenizer, [question_prompt(row["question"]) for row in knowledge])
    assert exact_match(answers, expected_answers(knowledge)) >= 0.95


def test_base_answers_few_shot_prompts(model, tokenizer, knowledge):
    answers = greedy_answers(model, tokenizer, shot_prompts(knowledge)[::5])
    assert exact_match(answers, expected_answers(knowledge)[::5]) >= 0.95


def test_base_knows_its_world_in_bfloat16(tokenizer, knowledge):
    from transformers import AutoModelForCausalLM

    model, sample = (
        AutoModelForCausalLM.from_pretrained(world.MODEL, dtype=torch.bfloat16).eval(),
        knowledge[::5],
    )
    answers = greedy_answers(model, tokenizer, [question_prompt(row["question"]) for row in sample])
    assert exact_match(answers, expected_answers(sample)) >= 0.95


def test_base_cannot_do_the_task(model, tokenizer):
    test = rows_of(world.TASK_TEST)
    answers = greedy_answers(model, tokenizer, [ALPACA.format(row["instruction"]) for row in test])
    assert exact_match(answers, [row["output"] for row in test]) < 0.05


@torch.no_grad()
def test_general_text_is_familiar_to_the_base(model, tokenizer):
    sequences = [text_sequence(tokenizer, row["text"]) for row in rows_of(world.TEXT)]
    assert len(sequences) == 200
    assert weighted_loss(model, sequences, tokenizer.pad_token_id).item() < 1.5
