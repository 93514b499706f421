"""Kronecker-factored Fisher: how important a layer is (FARSS, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from farss.precision import float32_products

STRIP = 1024
"""Rows of two moments that are multiplied in float64 at a time: of 8192 x 8192 each copy would be half a gigabyte."""


def importance(activation: Tensor, gradient: Tensor, shape: tuple[int, int]) -> float:
    """Fisher importance `tr(G W A W^T) / (m n)` (eq. 8) from two moments of one size.

    Args:
        activation: `A [n, n]`, or `W A W^T [m, m]`, the moment of the activations after the weight.
        gradient: correspondingly `W^T G W [n, n]`, or `G [m, m]`.
        shape: (m, n) of `W`.
    """
    total = 0.0
    for one, other in zip(activation.split(STRIP), gradient.split(STRIP), strict=True):
        total += (one.double() * other.double()).sum().item()
    return total / (shape[0] * shape[1])


@float32_products("highest")
def output_energy(weight: Tensor, activation: Tensor | None = None) -> float:
    """`tr(W A W^T) / (m n)`: eq. 8 with `G = I`; with `A = I` too where no moment `A [n, n]` is given.

    Args:
        weight: `W [m, n]`.
    """
    wide = weight.float() if weight.dtype != torch.float64 else weight
    energy = (wide @ activation.to(wide.dtype)) * wide if activation is not None else wide.square()
    return energy.mean(dtype=torch.float64).item()
