"""The singular directions of the weights, for the methods that look at nothing else."""

from __future__ import annotations

from torch import Tensor

from farss.artifacts import layer_tensors
from farss.maths.directions import decompose, ends
from farss.methods.base import Reading


def read(weight: Tensor, cap: int) -> dict[str, Tensor]:
    """The ends of the spectrum. It is FARSS's survey with A = G = I: a direction's score is its squared singular value."""
    parts = decompose(weight)
    kept = ends_of_spectrum(parts.sigma, cap)
    return layer_tensors(parts.sigma, kept, *parts.vectors(kept))


def ends_of_spectrum(sigma: Tensor, cap: int) -> Tensor:
    """Which directions are kept, as a plan chooses among them: by the singular values that are stored, float32, so that equal ones fall
    the same way in both."""
    return ends(sigma.float().double().square(), cap)


SINGULAR = Reading("weights", "weights", read)
