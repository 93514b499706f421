"""What every method is: facts for the table, what it looks at, how it is planned, how it starts and how it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from farss.artifacts import Layer, Plan, Survey, layer_tensors
from farss.config import PlanConfig
from farss.errors import ConfigError
from farss.maths.directions import factors


@dataclass(frozen=True)
class Context:
    """What a method may look at. It never sees the model."""

    layers: dict[str, Layer]
    """The target layers."""
    blocks: int
    survey: Survey | None = None
    """What the method's `Reading` found; None where it looks at nothing."""


Over = Literal["tokens", "answers", "examples"]
"""See `Reading.over`."""


@dataclass(frozen=True)
class Reading:
    """What a method looks at before it is planned. What is found is written as a survey."""

    name: str
    """Of its folder and its step; methods that read the same share it."""
    of: Literal["survey", "weights", "task", "knowledge", "both", "gradients"]
    """FARSS's statistics of the task; the weights alone, or the activations of the training examples, or those of the knowledge text; or
    what both say, the training examples with the gradients behind their activations; or the squared gradients of whole blocks."""
    read: Callable[..., dict[str, Tensor]] | None = None
    """(weight [m, n], how many directions at an end, *moments [n, n]) -> `artifacts.layer_tensors`; a moment for each of the `texts`.
    None: see `survey.survey` and `survey.gradients`."""
    reach: int = 1
    """How many times its average rank a layer may get."""
    over: Over = "tokens"
    """What the moment is taken over: all real tokens; the tokens that are learnt, whose covariance it is; or examples (CorDA's)."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What goes through the model."""
        return {"survey": ("task",), "gradients": ("task",), "weights": (), "both": ("task", "knowledge")}.get(self.of, (self.of,))

    @property
    def has_directions(self) -> bool:
        """Whether there are directions among what is found, from which an adapter may start."""
        return self.of != "gradients"

    @property
    def in_parts(self) -> bool:
        """Whether several processes share it: it goes through the blocks with gradients."""
        return self.of in ("survey", "both", "gradients")


SURVEY = Reading("survey", "survey")
"""The Kronecker-factored Fisher statistics of the task."""


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


def from_directions(u: Tensor, sigma: Tensor, v: Tensor, scaling: float) -> Start:
    """`A = V^T` and `B = 0`: the base stays whole."""
    return Start((torch.zeros_like(u), v.T), None)


def of_the_inputs(weight: Tensor, scores: Tensor, v: Tensor) -> dict[str, Tensor]:
    """What is kept of a layer for `from_directions`: directions of its inputs `v [n, c]` and their scores `[c]`, descending."""
    count = len(scores)
    return layer_tensors(torch.ones(count), torch.arange(count), weight.new_zeros(weight.shape[0], count), v, lam=scores)


class Regime:
    """What a method does while it trains, beside the loss. Every hook may be left as it is."""

    def dress(self, layers: list[Any], adapter: str) -> None:
        """Add to PEFT's LoRA modules what the method trains beside A and B."""

    def optimizer(self, made: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """What trains it, instead of the trainer's AdamW. A schedule multiplies the learning rate of each group by the same."""
        return made

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
    needs: Reading | None = None
    """What is looked at before it is planned."""
    start: Callable[[Tensor, Tensor, Tensor, float], Start] = balanced
    """(u [m, r], sigma [r], v [n, r], scaling) of a layer's chosen directions -> how its adapter begins. Methods that
    choose no directions start as PEFT's LoRA does, or as their regime dresses it."""
    regime: Callable[[PlanConfig, Plan], Regime] | None = None
    """Makes what happens while it trains with a plan; None: nothing beside the loss."""
    lora_options: dict[str, Any] = field(default_factory=dict)
    """Options of PEFT's `LoraConfig`."""
    plain_lora: bool = True
    """Whether the result can be exported as a plain LoRA on the untouched base."""
    fixed_a: bool = False
    """Whether A stays as it begins although the start is taken out of the base."""
    boundary: bool = False
    """Whether it treats shallow and deep blocks differently."""

    @property
    def takes_out(self) -> bool:
        """Whether the base is left without what an adapter starts from."""
        return self.needs is not None and self.needs.has_directions and self.start is not from_directions

    @property
    def needs_text(self) -> str:
        """`needs`, for the table."""
        if self.needs is None:
            return "nothing"
        return {
            "survey": "a survey of the task",
            "weights": "the weights",
            "task": "activations of the task",
            "knowledge": "activations of knowledge text",
            "gradients": "the task's gradients",
            "both": "gradients of the task, and activations of knowledge text",
        }[self.needs.of]


def check_elsewhere(method: Method) -> None:
    """Refuse what only the trainer of `farss train` can do.

    Raises:
        ConfigError: the method trains the model itself or by rules of its own, or becomes no plain LoRA.
    """
    if method.name == "full":
        raise ConfigError("method 'full' trains the model itself: there is nothing to prepare")
    if method.regime is not None:
        raise ConfigError(f"method {method.name!r} trains by rules of its own, which no other trainer knows: use `farss run`")
    if not method.plain_lora:
        raise ConfigError(f"method {method.name!r} becomes no plain LoRA: use `farss run`, which hands over a whole model")
