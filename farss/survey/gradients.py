"""The sweep that looks at whole blocks: how large the gradients of all their weights are, one example at a time (FoRA)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from farss import processes
from farss.artifacts import Layer, Survey, layer_tensors
from farss.errors import ModelError, NumericalError
from farss.files import fingerprint
from farss.forward import hooked
from farss.models import weights_fingerprint
from farss.places import Batch
from farss.structure import holds_numbers, is_linear, is_packed
from farss.survey.passage import Passage
from farss.survey.site import Site
from farss.survey.statistics import Readout, on_gradient, sums_of
from farss.survey.sweep import Sweep, carry_out, real_tokens


def gradients(site: Site, batches: list[Batch]) -> Survey:
    """The mean over the examples of the squared gradients of all weights of a block, summed: the trace of its empirical Fisher matrix.

    It is written as a survey in which a layer's importance is its block's, and no directions are kept (`cap` is 1). Arguments and errors
    are those of `farss.survey.survey`; how the examples are batched does not matter.
    """
    single = one_by_one(batches)
    key = fingerprint(["squared gradients of blocks", weights_fingerprint(site.model), real_tokens(single), list(site.layers)])
    return carry_out(Gradients, replace(site, cap=1), single, key)


def one_by_one(batches: list[Batch]) -> list[Batch]:
    """Every example as a batch of its own, without padding."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row].bool()
            found.append({name: value[row : row + 1, real] if value.dim() == 2 else value[row : row + 1] for name, value in batch.items()})
    return found


@dataclass
class Gradients(Sweep):
    """Squared gradients, block by block."""

    def look(
        self, index: int, passages: list[Passage], inside: dict[str, Layer], modules: dict[str, nn.Module]
    ) -> tuple[list[Tensor], dict[str, Readout]]:
        """Add up the squares of the gradients of a block; see `Sweep.look`."""
        block = self.site.blocks[index]
        wide = sums_of(block)
        weights = [weight for weight in block.parameters() if holds_numbers(weight)]
        packed = [module for module in block.modules() if is_linear(module) and is_packed(module)]
        known = {id(weight) for module in packed for weight in module.parameters()} | {id(weight) for weight in weights}
        if any(id(weight) not in known for weight in block.parameters()):
            raise ModelError(
                f"block {index} has quantised weights outside its linear layers, whose gradients are not known: load it unquantised"
            )
        total, beside = torch.zeros((), dtype=torch.float64, device=self.site.place), dict[nn.Module, Tensor]()

        def take(found: Sequence[Tensor | None]) -> None:
            total.add_(sum(torch.linalg.vector_norm(each, dtype=wide).square() for each in (*found, *beside.values()) if each is not None))
            beside.clear()

        with self.timed("gradients"), _trainable(weights):
            before = self.walk(index, passages, lambda mask: _recording(packed, beside), weights, take)
        processes.add_up(total)
        worth = float(total) / self.examples
        if not math.isfinite(worth):
            raise NumericalError(
                f"the gradients of block {index} hold NaN or infinite values: load the model in float32 (model.dtype=float32)"
            )
        nothing = torch.zeros(0, 0)
        return before, {name: Readout(worth, layer_tensors(nothing.flatten(), torch.arange(0), nothing, nothing)) for name in inside}


@contextmanager
def _trainable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let autograd reach weights of a frozen model for a while."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _recording(packed: list[nn.Module], found: dict[nn.Module, Tensor]) -> AbstractContextManager[None]:
    """While active, every forward and backward through layers with quantised weights, which have no gradient of their own, adds what
    it would be, `delta^T h` `[m, n]`."""

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach().flatten(0, -2)

        def take(gradient: Tensor) -> None:
            product = gradient.flatten(0, -2).T.to(inputs.dtype) @ inputs
            found[module] = found[module] + product if module in found else product

        on_gradient(output, take)

    return hooked([module.register_forward_hook(record) for module in packed])
