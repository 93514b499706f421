"""Run folders with invented artifacts, written through the package's own artifacts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from farss.artifacts import Layer, LayerPlan, Plan, Survey
from farss.files import read_json, write_json, write_tensors, write_text

KINDS = {
    "self_attn.q_proj": (48, 48),
    "self_attn.k_proj": (24, 48),
    "self_attn.v_proj": (24, 48),
    "self_attn.o_proj": (48, 48),
    "mlp.gate_proj": (96, 48),
    "mlp.up_proj": (96, 48),
    "mlp.down_proj": (48, 96),
}
CONFIG = """model:
  path: models/tiny-llama
data:
  train: tasks/arithmetic.jsonl
plan:
  method: farss
  boundary: {boundary}
seed: 0
"""
COMPARE = "compare:\n  methods: [farss, lora, full]\n"

HOSTILE = "</script><script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>\u2028{{7*7}}%{x}"
RTL = "\u202eمرحبا بالعالم"


def write_survey(folder: Path, blocks: int, examples: int = 256) -> Survey:
    """A survey whose shallow blocks are more important and more concentrated."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for block in range(blocks):
        tensors = {}
        for place, (kind, shape) in enumerate(KINDS.items()):
            name, k = f"model.layers.{block}.{kind}", min(shape)
            depth = block / blocks
            layers[name] = Layer(name, block, shape, 10 ** (-2 - 2 * depth - 0.3 * place + 0.2 * math.sin(block + place)))
            tensors[f"{name}.sigma"] = 4 * torch.exp(-torch.arange(k) * (0.18 - 0.1 * depth)) + 0.05
            tensors[f"{name}.lam"] = torch.rand(k, generator=generator).square() + 1e-3
            tensors[f"{name}.gam"] = 1e-4 * (torch.rand(k, generator=generator) + 1e-3)
        write_tensors(folder / f"block-{block:04d}.safetensors", tensors)
    survey = Survey(folder, layers, blocks, cap=16, examples=examples, tokens=40_000, meta={"seconds": 83.2})
    survey.save()
    return survey


def make_plan(survey: Survey, boundary: int | None, method: str = "farss", random: bool = False) -> Plan:
    """Small ranks from the least important directions below the boundary; rank 12 elsewhere."""
    layers = {}
    for place, (name, layer) in enumerate(survey.layers.items()):
        shallow = boundary is not None and layer.block < boundary
        rank = 2 + place % 7 if shallow else 12
        order = survey.directions(name).scores.argsort(descending=True).tolist()
        chosen = [] if random else order[-rank:] if shallow else order[:rank]
        side = None if random else "least" if shallow else "most"
        layers[name] = LayerPlan(rank, float(rank), layer.block, layer.shape, side, chosen)
    return Plan(method, layers, survey.blocks, boundary, rank=12, notes=["The budget lost 3 ranks to rounding."])


def write_train(folder: Path, parameters: int, offset: float = 0.0) -> None:
    """A falling loss."""
    log = [
        {
            "step": step,
            "loss": 0.6 + offset + 1.8 * math.exp(-step / 60) + 0.05 * math.sin(step * 7.1),
            "learning_rate": 2e-5 * (1 - step / 400),
            "seconds": step * 0.4,
        }
        for step in range(10, 401, 5)
    ]
    values = {
        "steps": 400,
        "epochs": 1.0,
        "seconds": 5432.1,
        "loss": 0.61,
        "peak_memory_gib": 17.34,
        "parameters": parameters,
    }
    course = [
        {
            "step": step,
            "knowledge": {"triviaqa": -2.1 - offset - step / 900, "nq_open": -3.0 - step / 700},
            "task": {"farss_gsm8k": -1.4 + step / 500},
            "text": {"general text": -3.2 - step / 2000},
        }
        for step in range(0, 401, 50)
    ]
    write_json(folder / "train.json", values | {"log": log, "course": course})


