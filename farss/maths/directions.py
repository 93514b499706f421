"""Singular directions of a weight, their scores and their selection (FARSS, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from farss.maths.moments import add_square, mirrored
from farss.precision import float32_products

WEAK = {torch.float64: 1e-3, torch.float32: 3e-3}
"""Directions below this share of the largest singular value are weak. They are decomposed once more by themselves: the
Gram matrix squares the singular values, so its small eigenvalues lose twice the digits."""
WEAK_OF_MEAN = 0.02
"""Directions below this share of the root mean square of the singular values are weak too: statistics that are summed
after the weight, and divided by sigma squared, would lose more than four digits. (A direction with thousands of times the energy of
the others costs two digits more of the statistics across it, and one with tens of thousands three.)"""
LOST = 1e-5
"""Below this share of the largest singular value the Gram matrix has lost a direction altogether."""
MISSING = 1e-10
"""A part of the weight that is smaller than this, made of two factors, begins at a point where no gradient moves them."""
CHUNK = 4096
"""Rows of a weight that are converted to the working precision at a time."""


@dataclass(frozen=True)
class Decomposition:
    """`W = U diag(sigma) V^T`, `W [m, n]`, k = min(m, n), sigma descending.

    Only the vectors of the smaller side (the near one) are held. Those of the larger (far) side follow from them,
    `u_i = W v_i / sigma_i`, and are made when they are asked for.
    """

    weight: Tensor
    """[m, n], as it is stored."""
    sigma: Tensor
    """[k]"""
    near: Tensor
    """[k, k]: V where m >= n, U otherwise."""
    far_weak: Tensor
    """[max(m, n), q]: far vectors of the last q directions, which are too weak to be divided by their sigma."""

    @property
    def tall(self) -> bool:
        """Whether the near side is that of the inputs, m >= n."""
        return self.weight.shape[0] >= self.weight.shape[1]

    @property
    def strong(self) -> int:
        """How many directions are not weak."""
        return self.sigma.numel() - self.far_weak.shape[1]

    @float32_products("highest")
    def far(self, which: Tensor | None = None) -> Tensor:
        """[max(m, n), r] far vectors of the directions `which` (indices [r]); None: of all of them."""
        if which is None:
            which = torch.arange(self.sigma.numel(), device=self.sigma.device)
        place = (which < self.strong).nonzero()[:, 0]
        result = self.far_weak.new_empty(self.far_weak.shape[0], which.numel())
        near = self.near[:, which[place]] / self.sigma[which[place]]
        for start, rows in _chunks(far_rows(self.weight), near.dtype):
            result[start : start + rows.shape[0], place] = rows @ near
        rest = (which >= self.strong).nonzero()[:, 0]
        result[:, rest] = self.far_weak[:, which[rest] - self.strong]
        return result

    def vectors(self, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`U_S [m, r]` and `V_S [n, r]`; each pair's sign makes the largest-magnitude entry of `u` positive."""
        near = self.near if which is None else self.near[:, which]
        u, v = (self.far(which), near) if self.tall else (near, self.far(which))
        largest = u.abs().argmax(dim=0, keepdim=True)
        signs = torch.where(u.gather(0, largest) < 0, -1.0, 1.0).to(u.dtype)
        return u * signs, v * signs


