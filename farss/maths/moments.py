"""Second moments of activations and output gradients, in the singular basis of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

# Projecting t rows of size d on k directions and squaring costs t (d k + k^2), squaring them as they are t d^2:
# projecting first wins from d > 1.62 k.
PROJECT_FROM = (1 + 5**0.5) / 2


class Moment:
    """Running sum of `x x^T` over rows `x [d]`, read out in the basis `Q [d, k]`: `Q^T E[x x^T] Q`."""

    def __init__(self, basis: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Args: basis: [d, k], orthonormal columns. dtype: of the products and the sums (float32 or better)."""
        size, directions = basis.shape
        self.projects = size > PROJECT_FROM * directions
        self.basis = basis
        self.projection = basis.to(dtype)
        width = directions if self.projects else size
        self.total = torch.zeros(width, width, dtype=dtype, device=basis.device)
        self.count = 0

    def add(self, rows: Tensor, square: Tensor | None = None) -> Tensor:
        """Add rows `[t, d]`; `square`, if given, is their `x^T x [d, d]` from another layer with the same input.

        Returns:
            The product that was added.
        """
        if square is None or self.projects:
            rows = rows.to(self.total.dtype)
            rows = rows @ self.projection if self.projects else rows
            square = rows.T @ rows
        self.total += square
        self.count += rows.shape[0]
        return square

    def in_basis(self) -> Tensor:
        """[k, k] float64: the mean, in the singular basis."""
        mean = self.total.double() / self.count
        return mean if self.projects else self.basis.double().T @ mean @ self.basis.double()


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
