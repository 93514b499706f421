"""The two ways of taking the start out of the base (`adapter.base`), side by side: seconds a step, memory, exactness.

farss gemma models/gemma-3-270m
FARSS_DATA=path/to/data python benchmarks/adapter_base.py models/gemma-3-270m
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

from common import WORK, data_file, environment, measured, table, write_section

STEPS = 6


def run_file(folder: Path, model: Path, base: str) -> Path:
    """A few steps of FARSS on Banking77, each way with a survey of its own."""
    data = data_file("banking77/train.jsonl")
    path = folder / f"{base}.yaml"
    path.write_text(
        f"model: {{path: {model.absolute()}}}\n"
        f"data: {{train: {data}, prompt: text, response: category, limit: {16 * STEPS}}}\n"
        "calibration: {examples: 32}\n"
        "plan: {boundary: 4, rank: 64}\n"
        f"adapter: {{base: {base}}}\n"
        "export: {to: merged}\n"  # an adapter of weights that were rounded would not be exact, and is refused
        f"train: {{max_steps: {STEPS}, logging_steps: 1, gradient_checkpointing: false}}\n"
        f"out: {folder / base}\n"
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for base in ("untouched", "residual"):
            run = run_file(Path(temporary), options.model, base)
            measured([sys.executable, "-m", "farss", "survey", str(run)], WORK / "adapter_base.log")
            found = measured([sys.executable, "-m", "farss", "train", str(run)], WORK / "adapter_base.log")
            log = json.loads((Path(temporary) / base / "train.json").read_text())["log"]
            ends = [entry["seconds"] for entry in log]
            zero = json.loads((Path(temporary) / base / "steps" / "train.json").read_text())["step_zero"]
            seconds = statistics.median(later - earlier for earlier, later in itertools.pairwise(ends))
            exactness = {f"step-0 logit difference, {name}": f"{value:.1e}" for name, value in zero.items()}
            rows.append(
                {"adapter.base": base, "seconds a step": f"{seconds:.2f}", "peak memory (GiB)": f"{found['peak_gib']:.1f}", **exactness}
            )
    write_section("adapter-base", f"{table(rows)}\n\n({environment()})")


if __name__ == "__main__":
    main()
