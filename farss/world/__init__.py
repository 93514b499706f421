"""The embedded world: a tiny LLaMA that knows invented facts, and a task it has not learned. Offline."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL = _HERE / "model"
"""Folder of the model and its tokenizer, as `from_pretrained` reads them."""
KNOWLEDGE = _HERE / "data" / "knowledge.jsonl"
"""What the model knows: `question`, `answers` (a list of one string)."""
TASK_TRAIN = _HERE / "data" / "task_train.jsonl"
"""What it can learn: `instruction`, `output`."""
TASK_TEST = _HERE / "data" / "task_test.jsonl"
"""Unseen rows of the same task: `instruction`, `output`."""
TEXT = _HERE / "data" / "text.jsonl"
"""General text in wordings that the model was not trained on, for the mean token loss: `text`."""
