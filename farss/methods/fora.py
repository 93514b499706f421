"""FoRA: LoRA on the half of the blocks with the largest gradients, whose B keeps orthonormal columns (arXiv 2605.29317, 2026)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.maths.stiefel import cayley, orthonormal
from farss.methods.base import Context, Method, Reading, Regime
from farss.methods.diagonal import add_diagonals
from farss.methods.uniform import nothing, uniform_plan
from farss.precision import float32_products

RATE = 5.0
"""B's learning rate, in times that of A and the gate: the authors' 1e-3 and 2e-4."""
BETAS = (0.9, 0.99)
"""Of B's momentum, and of the mean square of its gradient's norm."""


def gate(rank: int, rows: int) -> int:
    """What trains beside A and B."""
    return 1


def plan(config: PlanConfig, context: Context) -> Plan:
    """One rank in the layers of the chosen blocks."""
    scores = {layer.block: layer.importance for layer in context.layers.values()}
    chosen = largest_half(scores) if config.fora_blocks == "fisher" else sorted(scores)
    if isinstance(config.fora_blocks, int):
        chosen = sorted(random.Random(config.fora_blocks).sample(chosen, half(len(chosen))))
    layers = {name: layer for name, layer in context.layers.items() if layer.block in chosen}
    made = uniform_plan(config, context, None, gate if config.fora_orthonormal else nothing, layers=layers)
    note = f"FoRA adapts {len(chosen)} of {len(scores)} blocks: {', '.join(map(str, chosen))}."
    return dataclasses.replace(made, notes=[*made.notes, note])


def half(count: int) -> int:
    """Rounded down, and at least one."""
    return max(1, count // 2)


def largest_half(scores: dict[int, float]) -> list[int]:
    """The blocks with the largest scores, ascending; of equal ones the first."""
    return sorted(sorted(scores, key=lambda block: (-scores[block], block))[: half(len(scores))])


class Rotation(Regime):
    """`dW = s g B A`: a gate g that starts at zero, a random A, and a random B that is only ever rotated."""

    def dress(self, layers: list[Any], adapter: str) -> None:
        """Begin with `B^T B = I`, `A ~ N(0, 1/r)` and `g = 0`."""
        add_diagonals(layers, adapter, lambda rank: torch.zeros(1))
        for layer in layers:
            b, a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
            b.data.copy_(orthonormal(*b.shape))
            nn.init.normal_(a, std=a.shape[0] ** -0.5)
        self.turned = [layer.lora_B[adapter].weight for layer in layers]

    def optimizer(self, made: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The same for A and the gates, and Cayley-Adam for B."""
        known = {id(weight) for weight in self.turned}
        flat = [{**group, "params": [each for each in group["params"] if id(each) not in known]} for group in made.param_groups]
        rate = made.defaults["lr"]
        return CayleyAdamW([*flat, {"params": self.turned, "lr": RATE * rate, "betas": BETAS, "orthonormal": True}], lr=rate)


class CayleyAdamW(torch.optim.AdamW):
    """AdamW; and Cayley-Adam (Li et al. 2020), without weight decay, for groups with `orthonormal: True`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every group."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("orthonormal")]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = groups
        with float32_products("highest"):
            for group in groups:
                if group.get("orthonormal"):
                    for weight in group["params"]:
                        if weight.grad is not None:
                            self._turn(weight, weight.grad, group)
        return result

    def _turn(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Rotate a weight `[m, r]` against its momentum, over the root of the mean square of its gradient's norm."""
        state, (first, second) = self.state[weight], group["betas"]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight[0, 0])}
        state["step"] += 1
        count = float(state["step"])
        momentum = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].lerp_(gradient.square().sum(), 1 - second)
        size = (square / (1 - second**count)).sqrt() + group["eps"]
        turned, carried = cayley(weight, momentum / (1 - first**count) / size, group["lr"], momentum)
        weight.copy_(turned)
        momentum.copy_(carried)


def regime(config: PlanConfig, plan: Plan) -> Regime:
    """Nothing where B is not kept orthonormal: a LoRA on the chosen blocks."""
    return Rotation() if config.fora_orthonormal else Regime()


FORA = Method(
    name="fora",
    title="FoRA (arXiv 2605.29317, 2026)",
    changes="one rank in the half of the blocks with the largest gradients, starting from zero; B keeps orthonormal columns",
    plan=plan,
    needs=Reading("block-gradients", "gradients"),
    regime=regime,
)
