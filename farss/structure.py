"""Where the blocks, the linear layers and their weights lie in a model: the only place that knows block names, fused layers, packed
weights and Conv1D."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from farss.artifacts import Layer
from farss.errors import ConfigError, ModelError, nearest


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of blocks: the outermost `ModuleList` with the most weights in linear layers.

    Returns:
        Its full name (such as `model.layers`) and the list.

    Raises:
        ModelError: there is none, or the model has an encoder and a decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError("encoder-decoder models are not supported: use a decoder-only model")
    sizes = {
        name: sum(math.prod(shape_of(module)) for module in modules.modules() if is_linear(module))
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
    }
    if not sizes or not max(sizes.values()):
        raise ModelError(f"{type(model).__name__} has no list of blocks with linear layers: nothing can be adapted")
    best = max(sizes, key=lambda name: (sizes[name], -len(name)))
    return best, model.get_submodule(best)  # type: ignore[return-value]


def positions(model: nn.Module) -> int | None:
    """How many positions a model has vectors for, where it learned one for each (GPT-2, OPT); None: it counts as far as it must."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    return limit if limit and any(table.num_embeddings in (limit, limit + 2) for table in tables) else None  # OPT's begin at 2


def check_loaded(model: Any) -> None:
    """Refuse what is no model, such as the name of one.

    Raises:
        ConfigError: with the cure.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}: load it first, with AutoModelForCausalLM.from_pretrained")


def uncompiled(model: Any) -> Any:
    """The model within one from torch.compile, which gives all layers another name; any other as it is."""
    return getattr(model, "_orig_mod", model)


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter on a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes `y = W h (+ b)` with a two-dimensional weight."""
    return (isinstance(module, nn.Linear) and _only_multiplies(module)) or is_transposed(module)


