"""EVA: A starts from the principal components of the activations on the task's answers, B from zero, and ranks go where they
explain most (Paischer et al. 2024)."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from farss.artifacts import LayerPlan, Plan
from farss.config import PlanConfig
from farss.maths.eigenpairs import largest_pairs
from farss.methods.base import Context, Method, Reading, from_directions, of_the_inputs
from farss.methods.uniform import chosen_rank, layer_alpha

RHO = 2
"""A layer gets at most this many times the average rank (PEFT's default)."""


def read(weight: Tensor, cap: int, moment: Tensor) -> dict[str, Tensor]:
    """The principal components of the inputs; a component's score is its share of their variance, 0 where there is none."""
    moment = moment.double()
    energy, vectors = largest_pairs(lambda x: moment @ x, moment, min(cap, *weight.shape))
    share = energy.clamp_min(0) / moment.trace().clamp_min(torch.finfo(energy.dtype).tiny)
    return of_the_inputs(weight, share, vectors)


def plan(config: PlanConfig, context: Context) -> Plan:
    """The budget of one rank everywhere, given to the components with the largest shares of their layers' variance. A layer
    without any is left as it is."""
    survey = context.survey
    assert survey is not None
    shares = {name: survey.directions(name).lam.tolist() for name in survey.layers}

    def parameters(rank: int) -> int:
        return sum(own * sum(context.layers[name].shape) for name, own in share_out(shares, rank).items())

    notes: list[str] = []
    rank = chosen_rank(config, context.layers, parameters, notes)
    ranks = share_out(shares, rank)
    layers = {
        name: LayerPlan(own, layer_alpha(config, own, rank), layer.block, layer.shape, "most", list(range(own)))
        for name, layer in context.layers.items()
        if (own := ranks[name])
    }
    return Plan(config.method, layers, context.blocks, rank=rank, notes=notes)


def share_out(shares: dict[str, list[float]], rank: int) -> dict[str, int]:
    """The rank of each layer: how many of its components are among the best of all.

    Args:
        shares: of each layer's variance, descending.
        rank: the average.
    """
    ordered = sorted((-share, place, name) for place, name in enumerate(shares) for share in shares[name][: RHO * rank])
    counts = Counter(name for _, _, name in ordered[: rank * len(shares)])
    return {name: counts[name] for name in shares}


EVA = Method(
    name="eva",
    title="EVA (Paischer et al. 2024)",
    changes="ranks by explained variance, starting from the principal components of the activations on answers",
    plan=plan,
    needs=Reading("eva-answers", "task", read, reach=RHO, over="answers"),
    start=from_directions,
)
