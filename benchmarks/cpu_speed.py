"""How much each measure saves on a CPU with a large vocabulary: float32 where it has no units for 16-bit products; in training,
answer tokens alone, small tiles of logits, sums of bfloat16, cheap dropout, thin products, and freed memory that is kept; in
asking questions, a compact output layer, and reading the examples before every question once; in writing texts, drawing by inversion.

    farss gemma models/gemma-3-270m
    FARSS_DATA=path/to/data python benchmarks/cpu_speed.py models/gemma-3-270m
    FARSS_DATA=path/to/data python benchmarks/cpu_speed.py models/gemma-3-270m --only farss --task Banking77

Each figure is measured with and without the measure in one run and printed as seconds and ratio: steps of one training in turns,
the rest one after the other.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from common import data_file
from transformers import TrainerCallback

from farss import forward, precision
from farss.adapter import attach
from farss.config import ModelConfig
from farss.configfile import from_dict
from farss.evaluate import evaluate
from farss.models import load_model, load_tokenizer
from farss.pipeline import Run
from farss.survey import own_text, writing
from farss.tasks import live
from farss.train import speed, trainer, training
from farss.versions import versions

ROUNDS = 5
"""Steps with and without each measure; the first round is left out."""
QUESTIONS = 128


TASKS = {
    "Banking77": {"train": "banking77/train.jsonl", "prompt": "text", "response": "category"},
    "GSM8K": {"train": "gsm8k/train.jsonl.gz", "max_length": 320},
}
"""Answers of four tokens, and of a hundred."""
MEASURES = {
    "answers only": speed.answers_only,
    "small tiles": speed.small_tiles,
    "sums of bfloat16": speed.sums_of_bfloat16,
    "cheap dropout": speed.cheap_dropout,
    "thin products": speed.thin_products,
}
"""Of a training step."""
ALL, NONE = "all", "these five together"


def run_config(model: str, data: Path, out: str, method: str, task: str = "Banking77", steps: int = 1):
    """A few steps on the same sixteen examples."""
    return from_dict(
        {
            "model": {"path": model},
            "data": {**TASKS[task], "train": str(data / TASKS[task]["train"]), "limit": 16},
            "plan": {"method": method, "rank": 64},
            "train": {"max_steps": steps, "batch_size": 16, "gradient_checkpointing": False, "save_steps": steps},
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


class Turns(TrainerCallback):
    """One step with every measure, one without each of them and one with none, again and again."""

    def __init__(self, left_out: list[str]) -> None:
        self.left_out, self.seconds = left_out, defaultdict(list)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.now = self.left_out[state.global_step % len(self.left_out)]
        self.entered = contextlib.ExitStack()
        for name, measure in MEASURES.items():
            if self.now not in (NONE, name):
                self.entered.enter_context(measure())
        self.begun = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.entered.close()
        if state.global_step > len(self.left_out):
            self.seconds[self.now].append(time.monotonic() - self.begun)


def step_seconds(model: str, data: Path, method: str, task: str, left_out: list[str]) -> tuple[dict[str, float], float]:
    """Median seconds of a training step, by the measure that is left out, and the training's peak memory in GiB."""
    turns = Turns(left_out)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(run_config(model, data, f"{folder}/run", method, task, ROUNDS * len(left_out)))
        plan, base = run.plan(), load_model(run.config.model, torch.float32 if method == "full" else None)
        with mock.patch.object(training, "faster_steps", return_value=contextlib.nullcontext()):
            done = training.train(
                attach(base, plan, run.statistics(), dropout=0.05),
                run.inputs.tokenizer,
                run.inputs.examples,
                run.config,
                Path(folder),
                [turns],
            )
    return {name: statistics.median(seconds) for name, seconds in turns.seconds.items()}, done.peak_memory_gib


def question_seconds(model: str, data: Path) -> float:
    """Seconds for the answers and log-likelihoods of the questions."""
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(model, data, f"{folder}/run", "lora")
        scores = evaluate(load_model(config.model), load_tokenizer(config.model), config, Path(folder))
    return scores.knowledge["nq_open"].seconds


