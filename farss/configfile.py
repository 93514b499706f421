"""Options from and to YAML files, dictionaries and `key=value` texts: every key and every value is checked."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from farss.config import Config, QuestionSet
from farss.errors import ConfigError, nearest

Kind = TypeVar("Kind")
CONFIG = "config.yaml"
"""What the configuration is called in a run folder."""
CALLED = {
    **dict.fromkeys(("lr", "learning_rate"), "train.learning_rate"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "train.epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size", "micro_batch"), "train.micro_batch_size"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "train.scheduler"),
    "lora_dropout": "train.dropout",
    "warmup_steps": "train.warmup_ratio",
    **dict.fromkeys(("gradient_clipping", "grad_clip", "clip", "max_norm"), "train.max_grad_norm"),
    **dict.fromkeys(("bf16", "fp16", "tf32"), "train.precision"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "plan.rank"),
    "lora_alpha": "plan.alpha",
    **dict.fromkeys(("target_modules", "lora_target_modules"), "model.targets"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_config"), "model.quantization: nf4"),
    **dict.fromkeys(("model_name_or_path", "model_name", "base_model"), "model.path"),
    "device_map": "model.device",
    "torch_dtype": "model.dtype",
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "train_file"), "data.train"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"), "data.max_length"),
    **dict.fromkeys(("data.path", "data.file", "data.data", "train.data", "train.file"), "data.train"),
    **dict.fromkeys(("data.instruction", "data.question", "data.input", "data.query"), "data.prompt"),
    **dict.fromkeys(("data.output", "data.answer", "data.completion"), "data.response"),
    **dict.fromkeys(("learning_rates", "lrs"), "compare.tune"),
    **dict.fromkeys(("prune.blocks", "prune.layers"), "prune.ratio"),
    **dict.fromkeys(("output_dir", "output"), "out"),
}
"""Our keys, by what others call them."""
REFUSED = {
    "rslora": "FARSS scales its factors by alpha / R itself, and rsLoRA would scale the start too: set plan.alpha",
    "dora": "DoRA is a method of its own, for FARSS's start is not the base model once its rows are rescaled: set plan.method=dora",
    "gradient_accumulation_steps": "train.batch_size is that of a whole step: set train.micro_batch_size to what fits at a time",
    "optim": "AdamW trains, and there is no other: leave it out",
    "packing": "examples are not packed: leave it out",
}
"""Why options of others are not options here."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and check everything.

    Raises:
        ConfigError: the file is missing or no YAML, or a key or a value is wrong.
    """
    return override(from_dict(_read(Path(path))), overrides)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give a configuration file, such as {path / CONFIG}")
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}: `farss config > {shlex.quote(str(path))}` makes one")
    try:
        values = _parsed(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_told(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not `key: value` lines: start from `farss config`")
    return values


def _parsed(text: str) -> Any:
    """What a YAML text says; a ValueError where it holds itself (`&a [*a]`)."""
    values = yaml.load(text, _Loader)
    json.dumps(values, default=str, skipkeys=True)
    return values


def _told(error: Exception) -> str:
    """What PyYAML finds wrong, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        cure = "; indent with spaces" if "'\\t'" in (error.problem or "") else ""
        return f"{error.problem}, in line {error.problem_mark.line + 1}{cure}"
    return " ".join(str(error).split())


