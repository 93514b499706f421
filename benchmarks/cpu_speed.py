"""How much five measures save on a CPU with a large vocabulary: float32 where it has no units for 16-bit products, training on
answer tokens only, freed memory that is kept, a compact output layer, and reading the examples before every question once.

    farss gemma models/gemma-3-270m
    FARSS_DATA=path/to/data python benchmarks/cpu_speed.py models/gemma-3-270m

Each figure is measured with and without the measure in one run, one after the other, and printed as seconds and ratio.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
from pathlib import Path

import torch

from farss import models
from farss import train as train_room
from farss.config import from_dict
from farss.evaluate import evaluate
from farss.models import load_model, load_tokenizer
from farss.pipeline import Run, versions
from farss.tasks import live

STEPS = 4
QUESTIONS = 128


TASKS = {
    "Banking77": {"train": "banking77/train.jsonl", "prompt": "text", "response": "category"},
    "GSM8K": {"train": "gsm8k/train.jsonl.gz", "max_length": 320},
}
"""Answers of four tokens, and of a hundred."""


def run_config(model: str, data: Path, out: str, method: str, task: str = "Banking77"):
    """A few steps."""
    return from_dict(
        {
            "model": {"path": model},
            "data": {**TASKS[task], "train": str(data / TASKS[task]["train"]), "limit": 16 * STEPS},
            "plan": {"method": method, "rank": 64},
            "train": {"max_steps": STEPS, "logging_steps": 1, "gradient_checkpointing": False},
            "evaluate": {
                "knowledge": [
                    {
                        "name": "nq_open",
                        "data": str(data / "nq_open" / "dev.jsonl"),
                        "answers": "answer",
                        "fewshot": 5,
                        "limit": QUESTIONS,
                        "max_tokens": 16,
                    }
                ],
                "batch_size": 32,
            },
            "out": out,
        }
    )


def step_seconds(model: str, data: Path, method: str, task: str) -> float:
    """Median seconds of a training step, the first one left out."""
    with tempfile.TemporaryDirectory() as folder:
        log = Run(run_config(model, data, f"{folder}/run", method, task)).train().log
    ends = [entry["seconds"] for entry in log]
    return statistics.median(end - start for start, end in itertools.pairwise(ends))


def question_seconds(model: str, data: Path) -> float:
    """Seconds for the answers and log-likelihoods of the questions."""
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(model, data, f"{folder}/run", "lora")
        scores = evaluate(load_model(config.model), load_tokenizer(config.model), config, Path(folder))
    return scores.knowledge["nq_open"].seconds


def without(room, name: str, result=None):
    """A context in which one of a room's measures does nothing and returns this."""

    @contextlib.contextmanager
    def patched():
        measure = getattr(room, name)
        setattr(room, name, lambda *args: result)
        try:
            yield
        finally:
            setattr(room, name, measure)

    return patched()


def show(what: str, before: float, after: float) -> None:
    print(f"| {what} | {before:.1f} s | {after:.1f} s | {before / after:.1f} |", flush=True)


def float32(model: str, data: Path) -> None:
    """What a CPU without units for 16-bit products takes if it is not spared them."""
    if models.multiplies_in(torch.bfloat16, torch.device("cpu")):
        print("(this CPU has units for bfloat16 products, and uses them)")
        return

    def measured() -> tuple[float, float]:
        return step_seconds(model, data, "lora", "Banking77"), question_seconds(model, data)

    now = measured()
    with without(models, "multiplies_in", True), without(train_room, "multiplies_in", True):
        before = measured()
    for what, *seconds in zip(("lora, a step of 16 examples of Banking77", f"{QUESTIONS} five-shot questions"), before, now, strict=True):
        show(f"float32 instead of bfloat16: {what}", *seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    model = parser.parse_args().model
    data = Path(os.environ.get("FARSS_DATA", "../shared/data"))
    print(", ".join(f"{name} {version}" for name, version in versions().items()), f"({torch.get_num_threads()} threads)")
    print("\n| what | without | with | ratio |\n|---|---:|---:|---:|")
    float32(model, data)
    for method, task in itertools.product(("lora", "full"), TASKS):
        now = step_seconds(model, data, method, task)
        for measure, words in (("_answers_only", "answers only"), ("freed_memory_kept", "freed memory kept")):
            with without(train_room, measure, contextlib.nullcontext()):
                before = step_seconds(model, data, method, task)
            show(f"{words}: {method}, a step of 16 examples of {task}", before, now)
    now = question_seconds(model, data)
    for room, measure, words, nothing in (
        (models, "compact_head", "compact output layer", contextlib.nullcontext()),
        (live, "shared_prefix", "examples read once", None),
    ):
        with without(room, measure, nothing):
            before = question_seconds(model, data)
        show(f"{words}: {QUESTIONS} five-shot questions", before, now)


if __name__ == "__main__":
    main()
