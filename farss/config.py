"""The configuration of a run: frozen dataclasses to and from YAML. The docstring under each field is its help text."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from farss.errors import ConfigError


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ModelConfig:
    """The model that is fine-tuned."""

    path: str = ""
    """Folder of the base model (safetensors and tokenizer), or its name on a hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen weights; auto: as they are stored, or float32 on a CPU that cannot compute with 16 bits."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: hold the frozen weights in bitsandbytes' 4-bit format while training, as QLoRA does."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:1."""
    targets: list[str] = field(default_factory=list)
    """Names of the linear layers to adapt, such as [q_proj, v_proj]; empty: every linear layer in every block."""
    trust_remote_code: bool = False
    """Run the model's own Python code. Only for models whose authors you trust."""


@dataclass(frozen=True)
class DataConfig:
    """The task: what the model shall learn."""

    train: str = ""
    """Training examples: a .jsonl, .json, .csv or .parquet file (.gz too), or a data set's name on a hub, its configuration behind a
    colon (openai/gsm8k:main). A column input or context beside instruction is added to it, unless data.prompt
    is named."""
    split: str = "train"
    """Split of a hub data set."""
    prompt: str | None = None
    """Column with the instruction; null: found by itself (prompt, instruction, query, question, ...)."""
    response: str | None = None
    """Column with the answer; null: found by itself (completion, response, output, answer, ...)."""
    template: str = "alpaca"
    """alpaca, chat (the model's own chat template), plain (as it is), or your own text with {instruction} in it."""
    max_length: int = 512
    """Longest example in tokens; the end is cut off, and an example of which no answer is left is not used (you are told)."""
    limit: int | None = None
    """Use this many examples, drawn with the seed; null: all."""

    def __post_init__(self) -> None:
        _check(self.max_length >= 8, f"data.max_length={self.max_length} is too short: give 8 tokens or more")
        _check(self.limit is None or self.limit >= 1, f"data.limit={self.limit}: give 1 or more, or null for all")
        named = self.template in ("alpaca", "chat", "plain")
        _check(
            named or "{instruction}" in self.template,
            f"data.template={self.template!r}: choose alpaca, chat or plain, or give a text that contains {{instruction}}",
        )


@dataclass(frozen=True)
class QuestionSet:
    """A file of questions with their answers, scored by exact match and by the answers' log-likelihood."""

    name: str = ""
    """How the table calls it."""
    data: str = ""
    """A .jsonl, .json, .csv or .parquet file (.gz too), or a data set's name on a hub, its configuration behind a colon."""
    split: str = "test"
    """Split of a hub data set; examples are shown from its train split."""
    question: str = "question"
    """Column with the question. A column input or context beside instruction is added to it."""
    answers: str = "answers"
    """Column with the answer, or with a list of accepted answers."""
    prompt: str | None = None
    """The prompt, with {question} in it; `train` for the training template; null: `train` for tasks and
    'Question: {question}\\nAnswer:' for knowledge."""
    fewshot: int = 0
    """Show this many other questions, with their answers, before each question."""
    examples: str | None = None
    """File with the questions that are shown, with the same columns; null: others of the same file."""
    limit: int | None = None
    """Ask this many questions, drawn with the seed; null: all."""
    max_tokens: int = 32
    """Longest answer in tokens."""
    metric: Literal["exact_match", "contains", "number"] = "exact_match"
    """exact_match: the answer is one of the accepted ones (case, articles and punctuation apart); contains: holds one;
    number: the number behind its last '####' or 'The answer is:', else its last number, equals that of one."""

    def __post_init__(self) -> None:
        _check(bool(self.name), f"a question set needs a name: add `name:` beside data={self.data!r}")
        _check(bool(self.data), f"question set {self.name!r} needs a file: add `data:`")
        _check(self.fewshot >= 0, f"question set {self.name!r}: fewshot={self.fewshot}: give 0 or more")
        _check(self.limit is None or self.limit >= 1, f"question set {self.name!r}: limit={self.limit}: give 1 or more")
        _check(self.max_tokens >= 1, f"question set {self.name!r}: max_tokens={self.max_tokens}: give 1 or more")


