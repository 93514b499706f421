"""What methods look at before they are planned that need no gradients: the weights alone, or a moment of the activations.

It is written like a survey, so that a plan and an adapter are made from it in the same way: directions with a score each,
and the vectors of those that can be chosen. What a direction is, a method's `read` decides. Activations of one text are collected
forwards only, one block at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farss.artifacts import Layer, Survey
from farss.files import write_json
from farss.jobs import Progress, unseen
from farss.maths.fisher import output_energy
from farss.maths.moments import Covariance, ExampleMoment, Moment
from farss.memory import freed_memory_kept, give_back_if_scarce, peak_gib
from farss.methods.base import Over
from farss.places import Batch, computing_device, frozen, moved, outside, placed, placed_in_turn, tensors_of
from farss.structure import find_blocks, keep_gradients, target_layers
from farss.survey.against import Read, reading_key
from farss.survey.kept import INPUT, Kept
from farss.survey.passage import check_finite, check_passage, counted, enter, returned_by, through
from farss.survey.record import PROGRESS, begin, finish, mark_file, same_survey, write_block
from farss.survey.statistics import check_counts, finite_moment, finite_weight, finite_weights, recording_inputs, sums_of
from farss.survey.sweep import batches_fit

KINDS: dict[Over, type[Moment]] = {"tokens": Moment, "answers": Covariance, "examples": ExampleMoment}


def read_layers(
    model: nn.Module,
    folder: Path | str,
    read: Read,
    cap: int,
    batches: Sequence[Batch] = (),
    targets: list[str] | None = None,
    meta: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
    device: torch.device | None = None,
    over: Over = "tokens",
) -> Survey:
    """Read every target layer, one block after the other; a killed reading goes on at its block, to the same bytes.

    Args:
        folder: `survey.json` and one safetensors file a block are written here.
        read: what is kept of a layer.
        cap: how many directions it keeps at an end.
        batches: of the text whose activations are collected, as in `survey`. Without any the weights alone are read.
        device: compute here, one block at a time; None: where the model is.
        over: what `read` gets: the second moment over the real `tokens`, the covariance of the `answers` (the tokens that are learnt; EVA),
            or CorDA's mean over `examples`.

    Raises:
        NumericalError: a weight or an activation is NaN or infinite; the layer is named.
        FolderError: the folder holds something else.
    """
    folder, tell = Path(folder), on_progress or unseen
    keep_gradients(model)
    layers, (_, blocks) = target_layers(model, targets), find_blocks(model)
    batches = [*batches]
    key = reading_key(read, model, layers, batches, *([] if over == "tokens" else [over]))
    if (folder / "survey.json").is_file():
        return same_survey(Survey.load(folder), key, cap)
    before, started = begin(folder, key, cap, batches), time.monotonic()
    place = computing_device(model, device)
    if batches and over == "answers":
        batches = [{**batch, "counted": (batch["labels"] != -100).long()} for batch in batches]
    rows = _rows(batches, over)
    with frozen(model), freed_memory_kept(place), batches_fit(batches):
        walk = _moments(model, blocks, layers, batches, folder, place, KINDS[over]) if batches else _alone(blocks, layers, folder, place)
        for index, moments in walk:
            inside = {name: layer for name, layer in layers.items() if layer.block == index}
            _read_block(folder, index, inside, model, read, cap, moments, rows)
            del moments  # or they lie beside those of the next block
            before["seconds"], started = before["seconds"] + time.monotonic() - started, time.monotonic()
            write_json(folder / PROGRESS, before)
            tell(index + 1, len(blocks), f"block {index}")
    facts = {"key": key, "seconds": round(before["seconds"], 1), "peak_memory_gib": round(peak_gib(place), 2)}
    return finish(folder, layers, len(blocks), cap, batches, {**(meta or {}), **facts})


def _rows(batches: list[Batch], over: Over) -> int:
    """How many rows a layer's moment is the mean of."""
    counts = [counted(batch).sum(1) for batch in batches]
    return sum(int((count > 0).sum() if over == "examples" else count.sum()) for count in counts)


def _read_block(
    folder: Path, index: int, inside: dict[str, Layer], model: nn.Module, read: Read, cap: int, moments: dict[str, Moment], rows: int
) -> None:
    """Read the layers inside a block, and write what is kept of them."""
    found, worth = {}, {}
    for name, layer in inside.items():
        if moments:
            check_counts(name, "token", moments[name], rows)
        weight = finite_weight(layer, model.get_submodule(name))
        known = [finite_moment(name, "activations", moments[name].mean)] if moments else []
        give_back_if_scarce(weight.device)
        found[name], worth[name] = read(weight, cap, *known), output_energy(weight, *known)
    write_block(folder, index, found, {"importance": worth, "overlap": None})


def _undone(layers: dict[str, Layer], folder: Path) -> list[int]:
    """The blocks, up to the last with a target layer, that are not read yet."""
    last = max(layer.block for layer in layers.values())
    return [index for index in range(last + 1) if not mark_file(folder, index).is_file()]


def _alone(blocks: nn.ModuleList, layers: dict[str, Layer], folder: Path, device: torch.device) -> Iterator[tuple[int, dict[str, Moment]]]:
    """Each undone block, on the device where it is to be read."""
    for index in _undone(layers, folder):
        with placed(tensors_of(blocks[index]), device):
            yield index, {}


def _moments(
    model: nn.Module,
    blocks: nn.ModuleList,
    layers: dict[str, Layer],
    batches: list[Batch],
    folder: Path,
    device: torch.device,
    kind: type[Moment],
) -> Iterator[tuple[int, dict[str, Moment]]]:
    """The same, with the moments of its layers' inputs; what enters the next block is kept on disk first."""
    kept, undone = Kept(folder), _undone(layers, folder)
    with placed(outside(model, blocks), device):
        if not kept.blocks(INPUT):
            with placed_in_turn(blocks, device):
                check_passage(model, blocks, moved(batches[0], device))
        with placed_in_turn(blocks[:1], device):
            returned = returned_by(model, blocks, moved(batches[0], device))
        passages = [enter(model, blocks, moved(batch, device), returned) for batch in batches]
        if undone[:1] == [0]:
            kept.write(INPUT, 0, [passage.start for passage in passages])
        for passage in passages:
            passage.let_go()
        for index in undone:
            modules = {name: model.get_submodule(name) for name, layer in layers.items() if layer.block == index}
            moments = {name: kind(sums_of(module)) for name, module in modules.items()}
            states = kept.read(INPUT, index)
            with placed(tensors_of(blocks[index]), device):
                for place, passage in enumerate(passages):  # no name is left to a state that lies in the file, which is then deleted
                    with torch.no_grad(), recording_inputs(modules, moments, passage.mask):
                        states[place] = through(blocks[index], index, passage, states[place]).cpu()
                check_finite(states, f"what leaves block {index}", partial(finite_weights, model, layers, index))
                kept.write(INPUT, index + 1, states)
                yield index, moments
            kept.drop(INPUT, index)
