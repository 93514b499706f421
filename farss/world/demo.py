"""The configuration of `farss demo`: the embedded world, four methods side by side."""

from pathlib import Path

import yaml

from farss import world
from farss.config import Config
from farss.configfile import from_dict

MAX_TOKENS = 16


def demo_config(out: str) -> Config:
    """The demo's configuration, with its runs in the folder `out`."""
    values = yaml.safe_load((Path(__file__).parent / "demo.yaml").read_text(encoding="utf-8"))
    values["out"] = out
    values["model"] = {"path": str(world.MODEL)}
    values["data"]["train"] = str(world.TASK_TRAIN)
    values["evaluate"] |= {
        "knowledge": [{"name": "world_facts", "data": str(world.KNOWLEDGE), "max_tokens": MAX_TOKENS}],
        "task": [
            {
                "name": "letter_seals",
                "data": str(world.TASK_TEST),
                "question": "instruction",
                "answers": "output",
                "max_tokens": MAX_TOKENS,
            }
        ],
        "text": str(world.TEXT),
    }
    return from_dict(values)
