"""What the tests of whole runs share: a small model on disk, a short configuration."""

import functools
import json
from pathlib import Path

import pytest
from small_models import save_small

from farss import world
from farss.configfile import from_dict


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small random LLaMA with the world's tokenizer, on disk."""
    return save_small("llama-gqa", tmp_path_factory.mktemp("model"))


def settings(model_folder, out):
    return {
        "model": {"path": str(model_folder)},
        "data": {"train": str(world.TASK_TRAIN), "max_length": 96, "limit": 64},
        "calibration": {"examples": 8, "batch_size": 4},
        "plan": {"boundary": 1, "rank": 8, "r_avg": 4, "r_max": 6},
        "train": {"learning_rate": 1e-3, "max_steps": 6, "batch_size": 4, "save_steps": 2, "logging_steps": 1, "precision": "fp32"},
        "evaluate": {
            "knowledge": [{"name": "facts", "data": str(world.KNOWLEDGE), "limit": 6, "max_tokens": 2}],
            "task": [
                {"name": "seals", "data": str(world.TASK_TEST), "question": "instruction", "answers": "output", "limit": 6, "max_tokens": 2}
            ],
            "text": str(world.TEXT),
            "text_rows": 20,
            "resamples": 100,
        },
        "out": str(out),
    }


@pytest.fixture
def config(model_folder, tmp_path):
    return from_dict(settings(model_folder, tmp_path / "run"))


def counted(calls, name, function):
    """The same function, which leaves its name among the calls."""

    @functools.wraps(function)
    def call(*arguments, **options):
        calls.append(name)
        return function(*arguments, **options)

    return call


def killed(*_, **__):
    raise KeyboardInterrupt


def asked(config):
    return json.loads((Path(config.out) / "scores.json").read_text())["meta"]["weights"]