@dataclass(frozen=True)
class CalibrationConfig:
    """The examples on which the Fisher statistics are estimated (FARSS, section 3.2)."""

    examples: int = 256
    """How many training examples to use, drawn with the seed."""
    batch_size: int = 8
    """Examples per forward pass; changes the memory, not the result."""
    knowledge: str | QuestionSet | None = None
    """The knowledge that CorDA-KPM and LoRA-Null start away from and that FARSS-plus weighs the task against: a file with a column
    text, or with question and answers (with columns of other names: {name, data, question, answers}), of which as many rows are used
    as there are examples; null: as many texts that the base model writes by itself."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """empirical: gradients at the data's own answers; sampled: at answers drawn from the model (the true Fisher)."""
    padding: Literal["ignore", "count"] = "ignore"
    """count: pad every example to data.max_length and let the padding count in the survey's averages, as the authors'
    released code does (for comparison only)."""
    svd: Literal["exact", "fast"] = "exact"
    """exact: decompositions in float64; fast: in float32 wherever a block cannot become shallow (the survey measures how
    many of the chosen directions stay the same; of Gemma 3 270M's, 99.99 %)."""

    def __post_init__(self) -> None:
        _check(self.examples >= 1, f"calibration.examples={self.examples}: give 1 or more")
        _check(self.batch_size >= 1, f"calibration.batch_size={self.batch_size}: give 1 or more")


@dataclass(frozen=True)
class PlanConfig:
    """Where and how much to adapt, and from which directions to start."""

    method: str = "farss"
    """The fine-tuning method; `farss methods` lists them."""
    boundary: int | Literal["auto"] | None = None
    """Number of shallow blocks (blocks 0 .. boundary-1); auto: found by short training probes, see `boundary:` below;
    null: a fifth of the blocks, rounded."""
    rank: int = 128
    """Rank R of every deep layer, and of every layer in methods without a boundary."""
    r_min: int = 1
    """Smallest rank of a shallow layer."""
    r_avg: int = 50
    """Average rank of the shallow layers: their budget is r_avg times their number (eq. 10)."""
    r_max: int = 64
    """Largest rank of a shallow layer."""
    alpha: float | Literal["uniform", "constant"] = "uniform"
    """A number: the adapter is scaled by alpha / plan.rank in every layer. uniform: the scale is 1. constant: alpha = R in every
    layer whatever its rank, and FARSS's factors without the scale, as the authors' released code does (for comparison only)."""
    budget: Literal["paper", "exact"] = "paper"
    """paper: round and clip (eq. 12), which loses some of the budget; exact: hand out all of it."""
    match_params: int | Literal["lora"] | None = None
    """Solve for the rank so that the number of trainable parameters is this, or that of uniform LoRA at `rank` (AdaLoRA: at
    the end of its training)."""
    shallow_directions: Literal["least", "most"] = "least"
    """Shallow layers start from their least (or most) important singular directions."""
    deep_directions: Literal["least", "most"] = "most"
    """Deep layers start from their most (or least) important singular directions."""
    kasa_beta: float = 1e-4
    """KaSA's weight of the squared singular values (its paper uses 1e-4 on GLUE; FARSS compares with 1e-2 on LLaMA-2-7B)."""
    kasa_gamma: float = 1e-3
    """KaSA's weight of the distance from orthogonality (1e-3 on GLUE; FARSS compares with 1e-4 on LLaMA-2-7B)."""

    def __post_init__(self) -> None:
        for name in ("rank", "r_min", "r_avg", "r_max"):
            _check(getattr(self, name) >= 1, f"plan.{name}={getattr(self, name)}: a rank is 1 or more")
        _check(self.r_min <= self.r_max, f"plan.r_min={self.r_min} is larger than plan.r_max={self.r_max}: swap them?")
        _check(self.r_avg <= self.r_max, f"plan.r_avg={self.r_avg} is larger than plan.r_max={self.r_max}: swap them?")
        _check(self.r_avg >= self.r_min, f"plan.r_avg={self.r_avg} is smaller than plan.r_min={self.r_min}: swap them?")
        if isinstance(self.boundary, int):
            _check(self.boundary >= 1, f"plan.boundary={self.boundary}: give 1 or more, or auto")
        for name in ("kasa_beta", "kasa_gamma"):
            _check(0 <= getattr(self, name) < float("inf"), f"plan.{name}={getattr(self, name)}: give 0 or more")
        if not isinstance(self.alpha, str):
            _check(0 < self.alpha < float("inf"), f"plan.alpha={self.alpha}: give a number above 0")
        if isinstance(self.match_params, int):
            _check(self.match_params >= 1, f"plan.match_params={self.match_params}: give a number of parameters above 0")


