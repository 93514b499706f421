"""What was done and what came of it, in plain sentences and a few numbers."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any, NamedTuple

from farss.artifacts import KINDS, LayerPlan, Plan, Survey
from farss.methods import METHODS, SURVEY
from farss.options import OWN_TEXT
from farss.report.figures import AGAINST
from farss.report.folder import Comparison, Run
from farss.report.tables import METRICS, SIGNIFICANT, Value, frontier_points, labels, rivals, standing
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
    reference_of,
    signed,
)

NO_PACKAGES = ("farss", "python", "machine", "date", "command")
MEANINGS = {
    "KT": "balance of kept and learned",
    "K": "kept of the knowledge",
    "T": "learned, against",
    "retained": "still right, of what was answered right before",
    "recovered": "K after a few steps of question answering",
}


class Step(NamedTuple):
    """One step of the line, in plain words."""

    name: str
    text: str


class Tile(NamedTuple):
    """One number of the headline."""

    name: str
    text: str
    detail: str
    meaning: str


def title(run: Run) -> str:
    """The model's name, or the folder's. Where its folder is called model, the folder above says more."""
    path = (run.settings.get("model") or {}).get("path")
    if not path:
        return cut(run.folder.resolve().name, 80)
    name = PurePath(str(path)).name
    return cut("/".join(PurePath(str(path)).parts[-2:]) if name == "model" else name, 80)


def headline(run: Run) -> list[str]:
    """What was fine-tuned, and what came of it."""
    return [_opening(run), *_outcome(run.summary)]


def _opening(run: Run) -> str:
    if not run.train and run.shared == run.folder and (compared := (run.settings.get("compare") or {}).get("methods")):
        return f"{cut(', '.join(map(str, compared)), 200)}: the comparison of these on {title(run)}{_data(run)} has no complete run yet."
    method = run.plan.method if run.plan else (run.settings.get("plan") or {}).get("method")
    by = f" with {cut(str(method), 80)}" if method else ""
    if run.train:
        return f"{title(run)} was fine-tuned{_data(run)}{by}."
    parts = (("planned", run.plan), ("surveyed and its boundary searched", run.boundary), ("surveyed", run.survey), ("prepared", True))
    done = next(word for word, found in parts if found)
    return f"The fine-tuning of {title(run)}{_data(run)}{by} has been {done}, not yet trained."


def _data(run: Run) -> str:
    """The training data's name, with its folder's: many files are called train.jsonl."""
    path = (run.settings.get("data") or {}).get("train")
    return f" on {cut('/'.join(PurePath(str(path)).parts[-2:]), 80)}" if path else ""


def steps(run: Run, runs: list[Run] | None = None) -> list[Step]:
    """Look, decide, train, judge: what happened in each step and what it cost, as far as it is known.

    Args:
        run: its survey, plan and scores are told.
        runs: all runs of a comparison, whose training is told together.
    """
    trained = [one.train for one in (runs or [run]) if one.train]
    told = [
        ("Look", _looked(run)),
        ("Decide", f"{_named(run, runs)}{plan_sentence(run.plan, run.train.get('parameters'))}" if run.plan else ""),
        ("Train", _trained(trained)),
        ("Judge", _judged(run.summary)),
    ]
    return [Step(name, text) for name, text in told if text]


def _named(run: Run, runs: list[Run] | None) -> str:
    return f"{cut(run.plan.method, 80)}: " if run.plan and runs and len(runs) > 1 else ""


def _looked(run: Run) -> str:
    survey = seen(run)
    if survey is None:
        return ""
    seconds = survey.meta.get("seconds")
    time = f" It took {duration(seconds)}." if is_number(seconds) else ""
    return (
        f"{count(survey.examples, 'example')} ({count(survey.tokens, 'token')}) went through the untouched model once. "
        f"Of {count(len(survey.layers), 'layer')} it was measured how much the loss depends on each, and on which directions.{time}"
    )


def _trained(trains: list[dict[str, Any]]) -> str:
    if not trains:
        return ""
    steps_each = {count(train["steps"], "step") for train in trains if is_number(train.get("steps"))}
    runs = [count(len(trains), "run")] if len(trains) > 1 else []
    facts = [" of ".join(runs + sorted(steps_each)) if len(steps_each) <= 1 else runs[0]]
    facts += [_cut_off(trains[0])] if not runs else []
    seconds = sum(train.get("seconds") or 0 for train in trains)
    facts += [f"{duration(seconds)}{' together' if runs else ''}"] if seconds else []
    peak = max(train.get("peak_memory_gib") or 0 for train in trains)
    facts += [f"at most {gib(peak)} of memory"] if peak else []
    changed = trains[0].get("parameters")
    facts += [f"{compact(changed)} parameters changed"] if not runs and is_number(changed) else []
    return f"{', '.join(fact for fact in facts if fact)}."


def _cut_off(train: dict[str, Any]) -> str:
    """How many examples were trained on, where some of them did not fit; else nothing."""
    number, truncated, dropped = (train.get(name) or 0 for name in ("examples", "truncated", "dropped"))
    told = [f"the end of {truncated:,} is cut off"] if truncated else []
    told += [f"{dropped:,} {'is' if dropped == 1 else 'are'} left out because no answer fits"] if dropped else []
    return f"{count(number, 'example')} ({', '.join(told)})" if told and number else ""


def _judged(summary: dict[str, Any]) -> str:
    asked = {kind: sum(row.get("questions") or 0 for row in summary.get("benchmarks") or [] if row.get("kind") == kind) for kind in KINDS}
    words = [count(number, f"{kind} question") for kind, number in asked.items() if number]
    return f"{' and '.join(words)} were asked before and after." if words else ""


def plan_sentence(plan: Plan, trained: Any = None) -> str:
    """Boundary, sides, ranks and the number of parameters."""
    if not plan.layers:
        number = f": {compact(trained)} parameters" if is_number(trained) else ""
        return f"Every weight is trained{number}."
    layers = list(plan.layers.values())
    total = f"{compact(plan.parameters)} trainable parameters in {count(len(layers), 'layer')}"
    if plan.boundary is None:
        adapted = len({layer.block for layer in layers})
        which = f"All {count(plan.blocks, 'block')}" if adapted == plan.blocks else f"{adapted} of {count(plan.blocks, 'block')}"
        return f"{which} {_verb(adapted)} {_start(layers)}, {_ranks(layers)}; {total}."
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
    if len(sides) != 1:
        return "directions chosen layer by layer"
    fixed = all(layer.fixed_a for layer in layers)
    return AGAINST if fixed and sides == {"most"} else words[sides.pop()] + fixed * ", with A fixed"


def _ranks(layers: list[LayerPlan]) -> str:
    ranks = [layer.rank for layer in layers]
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high} (mean {sum(ranks) / len(ranks):.1f})"


def _outcome(summary: dict[str, Any], who: str = "It") -> list[str]:
    kept, learned, balance = (summary.get(name) or {} for name in ("K", "T", "KT"))
    words = []
    if is_number(kept.get("value")):
        words.append(f"kept {percent(kept['value'])} of the knowledge it had (K{_between(kept)})")
    if is_number(learned.get("value")):
        of = "gain of likelihood" if summary.get("learned_by") == "likelihood" else "score"
        words.append(f"reached {percent(learned['value'])} of the {of} of {reference_of(summary)} on the task (T{_between(learned)})")
    end = f"; together KT is {percent(balance['value'])}" if is_number(balance.get("value")) else ""
    return [f"{cut(who, 80)} {' and '.join(words)}{end}."] if words else []


def _between(entry: dict[str, Any]) -> str:
    text = interval(entry.get("low"), entry.get("high"))
    return f"; 95{SPACE}% interval {text}{SPACE}%" if text else ""


def tiles(summary: dict[str, Any]) -> list[Tile]:
    """K, T, KT and forgetting, as far as they were measured."""
    found = []
    for name in (*METRICS, "retained", "recovered"):
        entry = summary.get(name) or {}
        if is_number(entry.get("value")):
            found.append(
                Tile(
                    name,
                    percent(entry["value"]),
                    interval(entry.get("low"), entry.get("high")),
                    f"{MEANINGS[name]} {reference_of(summary)}" if name == "T" else MEANINGS[name],
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
    table = comparison.table
    groups, folders = labels(table), {each.get("folder") for each in [*table.get("rows", []), *frontier_points(table)]}
    runs = len(folders - {None})
    what = f"{title(comparison.common)}{_data(comparison.common)}"
    left = table.get("missing", 0)
    missing = f"; {left} more {'is' if left == 1 else 'are'} to come" if left else ""
    sentences = [f"{count(len(groups), 'method')} fine-tuned {what}, in {count(runs, 'run')}{missing}."]
    found = {name: entry for name in rivals(table) if (entry := standing(table, name, "KT")).mean is not None}
    sentences += _best(table, found) if found else []
    main = main_run(comparison)
    told = [row for row in table.get("rows", []) if main and row.get("folder") == main.folder.name] if len(groups) > 1 else []
    name = told[0]["method"] if told else ""
    entries = {letter: standing(table, name, letter) for letter in ("K", "T") if name}
    found_of_it: dict[str, Any] = {letter: {"value": entry.mean, "low": entry.low, "high": entry.high} for letter, entry in entries.items()}
    found_of_it |= {name: table.get(name) for name in ("learned_by", "reference")}
    return [*sentences, *_outcome(found_of_it, name)]


def _best(table: dict[str, Any], found: dict[str, Value]) -> list[str]:
    """The method with the highest KT, and those from which it cannot be told apart: by the p-value of the paired difference where there
    is one, else by whether they lie in its interval."""
    name = max(found, key=lambda method: found[method].mean or 0.0)  # the first of equal ones, as in the differences
    others = sorted(found.keys() - {name}, key=lambda method: found[method].mean or 0.0)
    best = found[name]
    verb = "has the highest balance of kept and learned" if others else "has the balance"
    sentences = [f"{cut(name, 80)} {verb}, KT {percent(best.mean)}{_spread(best)}."]
    rows = [row for row in table.get("differences") or [] if row.get("metric") == "KT" and row.get("against") == name]
    paired = {row.get("method"): row.get("p_value") for row in rows}
    level = [cut(other, 80) for other in others if other in paired and not (is_number(paired[other]) and paired[other] < SIGNIFICANT)]
    if level:
        doubt = f"of {count(len(others) + 1, 'method')} that are alike, one would lead as far in 5{SPACE}% of all comparisons or more"
        sentences.append(f"Its lead over {' and '.join(level)} is no result: {doubt}.")
    unpaired = [other for other in others if other not in paired]
    near = [cut(other, 80) for other in unpaired if best.lowest is not None and (found[other].mean or 0.0) >= best.lowest]
    if near:
        verb = "lies" if len(near) == 1 else "lie"
        sentences.append(f"Inside that range {verb} {' and '.join(near)}: a difference this small is no result.")
    return sentences


def _spread(entry: Value) -> str:
    if entry.deviation is not None:
        return f" (± {100 * entry.deviation:.1f} over the seeds)"
    text = interval(entry.low, entry.high)
    return f" (95{SPACE}% interval {text}{SPACE}%)" if text else ""


def main_run(comparison: Comparison) -> Run | None:
    """The run that the page is about: FARSS, else the first that was planned from a survey, else the first with a plan."""
    runs = [run for run in comparison.runs.values() if run.plan]
    orders = (lambda plan: plan.method == "farss", uses_survey, lambda plan: bool(plan.layers), lambda plan: True)
    return next((run for test in orders for run in runs if test(run.plan)), None)


def uses_survey(plan: Plan | None) -> bool:
    """Whether a plan's method looks at the data: a comparison's survey lies beside runs that never saw it."""
    method = METHODS.get(plan.method) if plan else None
    return method is not None and method.needs is SURVEY


def seen(run: Run) -> Survey | None:
    """The survey that the plan was made from, or will be; None where its method does not use one."""
    return run.survey if run.plan is None or uses_survey(run.plan) else None


def costs(run: Run) -> list[tuple[str, str]]:
    """Time, memory and size, as far as they are known."""
    train, survey = run.train, seen(run)
    searched = run.boundary if run.boundary.get("candidates") else {}
    looked = _record(run) | (survey.meta if survey else {})
    rows = [
        ("Survey" if survey else "Statistics", duration(looked.get("seconds")), looked.get("seconds")),
        ("Boundary search", duration(searched.get("seconds")), searched.get("seconds")),
        ("Peak memory before training", gib(looked.get("peak_memory_gib")), looked.get("peak_memory_gib")),
        ("Training", duration(train.get("seconds")), train.get("seconds")),
        ("Optimiser steps", plain(train.get("steps")), train.get("steps")),
        ("Epochs", plain(train.get("epochs")), train.get("epochs")),
        ("Loss, mean of the last steps", plain(train.get("loss"), 4), train.get("loss")),
        ("Peak memory", gib(train.get("peak_memory_gib")), train.get("peak_memory_gib")),
        ("Trained parameters", compact(train.get("parameters")), train.get("parameters")),
        *(
            (f"{form.capitalize()} size", gib(size / 2**30), size or None)
            for form in ("adapter", "model")
            for size in [run.weight_bytes(form)]
        ),
    ]
    return [(name, text) for name, text, known in rows if known is not None]


def _record(run: Run) -> dict[str, Any]:
    """What it cost to look at what the plan's method looks at, and to write the text that the model wrote for it; before there is a plan,
    to survey."""
    method = METHODS.get(run.plan.method) if run.plan else None
    needs = SURVEY if run.plan is None else method and method.needs
    if not needs:
        return {}
    steps = [needs.name, *([OWN_TEXT] if "knowledge" in needs.texts else [])]
    records = [record for step in steps if (record := run.record(step))]
    found = {key: [record[key] for record in records if key in record] for key in ("seconds", "peak_memory_gib")}
    return {key: sum(values) if key == "seconds" else max(values) for key, values in found.items() if values}


def install(versions: dict[str, Any]) -> str:
    """The command that installs the same packages; only what looks like a name and a version goes into it."""
    pattern = re.compile(r"[A-Za-z0-9][\w.-]*")
    known = {name: str(version).partition("+")[0] for name, version in versions.items() if name not in NO_PACKAGES}
    pins = [f"{name}=={version}" for name, version in known.items() if pattern.fullmatch(name) and pattern.fullmatch(version)]
    return f"pip install {' '.join(pins)}" if pins else ""
