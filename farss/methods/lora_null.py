"""LoRA-Null: start from the weight's projection on the null space of knowledge activations (Tang et al. 2025). In its second version A,
which reads the inputs, stays as it begins: on the knowledge it was given the change is nought for good."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from farss.artifacts import Plan, layer_tensors
from farss.config import PlanConfig
from farss.maths.directions import factors
from farss.methods.base import Context, Method, Reading, Start
from farss.methods.uniform import WITH_A, b_alone, uniform_plan


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


def plan_v2(config: PlanConfig, context: Context) -> Plan:
    """The same, but that A does not train. An adapter is matched by the size in which it is handed over, A included."""
    return b_alone(uniform_plan(config, context, "least", what=WITH_A))


LORA_NULL = Method(
    name="lora-null",
    title="LoRA-Null (Tang et al. 2025)",
    changes="one rank in every layer, starting from the null space of knowledge activations",
    plan=partial(uniform_plan, side="least"),
    needs=Reading("null-space", "knowledge", read),
    start=start,
)
LORA_NULL_V2 = replace(
    LORA_NULL,
    name="lora-null-v2",
    title="LoRA-Null-v2 (Tang et al. 2025)",
    changes="B alone, one rank in every layer, starting from the null space of knowledge activations",
    plan=plan_v2,
    fixed_a=True,
)
