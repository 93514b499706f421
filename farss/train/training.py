"""One training: begun, or gone on with where it was killed."""

from __future__ import annotations

import array
import dataclasses
import gc
import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farss.config import Config, TrainConfig
from farss.data import Tokenized
from farss.errors import FarssError
from farss.files import fingerprint
from farss.memory import freed_memory_kept, memory_cure
from farss.methods import Regime
from farss.models import hushed
from farss.options import OF_NO_STEP
from farss.tasks.course import Course
from farss.train.checkpoints import check_room_for, read_weights, remove_broken, tidy
from farss.train.record import Record, StepProgress, TrainResult
from farss.train.speed import faster_steps
from farss.train.trainer import build, products, stop, training_steps, unchanged

log = logging.getLogger(__name__)


def train(
    model: Any,
    tokenizer: Any,
    examples: Tokenized,
    config: Config,
    folder: Path,
    callbacks: Sequence[Any] = (),
    on_progress: StepProgress | None = None,
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
        on_progress: see `StepProgress`.
        regime: what the method does beside the loss; the one that the model was attached with.
        stop_at: stop after this many steps, with a checkpoint; the same call with a later stop, or none, goes on from there.
        cycles: for `train.scheduler: cosine_with_restarts`: how often the learning rate falls to zero.
        course: what is looked at on the way. It changes nothing, and its seconds are not counted.

    Raises:
        NumericalError: a loss or a gradient is NaN or infinite; the last checkpoint stays.
        FolderError: the checkpoints belong to another training.
        ConfigError: an option does not fit this machine.
        FarssError: the disk cannot hold the checkpoints.
    """
    _check_model(model)
    checkpoints = Path(folder) / "checkpoints"
    run = Record(_identity(model, examples, config, cycles), model, config.train.logging_steps, on_progress, regime or Regime(), course)
    newest = remove_broken(checkpoints)
    if newest is not None:
        run.continue_from(newest)
        if run.finished or (stop_at is not None and run.step >= stop_at):
            read_weights(model, newest)
            if run.finished:  # a killed process may not have come to it
                tidy(checkpoints)
            return run.result()
        log.info("continuing from %s", newest)
    left = (stop_at or training_steps(config.train, len(examples.rows))) - run.step
    check_room_for(math.ceil(left / config.train.save_steps), run.parameters, checkpoints)
    size = config.train.batch_size
    memory = memory_cure(config.train.micro_batch_size or size, "examples in a forward pass", "train.micro_batch_size", of=size)
    with freed_memory_kept(run.device), unchanged(model), hushed(), faster_steps(run.device), memory:
        trainer = build(model, tokenizer, examples, config, checkpoints, run, [*callbacks, *stop(stop_at)], cycles)
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    del trainer
    gc.collect()  # it and the model hold each other, and its optimiser's state is larger than the adapter
    if run.finished:
        tidy(checkpoints)
    return run.result()


def _check_model(model: nn.Module) -> None:
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise FarssError("no parameter of the model is trainable: call requires_grad_() on what shall be trained")
    for name, parameter in trainable:
        if parameter.dtype != torch.float32:
            raise FarssError(f"{name} is trainable but {parameter.dtype}: small updates would be lost, make it float32")


def _identity(model: nn.Module, examples: Tokenized, config: Config, cycles: int | None) -> str:
    """Hash of all that decides the result: options, seed, examples and the names of what is trained."""
    digest = hashlib.sha256()
    for row in examples.rows:
        digest.update(array.array("q", [*row["input_ids"], -1, *row["completion_mask"], -1]).tobytes())
    own, usual = dataclasses.asdict(config.train), dataclasses.asdict(TrainConfig())  # a new option of another farss changes nothing
    options = {key: value for key, value in own.items() if f"train.{key}" not in OF_NO_STEP and value != usual[key]}
    options["precision"] = products(config.train, next(model.parameters()).device)
    shapes = [[name, list(p.shape)] for name, p in model.named_parameters() if p.requires_grad]
    return fingerprint([options, config.seed, digest.hexdigest(), shapes, *([cycles] if cycles else [])])
