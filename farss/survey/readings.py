"""What methods look at before they are planned that need no gradients: the weights alone, or a moment of the activations.

It is written like a survey, so that a plan and an adapter are made from it in the same way: directions with a score each,
and the vectors of those that can be chosen. What a direction is, a method's `read` decides. Activations of one text are collected
forwards only, one block at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from farss.artifacts import Survey
from farss.files import write_json
from farss.maths.fisher import output_energy
from farss.maths.moments import Covariance, ExampleMoment, Moment
from farss.memory import freed_memory_kept, give_back_if_scarce, peak_gib
from farss.methods.base import Over
from farss.places import Batch, frozen, moved, outside, placed, placed_in_turn, tensors_of
from farss.survey.against import Read, reading_key
from farss.survey.kept import INPUT, Kept
from farss.survey.passage import check_finite, check_passage, counted, enter, returned_by, through
from farss.survey.record import PROGRESS, begin, complete, finish, mark_file, write_block
from farss.survey.site import Site
from farss.survey.statistics import check_counts, finite_moment, finite_weight, finite_weights, recording_inputs, sums_of
from farss.survey.sweep import batches_fit

KINDS: dict[Over, type[Moment]] = {"tokens": Moment, "answers": Covariance, "examples": ExampleMoment}


def read_layers(site: Site, read: Read, batches: Sequence[Batch] = (), over: Over = "tokens") -> Survey:
    """Read every target layer, one block after the other; a killed reading goes on at its block, to the same bytes.

    Args:
        read: what is kept of a layer.
        batches: of the text whose activations are collected, as in `survey`. Without any the weights alone are read.
        over: what `read` gets: the second moment over the real `tokens`, the covariance of the `answers` (the tokens that are learnt; EVA),
            or CorDA's mean over `examples`.

    Raises:
        NumericalError: a weight or an activation is NaN or infinite; the layer is named.
        FolderError: the folder holds something else.
    """
    batches = [*batches]
    key = reading_key(site, read, batches, *([] if over == "tokens" else [over]))
    if (found := complete(site, key)) is not None:
        return found
    before, started = begin(site, key, batches), time.monotonic()
    site = replace(site, cap=before["cap"])
    if batches and over == "answers":
        batches = [{**batch, "counted": (batch["labels"] != -100).long()} for batch in batches]
    rows = _rows(batches, over)
    with frozen(site.model), freed_memory_kept(site.place), batches_fit(batches):
        for index, moments in _moments(site, batches, KINDS[over]) if batches else _alone(site):
            _read_block(site, index, read, moments, rows)
            del moments  # or they lie beside those of the next block
            before["seconds"], started = before["seconds"] + time.monotonic() - started, time.monotonic()
            write_json(site.folder / PROGRESS, before)
            site.tell(index + 1, _last(site) + 1, f"block {index}")
    return finish(site, batches, {"key": key, "seconds": round(before["seconds"], 1), "peak_memory_gib": round(peak_gib(site.place), 2)})


def _rows(batches: list[Batch], over: Over) -> int:
    """How many rows a layer's moment is the mean of."""
    counts = [counted(batch).sum(1) for batch in batches]
    return sum(int((count > 0).sum() if over == "examples" else count.sum()) for count in counts)


def _read_block(site: Site, index: int, read: Read, moments: dict[str, Moment], rows: int) -> None:
    """Read the layers inside a block, and write what is kept of them."""
    found, worth = {}, {}
    for name, layer in site.inside(index).items():
        if moments:
            check_counts(name, "token", moments[name], rows)
        weight = finite_weight(layer, site.model.get_submodule(name))
        known = [finite_moment(name, "activations", moments[name].mean)] if moments else []
        give_back_if_scarce(weight.device)
        found[name], worth[name] = read(weight, site.cap, *known), output_energy(weight, *known)
    write_block(site.folder, index, found, {"importance": worth, "overlap": None})


def _last(site: Site) -> int:
    """The last block with a target layer."""
    return max(layer.block for layer in site.layers.values())


def _undone(site: Site) -> list[int]:
    """The blocks, up to the last with a target layer, that are not read yet."""
    return [index for index in range(_last(site) + 1) if not mark_file(site.folder, index).is_file()]


def _alone(site: Site) -> Iterator[tuple[int, dict[str, Moment]]]:
    """Each undone block, on the device where it is to be read."""
    for index in _undone(site):
        with placed(tensors_of(site.blocks[index]), site.place):
            yield index, {}


def _moments(site: Site, batches: list[Batch], kind: type[Moment]) -> Iterator[tuple[int, dict[str, Moment]]]:
    """The same, with the moments of its layers' inputs; what enters the next block is kept on disk first."""
    model, blocks, device, kept, undone = site.model, site.blocks, site.place, Kept(site.folder), _undone(site)
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
            modules = {name: model.get_submodule(name) for name in site.inside(index)}
            moments = {name: kind(sums_of(module)) for name, module in modules.items()}
            states = kept.read(INPUT, index)
            with placed(tensors_of(blocks[index]), device):
                for place, passage in enumerate(passages):  # no name is left to a state that lies in the file, which is then deleted
                    with torch.no_grad(), recording_inputs(modules, moments, passage.mask):
                        states[place] = through(blocks[index], index, passage, states[place]).cpu()
                check_finite(states, f"what leaves block {index}", partial(finite_weights, model, site.layers, index))
                kept.write(INPUT, index + 1, states)
                del states  # what is read now is as large as they are
                yield index, moments
            kept.drop(INPUT, index)
