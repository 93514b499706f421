"""Kronecker-factored Fisher: how important a layer is (FARSS, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from farss.precision import float32_products


def importance(activation: Tensor, gradient: Tensor, shape: tuple[int, int]) -> float:
    """Fisher importance `tr(G W A W^T) / (m n)` (eq. 8) from two moments of one size.

    Args:
        activation: `A [n, n]`, or `W A W^T [m, m]`, the moment of the activations after the weight.
        gradient: correspondingly `W^T G W [n, n]`, or `G [m, m]`.
        shape: (m, n) of `W`.
    """
    return (activation.double() * gradient.double()).sum().item() / (shape[0] * shape[1])


@float32_products("highest")
def output_energy(weight: Tensor, activation: Tensor | None = None) -> float:
    """`tr(W A W^T) / (m n)`: eq. 8 with `G = I`; with `A = I` too where no moment `A [n, n]` is given.

    Args:
        weight: `W [m, n]`.
    """
    wide = weight.float() if weight.dtype != torch.float64 else weight
    energy = (wide @ activation.to(wide.dtype)) * wide if activation is not None else wide.square()
    return energy.mean(dtype=torch.float64).item()