@float32_products("highest")
def decompose(weight: Tensor, precision: torch.dtype = torch.float64) -> Decomposition:
    """Singular value decomposition of `W [m, n]` (eq. 13), through the eigenvectors of the smaller Gram matrix.

    That is several times faster than `linalg.svd`. The weak end, which squaring blurs, is decomposed once more in
    float64; a weight that is nearly rank-deficient goes through `linalg.svd`.

    Args:
        precision: float64, or float32, which is twice as fast and blurs neighbouring and very weak directions.
    """
    weight = weight.detach()
    rows = far_rows(weight)
    gram = _gram(rows, precision)
    values, near = torch.linalg.eigh(gram)
    del gram
    values, near = values.flip(0).clamp_min(0), near.flip(1).contiguous()
    sigma = values.sqrt()
    weak = int((sigma <= torch.maximum(WEAK[precision] * sigma[0], WEAK_OF_MEAN * sigma.square().mean().sqrt())).sum())
    if precision == torch.float64 and sigma[-1] <= LOST * sigma[0]:
        return _directly(weight, weak)
    if not weak:
        return Decomposition(weight, sigma, near, near.new_empty(rows.shape[0], 0))
    strong = sigma.numel() - weak
    tail = torch.cat([part @ near[:, strong:].double() for _, part in _chunks(rows, torch.float64)])
    far, small, turn = torch.linalg.svd(tail, full_matrices=False)
    near[:, strong:] = (near[:, strong:].double() @ turn.T).to(precision)
    sigma[strong:] = small.to(precision)
    if strong:
        sigma[strong:].clamp_(max=sigma[strong - 1].item())
    return Decomposition(weight, sigma, near, far.to(precision))


def _directly(weight: Tensor, weak: int) -> Decomposition:
    """The same from `linalg.svd`, which alone completes the bases of a (nearly) rank-deficient weight."""
    rows = far_rows(weight).double()
    far, sigma, near = torch.linalg.svd(rows, full_matrices=False)
    return Decomposition(weight, sigma, near.T.contiguous(), far[:, sigma.numel() - weak :].clone())


def far_rows(weight: Tensor) -> Tensor:
    """The weight with its larger side first."""
    return weight if weight.shape[0] >= weight.shape[1] else weight.T


def _chunks(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """A matrix a few rows at a time, in another precision: a weight of 11008 x 4096 takes 360 MB in float64."""
    for start in range(0, rows.shape[0], CHUNK):
        yield start, rows[start : start + CHUNK].to(dtype).contiguous()


def _gram(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`R^T R [k, k]` of `R [d, k]`."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype, device=rows.device)
    for _, part in _chunks(rows, dtype):
        add_square(total, part)
    return mirrored(total)


def direction_scores(sigma: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    """[k] float64, `sigma_i^2 lambda_i gamma_i`: expected loss change of a unit relative perturbation along each direction (eq. 15)."""
    return sigma.double().square() * lam.double() * gam.double()


def select(scores: Tensor, rank: int, side: Literal["least", "most"]) -> Tensor:
    """[rank] indices of the `rank` least or most important directions, from the highest score to the lowest.

    Ordered by (score, index), so that ties always fall the same way.
    """
    ascending = scores.argsort(stable=True)
    chosen = ascending[:rank] if side == "least" else ascending[scores.numel() - rank :]
    return chosen.flip(0)


def ends(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest and the `count` lowest scores, ascending, each once."""
    size = min(count, scores.numel())
    both: Tensor = torch.cat([select(scores, size, "most"), select(scores, size, "least")]).unique()
    return both


def overlap(one: Tensor, other: Tensor) -> float:
    """Share of the indices in `one [r]` that are in `other [r]` too."""
    return torch.isin(one, other).double().mean().item()


def factors(u: Tensor, sigma: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Start of the adapter (eq. 16-17): `B [m, r]`, `A [r, n]` with `scaling * B A = U_S diag(sigma_S) V_S^T`.

    A direction that the weight does not have, of a (nearly) rank-deficient one, would make both factors zero, which no gradient ever
    moves. It starts as a LoRA does: `v` in A, zero in B.
    """
    root = (sigma.double() / scaling).sqrt()
    v, size = v.double(), v.double().norm(dim=0)  # CorDA's v are no unit vectors: where its sigma are small, they are long
    missing = root.square() * size < MISSING
    length = torch.where(missing, 1 / size, root)
    return u.double() * root.masked_fill(missing, 0), length[:, None] * v.T
