"""CorDA: start from the directions of `W C`, with the covariance `C` of a text's activations (Yang et al., NeurIPS 2024).

Instruction-previewed (IPM): the text is the task, and the largest directions are trained. Knowledge-preserved (KPM): it is
general knowledge, and the smallest are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from farss.artifacts import layer_tensors
from farss.maths.directions import decompose
from farss.methods.base import Method, Reading
from farss.methods.singular import ends_of_spectrum
from farss.methods.uniform import uniform_plan

DAMPING = 0.01
"""The covariance's mean diagonal times this is added to its diagonal, as in the authors' code, so that it has an inverse."""


def read(weight: Tensor, cap: int, moment: Tensor) -> dict[str, Tensor]:
    """`W = U diag(sigma) (C^-1 V)^T` with `W C = U diag(sigma) V^T`, at both ends of sigma."""
    covariance, factor = damped(moment.to(torch.float64, copy=True))
    parts = decompose(weight.double() @ covariance)
    kept = ends_of_spectrum(parts.sigma, cap)
    u, v = parts.vectors(kept)
    return layer_tensors(parts.sigma, kept, u, torch.cholesky_solve(v, factor))


def damped(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """A covariance `C [n, n]` that has an inverse, damped in place, and its Cholesky factor [n, n]; of inputs that are all zero, which
    say nothing, the identity. The authors' code computes in float32, and doubles the damping while `C C^-1` is far from the identity too;
    no eigenvalue of C is more than some 100 n times the smallest, for which float64 is exact enough."""
    diagonal = covariance.diagonal().clone()
    if not covariance.any():
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        return identity, identity
    damping = DAMPING
    while True:
        covariance.diagonal().copy_(diagonal + damping * diagonal.mean())
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not failed:
            return covariance, factor
        damping *= 2


CORDA_IPM = Method(
    name="corda-ipm",
    title="CorDA, instruction-previewed (Yang et al., NeurIPS 2024)",
    changes="one rank in every layer, starting from the directions that the task's activations use most",
    plan=partial(uniform_plan, side="most"),
    needs=Reading("corda-task", "task", read, over="examples"),
)
CORDA_KPM = Method(
    name="corda-kpm",
    title="CorDA, knowledge-preserved (Yang et al., NeurIPS 2024)",
    changes="one rank in every layer, starting from the directions that knowledge text uses least",
    plan=partial(uniform_plan, side="least"),
    needs=Reading("corda-knowledge", "knowledge", read, over="examples"),
)
