"""What every method is: facts for the table, what it looks at, how it is planned, how it starts and how it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from farss.artifacts import Layer, LayerPlan, Plan, Side, Survey
from farss.config import PlanConfig
from farss.errors import ConfigError
from farss.maths.directions import factors, select
from farss.maths.ranks import matched_rank


@dataclass(frozen=True)
class Context:
    """What a method may look at. It never sees the model."""

    layers: dict[str, Layer]
    """The target layers."""
    blocks: int
    survey: Survey | None = None
    """Present for methods that need one, or what a `Reading` found, which is written like a survey."""


@dataclass(frozen=True)
class Reading:
    """What a method other than FARSS looks at before it is planned."""

    name: str
    """Of its folder and its step; methods that read the same share it."""
    of: Literal["weights", "task", "knowledge"]
    """The weights alone, or the activations of the training examples, or those of the knowledge text."""
    read: Callable[[Tensor, Tensor | None, int], dict[str, Tensor]]
    """(weight [m, n], activation moment [n, n] or None, how many directions at an end) -> `artifacts.layer_tensors`."""
    reach: int = 1
    """How many times its average rank a layer may get."""


class Start(NamedTuple):
    """How an adapter begins in one layer, each as `B [m, r]` and `A [r, n]`."""

    trained: tuple[Tensor, Tensor] | None
    """None: PEFT's own start, a random A and a zero B."""
    removed: tuple[Tensor, Tensor] | None
    """`s B A` is taken out of the base; None: nothing is."""


def balanced(u: Tensor, sigma: Tensor, v: Tensor, scaling: float) -> Start:
    """Train the chosen part of the weight, `U diag(sigma) V^T`, from where it is (FARSS, eq. 16-17)."""
    part = factors(u, sigma, v, scaling)
    return Start(part, part)


class Regime:
    """What a method does while it trains, beside the loss. Every hook may be left as it is."""

    def dress(self, layers: list[Any], adapter: str) -> None:
        """Add to PEFT's LoRA modules what the method trains beside A and B."""

    def begin(self, model: Any, steps: int) -> None:
        """Training begins, or goes on; it takes `steps` optimiser steps in all."""

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the loss of every optimiser step."""

    def after_step(self, step: int) -> None:
        """An optimiser step is done, and its gradients are still there. The first is step 1."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep for the training to go on to the same result."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up the state of a checkpoint, after `begin`."""


@dataclass(frozen=True)
class Method:
    """One fine-tuning method."""

    name: str
    title: str
    """Paper or source."""
    changes: str
    """What it trains, in a few words."""
    plan: Callable[[PlanConfig, Context], Plan]
    needs: Literal["nothing", "survey"] | Reading = "nothing"
    """What is looked at before it is planned: nothing, the survey of the task, or something simpler."""
    start: Callable[[Tensor, Tensor, Tensor, float], Start] = balanced
    """(u [m, r], sigma [r], v [n, r], scaling) of a layer's chosen directions -> how its adapter begins. Methods that
    choose no directions start as PEFT's LoRA does."""
    regime: Callable[[PlanConfig], Regime] | None = None
    """Makes what happens while it trains; None: nothing beside the loss."""
    lora_options: dict[str, Any] = field(default_factory=dict)
    """Options of PEFT's `LoraConfig`."""
    plain_lora: bool = True
    """Whether the result can be exported as a plain LoRA on the untouched base."""
    boundary: bool = False
    """Whether it treats shallow and deep blocks differently."""

    @property
    def needs_text(self) -> str:
        """`needs`, for the table."""
        if isinstance(self.needs, str):
            return {"nothing": "nothing", "survey": "survey of the task"}[self.needs]
        return {"weights": "the weights", "task": "activations of the task", "knowledge": "activations of knowledge text"}[self.needs.of]


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


def uniform_plan(config: PlanConfig, context: Context, side: Side | None, beside: Callable[[int, int], int] = lambda rank, rows: 0) -> Plan:
    """One rank everywhere, from one end of the score order; None: a start at zero.

    Args:
        beside: (rank, m) -> what is trained beside A and B in a layer.
    """
    notes: list[str] = []
    rank = uniform_rank(config, context.layers, notes)
    layers = {}
    for name, layer in context.layers.items():
        own, directions = min(rank, layer_cap(layer)), []
        if side is not None:
            assert context.survey is not None
            directions = select(context.survey.directions(name).scores, own, side).tolist()
        layers[name] = LayerPlan(own, layer_alpha(config, own), layer.block, layer.shape, side, directions, beside(own, layer.shape[0]))
    return Plan(config.method, layers, context.blocks, rank=rank, notes=notes)
