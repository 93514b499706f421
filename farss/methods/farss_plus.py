"""FARSS-plus: fix A to the input directions with the largest ratio of the task's gradient energy to knowledge's activation energy, and
train B alone.

Ours; docs/method.md derives it and docs/beyond.md says what was measured.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.maths.eigenpairs import largest_pairs
from farss.methods.base import Context, Method, Reading, from_directions, of_the_inputs
from farss.methods.corda import damped
from farss.methods.uniform import WITH_A, b_alone, uniform_plan


def read(weight: Tensor, cap: int, task: Tensor, knowledge: Tensor) -> dict[str, Tensor]:
    """The vectors `a [n]` with the largest `a^T T a` of those with `a^T K a = 1`: the generalised eigenvectors `T a = lambda K a` of the
    two moments, K damped as CorDA damps it. A direction's score is its lambda."""
    task, factor = task.double(), damped(knowledge.to(torch.float64, copy=True))[1]

    def times(x: Tensor) -> Tensor:
        pulled = task @ torch.linalg.solve_triangular(factor.T, x, upper=True)
        whitened: Tensor = torch.linalg.solve_triangular(factor, pulled, upper=False)
        return whitened

    pull, vectors = largest_pairs(times, task, min(cap, *weight.shape))  # no adapter has a larger rank
    return of_the_inputs(weight, pull.clamp_min(0), torch.linalg.solve_triangular(factor.T, vectors, upper=True))


def plan(config: PlanConfig, context: Context) -> Plan:
    """One rank everywhere. An adapter is matched by the size in which it is handed over, A included."""
    made = b_alone(uniform_plan(config, context, "most", what=WITH_A))
    # in the order in which they are kept, also of directions on which the task does not pull at all, and whose scores are alike
    layers = {name: dataclasses.replace(layer, directions=[*range(layer.rank)]) for name, layer in made.layers.items()}
    return dataclasses.replace(made, layers=layers)


FARSS_PLUS = Method(
    name="farss-plus",
    title="ours (docs/method.md)",
    changes="B alone, one rank in every layer; A holds the input directions with the largest ratio of task to knowledge",
    plan=plan,
    needs=Reading("task-against-knowledge", "both", read),
    start=from_directions,
)
