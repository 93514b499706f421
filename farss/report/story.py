"""What was done and what came of it, in plain sentences and a few numbers."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, NamedTuple

from farss.artifacts import LayerPlan, Plan
from farss.report.folder import Comparison, Run
from farss.report.tables import METRICS, Value, methods, value
from farss.report.words import (
    SPACE,
    compact,
    count,
    cut,
    duration,
    gib,
    interval,
    is_number,
    percent,
    plain,
    signed,
)

MEANINGS = {
    "KT": "balance of kept and learned",
    "K": "kept of the knowledge",
    "T": "learned, against full fine-tuning",
}


class Tile(NamedTuple):
    """One number of the headline."""

    name: str
    text: str
    detail: str
    meaning: str


def title(run: Run) -> str:
    """The model's name, or the folder's."""
    path = (run.settings.get("model") or {}).get("path")
    return cut(PurePath(str(path)).name if path else run.folder.resolve().name, 80)


def headline(run: Run) -> list[str]:
    """What was done, from the plan, and what came of it."""
    sentences = [_opening(run)]
    if run.plan is not None:
        sentences.append(plan_sentence(run.plan, run.train.get("parameters")))
    return [*sentences, *_outcome(run.summary)]


def _opening(run: Run) -> str:
    settings = run.settings
    data = (settings.get("data") or {}).get("train")
    on = f" on {cut(PurePath(str(data)).name, 80)}" if data else ""
    method = run.plan.method if run.plan else (settings.get("plan") or {}).get("method")
    by = f" with {cut(str(method), 80)}" if method else ""
    if run.train:
        return f"{title(run)} was fine-tuned{on}{by}."
    done = "planned" if run.plan else "surveyed" if run.survey else "prepared"
    return f"The fine-tuning of {title(run)}{on}{by} has been {done}, not yet trained."


def plan_sentence(plan: Plan, trained: Any = None) -> str:
    """Boundary, sides, ranks and the number of parameters."""
    if not plan.layers:
        number = f": {compact(trained)} parameters" if is_number(trained) else ""
        return f"Every weight is trained{number}."
    layers = list(plan.layers.values())
    total = f"{compact(plan.parameters)} trainable parameters in {count(len(layers), 'layer')}"
    if plan.boundary is None:
        return f"All {count(plan.blocks, 'block')} start from {_start(layers)}, {_ranks(layers)}; {total}."
    shallow = [layer for layer in layers if layer.block < plan.boundary]
    deep = [layer for layer in layers if layer.block >= plan.boundary]
    halves = [(plan.boundary, "shallow", shallow), (plan.blocks - plan.boundary, "deep", deep)]
    words = [f"{count(number, f'{name} block')} {_verb(number)} {_start(part)}, {_ranks(part)}" for number, name, part in halves if part]
    return f"{'; '.join(words)}; {total}."


def _verb(number: int) -> str:
    return "starts from" if number == 1 else "start from"


def _start(layers: list[LayerPlan]) -> str:
    sides = {layer.side for layer in layers}
    words = {
        "least": "the least important directions",
        "most": "the most important directions",
        None: "random directions",
    }
    return words[sides.pop()] if len(sides) == 1 else "directions chosen layer by layer"


def _ranks(layers: list[LayerPlan]) -> str:
    ranks = [layer.rank for layer in layers]
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high} (mean {sum(ranks) / len(ranks):.1f})"


def _outcome(summary: dict[str, Any]) -> list[str]:
    kept, learned, balance = (summary.get(name) or {} for name in ("K", "T", "KT"))
    words = []
    if is_number(kept.get("value")):
        words.append(f"kept {percent(kept['value'])} of the knowledge it had (K{_between(kept)})")
    if is_number(learned.get("value")):
        words.append(f"learned {percent(learned['value'])} of what full fine-tuning learns (T{_between(learned)})")
    end = f"; together KT is {percent(balance['value'])}" if is_number(balance.get("value")) else ""
    return [f"It {' and '.join(words)}{end}."] if words else []


def _between(entry: dict[str, Any]) -> str:
    text = interval(entry.get("low"), entry.get("high"))
    return f"; 95{SPACE}% interval {text}{SPACE}%" if text else ""


def tiles(summary: dict[str, Any]) -> list[Tile]:
    """K, T, KT and forgetting, as far as they were measured."""
    found = []
    for name in METRICS:
        entry = summary.get(name) or {}
        if is_number(entry.get("value")):
            found.append(
                Tile(
                    name,
                    percent(entry["value"]),
                    interval(entry.get("low"), entry.get("high")),
                    MEANINGS[name],
                )
            )
    if is_number(summary.get("forgetting")):
        found.append(
            Tile(
                "Forgetting",
                signed(summary["forgetting"]),
                "nats per token",
                "loss on general text, after minus before",
            )
        )
    return found


def comparison_headline(comparison: Comparison) -> list[str]:
    """Which methods were compared, and which has the best balance."""
    groups = methods(comparison.table)
    runs = len(comparison.table.get("rows", []))
    data = (comparison.common.settings.get("data") or {}).get("train")
    on = f" on {cut(PurePath(str(data)).name, 80)}" if data else ""
    sentences = [f"{count(len(groups), 'method')} fine-tuned {title(comparison.common)}{on}, in {count(runs, 'run')}."]
    ranked = sorted(
        ((found, name) for name, rows in groups.items() if (found := value(rows, "KT")).mean is not None),
        key=_mean,
    )
    if ranked:
        best, name = ranked[-1]
        verb = "has the highest balance of kept and learned" if len(ranked) > 1 else "has the balance"
        sentences.append(f"{cut(name, 80)} {verb}, KT {percent(best.mean)}{_spread(best)}.")
    return sentences


def _mean(entry: tuple[Value, str]) -> float:
    return entry[0].mean or 0.0


def _spread(entry: Value) -> str:
    if entry.deviation is not None:
        return f" (± {100 * entry.deviation:.1f} over the seeds)"
    text = interval(entry.low, entry.high)
    return f" (95{SPACE}% interval {text}{SPACE}%)" if text else ""


def best_run(comparison: Comparison) -> Run | None:
    """The run with the highest KT, of those whose folders are there."""
    rows = zip(comparison.names, comparison.table.get("rows", []), strict=True)
    scored = [
        (row["KT"]["value"], comparison.runs[name])
        for name, row in rows
        if name in comparison.runs and is_number((row.get("KT") or {}).get("value"))
    ]
    return max(scored, key=lambda entry: entry[0])[1] if scored else None


def costs(run: Run) -> list[tuple[str, str]]:
    """Time, memory and size, as far as they are known."""
    train, meta = run.train, run.survey.meta if run.survey else {}
    rows = [
        ("Survey", duration(meta.get("seconds")), meta.get("seconds")),
        ("Training", duration(train.get("seconds")), train.get("seconds")),
        ("Optimiser steps", plain(train.get("steps")), train.get("steps")),
        ("Epochs", plain(train.get("epochs")), train.get("epochs")),
        ("Final loss", plain(train.get("loss"), 4), train.get("loss")),
        ("Peak memory", gib(train.get("peak_memory_gib")), train.get("peak_memory_gib")),
        ("Trained parameters", compact(train.get("parameters")), train.get("parameters")),
        ("Adapter size", gib(run.adapter_bytes / 2**30), run.adapter_bytes or None),
    ]
    return [(name, text) for name, text, known in rows if known is not None]
