"""AdaLoRA: a LoRA in singular form whose least important triplets are pruned while it trains (Zhang et al., ICLR 2023).

PEFT's rank allocator does the pruning.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from farss.artifacts import Plan
from farss.config import PlanConfig
from farss.methods.base import Context, Method, Regime
from farss.methods.diagonal import add_diagonals, orthogonality
from farss.methods.uniform import layer_alpha, layer_cap, uniform_plan

EXTRA = 1.5
"""The ranks begin at this many times their final average, as in the paper."""
BEGIN, END, EVERY = 0.1, 0.5, 0.01
"""Shares of the steps: before pruning begins, after it ended, and between two prunings. The paper tunes them for each
task; these are ours for all."""
ORTHOGONAL = 0.5
"""Weight of the orthogonality penalty (PEFT's default)."""
MOMENTS = ("exp_avg_ipt", "exp_avg_unc")


def plan(config: PlanConfig, context: Context) -> Plan:
    """One rank everywhere, larger than the average at the end. It is the end that `plan.match_params` speaks of."""
    final = uniform_plan(
        config, context, None, lambda rank, rows: rank, what="trainable parameters at the end of training, if it is pruned evenly"
    )
    layers = {}
    for name, layer in final.layers.items():
        rank = min(math.ceil(EXTRA * layer.rank), layer_cap(context.layers[name]))
        layers[name] = dataclasses.replace(layer, rank=rank, alpha=layer_alpha(config, rank, final.rank), beside=rank)
    made = dataclasses.replace(final, layers=layers)
    note = (
        f"AdaLoRA begins with {EXTRA} times the final rank, {made.parameters:,} trainable parameters, and keeps the best "
        f"{average_rank(made)} per layer on average."
    )
    return dataclasses.replace(made, notes=[*made.notes, note])


def average_rank(plan: Plan) -> int:
    """How many triplets a layer keeps on average: the one rank, or the largest that a narrow layer can have."""
    ranks = [min(plan.rank, *layer.shape) for layer in plan.layers.values()]
    return round(sum(ranks) / len(ranks))


class RankPruning(Regime):
    """PEFT's allocator on our modules, and the penalty that keeps the singular vectors orthogonal."""

    def __init__(self, config: PlanConfig, plan: Plan) -> None:
        self.allocator: Any = None
        self.target = average_rank(plan)

    def dress(self, layers: list[Any], adapter: str) -> None:
        """Singular values that start at zero between normally distributed vectors, as in PEFT."""
        self.layers, self.adapter = layers, adapter
        add_diagonals(layers, adapter, torch.zeros)
        for layer in layers:
            for side in (layer.lora_A, layer.lora_B):
                nn.init.normal_(side[adapter].weight, std=0.02)

    def begin(self, model: Any, steps: int) -> None:
        """Set the schedule."""
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import RankAllocator

        self.last = steps - round(END * steps)
        settings = AdaLoraConfig(
            target_r=self.target,
            total_step=steps,
            tinit=round(BEGIN * steps),
            tfinal=steps - self.last,
            deltaT=max(1, round(EVERY * steps)),
        )
        self.model = model
        self.pattern: dict[str, list[bool]] = {}
        self.allocator = RankAllocator(model, settings, self.adapter)

    def penalty(self) -> Tensor:
        """`0.5` times the mean of all `||A A^T - I||_F` and `||B^T B - I||_F`, as in PEFT."""
        parts = [x for layer in self.layers for x in orthogonality(layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight)]
        return ORTHOGONAL * torch.stack(parts).mean()

    def after_step(self, step: int) -> None:
        """Update the importance of every triplet and prune, as PEFT's `update_and_allocate` does."""
        if self.allocator.init_bgt <= self.allocator.target_bgt:
            return  # the layers are too small to have a rank to spare
        if step > self.last:
            self.allocator.mask_using_rank_pattern(self.model, self.pattern)
            return
        if step == self.last and not self.allocator.exp_avg_ipt:  # so few steps that the first is the last with pruning
            self.allocator.update_ipt(self.model)
        _, pattern = self.allocator.update_and_allocate(self.model, step, force_mask=step == self.last)
        self.pattern = pattern or self.pattern

    def state(self) -> dict[str, Tensor]:
        """Smoothed importances and which triplets are left."""
        found = {f"{kind}/{name}": tensor for kind in MOMENTS for name, tensor in getattr(self.allocator, kind).items()}
        return found | {f"pattern/{name}": torch.tensor(kept) for name, kept in self.pattern.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take them up."""
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            if kind == "pattern":
                self.pattern[name] = tensor.tolist()
                continue
            getattr(self.allocator, kind)[name] = tensor
            self.allocator.ipt[name] = torch.zeros_like(tensor)


ADALORA = Method(
    name="adalora",
    title="AdaLoRA (Zhang et al., ICLR 2023)",
    changes="ranks that are pruned from 1.5 times their final average while training, starting from zero",
    plan=plan,
    regime=RankPruning,
)
