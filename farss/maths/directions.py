"""Singular directions of a weight, their scores and their selection (FARSS, section 3.3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Decomposition(NamedTuple):
    """`W = U diag(sigma) V^T`, k = min(m, n), sigma descending."""

    u: Tensor
    """[m, k]"""
    sigma: Tensor
    """[k]"""
    v: Tensor
    """[n, k]"""


def decompose(weight: Tensor) -> Decomposition:
    """Singular value decomposition of `W [m, n]` in float64 (eq. 13).

    Goes through the eigenvectors of the smaller Gram matrix, which is several times faster, and checks residual and
    orthogonality: squaring loses the small directions of an ill-conditioned weight, so those go through `linalg.svd`.
    Each pair's sign makes the largest-magnitude entry of `u` positive.
    """
    weight = weight.detach().double()
    result = _through_gram(weight)
    if not is_accurate(weight, result):
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        result = Decomposition(u, sigma, vh.T)
    return fix_signs(result)


def _through_gram(weight: Tensor) -> Decomposition:
    wide = weight.shape[0] <= weight.shape[1]
    gram = weight @ weight.T if wide else weight.T @ weight
    _, vectors = torch.linalg.eigh(gram)
    vectors = vectors.flip(1)
    other = (weight.T if wide else weight) @ vectors
    sigma = other.norm(dim=0)  # more accurate for small directions than the root of the eigenvalue
    other = other / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    u, v = (vectors, other) if wide else (other, vectors)
    order = sigma.argsort(descending=True, stable=True)
    return Decomposition(u[:, order], sigma[order], v[:, order])


def is_accurate(weight: Tensor, result: Decomposition, tolerance: float = 1e-7) -> bool:
    """Whether both bases are orthonormal and rebuild the weight, to `tolerance` (relative to the largest sigma)."""
    u, sigma, v = result
    identity = torch.eye(sigma.numel(), dtype=sigma.dtype, device=sigma.device)
    skew = max((basis.T @ basis - identity).abs().max().item() for basis in (u, v))
    residual = ((u * sigma) @ v.T - weight).abs().max().item()
    return skew <= tolerance and residual <= tolerance * sigma[0].item()


def fix_signs(result: Decomposition) -> Decomposition:
    """Flip each pair so that the largest-magnitude entry of `u_i` is positive."""
    u, sigma, v = result
    largest = u.abs().argmax(dim=0)
    signs = torch.where(u[largest, torch.arange(u.shape[1], device=u.device)] < 0, -1.0, 1.0).to(u.dtype)
    return Decomposition(u * signs, sigma, v * signs)


def direction_scores(sigma: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    """[k] float64: expected loss change of a unit relative perturbation along each direction (eq. 15)."""
    return sigma.double().square() * lam.double() * gam.double()


def select(scores: Tensor, rank: int, side: Literal["least", "most"]) -> Tensor:
    """[rank] indices of the `rank` least or most important directions, from the highest score to the lowest.

    Ordered by (score, index), so that ties always fall the same way.
    """
    ascending = scores.argsort(stable=True)
    chosen = ascending[:rank] if side == "least" else ascending[scores.numel() - rank :]
    return chosen.flip(0)


def factors(u: Tensor, sigma: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Start of the adapter (eq. 16-17): `B [m, r]`, `A [r, n]` with `scaling * B A = U_S diag(sigma_S) V_S^T`."""
    root = (sigma.double() / scaling).sqrt()
    return u.double() * root, root[:, None] * v.double().T
