"""The run folder: which step was done with which part of the configuration."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from farss import processes
from farss.artifacts import KINDS
from farss.config import Config, QuestionSet
from farss.configfile import CONFIG, dump, from_dict, load, override, to_dict
from farss.errors import ConfigError, FarssError, FolderError
from farss.files import disk_cure, read_json, write_json, write_text
from farss.rows import looks_local

DATA_KEYS = tuple(f"data.{name}" for name in ("train", "split", "prompt", "response", "template", "max_length", "limit"))
"""Of the examples: all of the section but the system message of what is asked."""
_LAYER_KEYS = ("model.path", "model.quantization", "model.targets")
_TASK_KEYS = (*_LAYER_KEYS, *DATA_KEYS, "calibration.examples", "seed")
SURVEY_KEYS = (*_TASK_KEYS, "calibration.fisher", "calibration.padding", "calibration.svd")
READING_KEYS = {
    "weights": _LAYER_KEYS,
    "task": _TASK_KEYS,
    "gradients": _TASK_KEYS,
    "knowledge": (*_LAYER_KEYS, "data.max_length", "calibration.examples", "calibration.knowledge", "seed"),
    "both": (*_TASK_KEYS, "calibration.knowledge"),
    "survey": SURVEY_KEYS,
}
"""By what a `Reading` looks at."""
PATHS = (
    *(("model", "path"), ("data", "train"), ("calibration", "knowledge"), ("evaluate", "text"), ("evaluate", "full_scores")),
    ("prune", "text"),
)
"""Options that may be files."""
FILES = ("data.train", "calibration.knowledge", "evaluate.knowledge", "evaluate.task", "evaluate.other", "evaluate.text", "prune.text")
"""Options whose files a result depends on."""
CONTENT = "content of "
VERSIONS = "versions.json"
PRUNING = "pruning"
"""The step by which a folder is known to be a pruning's."""
PLAN_KEYS = ("model.path", "model.targets", "plan")
TRAIN_KEYS = (
    *("model.path", "model.dtype", "model.quantization", "adapter", *DATA_KEYS, "seed"),
    *("train.learning_rate", "train.epochs", "train.max_steps", "train.batch_size", "train.scheduler", "train.warmup_ratio"),
    *("train.weight_decay", "train.dropout", "train.max_grad_norm", "train.precision"),
)
BOUNDARY_KEYS = (
    *PLAN_KEYS,
    # probes have a schedule of their own, so train.scheduler is not among these
    *(key for key in TRAIN_KEYS if key != "train.scheduler"),
    *("boundary", "evaluate.knowledge", "evaluate.text", "evaluate.resamples"),
)
_MAY = ("model.path", "prune.ratio", "prune.gate", "prune.keep_first", "prune.keep_last", "seed")
_BY_TEXT = (*_MAY, "model.dtype", "prune.text", "prune.sequences", "prune.length")
CHOICE_KEYS = {
    "random": _MAY,
    "shortgpt": _BY_TEXT,
    "sleb": _BY_TEXT,
    "scalars": (*_BY_TEXT, "prune.sparsity", "prune.gate_rate", "prune.gate_steps", "train.batch_size", "train.precision"),
}
"""Of the blocks that each rule of a pruning chooses."""
EXPORT_KEYS = ("export",)
LOADED_KEYS = ("model.path", "model.dtype", "model.quantization")
"""Of the untouched model, as it is loaded to be asked."""
COMPRESSED_KEYS = ("export.rank", "export.energy")
EVALUATE_KEYS = (
    *("evaluate.knowledge", "evaluate.task", "evaluate.other", "evaluate.text", "evaluate.text_rows", "evaluate.limit"),
    *("evaluate.run_generated_code", "seed", "data.template", "data.system"),
)
RECOVERY_KEYS = (*EVALUATE_KEYS, "evaluate.recovery", "data.max_length")
BASE_KEYS = (*LOADED_KEYS, "data.max_length", *EVALUATE_KEYS)
"""Of what the untouched model answers."""

