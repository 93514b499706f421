"""What every method is: facts for the table, and a function that plans it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from farss.artifacts import Layer, LayerPlan, Plan, Side, Survey
from farss.config import PlanConfig
from farss.errors import ConfigError
from farss.maths.directions import select
from farss.maths.ranks import matched_rank


@dataclass(frozen=True)
class Context:
    """What a method may look at. It never sees the model."""

    layers: dict[str, Layer]
    """The target layers."""
    blocks: int
    survey: Survey | None = None
    """Present for methods that need one, or the weights' singular directions, which are a survey with A = G = I."""


@dataclass(frozen=True)
class Method:
    """One fine-tuning method."""

    name: str
    title: str
    """Paper or source."""
    needs: Literal["nothing", "weights", "survey"]
    """What is looked at before it is planned: nothing, the weights' singular directions, or the survey of the task."""
    changes: str
    """What it trains, in a few words."""
    plain_lora: bool
    """Whether the result can be exported as a plain LoRA on the untouched base."""
    plan: Callable[[PlanConfig, Context], Plan]
    boundary: bool = False
    """Whether it treats shallow and deep blocks differently."""


def layer_cap(layer: Layer) -> int:
    """The largest rank that means anything: min(m, n)."""
    return min(layer.shape)


def uniform_parameters(layers: dict[str, Layer], rank: int) -> int:
    """Trainable parameters of a LoRA with one rank everywhere."""
    return sum(min(rank, layer_cap(layer)) * sum(layer.shape) for layer in layers.values())


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


def layer_alpha(config: PlanConfig, rank: int) -> float:
    """PEFT's alpha of a layer of this rank, so that alpha / rank is one scale in every layer; or, for
    `alpha: constant`, the same alpha whatever the rank."""
    if config.alpha == "constant":
        return float(config.rank)
    return float(rank) if config.alpha == "uniform" else config.alpha / config.rank * rank


def uniform_rank(config: PlanConfig, layers: dict[str, Layer], notes: list[str]) -> int:
    """`plan.rank`, or the one rank that gives the parameters that `plan.match_params` asks for."""
    check_rank(config, layers)
    target = target_parameters(config, layers)
    if target is None:
        return config.rank
    rank = matched_rank(lambda r: uniform_parameters(layers, r), target, max(layer_cap(layer) for layer in layers.values()))
    notes.append(f"Rank {rank} gives {uniform_parameters(layers, rank):,} trainable parameters, nearest to the {target:,} asked for.")
    return rank


def uniform_plan(config: PlanConfig, context: Context, side: Side | None) -> Plan:
    """One rank everywhere, from one end of the score order; None: a start at zero."""
    notes: list[str] = []
    rank = uniform_rank(config, context.layers, notes)
    layers = {}
    for name, layer in context.layers.items():
        own, directions = min(rank, layer_cap(layer)), []
        if side is not None:
            assert context.survey is not None
            directions = select(context.survey.directions(name).scores, own, side).tolist()
        layers[name] = LayerPlan(own, layer_alpha(config, own), layer.block, layer.shape, side, directions)
    return Plan(config.method, layers, context.blocks, rank=rank, notes=notes)
