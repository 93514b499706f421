"""Kronecker-factored Fisher: the quadratic form of a whole layer (FARSS, section 3.2)."""

from __future__ import annotations

from torch import Tensor


def importance(sigma: Tensor, activation: Tensor, gradient: Tensor, shape: tuple[int, int]) -> float:
    """Fisher importance `tr(G W A W^T) / (m n)` (eq. 8), in the singular basis.

    Args:
        sigma: [k] singular values of `W [m, n]`.
        activation: [k, k], `V^T A V`.
        gradient: [k, k], `U^T G U`.
        shape: (m, n).

    With `W = U diag(sigma) V^T` the trace is `sum_ij (U^T G U)_ij sigma_j (V^T A V)_ji sigma_i`.
    """
    sigma = sigma.double()
    form = gradient.double() * activation.double().T * sigma[:, None] * sigma[None, :]
    return form.sum().item() / (shape[0] * shape[1])


def quadratic_form(change: Tensor, activation: Tensor, gradient: Tensor) -> Tensor:
    """`tr(G X A X^T)` of a change `X [m, n]`, with `A [n, n]` and `G [m, m]` (eq. 6, 29)."""
    return ((gradient @ change @ activation) * change).sum()