def show(what: str, before: float, after: float, unit: str = "s") -> None:
    print(f"| {what} | {before:.1f} {unit} | {after:.1f} {unit} | {before / after:.2f} |", flush=True)


def float32(model: str, data: Path) -> None:
    """What a CPU without units for 16-bit products takes if it is not spared them."""
    if precision.multiplies_in(torch.bfloat16, torch.device("cpu")):
        print("(this CPU has units for bfloat16 products, and uses them)")
        return

    def measured() -> tuple[float, float]:
        return step_seconds(model, data, "lora", "Banking77", [ALL])[0][ALL], question_seconds(model, data)

    now = measured()
    with mock.patch.object(precision, "multiplies_in", return_value=True), mock.patch.object(trainer, "multiplies_in", return_value=True):
        before = measured()
    for what, *seconds in zip(("lora, a step of 16 examples of Banking77", f"{QUESTIONS} five-shot questions"), before, now, strict=True):
        show(f"float32 instead of bfloat16: {what}", *seconds)


def training_steps(model: str, data: Path, method: str, tasks: list[str]) -> None:
    """What each measure saves of a training step."""
    for task in tasks:
        step = f"{method}, a step of 16 examples of {task}"
        seconds, _ = step_seconds(model, data, method, task, [ALL, *MEASURES, NONE])
        for name in (*MEASURES, NONE):
            show(f"{name}: {step}", seconds[name], seconds[ALL])
        # these two decide where in memory a whole training lies
        alone, room = step_seconds(model, data, method, task, [ALL])
        thick, more = step_seconds(model, data, method, task, ["thin products"])
        with mock.patch.object(training, "freed_memory_kept", return_value=contextlib.nullcontext()):
            scattered, _ = step_seconds(model, data, method, task, [ALL])
        show(f"freed memory kept, trainings of their own: {step}", scattered[ALL], alone[ALL])
        show(f"thin products, trainings of their own: {step}", thick["thin products"], alone[ALL])
        show(f"the same, peak memory: {step}", more, room, "GiB")


def questions(model: str, data: Path) -> None:
    """What each measure saves of asking questions."""
    now = question_seconds(model, data)
    for room, measure, words, nothing in (
        (forward, "compact_head", "compact output layer", contextlib.nullcontext()),
        (live, "shared_prefix", "examples read once", None),
    ):
        with mock.patch.object(room, measure, return_value=nothing):
            before = question_seconds(model, data)
        show(f"{words}: {QUESTIONS} five-shot questions", before, now)


def texts(model: str) -> None:
    """What drawing by inversion saves where a model writes its own texts."""
    held = load_model(ModelConfig(path=model)), load_tokenizer(ModelConfig(path=model))

    def seconds() -> float:
        begun = time.monotonic()
        own_text(*held, count=writing.BATCH, length=32, seed=0)
        return time.monotonic() - begun

    now = seconds()
    with mock.patch.object(writing, "_cheap_draws", return_value=contextlib.nullcontext()):
        show(f"drawn by inversion: {writing.BATCH} texts of 32 tokens", seconds(), now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--only", choices=["float32", "lora", "farss", "full", "questions", "texts"], help="one part")
    parser.add_argument("--task", choices=list(TASKS), help="of the trainings; default: both")
    chosen = parser.parse_args()
    data = data_file("banking77/train.jsonl").parents[1]
    print(", ".join(f"{name} {version}" for name, version in versions().items()), f"({torch.get_num_threads()} threads)")
    print("\n| what | without | with | ratio |\n|---|---:|---:|---:|")
    tasks = [chosen.task] if chosen.task else list(TASKS)
    parts = {
        "float32": lambda: float32(chosen.model, data),
        **{method: partial(training_steps, chosen.model, data, method, tasks) for method in ("lora", "farss", "full")},
        "questions": lambda: questions(chosen.model, data),
        "texts": lambda: texts(chosen.model),
    }
    for name, part in parts.items():
        if chosen.only in (None, name):
            part()


if __name__ == "__main__":
    main()
