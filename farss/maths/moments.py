"""Second moments of activations and output gradients, and the products they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise

import torch
from torch import Tensor

from farss.precision import float32_products

STRIPS = 4
"""A symmetric product in 4 strips takes 10 / 16 of the whole one; more strips are too thin to be computed fast."""


class Moment:
    """Running mean of `(M^T x)(M^T x)^T [w, w]` over rows `x [d]`; without a map `M [d, w]`, of `x x^T`."""

    def __init__(self, dtype: torch.dtype = torch.float32, through: Tensor | None = None) -> None:
        """Args: dtype: of products and sums, float32 or better. through: the map M."""
        self.dtype = dtype
        self.through = through
        self.total: Tensor | None = None
        """[w, w], of which the upper half is kept."""
        self.count = 0

    def add(self, rows: Tensor, lengths: Sequence[int] = ()) -> None:
        """Add rows `[t, d]`; `lengths`: how many of them each example has."""
        rows_are_exact = self.through is None and rows.dtype == torch.bfloat16 and self.dtype == torch.float32
        rows = rows.to(self.dtype) if self.through is None else product(rows, self.through, self.dtype)
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        with _exact_products(rows_are_exact):
            add_square(self.total, rows)
        self.count += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        """[w, w]"""
        assert self.total is not None
        return mirrored(self.total) / self.count


class Covariance(Moment):
    """Running mean of `(x - E x)(x - E x)^T [d, d]` over rows `x [d]`."""

    def add(self, rows: Tensor, lengths: Sequence[int] = ()) -> None:
        """Add rows `[t, d]`."""
        if not rows.shape[0]:
            return
        rows = rows.to(self.dtype)
        if self.total is None:  # sums around a point near the mean lose few digits when the mean is taken out
            self.origin = rows.mean(0)
            self.offset = torch.zeros_like(self.origin)
        rows = rows - self.origin
        self.offset += rows.sum(0)
        super().add(rows)

    @property
    def mean(self) -> Tensor:
        """[d, d]"""
        around, offset = super().mean, self.offset / self.count
        return around - torch.outer(offset, offset)


class ExampleMoment(Moment):
    """Running mean over examples of `sum x x^T [d, d]` over an example's rows `x [d]`, divided by the example's largest entry: the
    covariance of CorDA, as its authors and PEFT compute it."""

    def add(self, rows: Tensor, lengths: Sequence[int] = ()) -> None:
        """Add rows `[t, d]` of examples with these lengths."""
        examples = rows.to(self.dtype).split([length for length in lengths if length])
        largest = [example.max().abs() for example in examples]
        super().add(torch.cat([example / size if size else example for example, size in zip(examples, largest, strict=True)]))
        self.count += len(examples) - rows.shape[0]


@float32_products("highest")
def energies(moment: Tensor, basis: Tensor) -> Tensor:
    """[k]: `q_i^T E q_i` of a moment `E [w, w]` along the columns of `Q [w, k]`."""
    basis = basis.to(moment.dtype)
    return (basis * (moment @ basis)).sum(0)


def add_square(total: Tensor, rows: Tensor) -> None:
    """Add `x^T x` of rows `[t, d]` to the upper half of `[d, d]`, in strips, where it lies."""
    for start, end in _strips(total):
        total[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])


def mirrored(total: Tensor) -> Tensor:
    """`[d, d]` with its upper half in its lower, where it lies."""
    for start, end in _strips(total):
        total[end:, start:end] = total[start:end, end:].T
    return total


def _strips(total: Tensor) -> Iterator[tuple[int, int]]:
    return pairwise(len(total) * strip // STRIPS for strip in range(STRIPS + 1))


def product(rows: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`x M [t, w]` of rows `[t, d]` and `M [d, w]`, with sums of at least float32."""
    exact = rows.dtype == matrix.dtype == torch.bfloat16 and dtype == torch.float32
    with _exact_products(exact):
        return rows.to(dtype) @ matrix.to(dtype)


def _exact_products(of_bfloat16: bool) -> AbstractContextManager[None]:
    """Multiply float32 exactly; numbers that bfloat16 holds may go through its matrix units, which are exact for them."""
    return float32_products("medium" if of_bfloat16 else "highest")


def kept_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Rows of real tokens.

    Args:
        x: [b, t, d] or already flattened [b * t, d].
        mask: [b, t], true on real tokens.

    Returns:
        [kept, d]

    Raises:
        ValueError: `x` has another number of tokens, as behind a router that sends each token elsewhere.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] != mask.numel():
        raise ValueError(f"{flat.shape[0]} rows for {mask.numel()} tokens")
    return flat[mask.reshape(-1)]
