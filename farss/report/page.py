"""The page: sections from artifacts, poured into one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from farss.errors import FolderError
from farss.files import write_text
from farss.report import candidates, examples, figures, planned, results, story, tables, training, words
from farss.report.drawing import save_figures
from farss.report.figures import Figure
from farss.report.folder import Comparison, Run, is_comparison, read_comparison, read_run

BENCHMARK_KEYS = ("name", "kind", "questions", "before", "after", "full", "low", "high", "change", "gold_before", "gold_after")
BENCHMARK_KINDS = {"knowledge": "Knowledge: to be kept", "task": "Task: to be learned", "other": "Also asked, in neither K nor T"}
EMPTY: dict[str, Any] = {
    "tiles": [],
    "steps": [],
    "boundary": {},
    "comparison": None,
    "benchmarks": {},
    "known": {},
    "reference": "",
    "costs": [],
    "examples_of": "",
    "own_config": "",
    "command": "",
    "install": "",
    "release": "",
}


def write_report(folder: Path, figures: bool = True) -> Path:
    """Draw `report.html` of a run folder or a comparison folder, from its artifacts alone.

    Args:
        folder: the run's or the comparison's.
        figures: also write every figure as PNG and SVG into `figures/`.

    Raises:
        FolderError: the folder is missing, holds nothing of ours, or a file in it is broken.
    """
    folder = Path(folder)
    if is_comparison(folder):
        content = comparison_content(read_comparison(folder))
    else:
        run = read_run(folder)
        if run.empty:
            raise FolderError(f"{folder} holds no run of ours: give a folder in which `farss run` has worked")
        content = run_content(run)
    path = folder / "report.html"
    write_text(path, render(content).encode("utf-8", "replace").decode("utf-8"))  # lone surrogates have no UTF-8
    if figures:
        save_figures(content["figures"].values(), folder / "figures")
    return path


# --- what stands on the page -----------------------------------------------------------------------------------------


def run_content(run: Run) -> dict[str, Any]:
    """Everything the template shows of one run; what is missing is empty."""
    pictures = {
        "balance": results.balance_figure([as_row(run)], words.reference_of(run.summary)),
        "boundary": candidates.boundary_figure(run.boundary),
        **plan_figures({run.plan.method: run} if run.plan else {}, run),
        "loss": training.loss_figure([training.log_of("", "loss", run.train)]),
        "course": training.course_figure([training.log_of("", "", run.train)]),
    }
    return {
        "title": story.title(run),
        "kicker": "Fine-tuning report",
        "headline": story.headline(run),
        "tiles": story.tiles(run.summary),
        "steps": story.steps(run),
        "figures": {name: figure for name, figure in pictures.items() if figure},
        "boundary": boundary_table(run),
        **benchmark_tables(run.summary),
        "examples": example_groups({"after": run}),
        "costs": story.costs(run),
        "notes": [*plan_notes(run), *(run.summary.get("notes") or [])],
        **again(run, "farss run"),
    }


def comparison_content(comparison: Comparison) -> dict[str, Any]:
    """Everything the template shows of a comparison."""
    common, table = comparison.common, comparison.table
    main = story.main_run(comparison)
    runs = {run.folder.name: run for run in ([main] if main else []) + list(comparison.runs.values())}  # the main run first
    methods = {name: str(row.get("method")) for name, row in zip(comparison.names, table.get("rows", []), strict=True)}
    logs = [training.log_of(methods[name], name, run.train) for name, run in comparison.runs.items()]
    of_method: dict[str, Run] = {}
    for name, run in runs.items():
        of_method.setdefault(methods[name], run)
    searched = {method: run for method, run in of_method.items() if run.boundary.get("candidates")}
    search = next(iter(searched.values()), common)
    pictures = {
        "balance": results.balance_figure(table.get("rows", []), words.reference_of(table)),
        "frontier": results.frontier_figure(table.get("frontier"), words.reference_of(table)),
        "benchmarks": results.benchmarks_figure(table),
        "boundary": candidates.boundary_figure(search.boundary) if searched else None,
        **plan_figures(runs, main or common),
        "loss": training.loss_figure(logs),
        "course": training.course_figure(logs),
    }
    return {
        "title": story.title(common),
        "kicker": "Comparison of fine-tuning methods",
        "headline": story.comparison_headline(comparison),
        "steps": story.steps(main, list(runs.values())) if main else [],
        "comparison": comparison_tables(comparison),
        "figures": {name: figure for name, figure in pictures.items() if figure},
        "boundary": boundary_table(search, whose_search(list(searched), list(of_method))) if searched else {},
        "examples": example_groups(of_method),
        "examples_of": main.folder.name if main else "",
        "notes": table.get("notes") or [],
        **again(common, "farss compare"),
    }


def again(run: Run, command: str) -> dict[str, Any]:
    """What it takes to do it once more; a run of a comparison, which shares much with the others, needs the whole of it."""
    own = {"config": run.config, "command": command}
    if run.comparison:
        own = {"config": run.comparison, "command": "farss compare", "own_config": run.config}
    release = str(run.versions.get("farss") or "")
    return {**own, "versions": run.versions, "install": story.install(run.versions), "release": release}


def as_row(run: Run) -> dict[str, Any]:
    """A run as a comparison's table would have it."""
    method = run.plan.method if run.plan else (run.settings.get("plan") or {}).get("method") or "run"
    return {**run.summary, "method": method, "seed": run.settings.get("seed", words.NOTHING)}


def plan_notes(run: Run) -> list[str]:
    """The plan's notes without what the section about the boundary says."""
    said = [run.boundary.get("sentence"), *(run.boundary.get("notes") or [])] if run.boundary.get("candidates") else []
    return [note for note in run.plan.notes if note not in said] if run.plan else []