TABLE_KEYS = (
    *("model", "data", "calibration", "plan", "boundary", "adapter", "train", "evaluate", "seed"),
    *("compare.methods", "compare.seeds", "compare.settings", "compare.tune", "compare.held_out"),
)
"""Of a comparison's table."""


class Folder:
    """A run folder. A step leaves a record of the options it was made with; a step whose record is complete and whose
    options are unchanged is skipped. One whose options changed is refused, or done again where that is cheap: see `is_done`."""

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
        if (self.record("train") or {}).get("done") and (self.path / VERSIONS).is_file():
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
            cure = f"choose another out, or go on with it by `farss compare {self.path / 'config.yaml'}`"
            raise FolderError(f"out={str(self.path)!r} holds a comparison, and this is a single run: {cure}")
        if config.compare.methods and not compares and self.record("train"):
            raise FolderError(f"out={str(self.path)!r} holds a single run, and this is a comparison: choose another out")

    def record(self, step: str) -> dict[str, Any] | None:
        """The record of a step, or None where it has not begun."""
        path = self.path / "steps" / f"{step}.json"
        record: dict[str, Any] | None = read_json(path) if path.is_file() else None
        return record

    def is_done(self, step: str, options: dict[str, Any], redo: bool = False, cure: str | None = None, makes: Path | None = None) -> bool:
        """Whether a step is complete with these options.

        Args:
            redo: a change of options means doing it again, instead of a refusal.
            cure: what the refusal recommends, instead of the usual.
            makes: what it makes; where that is gone, it is not complete.

        Raises:
            FolderError: it was begun with other options; the first difference is named.
        """
        record = self.record(step)
        if record is None:
            return False
        # An option that the record does not know is younger than the folder, which was made with its default; and where
        # it did not look at a file's content, or the file is gone, nothing can be said of it. One that only the record knows changes
        # nothing any more.
        options = {key: _filled(value) for key, value in options.items() if not (key.startswith(CONTENT) and _is_gone(value))}
        recorded = {key: _filled(value) for key, value in record["options"].items() if key in options}
        known = dict.fromkeys(options) | _defaults(options) | {key: options[key] for key in options if key.startswith(CONTENT)} | recorded
        if known != options:
            if redo:
                return False
            key = next(key for key in options | known if options.get(key) != known.get(key))
            if cure is None and tuple(key.split(".")) in PATHS:
                cure = "choose another out or, if it is the same that lies elsewhere now, put a link to it in its old place"
            elif cure is None:
                cure = "choose another out" if record["done"] else "choose another out, or delete that folder"
            raise FolderError(
                f"out={str(self.path)!r} holds the step {step!r}, made with {key}={known.get(key)!r}, and now "
                f"{key}={options.get(key)!r}: {cure}"
            )
        return bool(record["done"]) and (makes is None or makes.exists())

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


