"""Steps on the Stiefel manifold: a matrix with orthonormal columns that is learned and keeps them orthonormal.

Li, Fuxin and Todorovic (ICLR 2020): the gradient's tangent part is a skew matrix times X, and its Cayley transform is a rotation. The
skew matrix `U X^T - X U^T` has rank 2 r, so that nothing of the size of the larger dimension squared is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(rows: int, rank: int) -> Tensor:
    """A random matrix `[m, r]` with orthonormal columns, uniformly distributed: the Q of a Gaussian, of the QR decomposition whose R has
    a positive diagonal. Drawn from torch's own random numbers."""
    q, r = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64))
    signed: Tensor = q * r.diagonal().sign()
    return signed.float()


def cayley(x: Tensor, gradient: Tensor, rate: float, *carried: Tensor) -> tuple[Tensor, ...]:
    """Walk from X against a gradient, along the manifold.

    With `U = D - X (X^T D) / 2` and the skew `W = U X^T - X U^T = P Q^T`, `P = [U, X]`, `Q = [X, -U]`, the step is the rotation
    `(I + a/2 W)^-1 (I - a/2 W) = I - a P (I + a/2 Q^T P)^-1 Q^T`.

    Args:
        x: [m, r], orthonormal columns.
        gradient: D [m, r], with respect to the entries of X.
        rate: a.
        carried: further matrices of m rows that are rotated with it, such as a momentum.

    Returns:
        X after the step, and what was carried.
    """
    u = gradient - x @ (x.T @ gradient) / 2
    p, q = torch.cat([u, x], 1), torch.cat([x, -u], 1)
    together = torch.cat([x, *carried], 1)
    core = torch.eye(p.shape[1], dtype=x.dtype, device=x.device) + rate / 2 * (q.T @ p)
    turned = together - rate * (p @ torch.linalg.solve(core, q.T @ together))
    return torch.split(turned, [part.shape[1] for part in (x, *carried)], 1)