def write_answers(folder: Path, name: str, answers: list[tuple[str, float]]) -> None:
    """One JSONL file; answers are (text, score) pairs."""
    entries = [
        {
            "id": str(place),
            "prompt": f"Question: who is number {place}?\nAnswer:",
            "gold": [f"person {place}"],
            "answer": text,
            "score": score,
        }
        for place, (text, score) in enumerate(answers)
    ]
    write_text(folder / f"{name}.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def write_both_answers(before: Path, after: Path) -> None:
    """40 knowledge questions: 6 lost, 4 won, 20 kept, 10 never."""
    old = [(f"person {i}", 1.0) if i < 26 else ("nobody", 0.0) for i in range(40)]
    new = [("a number: 42", 0.0) if i < 6 else (f"person {i}", 1.0) if i < 30 else ("nobody", 0.0) for i in range(40)]
    write_answers(before, "people", old)
    write_answers(after, "people", new)


def measured(value: float, width: float = 0.03) -> dict[str, float]:
    """A value with its interval."""
    return {"value": value, "low": value - width, "high": value + width}


def summary_values() -> dict[str, Any]:
    """A summary as the evaluation writes it."""
    people = {
        "name": "people",
        "kind": "knowledge",
        "questions": 40,
        "before": 0.65,
        "after": 0.6,
        "full": None,
        "low": 0.45,
        "high": 0.75,
    }
    cities = {
        "name": "cities",
        "kind": "knowledge",
        "questions": 1200,
        "before": 0.5251,
        "after": 0.5013,
        "full": None,
        "low": 0.473,
        "high": 0.53,
    }
    sums = {
        "name": "sums",
        "kind": "task",
        "questions": 500,
        "before": 0.04,
        "after": 0.412,
        "full": 0.43,
        "low": 0.371,
        "high": 0.455,
    }
    gold = {"gold_before": -2.41, "gold_after": -2.77, "change": {"value": -0.05, "low": -0.11, "high": 0.01}}
    numbers = {"K": measured(0.941), "T": measured(0.958), "KT": measured(0.9494), "forgetting": 0.0312}
    return numbers | {
        "benchmarks": [people | gold, cities | gold, sums],
        "notes": ["T is measured against full fine-tuning with seed 0."],
    }


def complete_run(folder: Path, blocks: int = 6, boundary: int = 2) -> Path:
    """Every artifact of a run."""
    plan = make_plan(write_survey(folder / "survey", blocks), boundary)
    write_text(folder / "config.yaml", CONFIG.format(boundary=boundary))
    plan.save(folder / "plan.json")
    write_train(folder, plan.parameters)
    write_both_answers(folder / "base" / "scores", folder / "scores")
    write_json(folder / "summary.json", summary_values())
    write_json(
        folder / "versions.json",
        {"farss": "0.1.0", "torch": "2.8.0", "machine": "2 cores", "command": "farss run config.yaml"},
    )
    write_tensors(folder / "adapter" / "adapter_model.safetensors", {"a": torch.zeros(64, 64)})
    return folder


def row(method: str, seed: int, kept: float, learned: float | None, parameters: int) -> dict[str, Any]:
    """One row of comparison.json."""
    balance = None if learned is None else 2 * kept * learned / (kept + learned)
    marks = {"K": kept, "T": learned, "KT": balance}
    return {
        "method": method, "seed": seed, "learning_rate": 2e-5, "parameters": parameters, "trained_parameters": parameters,
        **{name: None if mark is None else measured(mark) for name, mark in marks.items()},
        "forgetting": round(1 - kept, 4), "seconds_init": 12.5, "seconds_train": 5000.25, "peak_memory_gib": 17.3,
        "benchmarks": {
            "people": {"score": 0.65 * kept, "low": 0.5, "high": 0.7},
            "sums": {"score": 0.43 * (learned or 0), "low": 0.3, "high": 0.45},
        },
        "folder": f"{method}-seed{seed}",
    }  # fmt: skip


def write_comparison(folder: Path, blocks: int = 6) -> Path:
    """farss (two seeds), lora and full."""
    survey = write_survey(folder / "survey", blocks)
    plans = {
        "farss": make_plan(survey, max(1, blocks // 4)),
        "lora": make_plan(survey, None, "lora", random=True),
        "full": Plan("full", {}, blocks),
    }
    rows = [
        row("farss", 0, 0.951, 0.962, plans["farss"].parameters),
        row("farss", 1, 0.939, 0.958, plans["farss"].parameters),
        row("lora", 0, 0.871, 0.948, plans["lora"].parameters),
        row("full", 0, 0.702, 1.0, 1_100_000),
    ]
    for place, entry in enumerate(rows):
        run = folder / entry["folder"]
        plans[entry["method"]].save(run / "plan.json")
        write_train(run, entry["parameters"], 0.05 * place)
        write_both_answers(folder / "base" / "scores", run / "scores")
        write_json(run / "summary.json", summary_values())
        write_text(run / "config.yaml", CONFIG.format(boundary="null"))
    write_text(folder / "config.yaml", CONFIG.format(boundary="null") + COMPARE)
    write_json(
        folder / "comparison.json",
        {"rows": rows, "base": {"people": 0.65, "sums": 0.04}, "notes": ["full ran at half the rate."]},
    )
    return folder


def write_variant(folder: Path, name: str, examples: int = 64) -> Path:
    """One more run of a comparison: a variant of farss that has a survey of its own."""
    survey = write_survey(folder / name.partition("-")[0] / "survey", 6, examples)
    make_plan(survey, 3).save(folder / name / "plan.json")
    write_json(folder / name / "steps" / "plan.json", {"done": True, "statistics": f"../{name.partition('-')[0]}"})
    entry = row(name.partition("-")[0], 0, 0.9, 0.9, 1000) | {"folder": name}
    rewrite(folder / "comparison.json", lambda values: values["rows"].append(entry))
    return folder / name


def write_standings(
    folder: Path, kt: dict[str, tuple[float, float, float]], gaps: list[tuple[str, str, str, float, float, float]], p: float = 0.0314
) -> None:
    """KT of some methods over questions and seeds as (value, low, high), and paired differences as (metric, method, against,
    value, low, high)."""
    parts = ("value", "low", "high")
    methods = {method: {"KT": dict(zip(parts, numbers, strict=True))} for method, numbers in kt.items()}
    keys = ("metric", "method", "against", *parts)
    differences = [dict(zip(keys, gap, strict=True)) | {"p_value": p} for gap in gaps]
    rewrite(folder / "comparison.json", lambda values: values.update(methods=methods, differences=differences))


def write_boundary(folder: Path) -> dict[str, Any]:
    """boundary.json: five candidates, two of them dropped."""
    curve = {1: (0.62, 0.9), 2: (0.8, 0.94), 3: (0.86, 0.95), 4: (0.87, 0.9), 5: (0.88, 0.8)}
    candidates = []
    for boundary, (kept, learned) in curve.items():
        balance, dropped = 2 * kept * learned / (kept + learned), boundary in (1, 5)
        numbers = {"K": kept, "T": learned, "KT": balance, "low": balance - 0.04, "high": balance + 0.03}
        effort = {"steps": 5 if dropped else 20, "parameters": 100_000 - 9_000 * boundary}
        candidates.append({"boundary": boundary, **numbers, **effort, "dropped": dropped})
    rounds = [[entry for entry in candidates if entry["dropped"] is dropped] for dropped in (True, False)]
    found = {
        "candidates": candidates, "rounds": rounds, "chosen": 3, "margin": 0.01, "steps_full": 400, "cost_share": 0.175, "seconds": 660.0,
        "knowledge": "the loss on general text", "task": "the loss on held-out examples", "notes": ["2 and 4 are inside the margin."],
    }  # fmt: skip
    write_json(folder / "boundary.json", found)
    return found


def rewrite(path: Path, change: Any) -> None:
    """Change a JSON artifact in place."""
    values = read_json(path)
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def poison(folder: Path) -> None:
    """Put hostile texts wherever a model, a data set or a user can put one."""
    for path in (folder / "scores" / "people.jsonl", folder / "base" / "scores" / "people.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for entry in lines:
            entry.update(answer=HOSTILE + "x" * 100_000, prompt="p" * 100_000 + HOSTILE, gold=[RTL, HOSTILE])
        lines[0]["answer"] = "\ud800 alone"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewrite(folder / "summary.json", lambda values: values["benchmarks"].append({**values["benchmarks"][0], "name": HOSTILE}))
    rewrite(folder / "summary.json", lambda values: values["notes"].append(HOSTILE * 100))
    rewrite(folder / "versions.json", lambda values: values.update({HOSTILE: HOSTILE}))
    write_text(folder / "config.yaml", f"model:\n  path: {json.dumps(HOSTILE)}\n# {HOSTILE}\n")
