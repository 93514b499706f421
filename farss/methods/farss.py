"""FARSS: inverse-Fisher ranks from the least important directions in shallow blocks, a fixed rank from the most
important directions in deep blocks (Chen et al., Findings of ACL 2026)."""

from __future__ import annotations

import dataclasses

from farss.artifacts import Layer, LayerPlan, Plan, Side, Survey
from farss.config import PlanConfig
from farss.errors import ConfigError, NumericalError
from farss.maths.directions import select
from farss.maths.ranks import BUDGETS, matched_rank
from farss.methods.base import SURVEY, Context, Method
from farss.methods.uniform import check_rank, layer_alpha, layer_cap, target_parameters, uniform_plan


def plan(config: PlanConfig, context: Context) -> Plan:
    """Ranks (eq. 8-12), sides and directions (eq. 13-17) of every target layer."""
    assert context.survey is not None
    boundary = choose_boundary(config, context.blocks)
    check_rank(config, context.layers)
    notes: list[str] = []
    shallow = shallow_ranks(config, context.layers, boundary, notes)
    deep = deep_rank(config, context.layers, shallow, notes)
    layers = {
        name: plan_layer(config, context.survey, layer, boundary, shallow.get(name, min(deep, layer_cap(layer))), deep)
        for name, layer in context.layers.items()
    }
    return Plan(config.method, layers, context.blocks, boundary, deep, notes, unscaled=config.alpha == "constant")


def everywhere(config: PlanConfig, context: Context, side: Side) -> Plan:
    """The start alone: one rank in every layer, from one end of the scores."""
    return dataclasses.replace(uniform_plan(config, context, side), unscaled=config.alpha == "constant")


def choose_boundary(config: PlanConfig, blocks: int) -> int:
    """The number of shallow blocks: as configured, or a fifth of the blocks.

    A fifth lies between the eighth and the quarter to which the paper confines its search (section 3.1).

    Raises:
        ConfigError: the model has fewer blocks, or the boundary has yet to be found.
    """
    if config.boundary is None:
        return max(1, round(blocks / 5))
    if config.boundary == "auto":
        raise ConfigError(
            "plan.boundary=auto is found by training, which only `farss run`, `farss plan` and `farss boundary` do: "
            "give the number that `farss boundary` chooses"
        )
    if not 1 <= config.boundary <= blocks:
        raise ConfigError(f"plan.boundary={config.boundary}, but the model has {blocks} blocks: choose 1..{blocks}")
    return config.boundary


def shallow_ranks(config: PlanConfig, layers: dict[str, Layer], boundary: int, notes: list[str]) -> dict[str, int]:
    """The rank of each target layer in the shallow blocks. The side is decided by the block index, never by the rank."""
    shallow = [layer for layer in layers.values() if layer.block < boundary]
    if not shallow:
        return {}
    # a weight of zeros has no importance and no direction: as the least important one it would take the others' ranks
    told = [layer for layer in shallow if layer.importance != 0] or shallow
    average, largest = config.shallow_budget
    caps = [min(largest, layer_cap(layer)) for layer in told]
    try:
        ranks = BUDGETS[config.budget]([layer.importance for layer in told], average, config.r_min, caps)
    except ValueError as error:
        raise NumericalError(f"no Fisher information reaches the shallow blocks ({error}): check the training data") from error
    budget = average * len(told)
    if sum(ranks) < budget:
        notes.append(f"The shallow layers got {sum(ranks)} of a budget of {budget} ranks: the rest was lost to rounding and clipping.")
    if sum(ranks) > budget:
        notes.append(
            f"The shallow layers got {sum(ranks)} ranks, more than the budget of {budget}: ranks are rounded, and none is below r_min."
        )
    given = {layer.name: rank for layer, rank in zip(told, ranks, strict=True)}
    return {layer.name: given.get(layer.name, min(config.r_min, layer_cap(layer))) for layer in shallow}


def deep_rank(config: PlanConfig, layers: dict[str, Layer], shallow: dict[str, int], notes: list[str]) -> int:
    """R: as configured, or solved for so that the parameter count matches."""
    target = target_parameters(config, layers)
    if target is None:
        return config.rank
    fixed = sum(rank * sum(layers[name].shape) for name, rank in shallow.items())
    deep = [layer for name, layer in layers.items() if name not in shallow]
    if not deep:
        raise ConfigError("plan.match_params solves for the rank of the deep layers, but every block is shallow: lower plan.boundary")

    def parameters(rank: int) -> int:
        return fixed + sum(min(rank, layer_cap(layer)) * sum(layer.shape) for layer in deep)

    chosen = matched_rank(parameters, target, max(layer_cap(layer) for layer in deep))
    notes.append(f"Deep rank {chosen} gives {parameters(chosen):,} trainable parameters, nearest to the {target:,} asked for.")
    return chosen


def plan_layer(config: PlanConfig, survey: Survey, layer: Layer, boundary: int, rank: int, deep: int) -> LayerPlan:
    """Side and directions of one layer of this rank; `deep` is R."""
    side: Side = config.shallow_directions if layer.block < boundary else config.deep_directions
    directions = select(survey.directions(layer.name).scores, rank, side).tolist()
    return LayerPlan(rank, layer_alpha(config, rank, deep), layer.block, layer.shape, side, directions)


FARSS = Method(
    name="farss",
    title="FARSS (Chen et al., Findings of ACL 2026)",
    needs=SURVEY,
    changes="in the first blocks the smaller ranks the more a layer matters, from the least important directions; in the others rank R, "
    "from the most important ones",
    plan=plan,
    boundary=True,
)
