"""What a command prints when it is done."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.panel import Panel

from farss.progress import console


def show_run(folder: Path) -> None:
    """What the report says, briefly: the table of a comparison, or the ranks and the scores of a run."""
    from farss.artifacts import Plan
    from farss.boundary import Boundary
    from farss.files import read_json
    from farss.terminal import RankMap, boundary_departure, comparison_table, summary_table
    from farss.train import TrainResult

    if (folder / "comparison.json").is_file():
        comparison = read_json(folder / "comparison.json")
        console.print(comparison_table(comparison))
        show_notes(comparison.get("notes") or [])
        return
    plan = Plan.load(folder / "plan.json") if (folder / "plan.json").is_file() else None
    if (folder / "boundary.json").is_file():
        found = Boundary.load(folder / "boundary.json")
        show_boundary(found)
        told = boundary_departure(found, plan) if plan else found.sentence  # a plan's notes have the sentence
        if told:
            console.print(told, highlight=False, markup=False, soft_wrap=True)
    if plan and plan.layers:
        console.print(RankMap(plan))
    if (folder / "summary.json").is_file():
        summary = read_json(folder / "summary.json")
        console.print(summary_table(summary))
        show_notes(summary.get("notes") or [])
    show_notes(plan.notes if plan else [])
    if (folder / "train.json").is_file() and (cut := TrainResult.load(folder / "train.json").cut):
        console.print(cut, highlight=False)


def show_boundary(found: Any) -> None:
    """The candidates of a search, and how they were compared."""
    from farss.terminal import boundary_table

    if found.candidates:
        console.print(boundary_table(found))
        console.print(f"[dim]K: {escape(found.knowledge)}\nT: {escape(found.task)}", highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)


def show_pruning(folder: Path) -> None:
    """The table of a pruning, and where its models lie."""
    from farss.files import read_json, reading
    from farss.terminal import pruning_table

    with reading(folder / "pruning.json", "table of a pruning"):
        rows = read_json(folder / "pruning.json")["rows"]
        console.print(pruning_table(rows))
    show_places({"table": folder / "pruning.md"} | {row["method"]: folder / row["method"] / "model" for row in rows[1:]})


def show_notes(notes: Iterable[str]) -> None:
    """What is to be known beside the numbers, a line each."""
    for note in notes:
        console.print(f"[dim]{escape(note)}", highlight=False, soft_wrap=True)


def exactness(facts: dict[str, Any]) -> str:
    """How exact an exported adapter is, in a sentence."""
    counting = f" (effective rank {facts['effective_rank']:.1f}, mean over the layers)" if "effective_rank" in facts else ""
    return (
        f"written with rank {facts['rank']}{counting}; logits differ from the trained model's by at most "
        f"{facts['logit_difference']:.1e} (float32); lost to compression: {facts['lost']:.2%}"
    )


def handed_over(folder: Path) -> Path:
    """Where a run's result lies, in the form of the last export: an older one may lie beside it."""
    from farss.folder import Folder

    options = (Folder(folder).record("export") or {}).get("options", {})
    whole = options.get("export.to") == "merged" or not (folder / "adapter").is_dir()
    return folder / ("model" if whole else "adapter")


def show_places(places: dict[str, Path]) -> None:
    """What lies where."""
    width = max(map(len, places))
    lines = [f"[bold]{name:<{width}}[/]  {escape(_short(path))}" for name, path in places.items()]
    if shutil.get_terminal_size().columns < 60 or not console.is_terminal:
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
    else:
        console.print(Panel("\n".join(lines), title="done", title_align="left", expand=False), highlight=False)


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
