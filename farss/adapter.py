"""Plan + model -> PeftModel.

FARSS starts from a part of the weight itself, `s B0 A0`, which must be taken out of the base for the adapted model to
equal the base at step 0. By default a second, frozen adapter that holds `(A0, -B0)` does that: exact in any precision, and
the base stays what it was, so it can be quantised, shared, evaluated and exported to at any time. `base="residual"`
subtracts it from the weights in memory instead, which saves a thin product a step and rounds the difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from farss.artifacts import Plan, Survey
from farss.config import Base
from farss.errors import FarssError, ModelError
from farss.maths.directions import factors
from farss.models import ORIGINAL, is_packed, is_transposed, keep_gradients, shape_of

TRAINED = "trained"
"""Name of the adapter that trains. It is not PEFT's `default`, so that a checkpoint of somebody's trainer lies in
subfolders: whoever loads the checkpoint as if it were an adapter gets an error and not a wrong model."""
START = "farss_start"
"""Name of the frozen adapter that takes the start out of the base."""


def attach(
    model: nn.Module, plan: Plan, survey: Survey | None = None, dropout: float = 0.0, seed: int = 0, base: Base = "untouched"
) -> Any:
    """Put the adapters of a plan on a model.

    Args:
        model: the base model.
        plan: from `make_plan`.
        survey: the survey the plan was made from, for methods that start from singular directions.
        dropout: on the trained adapter's input.
        seed: of the random start, where a method has one.
        base: `untouched` takes the start out by a frozen adapter; `residual` subtracts it from the weights in memory.

    Returns:
        A `PeftModel`, or the model itself with every weight trainable for full fine-tuning.

    Raises:
        ModelError: the weights are quantised, and `base` is `residual`.
    """
    from peft import get_peft_model

    if not plan.layers:
        return model.requires_grad_(True)
    keep_gradients(model)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, lora_config(plan, dropout), adapter_name=TRAINED)
    if any(layer.directions for layer in plan.layers.values()):
        if survey is None:
            raise FarssError(f"method {plan.method!r} starts from singular directions: give the survey its plan was made from")
        adapted.add_adapter(START, lora_config(plan, 0.0))
        _copy_start(adapted, plan, survey)
        if base == "residual":
            _take_out(adapted, plan)
    activate(adapted)
    return adapted


def lora_config(plan: Plan, dropout: float) -> Any:
    """PEFT's configuration of a plan: a rank and an alpha for each layer."""
    from peft import LoraConfig

    # PEFT matches pattern keys as regular expressions at the end of a module's name.
    ranks = {re.escape(name): layer.rank for name, layer in plan.layers.items()}
    alphas = {re.escape(name): layer.alpha for name, layer in plan.layers.items()}
    return LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(alphas.values()),  # type: ignore[arg-type]  # PEFT divides it as it is
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=list(plan.layers),
        lora_dropout=dropout,
        fan_in_fan_out=False,
        bias="none",
        task_type="CAUSAL_LM",
    )


def active_adapters(adapted: Any) -> list[str]:
    """The adapters that count: the frozen one only where the base still holds the start."""
    residual = any(hasattr(module, ORIGINAL) for module in adapted.modules())
    return [name for name in (TRAINED, START) if name in adapted.peft_config and not (residual and name == START)]


def activate(adapted: Any) -> None:
    """Make the right adapters count, and only the trained one train."""
    adapted.base_model.set_adapter(active_adapters(adapted))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(f".{TRAINED}." in name and "lora_" in name)


def lora_layers(adapted: Any, plan: Plan) -> dict[str, Any]:
    """PEFT's LoRA module of each planned layer, by the layer's full name in the base model."""
    return {name: adapted.base_model.model.get_submodule(name) for name in plan.layers}


def start_factors(plan: Plan, survey: Survey, name: str) -> tuple[Tensor, Tensor]:
    """`B0 [m, r]` and `A0 [r, n]` (float64) of one layer, with `s B0 A0` the chosen part of its weight (eq. 16-17)."""
    layer = plan.layers[name]
    u, v = survey.vectors(name, layer.directions)
    sigma = survey.directions(name).sigma[layer.directions]
    return factors(u, sigma, v, layer.scaling)


def _copy_start(adapted: Any, plan: Plan, survey: Survey) -> None:
    """Copy `(A0, B0)` into the trained adapter and `(A0, -B0)` into the frozen one, rounded to the same precision."""
    for name, module in lora_layers(adapted, plan).items():
        b, a = start_factors(plan, survey, name)
        with torch.no_grad():
            for adapter, sign in ((TRAINED, 1.0), (START, -1.0)):
                module.lora_A[adapter].weight.copy_(a)
                module.lora_B[adapter].weight.copy_(sign * b)


def _take_out(adapted: Any, plan: Plan) -> None:
    """Subtract the start from every planned weight, in float32 and then rounded; the original stays beside it."""
    for name, module in lora_layers(adapted, plan).items():
        layer = module.base_layer
        if is_packed(layer):
            raise ModelError(f"{name} is quantised: nothing can be subtracted from it; set adapter.base=untouched")
        start = module.scaling[TRAINED] * module.lora_B[TRAINED].weight.detach().float() @ module.lora_A[TRAINED].weight.detach().float()
        start = start.T if is_transposed(layer) else start
        setattr(layer, ORIGINAL, layer.weight.data)
        layer.weight.data = (layer.weight.data.float() - start).to(layer.weight.dtype)


@contextmanager
def untouched_base(adapted: Any) -> Iterator[None]:
    """The base's own weights for a while, where the start was subtracted from them."""
    layers = [module for module in adapted.modules() if hasattr(module, ORIGINAL)]
    residuals = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = getattr(layer, ORIGINAL).to(layer.weight.dtype)
    try:
        yield
    finally:
        for layer, residual in zip(layers, residuals, strict=True):
            layer.weight.data = residual


def adapter_change(adapted: Any, plan: Plan, name: str) -> tuple[Tensor, Tensor]:
    """What training changed in one layer, as thin factors on the original weight.

    Returns:
        `(P [m, q], Q [q, n])` in float64 with `dW = P Q`: `q = r` for a start at zero, and `q = 2 r` with
        `dW = s (B A - B0 A0)` for a start that was taken out of the base.
    """
    module = adapted.base_model.model.get_submodule(name)
    left, right = [], []
    for adapter in (TRAINED, START):
        if adapter in module.lora_A:
            left.append(module.scaling[adapter] * module.lora_B[adapter].weight.detach().double())
            right.append(module.lora_A[adapter].weight.detach().double())
    assert left[0].shape[0] == shape_of(module.base_layer)[0], name
    return torch.cat(left, 1), torch.cat(right, 0)
