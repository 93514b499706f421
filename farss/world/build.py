"""Builds the embedded world: `python -m farss.world.build [OUT]` writes OUT/data and OUT/model.

Without OUT it replaces the files of the package.
The data is the same, byte for byte, on every machine; the weights differ in the last digits between machines.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from farss.prompts import prompt_text
from farss.world.answering import exact_match, few_shot_prompt, greedy_answers, question_prompt
from farss.world.corpus import Row, held_out_rows, knowledge_rows, training_paragraphs
from farss.world.invent import invent_world
from farss.world.pretrain import Pretraining, new_model, pretrain, train_tokenizer
from farss.world.task import invent_task

log = logging.getLogger(__name__)

SEED = 20
SHOTS = 5
REQUIRED_ACCURACY = 0.95


@dataclass(frozen=True)
class WorldData:
    """The rows of every data file, by file name, and the general corpus, which is not shipped."""

    files: dict[str, list[Row]]
    paragraphs: list[str]


def make_data() -> WorldData:
    """Invent the world and put it into rows; no training."""
    world = invent_world(SEED)
    task = invent_task(SEED, world.towns, world.people)
    files = {
        "knowledge.jsonl": knowledge_rows(world),
        "task_train.jsonl": task.train,
        "task_test.jsonl": task.test,
        "text.jsonl": held_out_rows(world, SEED),
    }
    return WorldData(files, training_paragraphs(world, task.letters, SEED))


def as_jsonl(rows: Sequence[Row]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_data(data: WorldData, folder: Path) -> None:
    """Write every data file into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in data.files.items():
        (folder / name).write_text(as_jsonl(rows), encoding="utf-8")


def tokenizer_texts(data: WorldData) -> list[str]:
    """What the tokenizer learns its words from: corpus, questions, and instructions in the prompt."""
    asked = [f"{question_prompt(row['question'])} {row['answers'][0]}\n\n" for row in data.files["knowledge.jsonl"]]
    framed = [prompt_text("alpaca", row["instruction"]) for row in data.files["task_train.jsonl"]]
    return [*data.paragraphs, *asked * 10, *framed]


def build_model(data: WorldData, folder: Path, settings: Pretraining) -> None:
    """Train the tokenizer and the model, and save both in `folder`, the weights in bfloat16."""
    tokenizer = train_tokenizer(tokenizer_texts(data))
    model = new_model(tokenizer, SEED)
    pairs = [(row["question"], row["answers"][0]) for row in data.files["knowledge.jsonl"]]
    pretrain(model, tokenizer, pairs, data.paragraphs, settings, SEED)
    model.bfloat16().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that every version of transformers knows (version 5 writes a new one)."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def saved_accuracies(folder: Path, knowledge: Sequence[Row]) -> dict[str, float]:
    """Exact match of the saved model on the questions, in both precisions, bare and with `SHOTS` examples."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [row["answers"][0] for row in knowledge]
    prompts = {
        "bare": [question_prompt(row["question"]) for row in knowledge],
        "shots": shot_prompts(knowledge),
    }
    accuracies = {}
    for precision in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=precision).eval()
        for kind, texts in prompts.items():
            answers = greedy_answers(model, tokenizer, texts)
            accuracies[f"{kind}, {precision}"] = exact_match(answers, expected)
    return accuracies


def shot_prompts(knowledge: Sequence[Row]) -> list[str]:
    """Each question after the `SHOTS` solved ones that stand a stride further on in the list."""
    solved = [(row["question"], row["answers"][0]) for row in knowledge]
    stride, count = 37, len(knowledge)
    return [
        few_shot_prompt(question, [solved[(i + stride * shot) % count] for shot in range(1, SHOTS + 1)])
        for i, (question, _) in enumerate(solved)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Build everything; refuse weights that do not know their world."""
    parser = argparse.ArgumentParser(prog="python -m farss.world.build", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--steps", type=int, default=Pretraining.steps, help="training steps")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    data = make_data()
    write_data(data, options.out / "data")
    build_model(data, options.out / "model", Pretraining(steps=options.steps))
    accuracies = saved_accuracies(options.out / "model", data.files["knowledge.jsonl"])
    for name, accuracy in accuracies.items():
        log.info("%s: %.1f %%", name, 100 * accuracy)
    if min(accuracies.values()) < REQUIRED_ACCURACY:
        raise SystemExit(f"an accuracy is below {REQUIRED_ACCURACY:.0%}: raise --steps")


if __name__ == "__main__":
    main()
