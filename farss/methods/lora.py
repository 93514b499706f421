"""LoRA: one rank everywhere, random A, zero B (Hu et al., ICLR 2022); PEFT's own initialisation."""

from __future__ import annotations

from farss.artifacts import LayerPlan, Plan
from farss.config import PlanConfig
from farss.maths.ranks import matched_rank
from farss.methods.base import Context, Method, check_rank, layer_alpha, layer_cap, target_parameters, uniform_parameters


def plan(config: PlanConfig, context: Context) -> Plan:
    """Rank `plan.rank`, or the one that `plan.match_params` gives, in every target layer."""
    check_rank(config, context.layers)
    notes: list[str] = []
    rank, target = config.rank, target_parameters(config, context.layers)
    if target is not None:
        largest = max(layer_cap(layer) for layer in context.layers.values())
        rank = matched_rank(lambda r: uniform_parameters(context.layers, r), target, largest)
        notes.append(
            f"Rank {rank} gives {uniform_parameters(context.layers, rank):,} trainable parameters, nearest to the {target:,} asked for."
        )
    layers = {}
    for name, layer in context.layers.items():
        own = min(rank, layer_cap(layer))
        layers[name] = LayerPlan(own, layer_alpha(config, own), layer.block, layer.shape)
    return Plan(config.method, layers, context.blocks, rank=rank, notes=notes)


LORA = Method(
    name="lora",
    title="LoRA (Hu et al., ICLR 2022)",
    needs="nothing",
    changes="one rank in every layer, starting from zero",
    plain_lora=True,
    plan=plan,
)
