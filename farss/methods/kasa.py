"""KaSA: the smallest singular components are cut off for good, and the rest is adapted in singular form (Wang et al. 2024)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from farss.artifacts import Layer, Plan
from farss.config import PlanConfig
from farss.errors import ConfigError
from farss.maths.directions import factors
from farss.methods.base import Context, Method, Regime, Start
from farss.methods.diagonal import add_diagonals, orthogonality
from farss.methods.singular import SINGULAR
from farss.methods.uniform import layer_cap, uniform_plan


def cut_cap(layer: Layer) -> int:
    """All components but one: what is cut off does not come back, and a layer without any computes nothing."""
    return layer_cap(layer) - 1


def plan(config: PlanConfig, context: Context) -> Plan:
    """One rank everywhere, and a diagonal of that size."""
    made = uniform_plan(config, context, "least", lambda rank, rows: rank, cut_cap)
    if not made.layers:
        raise ConfigError(
            "plan.method=kasa: each of the target layers has one singular component, and KaSA cuts components off: choose others"
        )
    small = [name for name, layer in context.layers.items() if cut_cap(layer) < made.rank]
    if not small:
        return made
    where = small[0] if len(small) == 1 else f"{small[0]} and {len(small) - 1} more"
    note = f"KaSA cuts components off for good and leaves each layer one: the rank is min(m, n) - 1, below {made.rank}, in {where}."
    return dataclasses.replace(made, notes=[*made.notes, note])


def start(u: Tensor, sigma: Tensor, v: Tensor, scaling: float) -> Start:
    """PEFT's start at zero; the smallest components leave the base and do not come back."""
    return Start(None, factors(u, sigma, v, scaling))


class Penalties(Regime):
    """The two losses beside the task's (KaSA, eq. 9-12)."""

    def __init__(self, config: PlanConfig, plan: Plan) -> None:
        self.beta, self.gamma = config.kasa_beta, config.kasa_gamma

    def dress(self, layers: list[Any], adapter: str) -> None:
        """Singular values that start normally distributed; B is zero, so the change is."""
        self.layers, self.adapter = layers, adapter
        add_diagonals(layers, adapter, torch.randn)

    def penalty(self) -> Tensor:
        """`beta ||e||^2 + gamma (||B^T B - I||_F + ||A A^T - I||_F)`, summed over the layers."""
        total = torch.zeros((), device=self.layers[0].lora_A[self.adapter].weight.device)
        for layer in self.layers:
            values = layer.lora_E[self.adapter].weight
            apart = orthogonality(layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight)
            total = total + self.beta * values.float().square().sum() + self.gamma * (apart[0] + apart[1])
        return total


KASA = Method(
    name="kasa",
    title="KaSA (Wang et al. 2024)",
    changes="one rank in every layer, in singular form; the smallest singular components leave the base for good",
    plan=plan,
    needs=SINGULAR,
    start=start,
    regime=Penalties,
)
