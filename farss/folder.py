"""The run folder: which step was done with which part of the configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from farss import processes
from farss.artifacts import KINDS
from farss.config import Config
from farss.configfile import CONFIG, dump, from_dict, load, override
from farss.errors import ConfigError, FarssError, FolderError
from farss.files import disk_cure, read_json, reading, write_json, write_text
from farss.options import PATHS, difference, files_of
from farss.rows import looks_local, refuse_text

VERSIONS = "versions.json"
PRUNING = "pruning"
"""The step by which a folder is known to be a pruning's."""


class Folder:
    """A run folder. A step leaves a record of the options it was made with; a step whose record is complete and whose
    options are unchanged is skipped. One whose options changed is refused (`refuse_other`), or done again where that is cheap."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def claim(self, config: Config, versions: dict[str, str], prunes: bool = False) -> None:
        """Make the folder ours, or check that it is, and write `config.yaml`.

        Args:
            prunes: for a pruning, and not a run or a comparison.

        Raises:
            FolderError: it exists and is not a run folder, or is one of the other kind, or cannot be made.
        """
        if processes.rank():
            return
        if self.path.exists() and not self.path.is_dir():
            raise FolderError(f"out={str(self.path)!r} is a file: choose another folder")
        if self.path.exists() and any(self.path.iterdir()) and not is_run_folder(self.path) and not self._is_meant:
            raise FolderError(f"out={str(self.path)!r} is not empty and is no run folder: choose another one")
        self.check_kind(config, prunes)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FolderError(f"out={str(self.path)!r} cannot be made: {error.strerror}") from error
        if self.is_over("train") and (self.path / VERSIONS).is_file():
            versions = read_json(self.path / VERSIONS)  # those that it was trained with
        write_json(self.path / VERSIONS, versions)  # first: by this file the folder is known as ours
        heading = "".join(f"# {name} {version}\n" for name, version in versions.items())
        write_text(self.path / CONFIG, heading + dump(config))
        if prunes:
            self.begin(PRUNING, {})

    @property
    def _is_meant(self) -> bool:
        """Whether somebody put nothing but a run file there, which names this folder."""
        try:
            alone = [path.name for path in self.path.iterdir()] == [CONFIG]
            return alone and run_folder(load(self.path / CONFIG)) == self.path.absolute()
        except FarssError:
            return False

    def check_kind(self, config: Config, prunes: bool = False) -> None:
        """Refuse a single run in a comparison's folder, whose configuration would be lost, a comparison over a run that was trained, and a
        pruning beside either.

        Raises:
            FolderError: with the cure.
        """
        if prunes != bool(self.record(PRUNING)) and any((self.path / "steps").glob("*.json")):
            holds, wanted = ("a run or a comparison", "a pruning") if prunes else ("a pruning", "a run or a comparison")
            raise FolderError(f"out={str(self.path)!r} holds {holds}, and this is {wanted}: choose another out")
        try:
            compares = bool(load(self.path / CONFIG).compare.methods)
        except FarssError:
            return  # there is none, or it is not ours to judge
        if compares and not config.compare.methods:
            cure = f"choose another out, or go on with it by `{command('compare', self.path)}`"
            raise FolderError(f"out={str(self.path)!r} holds a comparison, and this is a single run: {cure}")
        if config.compare.methods and not compares and self.record("train"):
            raise FolderError(f"out={str(self.path)!r} holds a single run, and this is a comparison: choose another out")

    def record(self, step: str) -> dict[str, Any] | None:
        """The record of a step, or None where it has not begun."""
        path = self.path / "steps" / f"{step}.json"
        if not path.is_file():
            return None
        record: dict[str, Any] = read_json(path)
        with reading(path, "record of a step"):
            _ = record["done"], record["options"]
        return record

    def is_over(self, step: str) -> bool:
        """Whether a step is complete, with whatever options."""
        return bool((self.record(step) or {}).get("done"))

    def is_done(self, step: str, options: dict[str, Any], makes: Path | None = None) -> bool:
        """Whether a step is complete with these options.

        Args:
            makes: what it makes; where that is gone, it is not complete.
        """
        record = self.record(step)
        if record is None or difference(record["options"], options) is not None:
            return False
        return bool(record["done"]) and (makes is None or makes.exists())

    def is_other(self, step: str, options: dict[str, Any]) -> bool:
        """Whether a step was begun with other options."""
        record = self.record(step)
        return record is not None and difference(record["options"], options) is not None

    def refuse_other(self, step: str, options: dict[str, Any], cure: str | None = None) -> None:
        """Refuse to go on where a step was begun with other options.

        Args:
            cure: what is recommended, instead of the usual.

        Raises:
            FolderError: the first difference is named.
        """
        record = self.record(step)
        if record is None or (found := difference(record["options"], options)) is None:
            return
        key, before, now = found
        if cure is None and key in PATHS:
            cure = "choose another out or, if it is the same that lies elsewhere now, put a link to it in its old place"
        elif cure is None:
            cure = "choose another out" if record["done"] else "choose another out, or delete that folder"
        raise FolderError(f"out={str(self.path)!r} holds the step {step!r}, made with {key}={before!r}, and now {key}={now!r}: {cure}")

    @contextmanager
    def step(self, step: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Record that a step began with these options and, when the block ends well, that it is done.

        The block may add facts (seconds, sizes) to the dictionary it is given.
        """
        facts: dict[str, Any] = {}
        self.begin(step, options)
        with disk_cure(self.path):
            yield facts
        self._note(step, {"options": options, "done": True, **facts})

    def begin(self, step: str, options: dict[str, Any]) -> None:
        """Record that a step is not done with these options."""
        self._note(step, {"options": options, "done": False})

    def _note(self, step: str, record: dict[str, Any]) -> None:
        if processes.rank() == 0:
            write_json(self.path / "steps" / f"{step}.json", record)


