"""The largest eigenvalues of a symmetric matrix and their vectors, without the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FEW = 24
"""Where the matrix is at least this many times as large as the number of wanted pairs, they are looked for by themselves."""
SOUGHT = 0.5
"""Beyond this share of the whole space the search is given up, and everything is decomposed."""
EARLIEST = 8
"""Blocks of the search before it is looked whether the pairs are found; then every second."""
CLOSE = 1e-9
"""The largest residual `|C v - lambda v|` of a pair, as a share of its eigenvalue."""
SMALL = 1e-3
"""Eigenvalues below this share of the largest are held to the residual of one that is just so large: rounding is no better."""


def largest_pairs(times: Callable[[Tensor], Tensor], like: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues of a symmetric, positive semi-definite matrix `C [n, n]`, descending, and their vectors.

    A few of a large one are found in the Krylov space of a random block (Golub & Underwood 1977; Musco & Musco 2015), whose
    basis is kept orthonormal, until their residuals are next to nothing. That takes some ten products with blocks of `count`
    columns, and a whole decomposition some 9 n^3 operations. The block is the same each time, and so is the result.

    Args:
        times: `X [n, b] -> C X`.
        like: any tensor of n rows, in the precision and on the device of the computing.
        count: at least 1.

    Returns:
        [count] and [n, count].
    """
    size = like.shape[0]
    if size >= FEW * count and (found := _search(times, like, count)) is not None:
        return found
    return _first(times(torch.eye(size, dtype=like.dtype, device=like.device)), count)


def _first(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same, by decomposing all of a matrix that is symmetric but for rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def _search(times: Callable[[Tensor], Tensor], like: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The pairs in the space of blocks `X, C X, C^2 X, ...`; None if they are not found in a part of the whole."""
    size = like.shape[0]
    block = torch.randn(size, count, dtype=like.dtype, generator=torch.Generator().manual_seed(0)).to(like.device)
    basis, images = like.new_empty(size, 0), like.new_empty(size, 0)
    for blocks in range(1, int(SOUGHT * size / count) + 1):
        # twice, for what is left of a block may be mostly rounding
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        image = times(block)
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        block = image
        if blocks < EARLIEST or blocks % 2:
            continue
        values, turn = _first(basis.T @ images, count)
        vectors = basis @ turn
        residuals = (images @ turn - vectors * values).norm(dim=0)
        if (residuals <= CLOSE * values.clamp_min(SMALL * values[0])).all():
            return values, vectors
    return None
