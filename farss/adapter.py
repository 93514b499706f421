"""Plan + model -> PeftModel.

FARSS, like most methods, starts from a part of the weight itself, `s B0 A0`, which must be taken out of the base for the
adapted model to equal the base at step 0. By default a second, frozen adapter that holds `(A0, -B0)` does that, up to the rounding
of a sum and its difference, and the base stays what it was, so it can be quantised, shared, evaluated and exported to at any time.
`base="residual"` subtracts it from the weights in memory instead, which saves a thin product a step and rounds the
difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farss.artifacts import Plan, Survey
from farss.config import Base
from farss.errors import ConfigError, FarssError, FolderError
from farss.files import read_tensors
from farss.forward import seeded
from farss.methods import METHODS, Regime
from farss.methods.base import Start
from farss.structure import ORIGINAL, check_readable, check_unshared, is_packed, is_transposed, keep_gradients, shape_of, weight_of

TRAINED = "trained"
"""Name of the adapter that trains. It is not PEFT's `default`, so that a checkpoint of somebody's trainer lies in
subfolders: whoever loads the checkpoint as if it were an adapter gets an error and not a wrong model."""
START = "farss_start"
"""Name of the frozen adapter that takes the start out of the base."""


def attach(
    model: nn.Module,
    plan: Plan,
    survey: Survey | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    base: Base = "untouched",
    regime: Regime | None = None,
) -> Any:
    """Put the adapters of a plan on a model.

    Args:
        model: the base model.
        plan: from `make_plan`.
        survey: the survey the plan was made from, for methods that start from singular directions.
        dropout: on the trained adapter's input, and on that of what takes its start out of an untouched base.
        seed: of the random start, where a method has one.
        base: `untouched` takes the start out by a frozen adapter; `residual` subtracts it from the weights in memory.
        regime: of the method, where it has one; it may train more than A and B.

    Returns:
        A `PeftModel`, or the model itself with every weight trainable for full fine-tuning.

    Raises:
        ConfigError: the weights are quantised, and `base` is `residual`.
        ModelError: they are shared by several layers, and `base` is `residual`.
        FarssError: a planned layer gets no adapter, or the plan has directions and no survey is given.
    """
    from peft import get_peft_model

    if not plan.layers:
        return model.requires_grad_(True)
    keep_gradients(model)
    check_readable(model, plan.layers)
    with seeded(seed):
        adapted = get_peft_model(model, lora_config(plan, dropout), adapter_name=TRAINED)
        if missing := [name for name, module in lora_layers(adapted, plan).items() if not hasattr(module, "lora_A")]:
            raise FarssError(
                f"PEFT left {len(missing)} planned layers without an adapter, {missing[0]} the first: choose model.targets without them"
            )
        named = adapted.base_model.model.named_modules()
        if more := [name for name, module in named if hasattr(module, "lora_A") and name not in plan.layers]:
            raise FarssError(
                f"PEFT put adapters on {len(more)} layers whose names end as those of planned ones do, {more[0]} the first: this "
                "architecture is not supported"
            )
        if any(layer.directions for layer in plan.layers.values()):
            if survey is None:
                raise FarssError(f"method {plan.method!r} starts from singular directions: give the survey its plan was made from")
            _begin(adapted, plan, survey, share_dropout=base == "untouched")
            if base == "residual" and START in adapted.peft_config:
                _take_out(adapted, plan)
        for name, module in lora_layers(adapted, plan).items():
            fixed: dict[str, tuple[str, ...]] = {TRAINED: ("lora_A",)} if plan.layers[name].fixed_a else {}
            fixed |= {START: ("lora_A", "lora_B")} if START in module.lora_A else {}
            module.frozen_peft_weight_names = fixed  # PEFT leaves them so whenever an adapter is made active
        for module in lora_layers(adapted, plan).values():  # PEFT has rounded DoRA's lengths to the precision of the base
            if lengths := getattr(module, "lora_magnitude_vector", None):
                known = lengths[TRAINED].weight
                known.data = torch.linalg.norm(weight_of(module.base_layer).float(), dim=1).to(known)
        if regime is not None:
            regime.dress(list(lora_layers(adapted, plan).values()), TRAINED)
    activate(adapted)
    if START in adapted.peft_config:
        adapted.set_adapter = partial(_set_both, adapted)  # which is copied and pickled with the model, as a method is not
    return adapted


def _set_both(self: Any, adapter_name: Any, *more: Any, **options: Any) -> None:
    """PEFT's `set_adapter`, by which trainers make the trained adapter active when they resume: with what takes its start out."""
    type(self).set_adapter(self, adapter_name, *more, **options)
    if adapter_name == TRAINED:
        activate(self)