@dataclass(frozen=True)
class BoundaryConfig:
    """The search for the boundary: `farss boundary`, and `plan.boundary: auto`."""

    probe: float = 0.05
    """Length of a first probe as a share of the training's steps; down to half of it where the budget asks for it."""
    rate: float = 4.0
    """Learning rate of the probes, as a multiple of the training's: forgetting begins late, and a few steps at the training's own
    rate show none of it."""
    budget: float = 0.3
    """What all probes and their scoring may cost, as a share of the training's steps."""
    questions: int = 400
    """Score a probe on at most this many knowledge questions and this many held-out training examples."""

    def __post_init__(self) -> None:
        _check(0 < self.probe <= 1, f"boundary.probe={self.probe}: give a share above 0 and up to 1")
        _check(self.rate > 0, f"boundary.rate={self.rate}: give a number above 0, such as 4")
        _check(self.budget > 0, f"boundary.budget={self.budget}: give a share above 0, such as 0.3")
        _check(self.questions >= 8, f"boundary.questions={self.questions}: give 8 or more")


Base = Literal["untouched", "residual"]


@dataclass(frozen=True)
class AdapterConfig:
    """How the adapter's start is taken out of the base model."""

    base: Base = "untouched"
    """untouched: by a second, frozen adapter; the weights are never rounded. residual: subtracted from the weights in memory
    and rounded to their precision. Either way the exported adapter is for the original base model."""


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tuning (the defaults are the paper's, appendix A.2, and those of its authors' commands)."""

    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""
    epochs: float = 1.0
    """Passes over the training examples."""
    max_steps: int | None = None
    """Stop after this many optimiser steps; null: after `epochs`."""
    batch_size: int = 16
    """Examples per optimiser step."""
    micro_batch_size: int | None = None
    """Examples per forward pass; null: the whole batch_size. Smaller needs less memory, the result is the same."""
    scheduler: str = "linear"
    """Learning-rate schedule, by its name in transformers (linear, cosine, constant, ...)."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    dropout: float = 0.05
    """Dropout on the adapter's input."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the matrix products; auto: bf16 where the machine has units for it. Trainable weights and their updates
    are always float32."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_steps: int = 100
    """A checkpoint every so many steps; a killed run continues from the newest."""
    logging_steps: int = 10
    """The loss is logged every so many steps."""
    report_to: list[str] = field(default_factory=list)
    """Trackers, by their names in transformers: tensorboard, wandb, mlflow, trackio, ..."""

    def __post_init__(self) -> None:
        _check(self.learning_rate > 0, f"train.learning_rate={self.learning_rate}: give a number above 0")
        _check(self.epochs > 0, f"train.epochs={self.epochs}: give a number above 0")
        _check(self.max_steps is None or self.max_steps >= 1, f"train.max_steps={self.max_steps}: give 1 or more")
        _check(self.batch_size >= 1, f"train.batch_size={self.batch_size}: give 1 or more")
        _check(0 <= self.warmup_ratio < 1, f"train.warmup_ratio={self.warmup_ratio}: give 0 or more, below 1")
        _check(0 <= self.dropout < 1, f"train.dropout={self.dropout}: give 0 or more, below 1")
        _check(self.save_steps >= 1, f"train.save_steps={self.save_steps}: give 1 or more")
        _check(self.logging_steps >= 1, f"train.logging_steps={self.logging_steps}: give 1 or more")
        micro = self.micro_batch_size
        _check(
            micro is None or (micro >= 1 and self.batch_size % micro == 0),
            f"train.micro_batch_size={micro} does not divide train.batch_size={self.batch_size}: choose a divisor",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """What is asked before and after: knowledge (what shall be kept) and task (what shall be learned)."""

    knowledge: list[str | QuestionSet] = field(default_factory=list)
    """Names of lm_eval tasks (triviaqa, nq_open, webqs), or question sets: {name, data, question, answers}."""
    task: list[str | QuestionSet] = field(default_factory=list)
    """The same for the task. farss_gsm8k asks GSM8K with the training prompt."""
    other: list[str | QuestionSet] = field(default_factory=list)
    """Asked before and after too, but in neither K nor T: the same knowledge without examples, for instance."""
    text: str | None = None
    """File of general text (column `text`); forgetting is the mean token loss on it, after minus before."""
    text_rows: int | None = 500
    """Read this many rows of it, drawn with the seed; null: all."""
    recovery: int = 0
    """Ask the knowledge once more after this many steps of question answering, on questions of the same files that are not
    asked: what comes back was only masked. 0: do not."""
    looks: int = 8
    """While training, look this many times at how likely a few of the answers are (at most 5 % of its cost); 0: never."""
    full_scores: str | None = None
    """scores.json of a full fine-tuning run, the reference of T (eq. 37); null: in a comparison its run of full, elsewhere no T."""
    batch_size: int = 16
    """Prompts per forward pass."""
    limit: int | None = None
    """Ask at most this many questions of each lm_eval task; null: all."""
    resamples: int = 2000
    """Bootstrap resamples for the 95 % intervals."""
    run_generated_code: bool = False
    """Allow tasks that execute what the model writes (humaneval, mbpp)."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, f"evaluate.batch_size={self.batch_size}: give 1 or more")
        _check(self.limit is None or self.limit >= 1, f"evaluate.limit={self.limit}: give 1 or more, or null for all")
        _check(self.text_rows is None or self.text_rows >= 1, f"evaluate.text_rows={self.text_rows}: give 1 or more, or null for all")
        _check(self.recovery >= 0, f"evaluate.recovery={self.recovery}: give 0 or more")
        files = [entry for entry in self.knowledge if isinstance(entry, QuestionSet)]
        _check(not self.recovery or bool(files), "evaluate.recovery needs a question file in evaluate.knowledge: {name, data, ...}")
        _check(self.looks >= 0, f"evaluate.looks={self.looks}: give 0 or more")
        _check(self.resamples >= 100, f"evaluate.resamples={self.resamples}: give 100 or more")
        names = [entry if isinstance(entry, str) else entry.name for entry in self.asked]
        twice = sorted({name for name in names if names.count(name) > 1})
        _check(not twice, f"evaluate asks {twice[0] if twice else ''!r} twice: give every question set its own name")

    @property
    def asked(self) -> list[str | QuestionSet]:
        """Everything that is asked, of every kind."""
        return [*self.knowledge, *self.task, *self.other]

    @property
    def asks(self) -> bool:
        """Whether anything is measured before and after."""
        return bool(self.asked or self.text)


