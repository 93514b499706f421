"""LoRA-Null: start from the weight's projection on the null space of knowledge activations (Tang et al. 2025).

Both factors train, as in the paper's main rows.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from farss.artifacts import layer_tensors
from farss.maths.directions import factors
from farss.methods.base import Method, Reading, Start
from farss.methods.uniform import uniform_plan


def read(weight: Tensor, cap: int, moment: Tensor) -> dict[str, Tensor]:
    """The `cap` directions of the inputs that carry the least activation energy, `v`, and what the weight makes of them,
    `u = W v`; a direction's score is its energy."""
    energy, vectors = torch.linalg.eigh(moment.double())
    count = min(weight.shape)  # no adapter has a larger rank
    energy, vectors = energy[:count].clamp_min(0), vectors[:, : min(cap, count)]
    kept = torch.arange(vectors.shape[1])
    return layer_tensors(torch.ones(count), kept, weight.double() @ vectors, vectors, lam=energy)


def start(u: Tensor, sigma: Tensor, v: Tensor, scaling: float) -> Start:
    """`W N N^T = (W N) N^T` in balanced factors, with the null space `N = v [n, r]` and `W N = u`."""
    left, values, turn = torch.linalg.svd(u.double(), full_matrices=False)
    part = factors(left, values, v.double() @ turn.T, scaling)
    return Start(part, part)


LORA_NULL = Method(
    name="lora-null",
    title="LoRA-Null (Tang et al. 2025)",
    changes="one rank in every layer, starting from the null space of knowledge activations",
    plan=partial(uniform_plan, side="least"),
    needs=Reading("null-space", "knowledge", read),
    start=start,
)