def check_residual(model: nn.Module, names: Iterable[str], quantised: bool, dtypes: Iterable[torch.dtype], option: str) -> None:
    """Find out before a training that the start cannot be taken out of the weights themselves, or not exactly.

    Args:
        model: with its weights or without.
        names: of the planned layers.
        quantised: the weights are, or will be.
        dtypes: of the planned weights; none where they may be rounded.
        option: how the user chose it.

    Raises:
        ConfigError: the weights are quantised, or would be rounded without their start.
        ModelError: a weight is shared by several layers.
    """
    check_unshared(model, names)
    if quantised:
        raise ConfigError(f"{option}='residual' takes the start out of weights that are quantised: set {option}=untouched")
    if rounded := [dtype for dtype in dtypes if dtype.is_floating_point and dtype != torch.float32]:
        raise ConfigError(
            f"{option}='residual' rounds the weights without their start to {str(rounded[0]).removeprefix('torch.')}, and no adapter "
            f"for the original ones is exact: set {option}=untouched, or load the model in float32"
        )


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
        **METHODS[plan.method].lora_options,
    )


def active_adapters(adapted: Any) -> list[str]:
    """The adapters that count: the frozen one only where the base still holds the start."""
    residual = any(hasattr(module, ORIGINAL) for module in adapted.modules())
    return [name for name in (TRAINED, START) if name in adapted.peft_config and not (residual and name == START)]


def activate(adapted: Any) -> None:
    """Make the right adapters count, and only the trained one train, but for what is fixed of it."""
    adapted.base_model.set_adapter(active_adapters(adapted))
    layers = [module for module in adapted.modules() if "lora_A" in getattr(module, "frozen_peft_weight_names", {}).get(TRAINED, ())]
    fixed = {id(module.lora_A[TRAINED].weight) for module in layers}
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(f".{TRAINED}." in name and "lora_" in name and id(parameter) not in fixed)


def load_trained(adapted: Any, checkpoint: Path) -> None:
    """Take up the weights of a checkpoint of transformers' trainer.

    Raises:
        FolderError: the folder holds none, or those of a model that was prepared otherwise.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    found: dict[str, dict[str, Tensor]] = {}
    for adapter in (name for name in (TRAINED, START) if name in adapted.peft_config):
        place = Path(adapter, "adapter_model.safetensors")
        if not (checkpoint / place).is_file():
            raise FolderError(f"{checkpoint} is no checkpoint of a model from farss.prepare: there is no {place} in it")
        known, saved = get_peft_model_state_dict(adapted, adapter_name=adapter), read_tensors(checkpoint / place)
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (known, saved)]
        if shapes[0] != shapes[1] or (adapter == START and not _alike(known, saved)):
            raise FolderError(
                f"{checkpoint} was trained from another start than this model has: prepare it with the same arguments, seed and folder"
            )
        found[adapter] = saved
    set_peft_model_state_dict(adapted, found[TRAINED], adapter_name=TRAINED)
    activate(adapted)


def _alike(known: dict[str, Tensor], saved: dict[str, Tensor]) -> bool:
    """Whether they are the same but for rounding: some trainers save 16 bits."""
    return all(torch.dist(saved[name].float(), tensor.cpu().float()) <= 0.01 * tensor.norm().cpu() for name, tensor in known.items())


def lora_layers(adapted: Any, plan: Plan) -> dict[str, Any]:
    """PEFT's LoRA module of each planned layer, by the layer's full name in the base model."""
    return {name: adapted.base_model.model.get_submodule(name) for name in plan.layers}


def start_of(plan: Plan, survey: Survey, name: str) -> Start:
    """How the adapter of one layer begins: as its method makes it of the planned directions."""
    layer = plan.layers[name]
    u, v = survey.vectors(name, layer.directions)
    sigma = survey.directions(name).sigma[layer.directions]
    return METHODS[plan.method].start(u, sigma, v, 1.0 if plan.unscaled else layer.scaling)


class _Dropout(nn.Dropout):
    """On the trained adapter's input. The frozen adapter beside it takes what this has made of the same input: `s (B A - B0 A0)` gets it,
    and no noise comes from what was taken out of the base, which would be there before anything is learned."""

    made: tuple[Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        result = super().forward(input)
        self.made = (input, result) if self.training else None
        return result


class _SameDropout(nn.Module):
    """The frozen adapter's."""

    def __init__(self, first: _Dropout) -> None:
        super().__init__()
        self.first = first

    def forward(self, input: Tensor) -> Tensor:
        made, self.first.made = self.first.made, None
        return made[1] if made is not None and made[0] is input else input


