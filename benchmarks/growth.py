"""How time and memory of the survey grow with tokens and with blocks.

FARSS_DATA=path/to/data python benchmarks/growth.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy
from common import WORK, data_file, environment, make_model, measured, run_file, table, write_section

EXAMPLES = (16, 32, 64, 128)
BLOCKS = (6, 12, 24)


def surveyed(blocks: int, examples: int) -> dict[str, float]:
    """Tokens, seconds and peak anonymous memory of one survey, in a process of its own."""
    data = data_file("gsm8k/train.jsonl.gz")
    model = make_model(WORK / f"llama-512x{blocks}", data, blocks=blocks, hidden=512, mlp=1408, heads=8)
    with tempfile.TemporaryDirectory() as folder:
        run = run_file(Path(folder), model, data, examples=examples, rank=64)
        found = measured([sys.executable, "-m", "farss", "survey", str(run)], WORK / "growth.log")
        survey = json.loads((Path(folder) / "run" / "survey" / "survey.json").read_text())
    return {"blocks": blocks, "examples": examples, "tokens": survey["tokens"], **found, "sweep": survey["meta"]["seconds"]}


def exponent(points: list[dict[str, float]], size: str) -> float:
    """Slope of log(seconds of the sweep) over log(size)."""
    logs = [numpy.log([point[key] for point in points]) for key in (size, "sweep")]
    return float(numpy.polyfit(*logs, 1)[0])


def main() -> None:
    by_tokens = [surveyed(6, examples) for examples in EXAMPLES]
    by_blocks = [surveyed(blocks, 32) for blocks in BLOCKS]
    rows = [
        {
            "blocks": str(point["blocks"]),
            "examples": str(point["examples"]),
            "tokens": f"{point['tokens']:,}",
            "sweep (s)": f"{point['sweep']:.1f}",
            "peak anonymous memory (GiB)": f"{point['anonymous_gib']:.2f}",
        }
        for point in (*by_tokens, *by_blocks)
    ]
    growth = f"Exponent in tokens {exponent(by_tokens, 'tokens'):.2f}, in blocks {exponent(by_blocks, 'blocks'):.2f}."
    write_section("growth", f"{table(rows)}\n\n{growth} ({environment()})")


if __name__ == "__main__":
    main()
