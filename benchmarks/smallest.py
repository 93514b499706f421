"""What a model loses with its smallest singular components, which KaSA cuts off for good and MiLoRA trains from: the loss of general text.

farss gemma models/gemma-3-270m
FARSS_DATA=path/to/data python benchmarks/smallest.py models/gemma-3-270m
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import data_file, environment, table, write_section

from farss.config import ModelConfig
from farss.models import load_model, load_tokenizer
from farss.rows import text_rows
from farss.structure import target_layers
from farss.tasks.likelihood import text_loss

CUT = (1, 8, 32, 64)
"""Components of every layer."""
TEXTS, LENGTH = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    config = ModelConfig(path=str(parser.parse_args().model), dtype="float32", device="cpu")
    model, tokenizer = load_model(config), load_tokenizer(config)
    long = [text for text in text_rows(str(data_file("wikitext2/valid.jsonl.gz"))) if len(text) > 4 * LENGTH]
    texts = long[:: max(1, len(long) // TEXTS)][:TEXTS]
    weights = {name: model.get_submodule(name).weight for name in target_layers(model)}
    original = {name: weight.data.clone() for name, weight in weights.items()}
    parts = {name: torch.linalg.svd(weight.data, full_matrices=False) for name, weight in weights.items()}
    whole = sum(sigma.square().sum().item() for _, sigma, _ in parts.values())

    def loss(chosen: slice) -> tuple[float, float]:
        """Nats a token, and the share of the weights' squared norm that is cut off."""
        for name, (u, sigma, vh) in parts.items():
            weights[name].data = original[name] - (u[:, chosen] * sigma[chosen]) @ vh[chosen]
        lost = sum(sigma[chosen].square().sum().item() for _, sigma, _ in parts.values())
        return text_loss(model, tokenizer, texts, 4, LENGTH), lost / whole

    rows = [{"cut off in every layer": "nothing", "of the squared norm": "", "loss (nats a token)": f"{loss(slice(0, 0))[0]:.2f}"}]
    for end, chosen in (("smallest", lambda count: slice(-count, None)), ("largest", lambda count: slice(0, count))):
        for count in CUT if end == "smallest" else CUT[:2]:
            nats, lost = loss(chosen(count))
            rows.append(
                {"cut off in every layer": f"{count} {end}", "of the squared norm": f"{lost:.3%}", "loss (nats a token)": f"{nats:.2f}"}
            )
    how = f"{len(texts)} texts of WikiText-2's validation set, computed in float32; {environment()}"
    write_section("smallest", f"{table(rows)}\n\n({how})", "results-banking77.md")


if __name__ == "__main__":
    main()
