"""TRSP's two regularisations (arXiv 2505.18232): learned scalars on the blocks, and a penalty on what a block changes."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from farss.forward import entering, hooked, leaving
from farss.methods import Regime
from farss.pruning.choose import watched
from farss.structure import find_blocks

SCALAR = "farss_scalar"
"""Name of a block's scalar, while it has one."""
Gate = Literal["output", "branch"]


class Scalars(Regime):
    """Stage 1: a learned scalar S on each block, which starts at 1, and `weight * sum |S|` beside the loss.

    `output`: what leaves a block is S times what would (the paper's words). `branch`: `x + S (f(x) - x)`, so that S = 0 is a block that
    is not there.
    """

    def __init__(self, model: nn.Module, gate: Gate, weight: float) -> None:
        self.gate, self.weight = gate, weight
        self.blocks = list(find_blocks(model)[1])
        for block in self.blocks:
            device = next(block.parameters()).device
            block.register_parameter(SCALAR, nn.Parameter(torch.ones((), device=device)))

    @property
    def values(self) -> list[Tensor]:
        """The scalar of each block."""
        return [getattr(block, SCALAR) for block in self.blocks]

    def applied(self) -> AbstractContextManager[None]:
        """While active, the scalars count."""
        return hooked([block.register_forward_hook(self._scale, with_kwargs=True) for block in self.blocks])

    def _scale(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        scalar, after = getattr(block, SCALAR), leaving(output)
        wide = torch.promote_types(after.dtype, torch.float32)  # in 16 bits a scalar could not move
        if self.gate == "output":
            scaled = scalar * after.to(wide)
        else:
            before = entering(args, kwargs).to(wide)
            scaled = before + scalar * (after.to(wide) - before)
        scaled = scaled.to(after.dtype)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    def penalty(self) -> Tensor:
        """`weight * sum |S|`."""
        return self.weight * torch.stack([value.abs() for value in self.values]).sum()

    def remove(self) -> None:
        """Take the scalars off the blocks."""
        for block in self.blocks:
            delattr(block, SCALAR)


class Changes(Regime):
    """Stage 2: `weight` times the norm of what each of some blocks adds to its input, so that others learn to do without them.

    The norm is taken over a whole sequence, `||x_out - x_in||_F` or the sum of absolute values, and averaged over the sequences.
    """

    def __init__(self, model: nn.Module, which: Collection[int], weight: float, norm: Literal["frobenius", "l1"]) -> None:
        self.model, self.which = model, which
        self.weight, self.order = weight, 2 if norm == "frobenius" else 1
        self.found: dict[int, Tensor] = {}

    def applied(self) -> AbstractContextManager[None]:
        """While active, every forward pass is measured."""

        def see(index: int, before: Tensor, after: Tensor) -> None:
            change = after.float() - before.float()
            # where activations are computed anew in the backward pass, this is done again, and overwritten by the next forward pass
            self.found[index] = torch.linalg.vector_norm(change.flatten(1), ord=self.order, dim=1).mean()

        return watched(self.model, self.which if self.weight else (), see)

    def penalty(self) -> Tensor | None:
        """`weight * sum`, of the forward pass that was measured last."""
        return self.weight * torch.stack([*self.found.values()]).sum() if self.weight else None
