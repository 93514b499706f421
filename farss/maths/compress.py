"""Compression of a thin product through its small core."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Compressed(NamedTuple):
    """`P Q` as `B A` of lower rank."""

    b: Tensor
    """[m, r]"""
    a: Tensor
    """[r, n]"""
    lost: float
    """Relative Frobenius error, 0 .. 1; of rounding alone 0."""
    effective_rank: float
    """Of `B A`."""


def compress(left: Tensor, right: Tensor, rank: int | None = None, energy: float | None = None) -> Compressed:
    """Best approximation of `P Q` (`P [m, q]`, `Q [q, n]`) of a rank, in float64, without forming the m x n product.

    QR of each factor, then an SVD of the small core; each side gets the root of the singular values, so that both
    factors have the same size and rounding them loses least.

    Args:
        rank: keep at most this many directions; None: everything above rounding error.
        energy: keep the fewest directions with this share of the squared Frobenius norm; None: all.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    noise = torch.finfo(torch.float64).eps * max(left.shape[1], 1) * r_left.norm() * r_right.norm()
    sigma = sigma[sigma > noise]
    keep = len(sigma) if rank is None else min(len(sigma), rank)
    if energy is not None:
        shares = sigma.square().cumsum(0) / sigma.square().sum().clamp_min(torch.finfo(sigma.dtype).tiny)
        keep = min(keep, int((shares < energy).sum()) + 1)
    root = sigma[:keep].sqrt()
    total = sigma.norm().item()
    lost = sigma[keep:].norm().item() / total if total else 0.0
    return Compressed(q_left @ (u[:, :keep] * root), (q_right @ (vh[:keep].T * root)).T, lost, effective_rank(sigma[:keep]))


def effective_rank(singular: Tensor) -> float:
    """How many singular values count: `exp(-sum p log p)` with `p = sigma / sum sigma` (Roy and Vetterli 2007); 0 where all are zero."""
    share = singular[singular > 0]
    share = share / share.sum()
    return float((-(share * share.log()).sum()).exp()) if len(share) else 0.0