def options_of(config: Config, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of dotted keys (a section's name stands for all of it), and the content of the files they name."""
    values = to_dict(config)
    values["plan"] |= dict(zip(("r_avg", "r_max"), config.plan.shallow_budget, strict=True))  # the same plan, named or not
    found: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        value = values[section]
        if isinstance(value, dict) and not name:
            found |= {f"{section}.{inner}": value[inner] for inner in value}
        else:
            found[key] = value[name] if name else value
    for key in FILES:
        hashes = [content_hash(path) for path in _files(found.get(key))]
        if hashes:
            found[f"{CONTENT}{key}"] = hashes[0] if len(hashes) == 1 else hashes
    return found


def _is_gone(content: Any) -> bool:
    """Whether a file whose content an option depends on is not there."""
    return None in content if isinstance(content, list) else content is None


def _files(value: Any) -> list[str]:
    """The files that an option names: its own path, or those of its question sets."""
    if isinstance(value, dict):
        return [value[name] for name in ("data", "examples") if value.get(name)]
    if isinstance(value, list):
        return [path for entry in value if isinstance(entry, dict) for path in _files(entry)]
    return [value] if value else []


def _filled(value: Any) -> Any:
    """A value in which question sets have all of their options, and a file's no split, which it does not have."""
    if isinstance(value, list):
        return [_filled(entry) for entry in value]
    if not isinstance(value, dict) or not {"name", "data"} <= set(value):
        return value
    return to_dict(QuestionSet(**value | ({"split": None} if Path(value["data"]).is_file() else {})))


def _defaults(options: dict[str, Any]) -> dict[str, Any]:
    """The default values of these dotted keys; those without one are left out."""
    values = to_dict(Config())
    pairs = ((key, *key.partition(".")[::2]) for key in options)
    return {key: values[section][name] if name else values[section] for key, section, name in pairs if section in values}


def content_hash(path: str) -> str | None:
    """Short hash of a file's bytes; None for names on a hub."""
    file = Path(path)
    return _hashed(file, file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None


@functools.cache
def _hashed(path: Path, changed: int, size: int) -> str:
    """A comparison asks for the same files again and again, and they may be large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def resolve(config: Config) -> Config:
    """Expand `${VARIABLES}` in every path and make it absolute, so that a run can be replayed from anywhere; but for what may be a name on
    a hub, which is what neither exists nor did when the run folder was made."""
    values, out = to_dict(config), run_folder(config)
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

    for section, name in PATHS:
        values[section][name] = _resolve(f"{section}.{name}", values[section][name])
    for kind in KINDS:
        entries = values["evaluate"][kind]
        values["evaluate"][kind] = [
            _resolve(f"evaluate.{kind}[{index}]", entry) if isinstance(entry, dict) else entry for index, entry in enumerate(entries)
        ]
    for label, options in values["compare"]["settings"].items():
        for key, value in options.items() if isinstance(options, dict) else ():
            if str(key).partition(".")[::2] in PATHS:
                options[key] = _resolve(f"compare.settings.{label}.{key}", value)
    return from_dict(values)


def run_folder(config: Config) -> Path:
    """The folder that a configuration names."""
    return Path(_expand("out", config.out)).absolute()


def is_run_folder(path: Path) -> bool:
    """Whether a folder is one of ours, and not some folder that holds a `config.yaml`."""
    return (path / VERSIONS).is_file()


def read_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The options in a run file. Those that a run folder holds are of the folder in which they lie, wherever it was moved or copied to.

    Raises:
        ConfigError: see `farss.configfile.load`.
    """
    config = load(path)
    if path.name == CONFIG and is_run_folder(path.parent):
        config = dataclasses.replace(config, out=str(path.parent.absolute()))
    return override(config, overrides)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Be the only farss process of this user and machine that works in a folder, for a while.

    Raises:
        FolderError: another one is at work there.
    """
    if int(os.environ.get("RANK", "0")):
        yield  # the first of several processes stands for all
        return
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else ""
    lock = FileLock(Path(tempfile.gettempdir()) / f"farss-{user}-{name}.lock")  # not in the folder, which may not be there yet
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderError(f"out={str(path)!r} is in use by another farss process: wait for it, or choose another out") from error
    try:
        yield
    finally:
        lock.release()


def _paths_in(folder: Path) -> set[str]:
    """The paths in the configuration of a run folder."""
    try:
        values = to_dict(load(folder / CONFIG))
    except FarssError:
        return set()
    named = [values[section][name] for section, name in PATHS]
    return {path for value in (*named, *(values["evaluate"][kind] for kind in KINDS)) for path in _files(value)}


def _expand(key: str, path: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise ConfigError(f"{key}={path!r}: the environment variable {unset[1]} is not set; export it first")
    return expanded


def replaced(config: Config, section: str, **changes: Any) -> Config:
    """A copy of the configuration with options of one section changed."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
