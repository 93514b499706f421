"""The options of a run. The docstring under each field is its help text; `configfile` reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from farss.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_seed(key: str, seed: int) -> None:
    _check(0 <= seed < 2**32, f"{key} is {seed}: give a number from 0 to {2**32 - 1}")


def _check_once(key: str, values: list[Any]) -> None:
    twice = [value for place, value in enumerate(values) if value in values[:place]]
    _check(not twice, f"{key} holds {twice[0] if twice else ''} twice: give each once")


@dataclass(frozen=True)
class ModelConfig:
    """The model that is fine-tuned."""

    path: str = ""
    """Folder of the base model (safetensors and tokenizer), or its name on a hub."""
    dtype: Dtype = "auto"
    """Precision of the frozen weights; auto: as they are stored, or float32 on a CPU that cannot compute with 16 bits. float16 trains where
    products are bf16."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: hold the frozen weights in bitsandbytes' 4-bit format while training, as QLoRA does."""
    device: str = "auto"
    """auto (the first visible GPU, where there is one), cpu or cuda; choose another GPU by CUDA_VISIBLE_DEVICES."""
    targets: list[str] = field(default_factory=list)
    """Names of the linear layers to adapt, such as [q_proj, v_proj]; empty: every linear layer in every block."""
    trust_remote_code: bool = False
    """Run the model's own Python code. Only for models whose authors you trust."""


@dataclass(frozen=True)
class DataConfig:
    """The task: what the model shall learn."""

    train: str = ""
    """Training examples: a .jsonl, .json, .csv, .tsv or .parquet file (all but .parquet also as .gz), or a data set's name on a hub, its
    configuration behind a colon (openai/gsm8k:main). A column input or context beside instruction is added to it."""
    split: str = "train"
    """Split of a hub data set."""
    prompt: str | None = None
    """Column with the instruction; null: found by itself (prompt, instruction, query, question, ...)."""
    response: str | None = None
    """Column with the answer; null: found by itself (completion, response, output, answer, ...)."""
    template: str = "alpaca"
    """alpaca, chat (the model's own chat template), plain (as it is), or your own text with {instruction} in it. A space stands between
    prompt and answer, unless your own text ends in white space."""
    system: str | None = None
    """With the template chat: the system message with which questions are asked in the training's prompt. The examples must have it in
    their messages. null: none; where every example begins
    with one, repeat it here, or write '' to leave it out on purpose."""
    thinking: bool = False
    """With the template chat, for models that think: the answers of the examples begin with thoughts (<think> ...), and questions are asked
    so that the model writes its own. false: after empty thoughts, where the template writes them (Qwen3)."""
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
        _check(
            not self.system or self.template == "chat",
            f"data.system={self.system!r} is a message of a chat, and data.template={self.template!r}: set data.template=chat",
        )
        _check(
            not self.thinking or self.template == "chat",
            f"data.thinking=true is for chats, and data.template={self.template!r}: set data.template=chat, or data.thinking=false",
        )