def override(config: Config, overrides: Iterable[str]) -> Config:
    """Apply `section.key=value` texts, each value read as YAML, and the options of further .yaml files, in their order."""
    values = dataclasses.asdict(config)
    for text in overrides:
        if text.endswith((".yaml", ".yml")) and ("=" not in text or Path(text).is_file()):
            for section, inner in _read(Path(text)).items():
                set_key(values, str(section), inner)
            continue
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{text!r} is not of the form key=value, such as train.learning_rate=1e-4")
        try:
            parsed = _parsed(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{text!r}: the value is not valid YAML: {_told(error)}") from error
        if isinstance(parsed, str) and " #" in value and value.strip()[0] not in "\"'":
            parsed = value.strip()  # a name, and no comment behind one
        set_key(values, key.strip(), parsed)
    return from_dict(values)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dictionaries, in place; refuse a key that no section has. Of a whole section the options that are given
    change, and the others stay."""
    first, _, rest = key.partition(".")
    section = values.get(first)
    if first not in values or (rest and (not isinstance(section, dict) or rest not in section)):
        raise _unknown(key, all_keys())
    if not isinstance(section, dict):
        values[first] = value
    elif rest:
        # a file on top of another has options for some methods, and shall not take away those of the others
        adds = key == "compare.settings" and isinstance(value, dict) and isinstance(section[rest], dict)
        section[rest] = section[rest] | value if adds else value
    elif isinstance(value, Mapping):
        for inner, each in value.items():
            set_key(values, f"{first}.{inner}", each)
    elif value is not None:  # a section whose lines are all commented out
        raise ConfigError(f"{first} is {value!r}: give `key: value` pairs")


def _unknown(key: str, known: list[str]) -> ConfigError:
    """The error of a key that is not there, with what was probably meant: what others call so, a key of that name in another section,
    or one of its own that is spelt much like it."""
    section, _, name = key.rpartition(".")
    last = name.removeprefix("use_").lower()
    if last in REFUSED:
        return ConfigError(f"unknown key {key!r}: {REFUSED[last]}")
    called = CALLED.get(key, CALLED.get(last, ""))
    beside = [each for each in known if each.rpartition(".")[0] == section] if section else list({each.partition(".")[0] for each in known})
    names = {each.rpartition(".")[2]: each for each in beside or known}
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.6)
    namesakes = [each for each in known if each.rpartition(".")[2] == last]
    meant = [*([called] if called.partition(":")[0] in known else []), *namesakes, *(names[each] for each in close)]
    cure = f"did you mean {meant[0]!r}?" if meant else f"choose one of {', '.join(sorted(beside or known))}"
    return ConfigError(f"unknown key {key!r}: {cure}")


def all_keys() -> list[str]:
    """Every dotted key."""
    keys = []
    for entry in dataclasses.fields(Config):
        inner = entry.default_factory if entry.default_factory is not dataclasses.MISSING else None
        if inspect.isclass(inner) and dataclasses.is_dataclass(inner):
            keys += [f"{entry.name}.{f.name}" for f in dataclasses.fields(inner)]
        else:
            keys.append(entry.name)
    return keys


def from_dict(values: Mapping[str, Any]) -> Config:
    """Build a checked `Config` from nested dictionaries: the opposite of `dataclasses.asdict`."""
    config: Config = _build(Config, values, "")
    return config


def checked(config: Kind, name: str) -> Kind:
    """A part of a configuration that was made in Python, with every value checked as if it stood in a file.

    Raises:
        ConfigError: with the option.
    """
    found: Kind = _build(type(config), dataclasses.asdict(config), name)  # type: ignore[call-overload]
    return found


_hints = functools.cache(typing.get_type_hints)


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the configuration'} is {values!r}: give `key: value` pairs")
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            dotted = f"{where}.{key}" if where else str(key)
            known = all_keys() if cls is not QuestionSet else [f"{where}.{name}" for name in hints]
            raise _unknown(dotted, known)
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Turn a YAML value into the type of its field, or say what was found and what is allowed."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}={value!r}: {nearest(str(value), map(str, arguments))}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where}={value!r}: give a list{_such_as(value)}")
        return [_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict or kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build(kind, value if value is not None else {}, where)
    return _convert_plain(kind, value, where)


def _such_as(value: Any) -> str:
    """An example of what was probably meant."""
    if value == "all-linear":  # PEFT's word
        return "; an empty one, [], is every linear layer"
    if isinstance(value, str) and Path(value).suffix in (".jsonl", ".json", ".csv", ".parquet", ".gz"):
        return f" of question sets, such as [{{name: mine, data: {value}, question: question, answers: answers}}]"
    return f", such as [{_inline(value)}]"


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    errors = []
    for argument in arguments:
        if argument is type(None):
            continue
        if dataclasses.is_dataclass(argument) and isinstance(value, Mapping):
            return _build(argument, value, where)
        try:
            return _convert(argument, value, where)
        except ConfigError as error:
            errors.append(str(error))
    found = f"{where}={value!r}: "
    cures = ", or ".join(error.removeprefix(found) for error in errors)
    raise ConfigError(f"{found}{cures}")


def _convert_plain(kind: type, value: Any, where: str) -> Any:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{where} is a number of {len(str(value)):,} digits: give a smaller one")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, Path):  # as Python code names a file
        return str(value)
    if type(value) is not kind:
        unquoted = " without quotes" if isinstance(value, str) and re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", value) else ""
        quoted = ", in quotes" if kind is str else ""  # where YAML finds a mapping, a number or a truth value in it
        raise ConfigError(f"{where}={value!r}: give {names[kind]}{unquoted}{quoted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value!r}: give a finite number")
    return _whole(value, where) if isinstance(value, str) else value


def _whole(text: str, where: str) -> str:
    """A text whose characters JSON has written as two halves, as it does with emojis."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}={text!r} holds half a character: write it anew") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.2: PyYAML alone reads `1e-4` as a text, `0512` as 330 and `1:30` as 90, and takes the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, of which no key may stand twice."""
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key.value in {other.value for other in keys[:place]}:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice: keep one", key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts texts in quotes that the loader would take for numbers, such as `1e5`."""