def boundary_table(run: Run, whose: str = "") -> dict[str, Any]:
    """The search in sentences and as a table; empty where there was none."""
    found = run.boundary
    if not found.get("candidates"):
        return {}
    sentences = [whose, *candidates.boundary_sentences(found), candidates.departure(found.get("chosen"), run.plan)]
    return {
        "sentences": [sentence for sentence in sentences if sentence],
        "rows": candidates.boundary_rows(found),
        "notes": found.get("notes") or [],
    }


def whose_search(searched: list[str], methods: list[str]) -> str:
    """Whose search a comparison's page shows, where that is not clear.

    Args:
        searched: the methods that searched; the first one's search is shown.
        methods: all methods; the page is about the first one.
    """
    if searched == methods[:1]:
        return ""
    shown, *others = (words.cut(method, 80) for method in searched)
    too = f"; {' and '.join(others)} searched too" if others else ""
    return f"This is the search of {shown}{too}."


def benchmark_tables(summary: dict[str, Any]) -> dict[str, Any]:
    """The tables of scores, and which of their optional columns hold anything; a missing number is None."""
    rows = [{name: row.get(name) for name in BENCHMARK_KEYS} for row in summary.get("benchmarks") or []]
    known = {
        "full": any(words.is_number(row["full"]) for row in rows),
        "gold": any(words.is_number(row[f"gold_{when}"]) for row in rows for when in ("before", "after")),
    }
    groups = {head: [row for row in rows if row["kind"] == kind] for kind, head in BENCHMARK_KINDS.items()}
    reference = words.reference_of(summary).capitalize()
    return {"benchmarks": groups if any(groups.values()) else {}, "known": known, "reference": reference}


def plan_figures(runs: dict[str, Run], about: Run) -> dict[str, Figure]:
    """Pictures of the plans of some runs, and of the survey behind one of them."""
    drawn: dict[str, Figure] = {}
    plans = {name: (run.plan, story.seen(run)) for name, run in runs.items() if run.plan and run.plan.layers}
    if plans:
        drawn["plan"] = planned.plan_figure(plans)
    survey = story.seen(about)  # directions of methods without it are numbered by another decomposition
    if survey:
        drawn["importance"] = figures.importance_figure(survey, about.first_deep)
        if all(survey.block_file(layer.block).is_file() for layer in survey.layers.values()):  # a folder may be copied without them
            drawn["energy"] = figures.energy_figure(survey, about.first_deep)
            drawn["spectrum"] = figures.spectrum_figure(survey, about.plan)
    return drawn


def comparison_tables(comparison: Comparison) -> dict[str, Any]:
    """The table of methods, and the table of all runs."""
    table = comparison.table
    heads = tables.columns(table)
    runs = []
    for name, row in zip(comparison.names, table.get("rows", []), strict=True):
        shown = [
            (head.form(entry.mean), words.interval(entry.low, entry.high)) for head in heads for entry in [tables.value([row], head.key)]
        ]
        runs.append({"name": name, "cells": shown, "page": (comparison.folder / name / "report.html").is_file()})
    return {
        "heads": [head.title for head in heads],
        "base": tables.base_cells(table) if table.get("base") else [],
        "methods": tables.cells(table),
        "gaps": {metric: (tables.gap_heads(metric), rows) for metric, rows in tables.gaps(table).items()},
        "tried": _tried(comparison),
        "runs": runs if len(runs) > len(tables.methods(table)) or any(run["page"] for run in runs) else [],
    }


def _tried(comparison: Comparison) -> list[str]:
    """The folders of runs at learning rates that were not chosen, which have pages too."""
    folders = [point.get("folder") for point in tables.frontier_points(comparison.table)]
    return [name for name in folders if name and name not in comparison.names and (comparison.folder / name / "report.html").is_file()]


def example_groups(runs: dict[str, Run]) -> dict[str, list[examples.Group]]:
    """Questions lost, won and kept, by benchmark; the first run decides which, all of them show their answers."""
    if not runs:
        return {}
    outcomes = {who: run.answers() for who, run in runs.items()}
    first = next(iter(outcomes.values()))
    return {
        name: examples.groups(before, {who: asked[name][1] for who, asked in outcomes.items() if name in asked})
        for name, (before, _) in first.items()
    }


# --- the file --------------------------------------------------------------------------------------------------------


def render(content: dict[str, Any]) -> str:
    """Pour the content into the template. Everything is escaped; the only scripts that may run are our own two."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("farss.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(words, name) for name in ("points", "change", "interval", "signed_interval", "plain", "signed", "cut")
    }
    scripts = [plotly_script(), _own("page.js")] if content["figures"] else []
    return environment.get_template("page.html.j2").render(
        EMPTY | content,
        style=Markup(_own("page.css")),
        scripts=[Markup(script) for script in scripts],
        policy=" ".join(_allowed(script) for script in scripts) or "'none'",
        data=Markup(script_json({name: _figure_values(figure) for name, figure in content["figures"].items()})),
    )


def plotly_script() -> str:
    """Plotly's whole script: the Python package ships no smaller one."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no `<`, `>`, `&`, U+2028, U+2029, NaN or infinity."""
    text = json.dumps(finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value: Any) -> Any:
    """The same value with null in the place of NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure_values(figure: Figure) -> list[dict[str, Any]]:
    return [{"data": choice.data, "layout": choice.layout} for choice in figure.choices]


def _own(name: str) -> str:
    return files("farss.report").joinpath(name).read_text(encoding="utf-8")


def _allowed(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"