@dataclass(frozen=True)
class QuestionSet:
    """A file of questions with their answers, scored by exact match and by the answers' log-likelihood."""

    name: str = ""
    """How the table calls it."""
    data: str = ""
    """A .jsonl, .json, .csv, .tsv or .parquet file (all but .parquet also as .gz), or a data set's name on a hub, its configuration behind
    a colon."""
    split: str | None = None
    """Split of a hub data set; null: test, and train for calibration.knowledge. What `examples` names is of its train split."""
    question: str = "question"
    """Column with the question. A column input or context beside instruction is added to it."""
    answers: str = "answers"
    """Column with the answer, or with a list of accepted answers."""
    prompt: str | None = None
    """The prompt, with {question} in it; `train` for the training template; null: `train` for tasks and
    'Question: {question}\\nAnswer:' for knowledge. In any other prompt than the training's an answer ends at its first line break (metric
    number: at the first empty line)."""
    fewshot: int = 0
    """Show this many other questions, with their answers, before each question."""
    examples: str | None = None
    """File with the questions that are shown, with the same columns; null: others of the same file."""
    limit: int | None = None
    """Ask this many questions, drawn with the seed; null: all."""
    max_tokens: int = 32
    """Longest answer in tokens."""
    metric: Literal["exact_match", "contains", "number"] = "exact_match"
    """exact_match: the answer is one of the accepted ones (case, articles and punctuation apart, save that of numbers and of names
    such as C++); contains: holds one; number: the number behind its last '####' or 'The answer is:', else its last number, equals
    that of one."""

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
    """Of a survey: empirical: gradients at the data's own answers; sampled: at answers drawn from the model (the true Fisher).
    FARSS-plus and FoRA, which have no survey, always look at the data's own answers."""
    padding: Literal["ignore", "count"] = "ignore"
    """count: pad every example to data.max_length and let the padding count in the survey's averages, as the authors'
    released code does (for comparison only)."""
    svd: Literal["exact", "fast"] = "exact"
    """Of a survey: exact: decompositions in float64; fast: in float32 wherever a block cannot become shallow (the survey measures how
    many of the chosen directions stay the same; of Gemma 3 270M's, 99.99 %)."""

    def __post_init__(self) -> None:
        _check(self.examples >= 1, f"calibration.examples={self.examples}: give 1 or more")
        _check(self.batch_size >= 1, f"calibration.batch_size={self.batch_size}: give 1 or more")
        if isinstance(self.knowledge, QuestionSet):
            for name in ("prompt", "fewshot", "examples", "limit", "max_tokens", "metric"):
                given = getattr(self.knowledge, name)
                unused = f"calibration.knowledge has {name}={given!r}, but its rows are looked at and not asked"
                _check(given == getattr(QuestionSet, name), f"{unused}: leave it out (calibration.examples says how many)")


