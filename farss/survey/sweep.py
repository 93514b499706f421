"""Model + calibration examples -> Survey, one block at a time.

Forwards, every batch goes through a block before the next block is touched, and what enters each block is kept on disk.
Then the blocks are walked from last to first: a block is re-run from its kept input, the gradient of its output is pushed
back through it, and its linear layers record the second moments of their inputs and output gradients. The gradient of its
input is the output gradient of the block before. This is gradient checkpointing over the data set: exact, and only one
block's statistics ever exist. Weights are only read, block by block, so they may lie in a file larger than memory.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from farss import processes
from farss.artifacts import Layer, Survey
from farss.errors import FarssError
from farss.files import check_space, fingerprint, write_json
from farss.maths.directions import decompose
from farss.memory import freed_memory_kept, memory_cure, peak_gib, used_gib
from farss.models import weights_fingerprint
from farss.places import Batch, frozen, moved, outside, placed, placed_in_turn, tensors_of
from farss.search import shallow_end
from farss.survey.kept import GRADIENT, INPUT, KINDS, Kept
from farss.survey.passage import (
    Passage,
    check_finite,
    check_passage,
    counted,
    enter,
    output_gradient,
    real_count,
    returned_by,
    through,
    uniform_draws,
)
from farss.survey.record import PROGRESS, begin, complete, finish, write_block
from farss.survey.site import Site
from farss.survey.statistics import Readout, add_up_moments, finite_weights, read_out, recording, start, summary

Svd = Literal["exact", "fast"]


def survey(site: Site, batches: list[Batch], fisher: str = "empirical", seed: int = 0, svd: Svd = "exact") -> Survey:
    """Estimate the Kronecker-factored Fisher statistics of every target layer and keep what any plan can ask for.

    As one of several processes that were joined (`farss.processes.joined`), each takes its share of the batches and of
    the decompositions; the first one writes.

    Args:
        site: the model, its target layers, and where the survey goes.
        batches: `input_ids`, `attention_mask`, `labels` (-100: not supervised), each [b, t] (a classifier's labels [b]); the same in
            all processes.
        fisher: `empirical` (labels of the data) or `sampled` (labels drawn from the model).
        svd: `exact` decomposes in float64; `fast` in float32, except for the blocks that may become shallow.

    Raises:
        NumericalError: a weight, activation, gradient or loss is NaN or infinite; the layer is named.
        ModelError: the architecture is not supported.
        FolderError: the folder holds a survey of something else.
        FarssError: the disk cannot hold the states that are kept while it runs.
    """
    how = {"fisher": fisher, "seed": seed, "svd": svd}
    key = fingerprint([weights_fingerprint(site.model), real_tokens(batches), list(site.layers), *how.values()])
    draws = seed if fisher == "sampled" else None
    return carry_out(partial(Sweep, svd=svd), replace(site, meta={**site.meta, **how}), batches, key, draws)


def carry_out(
    make: Callable[[Site], Sweep], site: Site, batches: list[Batch], key: str, draws: int | None = None, beside: Sequence[Batch] = ()
) -> Survey:
    """Begin a sweep, or go on with a killed one, and finish its survey; a complete one is read.

    Args:
        key: of everything that its numbers depend on; how the examples are batched and padded is not among it.
        draws: see `Sweep.run`.
        beside: batches of another text, whose states are kept too.
    """
    if (found := complete(site, key)) is not None:
        return found
    check_share(batches)
    before = processes.shared(begin(site, key, [*batches, *beside]) if processes.rank() == 0 else None)
    site = replace(site, cap=before["cap"])
    started, sweep = time.monotonic(), make(site)
    sweep.parts.update(before["parts"])

    def so_far() -> dict[str, Any]:
        seconds = round(before["seconds"] + time.monotonic() - started, 1)
        return {"seconds": seconds, "parts": {name: round(spent, 1) for name, spent in sweep.parts.items()}}

    with frozen(site.model), freed_memory_kept(site.place), batches_fit(batches):
        sweep.run(batches, draws, lambda: write_json(site.folder / PROGRESS, {**before, **so_far()}))
    if processes.rank() == 0:
        facts = {"key": key, "processes": processes.size(), **so_far(), "peak_memory_gib": round(peak_gib(site.place), 2)}
        finish(site, batches, facts)
    processes.wait()
    return Survey.load(site.folder)


def batches_fit(batches: list[Batch]) -> AbstractContextManager[None]:
    """Say what filled the GPU's memory, if something does."""
    # float64, several times over: of 14,336 inputs 1.5 GiB each
    besides = ", leave the layers with most inputs out of model.targets, whose statistics are their square"
    size = max((len(batch["input_ids"]) for batch in batches), default=1)
    return memory_cure(size, "examples at a time", "calibration.batch_size", besides=besides)


def check_share(batches: list[Batch]) -> None:
    """Refuse to leave a process without a batch.

    Raises:
        FarssError: with the cure.
    """
    if len(batches) < processes.size():
        raise FarssError(
            f"{processes.size()} processes for {len(batches)} batches: start fewer processes, or lower "
            "calibration.batch_size, or raise calibration.examples"
        )


@dataclass
class Sweep:
    """The two ways through the blocks, each going on where a killed one stopped."""

    site: Site
    svd: Svd = "exact"
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds by part, over all attempts."""

    def __post_init__(self) -> None:
        self.kept = Kept(self.site.folder)

    def run(self, batches: list[Batch], draws: int | None, note: Callable[[], None]) -> None:
        """Go forwards, unless that was done, then backwards from the newest undone block.

        Args:
            batches: of all processes.
            draws: seed of the labels that are drawn from the model; None: the data's own labels.
            note: called by the first process when a block is done.
        """
        self.tokens = real_count(batches)
        self.examples = sum(len(batch["input_ids"]) for batch in batches)
        model, blocks, device = self.site.model, self.site.blocks, self.site.place
        last, lowest = len(blocks) - 1, min(layer.block for layer in self.site.layers.values())
        undone = self._first_undone()
        with placed(outside(model, blocks), device):
            if undone == last and not self.kept.blocks(INPUT):
                with placed_in_turn(blocks, device):
                    check_passage(model, blocks, moved(batches[0], device))
                self.announce(batches)
            with placed_in_turn(blocks[:1], device):
                self.returned = returned_by(model, blocks, moved(batches[0], device))
            passages = self.share(batches, INPUT, draws)
            if undone == last and last not in self.kept.blocks(GRADIENT):
                with self.timed("forward pass"):
                    self.forwards(passages)
            begun = time.monotonic()
            for index in range(undone, lowest - 1, -1):
                self.backwards(index, passages)
                if processes.rank() == 0:
                    note()
                speed = self.tokens * (undone - index + 1) / (time.monotonic() - begun)
                line = f"block {index}, {speed:,.0f} tokens/s through a block, {used_gib(device):.1f} GiB in use"
                self.site.tell(last - index + 1, last - lowest + 1, line)

    def forwards(self, passages: list[Passage]) -> None:
        """Send every batch through each block in turn, and the last block's output through the loss."""
        states = self.through_all(passages, INPUT)
        gradients = [
            output_gradient(self.site.model, self.site.blocks, passage, passage.here(state, len(self.site.blocks))).cpu()
            for passage, state in zip(passages, states, strict=True)
        ]
        check_finite(gradients, "the loss's gradient at the last block")
        self.kept.write(GRADIENT, len(self.site.blocks) - 1, gradients)

    def through_all(self, passages: list[Passage], kind: str) -> list[Tensor]:
        """Send every batch through each block in turn, keep what enters each, and return what leaves the last."""
        if not self.kept.blocks(kind):
            self.kept.write(kind, 0, [passage.start for passage in passages])
            for passage in passages:
                passage.let_go()
        blocks = self.site.blocks
        for index in range(max(self.kept.blocks(kind)), len(blocks)):
            self.site.tell(0, len(blocks), f"forward pass, block {index}")
            states = self.kept.read(kind, index)
            with placed(tensors_of(blocks[index]), self.site.place), torch.no_grad():  # on a GPU one batch's states at a time
                states = [through(blocks[index], index, *pair).cpu() for pair in zip(passages, states, strict=True)]
            check_finite(states, f"what leaves block {index}", partial(finite_weights, self.site.model, self.site.layers, index))
            if index < len(blocks) - 1:
                self.kept.write(kind, index + 1, states)
        return states

    def backwards(self, index: int, passages: list[Passage]) -> None:
        """Walk one block and write what is kept of its layers."""
        inside = self.site.inside(index)
        with placed(tensors_of(self.site.blocks[index]), self.site.place):
            gradients, found = self.look(index, passages, inside, {name: self.site.model.get_submodule(name) for name in inside})
        if index:
            check_finite(gradients, f"the loss's gradient at block {index - 1}")
            self.kept.write(GRADIENT, index - 1, gradients)
        parts = processes.gathered(found)  # all gradients are written when the first process has these
        if parts:
            readouts = {name: readout for part in parts for name, readout in part.items()}
            self._write(index, {name: readouts[name] for name in inside})
        processes.wait()
        for kind in KINDS:
            self.kept.drop(kind, index)

    def look(
        self, index: int, passages: list[Passage], inside: dict[str, Layer], modules: dict[str, nn.Module]
    ) -> tuple[list[Tensor], dict[str, Readout]]:
        """Decompose the layers inside a block, and score their directions.

        Returns:
            The gradients of the block's input, [b, t, d] a batch, and what this process found of its layers.
        """
        precision, check = self._precision(index)
        with self.timed("decompositions"):
            weights = finite_weights(self.site.model, self.site.layers, index)
            owners = {name: place % processes.size() for place, name in enumerate(inside)}
            # all of a process's own first: what they share afterwards waits for its owner
            own = {name: decompose(weights[name], precision) for name, owner in owners.items() if owner == processes.rank()}
            known = {name: start(layer, weights[name], modules[name], owners[name], own.get(name)) for name, layer in inside.items()}
        with self.timed("statistics"):
            gradients = self.walk(index, passages, lambda mask: recording(modules, known, mask))
            add_up_moments(moment for one in known.values() for moment in one.moments)
        with self.timed("scores and vectors"):
            return gradients, {name: read_out(known[name], self.site.cap, self.tokens, check) for name in own}

    def walk(
        self,
        index: int,
        passages: list[Passage],
        recorded: Callable[[Tensor], AbstractContextManager[None]],
        weights: Sequence[Tensor] = (),
        take: Callable[[Sequence[Tensor | None]], None] = lambda found: None,
    ) -> list[Tensor]:
        """Push the output gradients of a block back through it.

        Args:
            recorded: mask [b, t] of a batch -> what is active while it passes.
            weights: of the block, which are not frozen.
            take: called with their gradients after each batch; None for one that the batch did not use.

        Returns:
            The gradients of its input, [b, t, d] a batch.
        """
        inputs, gradients = self.kept.read(INPUT, index), self.kept.read(GRADIENT, index)
        result = []
        for passage, state, gradient in zip(passages, inputs, gradients, strict=True):
            hidden = passage.here(state, index).detach().requires_grad_(True)
            with torch.enable_grad(), recorded(passage.mask):
                output = through(self.site.blocks[index], index, passage, hidden)
                found = torch.autograd.grad(output, [hidden, *weights], gradient.to(output), allow_unused=bool(weights))
            result.append(found[0].cpu())
            take(found[1:])
        return result

    def _write(self, index: int, readouts: dict[str, Readout]) -> None:
        facts = {"importance": {name: readout.importance for name, readout in readouts.items()}, "overlap": summary([*readouts.values()])}
        write_block(self.site.folder, index, {name: readout.tensors for name, readout in readouts.items()}, facts)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds to a part's."""
        begun = time.monotonic()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.monotonic() - begun

    def _precision(self, index: int) -> tuple[torch.dtype, bool]:
        """Of the decompositions of a block, and whether they are compared with exact ones."""
        count = len(self.site.blocks)
        if self.svd == "exact" or index < shallow_end(count):
            return torch.float64, False
        return torch.float32, index == count - 1

    def _first_undone(self) -> int:
        """The block that comes next on the way back: the one before the newest that is done."""
        done = [int(path.stem.removeprefix("block-")) for path in self.site.folder.glob("block-????.json")]
        return int(processes.shared(min(done, default=len(self.site.blocks)) - 1))

    def share(self, batches: list[Batch], kind: str, draws: int | None = None) -> list[Passage]:
        """This process's share of the batches, embedded; what enters the first block is let go of where it is kept already."""
        kept = bool(self.kept.blocks(kind))
        firsts = [0, *itertools.accumulate(len(batch["input_ids"]) for batch in batches)]
        result = []
        for place in range(processes.rank(), len(batches), processes.size()):
            batch = batches[place]
            uniforms = uniform_draws(batch, draws, firsts[place]).to(self.site.place) if draws is not None else None
            result.append(enter(self.site.model, self.site.blocks, moved(batch, self.site.place), self.returned, uniforms))
            if kept:
                result[-1].let_go()
        return result

    def announce(self, batches: list[Batch]) -> None:
        """Say how much disk the states take, and refuse where there is not enough.

        The gradients of two blocks lie beside the inputs of all of them.
        """
        width = self.site.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
        dtype = next(self.site.model.parameters()).dtype
        needed = sum(batch["input_ids"].numel() for batch in batches) * width * dtype.itemsize * (len(self.site.blocks) + 2)
        check_space(self.site.folder, needed, "the survey", "lower calibration.examples")
        self.site.tell(0, len(self.site.blocks), f"keeps {needed / 1e9:.2f} GB of block inputs on disk while it runs")


def real_tokens(batches: list[Batch]) -> list[list[list[int]]]:
    """Tokens and labels of every example, without the padding that does not count."""
    return [_real_tokens(batch, row) for batch in batches for row in range(len(batch["input_ids"]))]


def _real_tokens(batch: Batch, row: int) -> list[list[int]]:
    real = counted(batch)[row]
    return [(batch[name][row][real] if batch[name].dim() == 2 else batch[name][row : row + 1]).tolist() for name in ("input_ids", "labels")]
