"""The options on which the result of a step depends, and whether they are still what they were."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from farss.config import Config, QuestionSet

DATA_KEYS = tuple(f"data.{name}" for name in ("train", "split", "prompt", "response", "template", "max_length", "limit"))
"""Of the examples: all of the section but how questions are asked."""
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
OWN_TEXT = "own_text"
"""The step in which the model writes its own knowledge text."""
PATHS = ("model.path", "data.train", "calibration.knowledge", "evaluate.text", "evaluate.full_scores", "prune.text")
"""Options that may be files."""
FILES = ("data.train", "calibration.knowledge", "evaluate.knowledge", "evaluate.task", "evaluate.other", "evaluate.text", "prune.text")
"""Options whose files a result depends on."""
CHATS = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""The files of a model's folder in which its chat template may lie."""
CONTENT = "content of "
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
    *("boundary", "evaluate.knowledge", "evaluate.text", "evaluate.resamples", "data.system", "data.thinking"),
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
SHIFT_KEYS = ("prune.shift", "prune.norm")
"""Of the penalty in TRSP's second stage."""
EXPORT_KEYS = ("export",)
LOADED_KEYS = ("model.path", "model.dtype", "model.quantization")
"""Of the untouched model, as it is loaded to be asked."""
COMPRESSED_KEYS = ("export.rank", "export.energy")
EVALUATE_KEYS = (
    *("evaluate.knowledge", "evaluate.task", "evaluate.other", "evaluate.text", "evaluate.text_rows", "evaluate.limit"),
    *("evaluate.run_generated_code", "seed", "data.template", "data.system", "data.thinking"),
)
RECOVERY_KEYS = (
    *("evaluate.knowledge", "evaluate.task", "evaluate.other", "evaluate.limit", "evaluate.run_generated_code", "evaluate.recovery"),
    *("seed", "data.template", "data.system", "data.thinking", "data.max_length"),
)
BASE_KEYS = (*LOADED_KEYS, "data.max_length", *EVALUATE_KEYS)
"""Of what the untouched model answers."""
OF_NO_STEP = (
    *("model.device", "model.trust_remote_code", "calibration.batch_size", "evaluate.batch_size", "evaluate.looks", "out"),
    *("train.micro_batch_size", "train.gradient_checkpointing", "train.save_steps", "train.logging_steps", "train.report_to"),
    *("evaluate.full_scores", "evaluate.learned_by", "prune.methods"),
    *("compare.methods", "compare.seeds", "compare.settings", "compare.tune", "compare.held_out", "compare.jobs", "compare.keep"),
)
"""Options on which the result of no step depends: where and how much at a time, what is told, and of what is made anew every time."""
TABLE_KEYS = (
    *("model", "data", "calibration", "plan", "boundary", "adapter", "train", "evaluate", "seed"),
    *("export.to", *COMPRESSED_KEYS),
    *("compare.methods", "compare.seeds", "compare.settings", "compare.tune", "compare.held_out"),
)
"""Of a comparison's table."""
OF_TABLE = ("evaluate.full_scores", "evaluate.learned_by", "compare.")
"""On these the table depends, and no step."""


def matters(key: str) -> bool:
    """Whether the result of a step, or a comparison's table, depends on an option."""
    return key not in OF_NO_STEP or key.startswith(OF_TABLE)


def table_options(config: Config) -> dict[str, Any]:
    """On what a comparison's table depends."""
    return {key: value for key, value in options_of(config, TABLE_KEYS).items() if matters(key)}


def options_of(config: Config, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of dotted keys (a section's name stands for all of it), and the content of the files they name."""
    values = asdict(config)
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
        hashes = [content_hash(path) for path in files_of(found.get(key))]
        if hashes:
            found[f"{CONTENT}{key}"] = hashes[0] if len(hashes) == 1 else hashes
    if found.get("data.template") == "chat":
        found[f"{CONTENT}data.template"] = [content_hash(str(Path(config.model.path, name))) for name in CHATS]
    return found


def difference(recorded: dict[str, Any], options: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option that is not what it was, with its value then and now; None: they are the same."""
    # An option that the record does not know is younger than the folder, which was made with its default; and where
    # it did not look at a file's content, or the file is gone, nothing can be said of it. One that only the record knows changes
    # nothing any more.
    now = {key: _filled(value) for key, value in options.items()}
    then = {key: _filled(value) for key, value in recorded.items() if key in now}
    now |= {key: _still(now[key], value) for key, value in then.items() if key.startswith(CONTENT)}
    known = dict.fromkeys(now) | _defaults(now) | {key: now[key] for key in now if key.startswith(CONTENT)} | then
    return next(((key, known[key], now[key]) for key in now if now[key] != known[key]), None)


def _still(now: Any, then: Any) -> Any:
    """The content of files now; that of one which is not there is what it was."""
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        return [_still(*pair) for pair in zip(now, then, strict=True)]
    return then if now is None else now


def files_of(value: Any) -> list[str]:
    """The files that an option names: its own path, or those of its question sets."""
    if isinstance(value, dict):
        return [value[name] for name in ("data", "examples") if value.get(name)]
    if isinstance(value, list):
        return [path for entry in value if isinstance(entry, dict) for path in files_of(entry)]
    return [value] if value else []


def _filled(value: Any) -> Any:
    """A value in which question sets have all of their options, and a file's no split, which it does not have."""
    if isinstance(value, list):
        return [_filled(entry) for entry in value]
    if not isinstance(value, dict) or not {"name", "data"} <= set(value):
        return value
    return asdict(QuestionSet(**value | ({"split": None} if Path(value["data"]).is_file() else {})))


def _defaults(options: dict[str, Any]) -> dict[str, Any]:
    """The default values of these dotted keys; those without one are left out."""
    values = asdict(Config())
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
