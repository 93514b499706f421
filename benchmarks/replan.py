"""One survey, every plan: seconds for a new plan, and how far `svd: fast` is from the exact choice.

farss gemma models/gemma-3-270m
FARSS_DATA=path/to/data python benchmarks/replan.py models/gemma-3-270m
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

from common import WORK, data_file, environment, measured, run_file, table, write_section

from farss.artifacts import Survey
from farss.config import PlanConfig
from farss.maths.directions import overlap, select
from farss.plan import make_plan

BASE = PlanConfig(boundary=4, rank=64)
CHANGES = {
    "boundary 5": {"boundary": 5},
    "deep rank 32": {"rank": 32},
    "r_avg 16, r_max 24": {"r_avg": 16, "r_max": 24},
    "budget exact": {"budget": "exact"},
    "most important directions everywhere": {"shallow_directions": "most"},
    "parameters of LoRA": {"match_params": "lora"},
}


def surveyed(model: Path, svd: str) -> Survey:
    """The survey of 64 GSM8K examples; made once."""
    folder = WORK / f"gemma-{svd}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "run" / "survey" / "survey.json").is_file():
        run = run_file(folder, model.absolute(), data_file("gsm8k/train.jsonl.gz"), examples=64, svd=svd)
        measured([sys.executable, "-m", "farss", "survey", str(run)], WORK / "replan.log")
    return Survey.load(folder / "run" / "survey")


def seconds(survey: Survey, config: PlanConfig) -> float:
    """Median seconds of a plan."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        make_plan(config, survey)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def overlaps(exact: Survey, fast: Survey, side: str, rank: int) -> tuple[float, float]:
    """Mean and lowest share of the fast choice that is in the exact one, over layers."""
    pairs = ((fast.directions(name).scores, exact.directions(name).scores) for name in exact.layers)
    shares = [overlap(*(select(scores, rank, side) for scores in pair)) for pair in pairs]
    return statistics.mean(shares), min(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    exact, fast = surveyed(options.model, "exact"), surveyed(options.model, "fast")
    rows = [{"change": name, "seconds": f"{seconds(exact, dataclasses.replace(BASE, **change)):.2f}"} for name, change in CHANGES.items()]
    write_section("replan", f"{table(rows)}\n\n({environment()})")
    rows = []
    for side, rank in (("most", 64), ("most", 128), ("least", 32), ("least", 64)):
        mean, lowest = overlaps(exact, fast, side, rank)
        rows.append({"directions": f"{rank} {side} important", "mean over layers": f"{mean:.2%}", "lowest layer": f"{lowest:.2%}"})
    times = f"exact {exact.meta['seconds']:.0f} s, fast {fast.meta['seconds']:.0f} s"
    write_section("overlap", f"{table(rows)}\n\n({exact.tokens:,} tokens; {times}; {environment()})")


if __name__ == "__main__":
    main()
