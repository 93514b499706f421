"""EVA: A starts from the main directions of the task's activations, B from zero, and ranks go where they explain most
(Paischer et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from farss.artifacts import LayerPlan, Plan, Survey, layer_tensors
from farss.config import PlanConfig
from farss.methods.base import Context, Method, Reading, Start, layer_alpha, layer_cap, uniform_rank

RHO = 2
"""A layer gets at most this many times the average rank (PEFT's default)."""


def read(weight: Tensor, moment: Tensor | None, cap: int) -> dict[str, Tensor]:
    """The main directions of the inputs; a direction's score is its share of the activations' energy."""
    assert moment is not None
    energy, vectors = torch.linalg.eigh(moment.double())
    count = min(weight.shape)
    share, vectors = (energy / energy.sum()).flip(0)[:count].clamp_min(0), vectors.flip(1)[:, : min(cap, count)]
    ones, size = torch.ones(count), vectors.shape[1]
    return layer_tensors(ones, share, ones.clone(), torch.arange(size), weight.new_zeros(weight.shape[0], size), vectors)


def start(u: Tensor, sigma: Tensor, v: Tensor, scaling: float) -> Start:
    """`A = V^T` and `B = 0`: the base stays whole."""
    return Start((torch.zeros_like(u), v.T), None)


def plan(config: PlanConfig, context: Context) -> Plan:
    """The budget of one rank everywhere, given to the directions with the largest shares of their layers' energy. A layer
    without any is left as it is."""
    assert context.survey is not None
    notes: list[str] = []
    rank = uniform_rank(config, context.layers, notes)
    ranks = share_out(context.survey, rank)
    layers = {
        name: LayerPlan(own, layer_alpha(config, own), layer.block, layer.shape, "most", list(range(own)))
        for name, layer in context.layers.items()
        if (own := ranks[name])
    }
    return Plan(config.method, layers, context.blocks, rank=rank, notes=notes)


def share_out(survey: Survey, rank: int) -> dict[str, int]:
    """The rank of each layer: how many of its directions are among the best of all."""
    caps = {name: min(RHO * rank, layer_cap(layer), survey.cap) for name, layer in survey.layers.items()}
    known = {name: survey.directions(name).lam[:cap].tolist() for name, cap in caps.items()}
    shares = [(-share, place, name) for place, name in enumerate(known) for share in known[name]]
    best = sorted(shares)[: rank * len(caps)]
    return {name: sum(entry[2] == name for entry in best) for name in caps}


EVA = Method(
    name="eva",
    title="EVA (Paischer et al. 2024)",
    changes="ranks by explained variance, starting from the main directions of the task's activations",
    plan=plan,
    needs=Reading("eva-task", "task", read, reach=RHO),
    start=start,
)
