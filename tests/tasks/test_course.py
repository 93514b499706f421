"""What is looked at while training: when, on what, at what cost, and without changing anything."""

import dataclasses
import json
import math

import pytest
import torch
from small_models import save_small

from farss.configfile import from_dict
from farss.errors import FarssError
from farss.models import load_model, load_tokenizer
from farss.pipeline import Run
from farss.tasks import course as room
from farss.tasks.course import Course, Watched, prepare_course
from farss.tasks.likelihood import FORWARD, LEAST, tokens_of


@pytest.fixture
def config(tmp_path):
    folder = save_small("llama", tmp_path / "model")
    facts = [{"question": f"Where is number {index}?", "answers": [f"in town {index}"]} for index in range(40)]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"The river of town {index} is long."}) for index in range(40)))
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"prompt": f"name {i}", "response": f"town {i}"}) for i in range(48)))
    return from_dict(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 64},
            "plan": {"method": "lora", "rank": 2},
            "train": {"batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "save_steps": 2, "gradient_checkpointing": False},
            "evaluate": {
                "knowledge": [{"name": "facts", "data": str(tmp_path / "facts.jsonl"), "fewshot": 2}, "triviaqa"],
                "task": [{"name": "towns", "data": str(tmp_path / "train.jsonl"), "question": "prompt", "answers": "response"}],
                "text": str(tmp_path / "text.jsonl"),
                "looks": 3,
            },
            "out": str(tmp_path / "run"),
        }
    )


def with_looks(config, looks, out=None):
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, looks=looks), out=out or config.out)


def test_looks_are_even_and_hold_both_ends():
    four = Course([], 4, 1, 0)
    assert [step for step in range(11) if four.due(step, 10)] == [0, 2, 5, 8, 10]
    assert [step for step in range(4) if Course([], 8, 1, 0).due(step, 3)] == [0, 1, 2, 3]


def test_a_look_is_the_mean_loglikelihood(config):
    tokenizer, model = load_tokenizer(config.model), load_model(config.model)
    model.train()
    rows = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}, {"input_ids": [9, 4, 3], "completion_mask": [0, 0, 1]}]
    found = Course([Watched("task", "two", rows)], 1, 2, tokenizer.pad_token_id).look(model)
    expected = []
    for row in rows:
        with torch.no_grad():
            values = model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        chosen = [values[place - 1, row["input_ids"][place]].item() for place, mark in enumerate(row["completion_mask"]) if mark]
        expected.append(sum(chosen) / len(chosen))
    assert found == {"task": {"two": pytest.approx(sum(expected) / 2, abs=1e-4)}}


def test_modes_are_restored(config):
    model = load_model(config.model).train()
    model.lm_head.eval()
    Course([Watched("task", "one", [{"input_ids": [5, 6], "completion_mask": [0, 1]}])], 1, 1, 0).look(model)
    assert model.training
    assert not model.lm_head.training


def test_what_fills_the_memory_is_named(config, monkeypatch):
    """In a training, whose own cure would be another."""

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(room, "token_loglikelihoods", full)
    course = Course([Watched("task", "one", [{"input_ids": [5, 6], "completion_mask": [0, 1]}])], 1, 8, 0)
    with pytest.raises(FarssError, match=r"8 answers that are looked at in training \(evaluate.looks\): set evaluate.batch_size=4"):
        course.look(load_model(config.model))


def test_files_and_text_are_watched_within_their_share(config):
    tokenizer = load_tokenizer(config.model)
    tokens = 50_000
    found = prepare_course(config, tokenizer, tokens)
    assert [(one.kind, one.name) for one in found.sets] == [("knowledge", "facts"), ("task", "towns"), ("text", "general text")]
    spent = FORWARD * (found.looks + 1) * sum(tokens_of(one.rows) for one in found.sets)
    assert 0.5 * room.SHARE * tokens < spent < 1.1 * room.SHARE * tokens
    assert [len(one.rows) for one in prepare_course(config, tokenizer, 10).sets] == [LEAST] * 3
    assert prepare_course(with_looks(config, 0), tokenizer, tokens) is None
    longer = dataclasses.replace(config.evaluate.task[0], name="long", prompt="{question}" + 999 * " Seal")
    more = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, task=[longer], text=None))
    assert [one.name for one in prepare_course(more, tokenizer, tokens).sets] == ["facts"]
    bare = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, knowledge=["triviaqa"], task=[], text=None))
    assert prepare_course(bare, tokenizer, tokens) is None


def test_a_short_training_is_looked_at_fewer_times(config):
    tokenizer = load_tokenizer(config.model)
    least = FORWARD * sum(tokens_of(one.rows) for one in prepare_course(config, tokenizer, 10).sets)  # of one look at the fewest questions
    for affordable, looks in ((1, 1), (2, 1), (3, 2), (9, 3)):
        found = prepare_course(config, tokenizer, (affordable + 0.5) * least / room.SHARE)
        assert found.looks == looks  # and one before the first step


def test_a_training_that_is_watched_is_the_same_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SHARE", 1.0)
    watched, alone = Run(config), Run(with_looks(config, 0, str(tmp_path / "alone")))
    seen, unseen = watched.train(), alone.train()
    assert [look["step"] for look in seen.course] == [0, 2, 4, 6]
    assert unseen.course == []
    assert [entry["loss"] for entry in seen.log] == [entry["loss"] for entry in unseen.log]
    first, last = seen.course[0], seen.course[-1]
    assert last["task"]["towns"] > first["task"]["towns"] + 0.1
    assert all(math.isfinite(value) for look in seen.course for found in (look["knowledge"], look["text"]) for value in found.values())


def test_a_resumed_training_has_seen_the_same(config, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SHARE", 1.0)
    whole = Run(config).train()
    killed = Run(dataclasses.replace(config, out=str(tmp_path / "killed")))

    class Killed(Exception):
        pass

    def kill(step, done, total, line):
        if step == "train" and done == 3:
            raise Killed

    killed.tell = kill
    with pytest.raises(Killed):
        killed.train()
    resumed = Run(killed.config).train()
    assert resumed.course == whole.course