@dataclass(frozen=True)
class PlanConfig:
    """Where and how much to adapt, and from which directions to start."""

    method: str = "farss"
    """The fine-tuning method: farss is the paper's, farss-plus the one to begin with; `farss methods` lists them."""
    boundary: int | Literal["auto"] | None = None
    """Number of shallow blocks (blocks 0 .. boundary-1); auto: found by short training probes, see `boundary:` below;
    null: a fifth of the blocks, rounded."""
    rank: int = 128
    """Rank R of every deep layer, and of every layer in methods without a boundary."""
    r_min: int = 1
    """Smallest rank of a shallow layer."""
    r_avg: int | None = None
    """Average rank of the shallow layers: their budget is r_avg times their number (eq. 10); null: 50 for each 128 of the rank."""
    r_max: int | None = None
    """Largest rank of a shallow layer; null: half of the rank."""
    alpha: float | Literal["uniform", "constant"] = "uniform"
    """A number: the adapter is scaled by alpha / plan.rank in every layer. uniform: the scale is 1. constant: alpha = R in every
    layer whatever its rank, and FARSS's factors without the scale, as the authors' released code does (for comparison only)."""
    budget: Literal["paper", "exact"] = "paper"
    """paper: round and clip (eq. 12), which loses some of the budget; exact: hand out all of it."""
    match_params: int | Literal["lora"] | None = None
    """Solve for the rank so that the number of trainable parameters is this, or that of uniform LoRA at `rank` (AdaLoRA: at
    the end of its training; FARSS-plus and LoRA-Null-v2: with A, which does not train)."""
    shallow_directions: Literal["least", "most"] = "least"
    """Shallow layers start from their least (or most) important singular directions."""
    deep_directions: Literal["least", "most"] = "most"
    """Deep layers start from their most (or least) important singular directions."""
    kasa_beta: float = 1e-4
    """KaSA's weight of the squared singular values (its paper uses 1e-4 on GLUE; FARSS compares with 1e-2 on LLaMA-2-7B)."""
    kasa_gamma: float = 1e-3
    """KaSA's weight of the distance from orthogonality (1e-3 on GLUE; FARSS compares with 1e-4 on LLaMA-2-7B)."""
    fora_blocks: int | Literal["fisher", "all"] = "fisher"
    """FoRA adapts the half of the blocks with the largest gradients; or its ablations, which collect them all the same: an integer, as
    many blocks drawn at random with this seed; all, every block."""
    fora_orthonormal: bool = True
    """FoRA's B keeps orthonormal columns; false: a LoRA on the chosen blocks (its ablation)."""

    def __post_init__(self) -> None:
        for name in ("rank", "r_min", "r_avg", "r_max"):
            given = getattr(self, name)
            _check(given is None or given >= 1, f"plan.{name}={given}: a rank is 1 or more")
        average, largest = self.shallow_budget
        _check(self.r_min <= largest, f"plan.r_min={self.r_min} is larger than plan.r_max={largest}: swap them?")
        _check(average <= largest, f"plan.r_avg={average} is larger than plan.r_max={largest}: swap them?")
        _check(average >= self.r_min, f"plan.r_avg={average} is smaller than plan.r_min={self.r_min}: swap them?")
        if isinstance(self.boundary, int):
            _check(self.boundary >= 1, f"plan.boundary={self.boundary}: give 1 or more, or auto")
        for name in ("kasa_beta", "kasa_gamma"):
            _check(0 <= getattr(self, name) < float("inf"), f"plan.{name}={getattr(self, name)}: give 0 or more")
        if not isinstance(self.alpha, str):
            _check(0 < self.alpha < float("inf"), f"plan.alpha={self.alpha}: give a number above 0")
        if isinstance(self.match_params, int):
            _check(self.match_params >= 1, f"plan.match_params={self.match_params}: give a number of parameters above 0")

    @property
    def shallow_budget(self) -> tuple[int, int]:
        """Average and largest rank of the shallow layers: as configured, or the paper's 50 and 64 of 128 (table 8) for any rank."""
        largest = self.r_max or max(self.r_min, self.rank // 2)
        return self.r_avg or max(self.r_min, min(round(self.rank * 50 / 128), largest)), largest


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
    and rounded to their precision (of 16 bits it is refused, unless export.to is merged). Either way the exported adapter is for
    the original base model."""


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
    """Examples per forward pass; null: the whole batch_size. Smaller needs less memory. The loss is the same, but
    dropout draws its elements anew for each."""
    scheduler: str = "linear"
    """Learning-rate schedule, by its name in transformers (linear, cosine, constant, ...)."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    dropout: float = 0.05
    """Dropout on the adapter's input. Of a method that starts from a part of the weights it falls on what changes alone, and with
    adapter.base=residual on all that trains."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: they are not."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """In what matrices are multiplied. bf16; fp32: in the weights' own precision (for float32 set model.dtype=float32 too); auto: bf16
    where the machine has units for it. What trains, and its updates, are always float32."""
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
        _check(self.weight_decay >= 0, f"train.weight_decay={self.weight_decay}: give 0 or more")
        _check(self.max_grad_norm >= 0, f"train.max_grad_norm={self.max_grad_norm}: give 0 (no clipping) or more")
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
    """The same for the task. farss_gsm8k and farss_math ask GSM8K and MATH with the training prompt and "Let's think step by step."."""
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
    """Look before the first step, and then this many times while training, at how likely a few of the answers are; fewer times where that
    would cost more than 5 % of the training, but at its start and end in any case. 0: never."""
    full_scores: str | None = None
    """scores.json of a full fine-tuning run, the reference of T (eq. 37), or of another run where that does not fit; null: in a
    comparison its run of full, elsewhere no T."""
    learned_by: Literal["score", "likelihood"] = "score"
    """What T is made of: the scores on the task or, for free text and where hardly a question is solved, how much likelier (nats)
    the right answers became. Either is relative to full fine-tuning."""
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
        _check(100 <= self.resamples <= 10**6, f"evaluate.resamples={self.resamples}: give 100 to 1,000,000")
        names = [entry if isinstance(entry, str) else entry.name for entry in self.asked]
        lower = [name.lower() for name in names]  # they name files too, and not every system tells "NQ" from "nq"
        twice = sorted({name for name in names if lower.count(name.lower()) > 1})
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
    """Compress the adapter to this rank, padded in the file to the next that vLLM takes (8, 16, 32, 64, 128, 256, ...); null: keep
    all of it."""
    energy: float | None = None
    """Compress each layer to this share (0 to 1) of its change's squared Frobenius norm; null: keep all of it."""

    def __post_init__(self) -> None:
        _check(self.energy is None or 0 < self.energy <= 1, f"export.energy={self.energy}: give a share above 0 and up to 1, or null")
        _check(self.rank is None or self.rank >= 1, f"export.rank={self.rank}: give 1 or more, or null to keep all")


REFERENCE = "full"
"""The method that T is relative to, full fine-tuning: no rival of the others."""


def method_of_label(label: str) -> str:
    """The method that a label of a comparison names: `farss@wide` is a variant of farss."""
    return label.partition("@")[0]


def label_of_row(row: str) -> str:
    """The label in the name of a table's row, which has a learning rate behind it before one is chosen."""
    return row.partition(" ")[0]


def is_reference(label: str) -> bool:
    """Whether a label is that of full fine-tuning, or of a variant of it."""
    return method_of_label(label) == REFERENCE


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
            _check_once(f"compare.{name}", values)
        for seed in self.seeds:
            _check_seed("compare.seeds", seed)
        _check(0 < self.held_out < 1, f"compare.held_out={self.held_out}: give a share above 0 and below 1")


@dataclass(frozen=True)
class PruneConfig:
    """Deleting whole blocks: `farss prune` (TRSP, and what it is compared with; weights and the second stage's rate are its authors')."""

    methods: list[str] = field(default_factory=lambda: ["trsp"])
    """How to choose the blocks and what to do before they are deleted; each gives a model: trsp; its controls trsp-stage-1,
    trsp-no-penalty and delete-first; random, shortgpt and sleb, which train nothing."""
    ratio: float = 0.25
    """Share of the blocks to delete."""
    text: str | None = None
    """File of general text (column `text`) to choose and to train by."""
    sequences: int = 128
    """Windows of it that are used, drawn with the seed, and as many of `evaluate.text`, by which perplexity is measured."""
    length: int = 2048
    """Tokens of a window."""
    gate: Literal["branch", "output"] = "branch"
    """Stage 1 learns a scalar S on each block. branch: what leaves it is x + S (f(x) - x), so that S = 0 is a block that is not there;
    output: S times what would, as TRSP's abstract has it, which a model that computes with norms hardly feels."""
    keep_first: int | None = None
    """Never delete this many of the first blocks; null: for TRSP with gate output 3 of 32, else none."""
    keep_last: int | None = None
    """The same of the last blocks, 4 of 32: the last block's scalar is invisible to a loss that is computed after a norm."""
    sparsity: float = 5e-3
    """Stage 1: weight of the sum of all |S|."""
    gate_rate: float = 1e-2
    """Learning rate of the scalars."""
    gate_steps: int = 32
    """Steps of train.batch_size windows before each block is chosen."""
    shift: float = 1e-3
    """Stage 2: weight of the sum of ||x_out - x_in|| over the chosen blocks. It trains with the options of `train`."""
    norm: Literal["frobenius", "l1"] = "frobenius"
    """Of x_out - x_in over a whole window."""

    def __post_init__(self) -> None:
        _check(0 < self.ratio < 1, f"prune.ratio={self.ratio}: give a share above 0 and below 1")
        for name in ("sequences", "gate_steps"):
            _check(getattr(self, name) >= 1, f"prune.{name}={getattr(self, name)}: give 1 or more")
        _check(self.length >= 8, f"prune.length={self.length}: give 8 tokens or more")
        for name in ("keep_first", "keep_last"):
            given = getattr(self, name)
            _check(given is None or given >= 0, f"prune.{name}={given}: give 0 or more, or null")
        for name in ("sparsity", "shift"):
            _check(getattr(self, name) >= 0, f"prune.{name}={getattr(self, name)}: give 0 or more")
        _check(self.gate_rate > 0, f"prune.gate_rate={self.gate_rate}: give a number above 0")
        _check(bool(self.methods), "prune.methods is empty: name one, such as trsp")
        _check_once("prune.methods", self.methods)


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
    prune: PruneConfig = field(default_factory=PruneConfig)
    seed: int = 0
    """Seed of every random choice."""
    out: str = "run"
    """The run folder."""

    def __post_init__(self) -> None:
        _check_seed("seed", self.seed)
