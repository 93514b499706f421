"""Fine-tuning with TRL's SFTTrainer: exact resume, one loss whatever the micro-batch, and a stop at the first NaN.

The trainer's own checkpoints hold every adapter, and on resume it would activate only the first of several. Here a
checkpoint holds the trainable parameters by name, so which adapters are active or frozen is never touched.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from farss.artifacts import fingerprint, read_json, write_json, write_tensors
from farss.config import Config, TrainConfig, nearest
from farss.data import Tokenized
from farss.errors import ConfigError, FarssError, FolderError, NumericalError
from farss.memory import fits, freed_memory_kept, give_back_if_scarce, peak_gib, reset_peak
from farss.methods import Regime
from farss.models import base_fingerprint, multiplies_in
from farss.speed import faster_steps
from farss.tasks.course import Course

Progress = Callable[[int, int, float | None], None]
"""Called with the step, the number of steps and the loss of that step (None before the first)."""

WEIGHTS = "weights.safetensors"
REGIME = "regime.safetensors"
MARKER = "complete.json"
SAME_RESULT = ("micro_batch_size", "gradient_checkpointing", "save_steps", "logging_steps", "report_to")
"""Options that a run may change between being killed and going on."""
KEPT = ("identity", "base", "start", "step", "total", "epoch", "losses", "entries", "looks", "seconds", "memory")
"""What a checkpoint keeps of a `_Run`."""

WRAPPED = ("forward", "_original_forward", "_require_grads_hook", "_require_grads_hooks")
"""Attributes that accelerate and TRL hang on a model."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training took and how it went."""

    steps: int
    """Optimiser steps."""
    epochs: float
    seconds: float
    """Wall-clock time, summed over resumes."""
    loss: float
    """Mean loss (nats per answer token) over the steps of the last log entry."""
    peak_memory_gib: float
    """On a GPU what torch allocated there, otherwise the resident memory of the process."""
    parameters: int
    """Trainable parameters."""
    log: list[dict[str, float]] = field(default_factory=list)
    """Every `logging_steps` steps, and at the end: step, loss (mean since the entry before), learning_rate, seconds."""
    course: list[dict[str, Any]] = field(default_factory=list)
    """What was seen on the way: step, and a `tasks.course.Look`."""
    examples: int = 0
    """Training examples: those that were used, those of them whose end was cut off, and those that were left out because no
    answer fits into `data.max_length`."""
    truncated: int = 0
    dropped: int = 0

    @property
    def cut(self) -> str:
        """What `data.max_length` took away, for people; empty where that is nothing."""
        if not (self.truncated or self.dropped):
            return ""
        return (
            f"Of {self.examples + self.dropped:,} training examples the end of {self.truncated:,} was cut off at data.max_length, and "
            f"{self.dropped:,} were left out because no answer fits into it."
        )

    def save(self, path: Path) -> None:
        """Write `train.json`."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> TrainResult:
        """Read `train.json`."""
        return cls(**read_json(path))


def train(
    model: Any,
    tokenizer: Any,
    examples: Tokenized,
    config: Config,
    folder: Path,
    callbacks: Sequence[Any] = (),
    on_progress: Progress | None = None,
    regime: Regime | None = None,
    stop_at: int | None = None,
    cycles: int | None = None,
    course: Course | None = None,
) -> TrainResult:
    """Train every parameter that requires a gradient, in place; a killed run continues from its newest checkpoint.

    Args:
        model: a `PeftModel` (any adapters active, the frozen ones stay as they are) or a whole model, in float32.
        tokenizer: gives the pad token.
        examples: from `data.load_examples`.
        config: its `train` and `seed` are used.
        folder: checkpoints go to `folder/checkpoints`.
        callbacks: further `transformers.TrainerCallback`s.
        on_progress: see `Progress`.
        regime: what the method does beside the loss; the one that the model was attached with.
        stop_at: stop after this many steps, with a checkpoint; the same call with a later stop, or none, goes on from there.
        cycles: for `train.scheduler: cosine_with_restarts`: how often the learning rate falls to zero.
        course: what is looked at on the way. It changes nothing, and its seconds are not counted.

    Raises:
        NumericalError: a loss or a gradient is NaN or infinite; the last checkpoint stays.
        FolderError: the checkpoints belong to another training.
        ConfigError: an option does not fit this machine.
    """
    _check_model(model)
    checkpoints = Path(folder) / "checkpoints"
    run = _Run(_identity(model, examples, config, cycles), model, config.train.logging_steps, on_progress, regime or Regime(), course)
    newest = _remove_broken(checkpoints)
    if newest is not None:
        run.continue_from(newest)
        if run.finished or (stop_at is not None and run.step >= stop_at):
            _read_weights(model, newest)
            return run.result()
        log.info("continuing from %s", newest)
    memory = fits(config.train.micro_batch_size or config.train.batch_size, "examples in a forward pass", "train.micro_batch_size")
    speed = faster_steps(model, run.device, products(config.train, run.device))
    with freed_memory_kept(run.device), _unchanged(model), _quiet(), speed, memory:
        trainer = _build(model, tokenizer, examples, config, checkpoints, run, [*callbacks, *_stop(stop_at)], cycles)
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    if run.finished:
        _tidy(checkpoints)
    return run.result()


def products(options: TrainConfig, device: torch.device) -> Literal["bf16", "fp32"]:
    """The precision of matrix products that `train.precision` means on a device."""
    if options.precision != "auto":
        return options.precision
    return "bf16" if multiplies_in(torch.bfloat16, device) else "fp32"


def training_steps(options: TrainConfig, rows: int) -> int:
    """Optimiser steps of a training on so many examples."""
    return options.max_steps or math.ceil(options.epochs * math.ceil(rows / options.batch_size))


def restore(model: Any, folder: Path) -> None:
    """Load the weights of the finished training in `folder` into a freshly built, identical model.

    Raises:
        FolderError: there is no finished training, or it belongs to another model.
    """
    newest = _newest(Path(folder) / "checkpoints")
    if newest is None:
        what = "the weights that were trained there are deleted" if (Path(folder) / "train.json").is_file() else "run `farss train` first"
        raise FolderError(f"there is no training in {folder}: {what}")
    marker = read_json(newest / MARKER)
    if marker["step"] < marker["total"]:
        raise FolderError(f"the training in {folder} stopped at step {marker['step']} of {marker['total']}: run it again to go on")
    with safe_open(newest / WEIGHTS, framework="pt") as file:
        trained = set(file.keys())
    check_base(newest, marker, base_fingerprint(model), _start_fingerprint(model, trained))
    _read_weights(model, newest)


def check_base(checkpoint: Path, marker: dict[str, Any], base: str, start: str) -> None:
    """Refuse trained weights that belong to another base model or another start.

    Raises:
        FolderError: with both fingerprints.
    """
    for what, expected, actual in (("base model", marker["base"], base), ("start of the adapters", marker["start"], start)):
        if expected != actual:
            raise FolderError(
                f"{checkpoint} was trained from a {what} with fingerprint {expected}, but this one has {actual}: "
                "give the one it was trained from, or choose another folder"
            )


def _start_fingerprint(model: nn.Module, trained: set[str]) -> str:
    """Hash of the adapters that are not trained: they take the start out of the base."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and name not in trained:
            digest.update(name.encode())
            digest.update(parameter.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_model(model: nn.Module) -> None:
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise FarssError("no parameter of the model is trainable: call requires_grad_() on what shall be trained")
    for name, parameter in trainable:
        if parameter.dtype != torch.float32:
            raise FarssError(f"{name} is trainable but {parameter.dtype}: small updates would be lost, make it float32")
    device = trainable[0][1].device
    if device.type == "cuda" and device.index not in (None, 0):
        raise ConfigError(f"training runs on the first visible GPU, but the model is on {device}: set CUDA_VISIBLE_DEVICES={device.index}")


def _identity(model: nn.Module, examples: Tokenized, config: Config, cycles: int | None) -> str:
    """Hash of all that decides the result: options, seed, examples and the names of what is trained."""
    digest = hashlib.sha256()
    for row in examples.rows:
        digest.update(array.array("q", [*row["input_ids"], -1, *row["completion_mask"], -1]).tobytes())
    options = {key: value for key, value in dataclasses.asdict(config.train).items() if key not in SAME_RESULT}
    options["precision"] = products(config.train, next(model.parameters()).device)
    shapes = [[name, list(p.shape)] for name, p in model.named_parameters() if p.requires_grad]
    return fingerprint([options, config.seed, digest.hexdigest(), shapes, *([cycles] if cycles else [])])


# --- the course of one training --------------------------------------------------------------------------------------


class _Run:
    """What is recorded while training, and goes on after a resume."""

    def __init__(
        self, identity: str, model: nn.Module, every: int, on_progress: Progress | None, regime: Regime, course: Course | None
    ) -> None:
        self.identity, self.every, self.on_progress, self.regime, self.course = identity, every, on_progress, regime, course
        self.model, self.checkpoint = model, Path()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.base, self.start = base_fingerprint(model), _start_fingerprint(model, trained)
        self.parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.device = next(model.parameters()).device
        self.step, self.total, self.epoch = 0, 0, 0.0
        self.micro: list[Tensor] = []  # losses of the micro-batches of this step; they add up to its loss
        self.losses: list[float] = []  # losses of the steps since the last log entry
        self.learning_rate = 0.0
        self.entries: list[dict[str, float]] = []
        self.looks: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.seconds_before, self.memory_before = 0.0, 0.0  # of the processes before this one
        self.seconds, self.memory = 0.0, 0.0  # at the last step or checkpoint

    @property
    def finished(self) -> bool:
        return 0 < self.total <= self.step

    def begin(self, total: int) -> None:
        """Start the clock and the memory gauge, and the method's own rules."""
        self.started, self.total = time.monotonic(), total
        self.regime.begin(self.model, total)
        if (self.checkpoint / REGIME).is_file():
            self.regime.load(load_file(self.checkpoint / REGIME, str(self.device)))
        reset_peak(self.device)
        if self.step == 0:
            self.look()
        self.tell(None)

    def measure(self) -> None:
        """Read the clock and the memory gauge."""
        self.seconds = round(self.seconds_before + time.monotonic() - self.started, 3)
        self.memory = round(max(self.memory_before, peak_gib(self.device)), 3)

    def check(self, step: int, gradient_norm: float) -> None:
        """Close the step's loss; refuse to update with a number that is none."""
        loss = float(sum(self.micro))
        self.micro = []
        for what, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                raise NumericalError(
                    f"the {what} is {value} at training step {step}: lower train.learning_rate "
                    "(the weights of the last checkpoint are untouched)"
                )
        self.losses.append(loss)

    def end_step(self, step: int, epoch: float) -> None:
        """Record one optimiser step."""
        self.step, self.epoch, loss = step, epoch, self.losses[-1]
        self.measure()
        if step % self.every == 0 or self.finished:
            self.close_entry()
        self.look()
        self.tell(loss)

    def look(self) -> None:
        """See what the training has done so far, where that is due. The clock stands still meanwhile."""
        if self.course is not None and self.course.due(self.step, self.total):
            begun = time.monotonic()
            self.looks.append({"step": self.step, **self.course.look(self.model)})
            self.started += time.monotonic() - begun

    def close_entry(self) -> None:
        """Log the mean loss since the entry before."""
        mean = sum(self.losses) / len(self.losses)
        entry = {"step": self.step, "loss": mean, "learning_rate": self.learning_rate, "seconds": self.seconds}
        self.entries.append(entry)
        self.losses = []

    def tell(self, loss: float | None) -> None:
        if self.on_progress is not None:
            self.on_progress(self.step, self.total, loss)

    def mark(self, checkpoint: Path) -> None:
        """Write the marker, the last file of a checkpoint: with it, it is complete."""
        self.measure()
        files = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.name != MARKER}
        write_json(checkpoint / MARKER, {**{name: getattr(self, name) for name in KEPT}, "files": files})

    def continue_from(self, checkpoint: Path) -> None:
        """Take up the record of a complete checkpoint.

        Raises:
            FolderError: it belongs to another training.
        """
        values = read_json(checkpoint / MARKER)
        if values["identity"] != self.identity:
            raise FolderError(
                f"{checkpoint.parent} belongs to a training with other options, data or adapters: "
                "choose another folder, or delete it to start again"
            )
        check_base(checkpoint, values, self.base, self.start)
        for name in KEPT:
            setattr(self, name, values.get(name, getattr(self, name)))  # a name may be younger than the checkpoint
        self.seconds_before, self.memory_before, self.checkpoint = self.seconds, self.memory, checkpoint

    def result(self) -> TrainResult:
        if self.losses:  # a callback stopped the training between two entries
            self.close_entry()
        loss = self.entries[-1]["loss"]
        return TrainResult(self.step, self.epoch, self.seconds, loss, self.memory, self.parameters, self.entries, self.looks)


