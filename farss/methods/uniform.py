"""What the plans of most methods share: how a rank is chosen, what it trains, and one rank in every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from farss.artifacts import Layer, LayerPlan, Plan, Side
from farss.config import PlanConfig
from farss.errors import ConfigError
from farss.maths.directions import select
from farss.maths.ranks import matched_rank
from farss.methods.base import Context

Beside = Callable[[int, int], int]
"""(rank, m) -> how many parameters train beside A and B in a layer."""
Cap = Callable[[Layer], int]
"""The largest rank of a layer."""
TRAINABLE = "trainable parameters"
WITH_A = "parameters, with those of A, which do not train"


def nothing(rank: int, rows: int) -> int:
    """A and B are all that trains."""
    return 0


def layer_cap(layer: Layer) -> int:
    """The largest rank that means anything: min(m, n)."""
    return min(layer.shape)


def uniform_parameters(layers: dict[str, Layer], rank: int, beside: Beside = nothing, cap: Cap = layer_cap) -> int:
    """Trainable parameters with one rank everywhere; those of a LoRA, unless more is trained beside it."""
    own = {name: min(rank, cap(layer)) for name, layer in layers.items()}
    return sum(own[name] * sum(layer.shape) + beside(own[name], layer.shape[0]) for name, layer in layers.items() if own[name])


def target_parameters(config: PlanConfig, layers: dict[str, Layer]) -> int | None:
    """The parameter count that `plan.match_params` asks for."""
    if config.match_params is None:
        return None
    return uniform_parameters(layers, config.rank) if config.match_params == "lora" else config.match_params


def check_rank(config: PlanConfig, layers: dict[str, Layer]) -> None:
    """Refuse a rank that no layer can have.

    Raises:
        ConfigError: `plan.rank` is larger than the smaller side of every target layer.
    """
    largest = max(layer_cap(layer) for layer in layers.values())
    if config.rank > largest:
        raise ConfigError(f"plan.rank={config.rank}, but no target layer has a rank above {largest}: choose 1..{largest}")


def layer_alpha(config: PlanConfig, rank: int, whole: int) -> float:
    """PEFT's alpha of a layer, so that alpha / rank is one scale in every layer; or, for `alpha: constant`, the same alpha
    whatever the rank.

    Args:
        rank: the layer's own.
        whole: R, as configured or as solved for.
    """
    if config.alpha == "constant":
        return float(whole)
    return float(rank) if config.alpha == "uniform" else config.alpha / config.rank * rank


def chosen_rank(
    config: PlanConfig, layers: dict[str, Layer], parameters: Callable[[int], int], notes: list[str], what: str = TRAINABLE
) -> int:
    """`plan.rank`, or the rank that trains the number of parameters that `plan.match_params` asks for.

    Args:
        parameters: how many the method trains at a rank; it must not fall.
        notes: what was chosen is added to them.
        what: they are, for the note.
    """
    check_rank(config, layers)
    target = target_parameters(config, layers)
    if target is None:
        return config.rank
    rank = matched_rank(parameters, target, max(layer_cap(layer) for layer in layers.values()))
    notes.append(f"Rank {rank} gives {parameters(rank):,} {what}, nearest to the {target:,} asked for.")
    return rank


def uniform_plan(
    config: PlanConfig,
    context: Context,
    side: Side | None,
    beside: Beside = nothing,
    cap: Cap = layer_cap,
    what: str = TRAINABLE,
    layers: dict[str, Layer] | None = None,
) -> Plan:
    """One rank everywhere, from one end of the score order; None: a start at zero. A layer whose cap is 0 is left as it is.

    Args:
        what: see `chosen_rank`.
        layers: those that are adapted; None: all of the target layers.
    """
    notes: list[str] = []
    adapted = context.layers if layers is None else layers
    rank = chosen_rank(config, context.layers, lambda r: uniform_parameters(adapted, r, beside, cap), notes, what)
    planned = {}
    for name, layer in adapted.items():
        own, directions = min(rank, cap(layer)), []
        if not own:
            continue
        if side is not None:
            assert context.survey is not None
            directions = select(context.survey.directions(name).scores, own, side).tolist()
        alpha = layer_alpha(config, own, rank)
        planned[name] = LayerPlan(own, alpha, layer.block, layer.shape, side, directions, beside(own, layer.shape[0]))
    return Plan(config.method, planned, context.blocks, rank=rank, notes=notes)


def b_alone(plan: Plan) -> Plan:
    """The same plan with A as it begins in every layer: B alone trains."""
    return dataclasses.replace(plan, layers={name: dataclasses.replace(layer, fixed_a=True) for name, layer in plan.layers.items()})
