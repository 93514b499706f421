"""The folder of a survey while it is made, and when it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from farss import processes
from farss.artifacts import Layer, Survey
from farss.errors import FolderError
from farss.files import fingerprint, read_json, write_json, write_tensors
from farss.places import Batch
from farss.survey.kept import Kept
from farss.survey.passage import real_count
from farss.survey.site import Site

PROGRESS = "progress.json"
"""In the survey's folder while it is unfinished."""


def complete(site: Site, key: str) -> Survey | None:
    """The survey that lies there already; None: it is still to be made.

    Raises:
        FolderError: it is of something else, or kept too little.
    """
    if not (site.folder / "survey.json").is_file():
        return None
    found = Survey.load(site.folder)
    if found.meta.get("key") != key:
        raise FolderError(
            f"{found.folder} holds a survey of another model, of other data, or for another method or seed: choose another folder, or "
            "delete it"
        )
    found.check_cap(site.cap)
    if processes.rank() == 0:
        _tidy(site.folder)
    return found


def begin(site: Site, key: str, batches: list[Batch]) -> dict[str, Any]:
    """Mark a folder as ours, or check that the unfinished survey in it is this one: states are kept batch by batch, each process its own.

    Returns:
        That mark, with the `cap` that it was begun with, which may be larger than the site's, and the `seconds` that were spent on it
        before, in all and by `parts`.
    """
    shapes = fingerprint([list(batch["input_ids"].shape) for batch in batches])
    folder, mark = site.folder, {"key": key, "processes": processes.size(), "batches": shapes}
    if (folder / PROGRESS).is_file():
        progress: dict[str, Any] = read_json(folder / PROGRESS)
        wide = progress["cap"] >= site.cap
        if wide and {name: progress.get(name) for name in mark} == mark:
            return progress
        if progress["key"] != key or not wide:
            raise FolderError(
                f"{folder} holds an unfinished survey of another model, of other data, or for another method, seed or rank: delete it"
            )
        if progress.get("processes") != mark["processes"]:
            raise FolderError(f"{folder} holds a survey that {progress.get('processes')} processes began: go on with as many, or delete it")
        raise FolderError(f"{folder} holds a survey that was begun with another calibration.batch_size: go on with that, or delete it")
    fresh = {**mark, "cap": site.cap, "seconds": 0.0, "parts": {}}
    write_json(folder / PROGRESS, fresh)
    return fresh


def finish(site: Site, batches: list[Batch], facts: dict[str, Any]) -> Survey:
    """Gather the importances and write `survey.json`, with these facts."""
    folder, meta, importances = site.folder, {**site.meta, **facts}, dict[str, float]()
    for path in sorted(folder.glob("block-????.json")):
        found = read_json(path)
        importances |= found["importance"]
        if found["overlap"]:
            meta["overlap"] = found["overlap"]
    measured = {name: Layer(name, x.block, x.shape, importances[name]) for name, x in site.layers.items()}
    examples = sum(batch["input_ids"].shape[0] for batch in batches)
    tokens = real_count(batches)
    Survey(folder, measured, len(site.blocks), site.cap, examples, tokens, meta).save()
    _tidy(folder)
    return Survey.load(folder)


def _tidy(folder: Path) -> None:
    """Delete what a complete survey needs no more; last its mark, so that one is tidied too that was killed before it was."""
    if (folder / PROGRESS).is_file():
        for path in folder.glob("block-????.json"):
            path.unlink()
        Kept(folder).clear()
        (folder / PROGRESS).unlink()


def mark_file(folder: Path, block: int) -> Path:
    """The last file of a block that is written: with it, the block is done."""
    return folder / f"block-{block:04d}.json"


def write_block(folder: Path, block: int, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """Write what is kept of a block's layers, and then that it is done.

    Args:
        tensors: for each layer, as `artifacts.layer_tensors` gives them.
        facts: `importance` by layer, and `overlap` (see `statistics.summary`) or None.
    """
    named = {f"{name}.{part}": tensor for name, parts in tensors.items() for part, tensor in parts.items()}
    write_tensors(folder / f"block-{block:04d}.safetensors", named)
    write_json(mark_file(folder, block), facts)
