"""TRSP's two stages: scalars choose the blocks, and a training moves what they do to the others."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from farss.batches import Row
from farss.config import Config
from farss.data import Tokenized
from farss.errors import FarssError
from farss.files import read_json, write_json
from farss.jobs import Tell
from farss.models import load_model
from farss.pruning.choose import changes, smallest
from farss.pruning.regularised import Changes, Scalars
from farss.pruning.surgery import delete_blocks
from farss.structure import find_blocks
from farss.train import train

SEEN = 8
"""Windows on which the chosen blocks are measured before and after they are trained."""


def choose_by_scalars(
    config: Config, tokenizer: Any, rows: list[Row], may: Collection[int], number: int, place: Path, tell: Tell
) -> dict[str, Any]:
    """Stage 1: learn the scalars, take out the block with the smallest, and learn those of the rest anew.

    Args:
        rows: windows of text.
        may: the blocks that may go, and `number` of them do.
        place: folder of its own; a killed choice goes on from there.

    Returns:
        `blocks` in the order in which they went, and each of the `rounds`: its block, and the scalars by block.
    """
    path = place / "rounds.json"  # those that are over
    rounds: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    options, model = config.prune, load_model(config.model)
    constant: dict[str, Any] = {
        "scheduler": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "dropout": 0.0,
        "epochs": 1.0,
    }
    stage = replace(config, train=replace(config.train, learning_rate=options.gate_rate, max_steps=options.gate_steps, **constant))
    gone = [each["block"] for each in rounds]
    left = [index for index in range(len(find_blocks(model)[1])) if index not in gone]
    delete_blocks(model, gone)
    while len(rounds) < number:
        scalars, turn = Scalars(model, options.gate, options.sparsity), len(rounds)
        told = partial(_told, tell, f"stage 1, block {turn + 1} of {number}")
        with scalars.applied(), _in_our_words():
            train(model, tokenizer, Tokenized(rows), stage, place / str(turn), on_progress=told, regime=scalars)
        values = {index: value.item() for index, value in zip(left, scalars.values, strict=True)}
        scalars.remove()
        least = smallest({index: values[index] for index in left if index in may}, 1)[0]
        delete_blocks(model, [left.index(least)])
        left.remove(least)
        rounds.append({"block": least, "scalars": values})
        write_json(path, rounds)
        shutil.rmtree(place / str(turn))
    return {"blocks": [each["block"] for each in rounds], "rounds": rounds}


def shift(
    model: Any, tokenizer: Any, rows: list[Row], config: Config, gone: Collection[int], weight: float, place: Path, name: str, tell: Tell
) -> dict[str, Any]:
    """Stage 2: train every weight, with a penalty on what some blocks change.

    Args:
        gone: these blocks; none where they are deleted already.
        weight: of the penalty; 0: the same training without.
        place: folder of the checkpoints.

    Returns:
        Seconds, loss, and how much the blocks change what enters them, before and after.
    """
    model.requires_grad_(True)
    measure = partial(changes, model, rows[:SEEN], gone, config.evaluate.batch_size, tokenizer.pad_token_id)
    before, penalty = measure(), Changes(model, gone, weight, config.prune.norm)
    with penalty.applied(), _in_our_words(stage_1=False):
        result = train(
            model, tokenizer, Tokenized(rows), config, place, on_progress=partial(_told, tell, f"{name}, stage 2"), regime=penalty
        )
    model.requires_grad_(False)
    return {"seconds": result.seconds, "loss": result.loss, "relative_change": {"before": before, "after": measure()}}


def _told(tell: Tell, step: str, done: int, total: int, loss: float | None) -> None:
    tell(step, done, total, f"loss {loss:.3f}" if loss is not None else "")


@contextmanager
def _in_our_words(stage_1: bool = True) -> Iterator[None]:
    """A training's messages name its own options."""
    try:
        yield
    except FarssError as error:
        text = str(error).replace("data.max_length", "prune.length")
        raise type(error)(text.replace("train.learning_rate", "prune.gate_rate") if stage_1 else text) from error
