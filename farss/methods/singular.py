"""The singular directions of the weights, for the methods that look at nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from farss.artifacts import layer_tensors
from farss.maths.directions import decompose, ends
from farss.methods.base import Reading


def read(weight: Tensor, cap: int) -> dict[str, Tensor]:
    """The ends of the spectrum. It is FARSS's survey with A = G = I: a direction's score is its squared singular value."""
    parts = decompose(weight)
    ones, kept = torch.ones(parts.sigma.numel()), ends(parts.sigma.double().square(), cap)
    return layer_tensors(parts.sigma, ones, ones.clone(), kept, *parts.vectors(kept))


SINGULAR = Reading("weights", "weights", read)