def _only_multiplies(module: nn.Linear) -> bool:
    """Whether a subclass gives one `y [1, m]` for `h [1, n]`, as `nn.Linear` does: Falcon's and quantised layers do, the routers of
    Llama 4 and Phi-3.5-MoE return a choice of experts too."""
    if type(module).forward is nn.Linear.forward or is_packed(module):
        return True
    empty = {name: parameter.to("meta") for name, parameter in module.named_parameters()}
    try:
        output = functional_call(module, empty, torch.empty(1, module.in_features, dtype=module.weight.dtype, device="meta"))
    except (RuntimeError, ValueError, TypeError, IndexError):  # it is called with something else than h
        return False
    return isinstance(output, Tensor) and output.shape == (1, module.out_features)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores `W^T` (GPT-2's Conv1D)."""
    return type(module).__name__ == "Conv1D"


def is_packed(module: nn.Module) -> bool:
    """Whether a linear layer's weight is quantised."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return not holds_numbers(weight) or weight.dim() != 2


def holds_numbers(tensor: Tensor) -> bool:
    """Whether each entry is a number by itself: 8-bit floats are multiplied by scales that lie beside them, and what a library packs may
    call itself bfloat16."""
    return tensor.is_floating_point() and tensor.element_size() > 1 and type(tensor) in (Tensor, nn.Parameter)


def is_sharded(parameter: Tensor) -> bool:
    """Whether a process holds no more than a part of a matrix, as with FSDP and DeepSpeed's ZeRO-3."""
    return parameter.dim() < 2 or not parameter.numel() or hasattr(parameter, "full_tensor")


def holds_packed(model: nn.Module) -> bool:
    """Whether some of a model's weights are quantised."""
    return not all(holds_numbers(parameter) for parameter in model.parameters())


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(m, n) of `W [m, n]`, packed or not."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1], weight.shape[0]


def weight_of(module: nn.Module) -> Tensor:
    """The weight as `W [m, n]`: Conv1D (GPT-2) stores its transpose, and 4-bit weights are dequantised.

    Raises:
        ModelError: the weight is packed in a format that is not understood.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not weight.numel() or weight.is_meta:
        raise ModelError(
            f"a {type(module).__name__} of {shape_of(module)} holds no weights in this process (sharded by ZeRO-3 or FSDP, or not "
            "loaded): prepare the model before it is sharded"
        )
    if not is_packed(module):
        return weight.T if is_transposed(module) else weight
    if type(module).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    if type(weight.data) is not Tensor and callable(getattr(weight, "dequantize", None)) and weight.is_floating_point():
        return weight.dequantize()  # torchao's tensors; a plain tensor's method knows nothing of scales that lie beside it, as FP8's do
    raise ModelError(
        f"a {type(module).__name__} holds packed weights ({weight.dtype}, shape {tuple(weight.shape)}) that cannot be read: "
        "load the model unquantised, or in bitsandbytes' 4-bit format (model.quantization=nf4)"
    )


def check_readable(model: nn.Module, names: Iterable[str]) -> None:
    """Find out before a training that weights are packed in a format from which no adapter could be exported and checked.

    Raises:
        ModelError: as `weight_of` does.
    """
    packed = {type(module): module for name in names if is_packed(module := model.get_submodule(name))}
    for module in packed.values():
        weight_of(module)


def check_unshared(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to write a change of a layer into a weight that other layers use too (Zamba's blocks), which would change those as well;
    adapters beside the weights differ from layer to layer.

    Raises:
        ModelError: with the first such layer.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.removesuffix(".weight").removesuffix(".base_layer"))
    for name in names:
        if others := [user for user in users[id(model.get_submodule(name).weight)] if user != name]:
            raise ModelError(
                f"{name} shares its weight with {others[0]}, so no change of it alone can be written into the weights: hand over an "
                "adapter (export.to=peft, adapter.base=untouched), or name other layers in model.targets"
            )


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights for inference on a CPU, and undo where it has.

    It does so in the first forward pass without gradients, and from then on no gradient comes back through the layer.
    """
    for module in four_bit_layers(model).values():
        module.support_avx512bf16_for_cpu = False
        if _is_rearranged(module):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight = module.weight
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def is_rearranged(model: nn.Module) -> bool:
    """Whether bitsandbytes has done so; what it undoes are not quite the numbers that were there, for it rounds their scales to 16 bits."""
    return any(map(_is_rearranged, four_bit_layers(model).values()))


def _is_rearranged(layer: Any) -> bool:
    return getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that bitsandbytes has made, by their names."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def target_layers(model: nn.Module, targets: list[str] | None = None) -> dict[str, Layer]:
    """Every linear layer inside the blocks that an adapter fits, or those whose name ends in one of `targets`, by full module name.

    Raises:
        ConfigError: a name in `targets` matches no such layer, or it is no list.
        ModelError: the model is spread over several devices.
    """
    if isinstance(targets, str):
        raise ConfigError(f"targets={targets!r} is a text: give a list, such as [{targets!r}], or nothing for every linear layer")
    _check_one_device(model)
    linear = _linear_layers(model)
    unfit = _unfit(model, linear)
    found = {name: layer for name, layer in linear.items() if name not in unfit}
    if not targets:
        return found
    suffixes = {name.rsplit(".", 1)[-1] for name in found}
    for target in targets:
        if reasons := [reason for name, reason in unfit.items() if _matches(name, target)]:
            raise ConfigError(f"model.targets: no adapter fits {target!r} of this model, {reasons[0]}: leave it out")
        if not any(_matches(name, target) for name in found):
            raise ConfigError(f"model.targets: no linear layer is called {target!r}: {nearest(target, suffixes)}")
    return {name: layer for name, layer in found.items() if any(_matches(name, target) for target in targets)}


def _check_one_device(model: nn.Module) -> None:
    """Refuse what accelerate moves about while it computes: weights are read, and blocks called, one at a time and where we want them."""
    places = sorted({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(places) > 1 or "disk" in places:
        raise ModelError(
            f"the model is spread over {', '.join(places)} (device_map): load it on one device, with device_map={{'': 0}} for the "
            "first GPU, or on the CPU without a device_map"
        )


def _linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer inside the blocks, by full module name."""
    prefix, blocks = find_blocks(model)
    found: dict[str, Layer] = {}
    for index, block in enumerate(blocks):
        for inner, module in block.named_modules():
            if isinstance(module, nn.Linear) or is_transposed(module):
                name = ".".join(filter(None, (prefix, str(index), inner)))
                found[name] = Layer(name, index, shape_of(module), float("nan"))
    return found


def _unfit(model: nn.Module, linear: dict[str, Layer]) -> dict[str, str]:
    """The linear layers that no adapter fits, and why, as a relative clause."""
    more = {name: "which does more than a linear layer" for name in linear if not is_linear(model.get_submodule(name))}
    experts = dict.fromkeys(_taken_for_experts(model, linear), "which PEFT takes for an expert's")
    return more | _unfit_in_mamba(model, linear) | experts


def _unfit_in_mamba(model: nn.Module, linear: dict[str, Layer]) -> dict[str, str]:
    """Those of Mamba's state-space mixers whose weights are read past the layer: by the model itself (`dt_proj`), or while it trains by the
    fused kernels, where they are installed. An adapter on them would get no gradient; in some models PEFT refuses them, too."""
    mixers = {name for name, module in model.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")}
    read = [name for name in linear if name.rpartition(".")[0] in mixers and name.endswith((".dt_proj", ".out_proj", ".x_proj"))]
    return dict.fromkeys(read, "whose weight Mamba's kernels read past any adapter")


def _taken_for_experts(model: nn.Module, linear: dict[str, Layer]) -> list[str]:
    """Linear layers that PEFT cannot adapt. In some mixtures (DeepSeek, GLM) it takes every layer with the name of an expert's, in
    dense blocks and in shared experts too, for the experts in one parameter, which are not adapted; whoever loads the adapter has
    that PEFT as well."""
    if not _in_one_parameter(model):
        return []
    from peft import LoraConfig

    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # before PEFT 0.19 names are what they are
        return []
    config = LoraConfig(target_modules=list(linear))
    conversion.convert_peft_config_for_transformers(config, model=model, conversions=None)
    return [name for name in linear if name not in (config.target_modules or ())]


def left_out(model: nn.Module) -> list[str]:
    """What is never adapted inside the blocks: the experts of a mixture, where they are one three-dimensional parameter, and linear
    layers that no adapter fits.

    Returns:
        One sentence a kind of parameter; empty for most models.
    """
    lines = [
        f"Not adapted: {kind} in {count} blocks, {shape[0]} experts in one parameter of shape {shape}."
        for kind, (count, shape) in _in_one_parameter(model).items()
    ]
    prefix, _ = find_blocks(model)
    unfit = _unfit(model, _linear_layers(model))
    kinds = Counter((name.removeprefix(f"{prefix}.").partition(".")[2], reason) for name, reason in unfit.items())
    return lines + [f"Not adapted: {kind} in {count} blocks, {reason}." for (kind, reason), count in kinds.items()]


def _in_one_parameter(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Stacks of matrices inside the blocks, which convolutions and RWKV's vectors `[1, 1, d]` are not: kind -> in how many blocks, and
    their shape."""
    prefix, _ = find_blocks(model)
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        convolution = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
        if name.startswith(f"{prefix}.") and parameter.dim() == 3 and min(parameter.shape) > 1 and not convolution:
            kind = name.removeprefix(f"{prefix}.").partition(".")[2]
            found[kind] = (found.get(kind, (0,))[0] + 1, tuple(parameter.shape))
    return found


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


PEFT_PREFIX = "base_model.model."
"""Before the names of layers in the files of PEFT's adapters."""
ORIGINAL = "farss_original"
"""Attribute of a linear layer that holds its own weight while a residual stands in its place."""


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a base model without what PEFT and we put into it."""
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, ORIGINAL):
            state[f"{name.removesuffix('.base_layer')}.weight"] = getattr(module, ORIGINAL)
    return state
