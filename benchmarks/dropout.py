"""What dropout does to a model before anything is learned, where it falls on a start that was taken out of the base: the loss of general
text with every adapter as it begins.

farss gemma models/gemma-3-270m
FARSS_DATA=path/to/data python benchmarks/dropout.py models/gemma-3-270m
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import data_file, environment, table, write_section

from farss import CalibrationConfig, DataConfig, PlanConfig, prepare
from farss.adapter import START, TRAINED
from farss.config import ModelConfig
from farss.models import load_model, load_tokenizer
from farss.rows import read_rows, text_rows
from farss.tasks.likelihood import text_loss

METHODS = ("pissa", "olora", "milora", "corda-ipm", "corda-kpm", "lora-null", "farss", "farss-init")
RATE = 0.05
EXAMPLES, TEXTS, LENGTH = 64, 16, 128


class Always(torch.nn.Dropout):
    """Also where a model is evaluated."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(input, self.p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    config = ModelConfig(path=str(parser.parse_args().model), dtype="float32", device="cpu")
    tokenizer, rows = load_tokenizer(config), read_rows(str(data_file("banking77/train.jsonl")))
    long = [text for text in text_rows(str(data_file("wikitext2/valid.jsonl.gz"))) if len(text) > 4 * LENGTH]
    asked, seen = long[: 2 * TEXTS : 2], long[2 * TEXTS :]

    def loss(model: torch.nn.Module) -> float:
        torch.manual_seed(0)
        return text_loss(model, tokenizer, asked, 4, LENGTH)

    found = []
    for method in METHODS:
        model = load_model(config)
        whole = loss(model)
        options = {"data": DataConfig(prompt="text", response="category"), "calibration": CalibrationConfig(examples=EXAMPLES)}
        adapted = prepare(model, tokenizer, rows, method=method, plan=PlanConfig(rank=64), dropout=RATE, knowledge=seen, **options)
        for module in adapted.modules():
            if TRAINED in getattr(module, "lora_dropout", {}):
                module.lora_dropout.update({TRAINED: Always(RATE), START: torch.nn.Identity()})
        found.append({"method": method, "the base": f"{whole:.2f}", "with dropout on the start": f"{loss(adapted):.2f}"})
        print(found[-1], flush=True)
    how = f"{len(asked)} texts of WikiText-2, nats a token, float32; rank 64, dropout {RATE}, {EXAMPLES} calibration examples"
    write_section("dropout", f"{table(found)}\n\n({how}; {environment()})", "adapters.md")


if __name__ == "__main__":
    main()
