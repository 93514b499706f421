"""Results of the benchmarks: one JSON file each in `benchmarks/results`, and docs/performance.md drawn from them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Machine, versions and date."""
    names = ("torch", "transformers", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    return {"machine": f"{_processor()}, {threads} threads", "versions": versions, "date": time.strftime("%Y-%m-%d")}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row[head] for head in heads) + " |" for row in rows)])


def write_result(name: str, result: dict) -> None:
    """Keep a benchmark's result."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
