"""A run folder or a comparison folder, read for the report. What is not there yet is None or empty."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from farss.artifacts import Plan, Survey, held_out, read_records
from farss.errors import FolderError
from farss.files import read_json


@dataclass(frozen=True)
class Run:
    """The artifacts of one run."""

    folder: Path
    config: str = ""
    """config.yaml as text."""
    settings: dict[str, Any] = field(default_factory=dict)
    """config.yaml as values."""
    survey: Survey | None = None
    boundary: dict[str, Any] = field(default_factory=dict)
    """boundary.json: what was tried to find the first deep block."""
    plan: Plan | None = None
    train: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    shared: Path = Path()
    """Folder with base/: the run's own, or the comparison's."""
    place: Path = Path()
    """Folder with survey/ and other statistics: the run's own, its variant's, or the comparison's."""
    comparison: str = ""
    """config.yaml of the comparison that it is a run of, as text."""

    @property
    def empty(self) -> bool:
        """True when the folder holds no artifact of ours."""
        return not (self.config or self.survey or self.boundary or self.plan or self.train or self.summary)

    @property
    def first_deep(self) -> int | None:
        """The boundary of the plan or, before there is one, of the search."""
        return self.plan.boundary if self.plan else self.boundary.get("chosen")

    def weight_bytes(self, form: str) -> int:
        """Size of the weights of the `adapter` or the whole `model`; 0 when there are none, or when they were deleted."""
        return sum(path.stat().st_size for path in (self.folder / form).glob("*.safetensors"))

    def record(self, step: str) -> dict[str, Any]:
        """What a step that looked at the model left: seconds, peak memory; empty where there is nothing."""
        return _json(self.place / "steps" / f"{step}.json")

    def answers(self) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """Per benchmark of the summary, the outcomes before and after, of what counts in a comparison's table. Others that were asked once
        lie in the folder too, of another model perhaps."""
        before, after = self.shared / "base" / "scores", self.folder / "scores"
        asked = {str(each.get("name")) for each in self.summary.get("benchmarks") or []}
        names = sorted(name for name in asked if all((folder / f"{name}.jsonl").is_file() for folder in (before, after)))
        options = _values(self.comparison).get("compare") or {}
        chooses = held_out(options["held_out"]) if options.get("tune") else lambda key: False

        def rows(folder: Path, name: str) -> list[dict[str, Any]]:
            return [row for row in read_records(folder, name) if not chooses(str(row["id"]))]

        return {name: (rows(before, name), rows(after, name)) for name in names}


@dataclass(frozen=True)
class Comparison:
    """The artifacts of a comparison: one table and one run for each of its rows."""

    folder: Path
    table: dict[str, Any]
    """comparison.json."""
    common: Run
    """What all runs share: configuration and versions. A survey, too, but not always with every run: see `Run.place`."""
    names: list[str]
    """The folder name of each of its rows."""
    runs: dict[str, Run]
    """Runs by folder name; those whose folder is there."""


def is_comparison(folder: Path) -> bool:
    """True for a folder that `farss compare` has filled."""
    return (folder / "comparison.json").is_file()


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        FolderError: the folder is missing or a file in it is broken.
    """
    if not folder.is_dir():
        raise FolderError(f"there is no folder {folder}: give the folder of a run")
    shared = _shared(folder)
    place = _place(folder, shared)
    above = _text(shared / "config.yaml")
    config = _text(folder / "config.yaml") or above
    return Run(
        folder=folder,
        config=config,
        settings=_values(config),
        survey=_survey(folder) or _survey(place),
        boundary=_json(folder / "boundary.json"),
        plan=Plan.load(folder / "plan.json") if (folder / "plan.json").is_file() else None,
        train=_json(folder / "train.json"),
        summary=_json(folder / "summary.json"),
        versions=_json(folder / "versions.json") or _json(shared / "versions.json"),
        shared=shared,
        place=place,
        comparison=above if shared != folder and _compares(_values(above)) else "",
    )


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison folder and the runs that its table names."""
    table = _json(folder / "comparison.json")
    names = [Path(str(row.get("folder") or f"{row.get('method')}-seed{row.get('seed')}")).name for row in table.get("rows", [])]
    runs = {name: read_run(folder / name) for name in names if (folder / name).is_dir()}
    return Comparison(folder=folder, table=table, common=read_run(folder), names=names, runs=runs)


def _shared(folder: Path) -> Path:
    """The runs of a comparison have survey/ and base/ in the folder above them."""
    above = folder.resolve().parent
    own, others = ([place for place in ("survey", "base") if (where / place).is_dir()] for where in (folder, above))
    return above if others and not own else folder


def _place(folder: Path, shared: Path) -> Path:
    """Where the statistics lie that its plan was made from: a variant of a comparison may have its own."""
    noted = _json(folder / "steps" / "plan.json").get("statistics")
    return folder / noted if noted and (folder / noted).is_dir() else shared


def _compares(settings: dict[str, Any]) -> bool:
    options = settings.get("compare")
    return isinstance(options, dict) and bool(options.get("methods"))


def _survey(folder: Path) -> Survey | None:
    return Survey.load(folder / "survey") if (folder / "survey" / "survey.json").is_file() else None


def _json(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise FolderError(f"{path} holds a {type(values).__name__}, not an object: delete it and run the step that writes it again")
    return values


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _values(config: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(config)
    except yaml.YAMLError:  # the text is still shown; only the model's and the data's names are missing
        return {}
    return values if isinstance(values, dict) else {}