@dataclass(frozen=True)
class ExportConfig:
    """The adapter that is handed over."""

    to: Literal["peft", "merged", "gguf"] = "peft"
    """peft: one plain LoRA for the untouched base model; gguf: the same, and beside it a file for llama.cpp; merged: a
    whole model."""
    rank: int | None = None
    """Compress the adapter to this rank; null: keep all of it."""
    energy: float | None = None
    """Compress each layer to this share (0 to 1) of its change's squared Frobenius norm; null: keep all of it."""

    def __post_init__(self) -> None:
        _check(self.energy is None or 0 < self.energy <= 1, f"export.energy={self.energy}: give a share above 0 and up to 1, or null")
        _check(self.rank is None or self.rank >= 1, f"export.rank={self.rank}: give 1 or more, or null to keep all")


@dataclass(frozen=True)
class CompareConfig:
    """Several methods side by side; `farss run` runs them all when `methods` is not empty."""

    methods: list[str] = field(default_factory=list)
    """Methods to compare, such as [farss, lora, full]; farss@wide is a variant of farss, with the options of its settings."""
    seeds: list[int] = field(default_factory=list)
    """One run of each method for each of these seeds; empty: the one `seed`."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options that differ for one method, such as {full: {train.learning_rate: 1e-5}}; a later file adds methods to an earlier one's."""
    tune: list[float] = field(default_factory=list)
    """Run every method at its learning rate times each of these, such as [0.25, 0.5, 1, 2], with the first seed, and with
    every seed at the best; empty: at its own learning rate."""
    held_out: float = 0.2
    """Share of the questions by which the best is chosen; the table is made of the others."""
    keep: Literal["all", "scores"] = "all"
    """scores: a run's weights are deleted when it is scored; its adapter is gone, its answers, curves and report stay."""
    jobs: int = 1
    """Runs at a time, each in a process of its own with an equal share of the processor's threads, or with a GPU of its own."""

    def __post_init__(self) -> None:
        _check(isinstance(self.settings, dict), f"compare.settings={self.settings!r}: give {{method: {{option: value}}}}, or leave it out")
        _check(self.jobs >= 1, f"compare.jobs={self.jobs}: give 1 or more")
        for factor in self.tune:
            _check(factor > 0, f"compare.tune holds {factor}: give numbers above 0")
        for name, values in (("methods", self.methods), ("seeds", self.seeds), ("tune", self.tune)):
            twice = [value for place, value in enumerate(values) if value in values[:place]]
            _check(not twice, f"compare.{name} holds {twice[0] if twice else ''} twice: give each once")
        _check(0 < self.held_out < 1, f"compare.held_out={self.held_out}: give a share above 0 and below 1")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    boundary: BoundaryConfig = field(default_factory=BoundaryConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    seed: int = 0
    """Seed of every random choice."""
    out: str = "run"
    """The run folder."""


# --- reading ---------------------------------------------------------------------------------------------------------


REFUSED = {
    "rslora": "FARSS scales its factors by alpha / R itself, and rsLoRA would scale the start too: set plan.alpha",
    "dora": "DoRA rescales the rows of W + s B A, so with FARSS's start the model would not begin as the base model",
}
"""Why PEFT options that people ask for together with FARSS are not options here."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `: did you mean X?`, or the list of what is known, for an error message about `name`."""
    last = name.rpartition(".")[2].removeprefix("use_").lower()
    if last in REFUSED:
        return REFUSED[last]
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and check everything.

    Raises:
        ConfigError: the file is missing or no YAML, or a key or a value is wrong.
    """
    return override(from_dict(_read(Path(path))), overrides)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}: `farss config > {path}` makes one")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not `key: value` lines: start from `farss config`")
    return values


def override(config: Config, overrides: Iterable[str]) -> Config:
    """Apply `section.key=value` texts, each value read as YAML, and the options of further .yaml files, in their order."""
    values = to_dict(config)
    for text in overrides:
        if "=" not in text and text.endswith((".yaml", ".yml")):
            for section, inner in _read(Path(text)).items():
                for key, value in inner.items() if isinstance(inner, dict) else [("", inner)]:
                    set_key(values, f"{section}.{key}" if key else section, value)
            continue
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{text!r} is not of the form key=value, such as train.learning_rate=1e-4")
        try:
            set_key(values, key.strip(), yaml.load(value, _Loader))
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r}: the value is not valid YAML") from error
    return from_dict(values)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dictionaries, in place; refuse a key that no section has."""
    sections = {f.name: f for f in dataclasses.fields(Config)}
    first, _, rest = key.partition(".")
    if first not in sections:
        raise ConfigError(f"unknown key {key!r}: {nearest(key, all_keys())}")
    if rest:
        section = values.get(first)
        if not isinstance(section, dict) or (rest not in section and first != "compare"):
            raise ConfigError(f"unknown key {key!r}: {nearest(key, all_keys())}")
        # a file on top of another has options for some methods, and shall not take away those of the others
        section[rest] = section["settings"] | value if key == "compare.settings" and isinstance(value, dict) else value
    else:
        values[first] = value


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
    """Build a checked `Config` from nested dictionaries."""
    config: Config = _build(Config, values, "")
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The opposite of `from_dict`: plain dictionaries, lists, strings and numbers."""
    return dataclasses.asdict(config)


_hints = functools.cache(typing.get_type_hints)


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the configuration'} is {values!r}: give `key: value` pairs")
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            dotted = f"{where}.{key}" if where else str(key)
            known = all_keys() if cls is not QuestionSet else [f"{where}.{name}" for name in hints]
            raise ConfigError(f"unknown key {dotted!r}: {nearest(dotted, known)}")
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
            raise ConfigError(f"{where}={value!r}: give a list, such as [{value}]")
        return [_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict or kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build(kind, value if value is not None else {}, where)
    return _convert_plain(kind, value, where)


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
    cures = ", or ".join(error.split(": ", 1)[-1] for error in errors)
    raise ConfigError(f"{where}={value!r}: {cures}")


def _convert_plain(kind: type, value: Any, where: str) -> Any:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}={value!r}: give {names[kind]}")
    return value


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML alone reads `1e-4` as a text."""


_FLOAT = r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789"))


# --- writing ---------------------------------------------------------------------------------------------------------


def dump(config: Config) -> str:
    """The configuration as YAML, without comments."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    return text


def commented(config: Config | None = None) -> str:
    """The configuration as YAML, each option under its help text."""
    config = config or Config()
    lines = ["# A farss run. Start it with `farss run FILE`; `farss run FILE key=value` overrides an option."]
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if not dataclasses.is_dataclass(value):
            lines += ["", *_comment(field_help(Config)[entry.name]), _line(entry.name, value)]
            continue
        lines += ["", f"# {(type(value).__doc__ or '').strip()}", f"{entry.name}:"]
        help_texts = field_help(type(value))
        for inner in dataclasses.fields(value):
            lines += _comment(help_texts[inner.name], "  ")
            lines.append(_line(inner.name, getattr(value, inner.name), "  "))
    return "\n".join(lines) + "\n"


def field_help(cls: type) -> dict[str, str]:
    """Map each field of a dataclass to the docstring under it."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    texts: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            texts[statement.target.id] = " ".join(following.value.value.split())  # type: ignore[union-attr, attr-defined]
    return texts


def _comment(text: str, indent: str = "") -> list[str]:
    return [f"{indent}# {text}"]


def _line(name: str, value: Any, indent: str = "") -> str:
    if isinstance(value, (list, dict)) and value:
        items = value if isinstance(value, dict) else None
        plain = items or [to_dict(item) if dataclasses.is_dataclass(item) else item for item in value]
        body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip().replace("\n", f"\n{indent}  ")
        return f"{indent}{name}:\n{indent}  {body}"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return f"{indent}{name}: {text.removesuffix('...').strip()}"
