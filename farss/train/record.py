"""What is recorded of a training while it runs, and what is left of it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from farss.data import told_cut
from farss.errors import FolderError, NumericalError
from farss.files import read_json, read_tensors, reading, write_json
from farss.memory import peak_gib, reset_peak
from farss.methods import Regime
from farss.models import base_fingerprint
from farss.tasks.course import Course
from farss.train.checkpoints import MARKER, REGIME, check_base, start_fingerprint

StepProgress = Callable[[int, int, float | None], None]
"""Called with the step, the number of steps and the loss of that step (None before the first)."""

KEPT = ("identity", "base", "start", "step", "total", "epoch", "losses", "entries", "looks", "seconds", "memory")
"""What a checkpoint keeps of a `Record`."""


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
        return told_cut(self.examples, self.truncated, self.dropped)

    def save(self, path: Path) -> None:
        """Write `train.json`."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> TrainResult:
        """Read `train.json`."""
        values = read_json(path)
        with reading(path, "result of a training"):
            return cls(**values)


class Record:
    """What is recorded while training, and goes on after a resume."""

    def __init__(
        self, identity: str, model: nn.Module, every: int, on_progress: StepProgress | None, regime: Regime, course: Course | None
    ) -> None:
        self.identity, self.every, self.on_progress, self.regime, self.course = identity, every, on_progress, regime, course
        self.model = model
        self.checkpoint: Path | None = None
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.base, self.start = base_fingerprint(model), start_fingerprint(model, trained)
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
        if self.checkpoint and (self.checkpoint / REGIME).is_file():
            self.regime.load(read_tensors(self.checkpoint / REGIME, str(self.device)))
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
            setattr(self, name, values[name])
        self.seconds_before, self.memory_before, self.checkpoint = self.seconds, self.memory, checkpoint

    def result(self) -> TrainResult:
        if self.losses:  # a callback stopped the training between two entries
            self.close_entry()
        loss = self.entries[-1]["loss"]
        return TrainResult(self.step, self.epoch, self.seconds, loss, self.memory, self.parameters, self.entries, self.looks)