def resolve(config: Config) -> Config:
    """Expand `${VARIABLES}` in every path and make it absolute, so that a run can be replayed from anywhere; but for what may be a name on
    a hub, which is what neither exists nor did when the run folder was made."""
    values, out = dataclasses.asdict(config), run_folder(config)
    values["out"], known = str(out), _paths_in(out)

    def _resolve(key: str, path: Any) -> Any:
        """A path, or a question set with its paths."""
        if isinstance(path, dict):
            return path | {name: _resolve(f"{key}.{name}", path[name]) for name in ("data", "examples") if name in path}
        if not isinstance(path, str) or not path:  # what is no path is refused where its type is checked
            return path
        expanded = _expand(key, path)
        whole = str(Path(expanded).absolute())
        return whole if Path(expanded).exists() or looks_local(expanded) or whole in known else expanded

    for section, name in (key.split(".") for key in PATHS):
        values[section][name] = _resolve(f"{section}.{name}", values[section][name])
    for kind in KINDS:
        entries = values["evaluate"][kind]
        values["evaluate"][kind] = [
            _resolve(f"evaluate.{kind}[{index}]", entry) if isinstance(entry, dict) else entry for index, entry in enumerate(entries)
        ]
    for label, options in values["compare"]["settings"].items():
        for key, value in options.items() if isinstance(options, dict) else ():
            if key in PATHS:
                options[key] = _resolve(f"compare.settings.{label}.{key}", value)
    return from_dict(values)


def run_folder(config: Config) -> Path:
    """The folder that a configuration names."""
    return Path(_expand("out", config.out)).absolute()


def command(name: str, folder: Path) -> str:
    """What to type to go on with a run folder."""
    return f"farss {name} {shlex.quote(str(folder / CONFIG))}"


def is_run_folder(path: Path) -> bool:
    """Whether a folder is one of ours, and not some folder that holds a `config.yaml`."""
    return (path / VERSIONS).is_file()


def read_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The options in a run file. Those that a run folder holds are of the folder in which they lie, wherever it was moved or copied to.

    Raises:
        ConfigError: see `farss.configfile.load`.
    """
    config = load(path)
    if path.name == CONFIG and (is_run_folder(path.parent) or (path.parent / "steps").is_dir()):  # what it lacks is told
        config = dataclasses.replace(config, out=str(path.parent.absolute()))
    return override(config, overrides)


@contextmanager
def alone(path: Path, wait: bool = False) -> Iterator[None]:
    """Be the only farss process of this user and machine that works in a folder, for a while.

    Args:
        wait: for whoever works there, instead of giving up.

    Raises:
        FolderError: another one is at work there.
    """
    if processes.rank() or int(os.environ.get("RANK", "0")):
        yield  # the first of several processes stands for all
        return
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else ""
    lock = FileLock(Path(tempfile.gettempdir()) / f"farss-{user}-{name}.lock")  # not in the folder, which may not be there yet
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise FolderError(f"out={str(path)!r} is in use by another farss process: wait for it, or choose another out") from error
    try:
        yield
    finally:
        lock.release()


def _paths_in(folder: Path) -> set[str]:
    """The paths in the configuration of a run folder."""
    try:
        values = dataclasses.asdict(load(folder / CONFIG))
    except FarssError:
        return set()
    named = [values[section][name] for section, name in (key.split(".") for key in PATHS)]
    for options in values["compare"]["settings"].values():
        named += [value for key, value in options.items() if key in PATHS]
    return {path for value in (*named, *(values["evaluate"][kind] for kind in KINDS)) for path in files_of(value)}


def _expand(key: str, path: str) -> str:
    refuse_text(path, key)
    if Path(path).exists():  # whatever is in its name
        return path
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise ConfigError(f"{key}={path!r}: the environment variable {unset[1]} is not set; export it first, or take a name without $")
    return expanded