def _begin(adapted: Any, plan: Plan, survey: Survey, share_dropout: bool) -> None:
    """Copy each layer's start into the trained adapter, and what leaves the base, negative, into a frozen one; both are
    rounded to the same precision. Dropout is shared where both hold the same."""
    for name in plan.layers:
        start = start_of(plan, survey, name)
        if start.removed is not None and START not in adapted.peft_config:
            adapted.add_adapter(START, lora_config(plan, 0.0))
        module = adapted.base_model.model.get_submodule(name)
        for adapter, part, sign in ((TRAINED, start.trained, 1.0), (START, start.removed, -1.0)):
            if part is not None:
                with torch.no_grad():
                    module.lora_B[adapter].weight.copy_(sign * part[0])
                    module.lora_A[adapter].weight.copy_(part[1])
        both = start.trained is not None and start.removed is not None
        if both and share_dropout and isinstance(dropout := module.lora_dropout[TRAINED], nn.Dropout):
            module.lora_dropout[TRAINED] = first = _Dropout(dropout.p)
            module.lora_dropout[START] = _SameDropout(first)


def _take_out(adapted: Any, plan: Plan) -> None:
    """Subtract the frozen adapter's part from every planned weight, in float32 and then rounded; the original stays beside it."""
    modules = lora_layers(adapted, plan)
    packed = any(is_packed(module.base_layer) for module in modules.values())
    check_residual(adapted.get_base_model(), plan.layers, packed, (), "adapter.base")
    for module in modules.values():
        layer = module.base_layer
        part = module.scaling[START] * module.lora_B[START].weight.detach().float() @ module.lora_A[START].weight.detach().float()
        part = part.T if is_transposed(layer) else part
        setattr(layer, ORIGINAL, layer.weight.data.cpu())  # not twice on a GPU
        layer.weight.data = (layer.weight.data.float() + part).to(layer.weight.dtype)


@contextmanager
def untouched_base(adapted: Any) -> Iterator[None]:
    """The base's own weights for a while, where the start was subtracted from them."""
    layers = [module for module in adapted.modules() if hasattr(module, ORIGINAL)]
    residuals = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = getattr(layer, ORIGINAL).to(layer.weight)  # it does not move with the model
    try:
        yield
    finally:
        for layer, residual in zip(layers, residuals, strict=True):
            layer.weight.data = residual


def adapter_change(adapted: Any, name: str) -> tuple[Tensor, Tensor]:
    """What training changed in one layer, as thin factors on the original weight.

    Returns:
        `(P [m, q], Q [q, n])` in float64 with `dW = P Q`: `q = r` for a start at zero, and `q = 2 r` with
        `dW = s (B A - B0 A0)` for a start that was taken out of the base. Triplets that were pruned are left out.
    """
    module = adapted.base_model.model.get_submodule(name)
    left, right = [], []
    for adapter in (TRAINED, START):
        if adapter in module.lora_A:
            b, a = (_in_float64(side[adapter].weight) for side in (module.lora_B, module.lora_A))
            if adapter in getattr(module, "lora_E", {}):
                values = _in_float64(module.lora_E[adapter].weight).expand(len(a), 1)
                kept = values[:, 0] != 0
                b, a = b[:, kept], (values * a)[kept]
            left.append(module.scaling[adapter] * b)
            right.append(a)
    assert left[0].shape[0] == shape_of(module.base_layer)[0], name
    return torch.cat(left, 1), torch.cat(right, 0)


def _in_float64(weight: Tensor) -> Tensor:
    return (weight.cpu() if weight.device.type == "mps" else weight).detach().double()  # Apple's GPUs have no float64


def changed_weight(adapted: Any, name: str, weight: Tensor) -> Tensor:
    """A layer's weight `W [m, n]` as it was trained, float32.

    With DoRA that is `diag(length / |W + dW|) (W + dW)`, with the norm of each row (Liu et al. 2024, eq. 5).
    """
    left, right = adapter_change(adapted, name)
    result = weight.cpu().float() + (left @ right).float().cpu()
    lengths = getattr(adapted.base_model.model.get_submodule(name), "lora_magnitude_vector", {})
    if TRAINED not in lengths:
        return result
    wanted: Tensor = lengths[TRAINED].weight.detach().float().cpu().reshape(-1)
    rescaled: Tensor = result * (wanted / result.norm(dim=1))[:, None]
    return rescaled