_TAG = "tag:yaml.org,2002:"
_NUMBERS = {"int": r"^[-+]?[0-9][0-9_]*$", "float": r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"}
_Loader.yaml_implicit_resolvers = {
    first: [kind for kind in kinds if kind[0] not in (f"{_TAG}timestamp", f"{_TAG}int")]  # a date is a text: no option takes one
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list("-+0123456789"))
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(node.value.replace("_", "")))


# --- writing ---------------------------------------------------------------------------------------------------------


def dump(config: Config) -> str:
    """The configuration as YAML, without comments."""
    text: str = yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def commented() -> str:
    """The defaults as YAML, each option under its help text."""
    config = Config()
    lines = ["# A farss run. Start it with `farss run FILE`; `farss run FILE key=value` overrides an option."]
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if not dataclasses.is_dataclass(value):
            lines += ["", f"# {field_help(Config)[entry.name]}", _line(entry.name, value)]
            continue
        lines += ["", f"# {(type(value).__doc__ or '').strip()}", f"{entry.name}:"]
        help_texts = field_help(type(value))
        lines += _question_set("  ") if entry.name == "evaluate" else []
        for inner in dataclasses.fields(value):
            lines += [f"  # {help_texts[inner.name]}", _line(inner.name, getattr(value, inner.name), "  ")]
    return "\n".join(lines) + "\n"


def _question_set(indent: str) -> list[str]:
    """The keys of a question set, as comments."""
    help_texts = field_help(QuestionSet)
    lines = [f"{indent}# A question set is a file of questions, with these keys:"]
    for key in dataclasses.fields(QuestionSet):
        default = f" Default: {key.default}." if key.default not in ("", None) else ""
        lines.append(f"{indent}#   {key.name}: {help_texts[key.name]}{default}")
    return lines


def field_help(cls: type) -> dict[str, str]:
    """Map each field of a dataclass to the docstring under it."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    texts: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            texts[statement.target.id] = " ".join(following.value.value.split())  # type: ignore[union-attr, attr-defined]
    return texts


def _line(name: str, value: Any, indent: str = "") -> str:
    return f"{indent}{name}: {_inline(value)}"


def _inline(value: Any) -> str:
    """A value as YAML, in one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip().removesuffix("...").strip()