# --- the trainer -----------------------------------------------------------------------------------------------------


def _build(
    model: Any,
    tokenizer: Any,
    examples: Tokenized,
    config: Config,
    checkpoints: Path,
    run: _Run,
    callbacks: Sequence[Any],
    cycles: int | None,
) -> Any:
    from transformers import PrinterCallback

    trainer_class, callback_class = _classes()
    trainer = trainer_class(
        run=run,
        model=model,
        args=_arguments(config.train, config.seed, checkpoints, next(model.parameters()).device, cycles),
        train_dataset=examples.dataset(),
        processing_class=tokenizer,
        callbacks=[callback_class(run), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # it stands in for the progress bar, and prints to stdout
    return trainer


def _arguments(options: TrainConfig, seed: int, checkpoints: Path, device: torch.device, cycles: int | None) -> Any:
    """The options in TRL's words."""
    from trl import SFTConfig  # type: ignore[attr-defined]

    _check_names(options)
    if options.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("train.precision=bf16, but this GPU has no bfloat16: set train.precision=fp32")
    micro = options.micro_batch_size or options.batch_size
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        # data: tokenised already, so nothing is cut, packed or added
        max_length=None,
        packing=False,
        padding_free=False,
        completion_only_loss=True,
        # optimisation
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch_size // micro,
        optim="adamw_torch",
        lr_scheduler_type=options.scheduler,
        lr_scheduler_kwargs={"num_cycles": cycles} if cycles else None,
        warmup_steps=options.warmup_ratio,  # below 1 it is a share of the steps, rounded up
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=seed,
        data_seed=seed,
        # precision and memory
        bf16=products(options, device) == "bf16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        # records
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=options.logging_steps,
        report_to=list(options.report_to),
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device, however many are visible: TRL refuses DataParallel
    return arguments


def _check_names(options: TrainConfig) -> None:
    from transformers import SchedulerType
    from transformers.integrations import get_available_reporting_integrations  # type: ignore[attr-defined]

    schedulers = [entry.value for entry in SchedulerType]
    if options.scheduler not in schedulers:
        raise ConfigError(f"train.scheduler={options.scheduler!r}: {nearest(options.scheduler, schedulers)}")
    installed = get_available_reporting_integrations()
    for name in options.report_to:
        if name not in installed:
            raise ConfigError(f"train.report_to: {name!r} is not installed or not known: `pip install` it, or choose of {installed}")


@functools.cache
def _classes() -> tuple[Any, Any]:
    """The trainer and the callback; made here because importing TRL takes seconds."""
    from transformers import TrainerCallback
    from trl import SFTTrainer  # type: ignore[attr-defined]

    class Trainer(SFTTrainer):
        """SFTTrainer that checks every step and keeps the trainable parameters only."""

        def __init__(self, run: _Run, **options: Any) -> None:
            self.run, self.whole = run, options["model"]
            before = [(parameter, parameter.data) for parameter in self.whole.parameters() if parameter.requires_grad]
            super().__init__(**options)
            for parameter, data in before:
                if parameter.dtype != data.dtype:  # TRL rounds adapters of 4-bit models to bfloat16: see `_check_model`
                    parameter.data = data
            # TRL divides by the number of answer tokens in the whole batch, if it is counted; models whose forward
            # takes no **kwargs would get a mean over micro-batches
            self.model_accepts_loss_kwargs = True

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.added = torch.zeros(())
            loss: Tensor = super().training_step(*args, **kwargs)
            self.run.micro.append(loss - self.added.to(loss))  # the loss alone, which is comparable between methods
            return loss

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            penalty = self.run.regime.penalty()
            if penalty is None:
                return result
            share = penalty / self.current_gradient_accumulation_steps  # once a step, whatever the micro-batch
            self.added = share.detach()
            return (result[0] + share, *result[1:]) if return_outputs else result + share

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            norm = super()._get_grad_norm(model, grad_norm)  # the last thing before the optimiser's step
            self.run.check(self.state.global_step + 1, float(norm))
            return norm

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            folder = Path(output_dir or str(self.args.output_dir))
            _write_weights(self.whole, folder)
            if state := self.run.regime.state():
                write_tensors(folder / REGIME, state)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            _read_weights(self.whole, Path(resume_from_checkpoint))

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """A checkpoint is no model to publish."""

        def _send_telemetry(self) -> None:
            """Nothing is sent anywhere."""

    class Callback(TrainerCallback):
        """Tells the run what happens."""

        def __init__(self, run: _Run) -> None:
            self.run = run

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.run.begin(state.max_steps)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.run.learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
            self.run.regime.after_step(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.run.end_step(state.global_step, state.epoch)
            give_back_if_scarce(self.run.device)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.run.mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Trainer, Callback


def _stop(step: int | None) -> list[Any]:
    """A callback that writes a checkpoint after this step and ends the training; none for None."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                control.should_save = control.should_training_stop = True

    return [] if step is None else [Stop()]


@contextlib.contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Take back what the trainer does to a model besides its weights: wrapped forwards, hooks and flags."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache, checkpointing = getattr(base.config, "use_cache", None), base.is_activation_checkpointing
    attributes = [(part, {name: vars(part)[name] for name in WRAPPED if name in vars(part)}) for part in (model, base)]
    modules = [(module, module.training, list(module._forward_hooks)) for module in model.modules()]
    try:
        yield
    finally:
        if not checkpointing:
            base.activation_checkpointing_disable()
        base.config.use_cache = cache
        for part, before in attributes:
            for name in WRAPPED:
                vars(part).pop(name, None)
            vars(part).update(before)
        for module, mode, hooks in modules:
            module.training = mode
            # TRL and transformers each hook the embeddings, and the handle of the first hook is lost
            for key in set(module._forward_hooks) - set(hooks):
                del module._forward_hooks[key]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' notices out of our output while it trains."""
    from transformers import logging as notices

    before = notices.get_verbosity()
    notices.set_verbosity_error()
    try:
        yield
    finally:
        notices.set_verbosity(before)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _write_weights(model: nn.Module, checkpoint: Path) -> None:
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    write_tensors(checkpoint / WEIGHTS, tensors)


def _read_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy the saved parameters over the model's, by name; all others stay."""
    parameters = dict(model.named_parameters())
    with safe_open(checkpoint / WEIGHTS, framework="pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            saved: Tensor = file.get_tensor(name)
            if name not in parameters or parameters[name].shape != saved.shape:
                raise FolderError(f"{checkpoint} belongs to another model: this one has no parameter {name} of shape {tuple(saved.shape)}")
            parameters[name].copy_(saved)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _complete(checkpoint: Path) -> bool:
    """Whether every file that the marker lists is there in full length: a killed run may also leave half of an old
    checkpoint that it was deleting."""
    if not (checkpoint / MARKER).is_file():
        return False
    files = read_json(checkpoint / MARKER)["files"]
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in files.items())


def _newest(folder: Path) -> Path | None:
    return next((path for path in _checkpoints(folder) if _complete(path)), None)


def _tidy(folder: Path) -> None:
    """After the last step keep what `restore` needs: the weights are a third of a checkpoint, the rest is the optimiser's."""
    newest = _newest(folder)
    for path in _checkpoints(folder):
        if path != newest:
            shutil.rmtree(path)
    if newest is None:
        return
    marker = read_json(newest / MARKER)
    kept = {name: size for name, size in marker["files"].items() if name in (WEIGHTS, REGIME)}
    write_json(newest / MARKER, marker | {"files": kept})
    for path in newest.iterdir():
        if path.name not in (MARKER, *kept):
            path.unlink()


def _remove_broken(folder: Path) -> Path | None:
    """Delete half-written checkpoints; return the newest complete one."""
    for path in _checkpoints(folder):
        if not _complete(path):
            log.warning("removing %s: it was not written to its end", path)
            shutil.rmtree(path)
    return _newest(folder)
