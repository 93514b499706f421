"""The only door to model loading, and the only place that knows block names, fused layers and Conv1D."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farss.artifacts import Layer
from farss.config import ModelConfig
from farss.errors import ConfigError, ModelError, nearest


def device_of(config: ModelConfig) -> torch.device:
    """The device that `model.device` means on this machine."""
    if config.device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.zeros(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device={config.device!r} cannot be used on this machine: choose auto or cpu") from error


def multiplies_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has units for matrix products in this precision.

    A CPU without them goes through 16-bit products three to several hundred times slower than through float32 ones.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    try:
        if dtype == torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        # oneDNN says yes to bfloat16 on every x86 CPU with AVX-512, and emulates it where its units are missing
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        units = not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return bool(units and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch that was built without oneDNN, or decides otherwise
        return False


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision in which to compute with values of a precision: float32, which holds them exactly, on a CPU without units for it."""
    return dtype if device.type != "cpu" or multiplies_in(dtype, device) else torch.float32


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """The precision in which the base model's weights are stored (or used, if the configuration says so)."""
    from transformers import AutoConfig

    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    found = getattr(_from_pretrained(AutoConfig, config), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def local_folder(path: str | Path) -> Path:
    """Where a model's files lie: in its folder, or in the hub's cache, from which it was loaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return Path(path)


def check_room(config: ModelConfig, whole: bool) -> None:
    """Find out before anything is done that a training cannot fit: what the weights alone take (on a CPU they may stay in their files).

    Args:
        whole: every weight trains: in float32, with its gradient and AdamW's two averages.

    Raises:
        ConfigError: with what is needed and what is there.
    """
    import psutil

    device = device_of(config)
    if config.quantization != "none" or not (whole or device.type == "cuda"):
        return
    on_gpu = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    count = sum(parameter.numel() for parameter in empty_model(config).parameters())
    each = 16 if whole else loaded_dtype(config).itemsize
    if count * each > there:
        what = "full fine-tuning" if whole else "the model"
        cure = "train adapters instead, with any other method" if whole else "set model.quantization=nf4"
        raise ConfigError(
            f"{what} needs {count * each / 2**30:.0f} GiB for {count:,} weights ({each} bytes each), and the "
            f"{'GPU' if on_gpu else 'machine'} has {there / 2**30:.0f}: {cure}"
        )


def loaded_dtype(config: ModelConfig) -> torch.dtype:
    """The precision that the weights have once they are loaded to compute with."""
    stored = stored_dtype(config)
    return stored if config.dtype != "auto" else computing_dtype(stored, device_of(config))


def load_model(config: ModelConfig, dtype: torch.dtype | None = None, device: torch.device | None = None, as_stored: bool = False) -> Any:
    """Load a causal language model, frozen and in `eval()` mode.

    On a CPU, and in the precision of the files, weights stay in the files until they are used, and the system may drop
    them again: a model larger than memory can be loaded.

    Args:
        config: where it lies and how to load it.
        dtype: overrides `config.dtype` (full fine-tuning trains float32 weights).
        device: overrides `config.device`.
        as_stored: with `config.dtype: auto` keep the precision of the files, even one in which this device cannot compute.

    Raises:
        ModelError: the folder is missing, unreadable or not a supported model.
    """
    from transformers import AutoModelForCausalLM

    place = device or device_of(config)
    wanted = dtype or _dtype(config, place, as_stored)
    if config.quantization != "none" and dtype is None:
        bits = _four_bits(computing_dtype(torch.bfloat16, place))
        model = _from_pretrained(AutoModelForCausalLM, config, dtype=wanted, quantization_config=bits, device_map={"": place})
    else:
        model = _from_pretrained(AutoModelForCausalLM, config, dtype=wanted)
        model = model if is_quantised(model) else model.to(place)
    keep_gradients(model)
    return model.requires_grad_(False).eval()


def _dtype(config: ModelConfig, device: torch.device, as_stored: bool) -> torch.dtype | str:
    """What `model.dtype` means on a device, as transformers is told."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    stored = stored_dtype(config)
    return "auto" if as_stored or computing_dtype(stored, device) == stored else torch.float32


def is_quantised(model: Any) -> bool:
    """Whether transformers loaded a model in a quantised format; such a model stays where it was put."""
    return getattr(model, "hf_quantizer", None) is not None


def _four_bits(dtype: torch.dtype) -> Any:
    """bitsandbytes' NF4, as in QLoRA (Dettmers et al. 2023)."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.quantization=nf4 needs bitsandbytes: pip install -e '.[quantized]'")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's tokenizer; a missing pad token becomes the end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, config)
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer in {config.path} has no end-of-sequence token: set eos_token in tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_pretrained(kind: Any, config: ModelConfig, **options: Any) -> Any:
    check_path(config.path)
    try:
        return kind.from_pretrained(config.path, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"model.path={config.path!r} cannot be read: {_first_sentence(error)}") from error
    except Exception as error:
        if "safetensor" in type(error).__name__.lower():  # safetensors' own error type is not importable by name
            raise ModelError(f"model.path={config.path!r} holds a damaged safetensors file: {error}") from error
        raise


def check_path(path: str) -> None:
    """Refuse an empty path, and a path that is neither a model folder nor could be a hub name."""
    if not path:
        raise ModelError("model.path is empty: give the folder of a model (with config.json) or its name on a hub")
    folder = Path(path)
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        what = "there is no such folder" if not folder.is_dir() else "there is no config.json in it"
        raise ModelError(f"model.path={path!r}: {what}; give the folder of a model in Hugging Face format")


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


# --- structure -------------------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of blocks: the outermost `ModuleList` with the most weights in linear layers.

    Returns:
        Its full name (such as `model.layers`) and the list.

    Raises:
        ModelError: there is none, or the model has an encoder and a decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError("encoder-decoder models are not supported: use a decoder-only or an encoder-only model")
    sizes = {
        name: sum(math.prod(shape_of(module)) for module in modules.modules() if is_linear(module))
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
    }
    if not sizes or not max(sizes.values()):
        raise ModelError(f"{type(model).__name__} has no list of blocks with linear layers: nothing can be adapted")
    best = max(sizes, key=lambda name: (sizes[name], -len(name)))
    return best, model.get_submodule(best)  # type: ignore[return-value]


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes `y = W h (+ b)` with a two-dimensional weight."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores `W^T` (GPT-2's Conv1D)."""
    return type(module).__name__ == "Conv1D"


def is_packed(module: nn.Module) -> bool:
    """Whether a linear layer's weight is quantised."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return not _unscaled(weight) or weight.dim() != 2 or type(weight) not in (Tensor, nn.Parameter)


def _unscaled(weight: Tensor) -> bool:
    """Whether each entry is a number by itself: 8-bit floats are multiplied by scales that lie beside them."""
    return weight.is_floating_point() and weight.element_size() > 1


def holds_packed(model: nn.Module) -> bool:
    """Whether some of a model's weights are quantised."""
    return not all(_unscaled(parameter) for parameter in model.parameters())


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


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights for inference on a CPU, and undo where it has.

    It does so in the first forward pass without gradients, and from then on no gradient comes back through the layer.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            weight: Any = module.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

                weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def target_layers(model: nn.Module, targets: list[str] | None = None) -> dict[str, Layer]:
    """Every linear layer inside the blocks that PEFT can adapt, or those whose name ends in one of `targets`, by full module name.

    Raises:
        ConfigError: a name in `targets` matches no such layer.
    """
    linear = _linear_layers(model)
    taken = _taken_for_experts(model, linear)
    found = {name: layer for name, layer in linear.items() if name not in taken}
    if not targets:
        return found
    suffixes = {name.rsplit(".", 1)[-1] for name in found}
    for target in targets:
        if any(_matches(name, target) for name in taken):
            raise ConfigError(f"model.targets: PEFT takes {target!r} of this model for an expert's, which is not adapted: leave it out")
        if not any(_matches(name, target) for name in found):
            raise ConfigError(f"model.targets: no linear layer is called {target!r}: {nearest(target, suffixes)}")
    return {name: layer for name, layer in found.items() if any(_matches(name, target) for target in targets)}


def _linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer inside the blocks, by full module name."""
    prefix, blocks = find_blocks(model)
    found: dict[str, Layer] = {}
    for index, block in enumerate(blocks):
        for inner, module in block.named_modules():
            if is_linear(module):
                name = ".".join(filter(None, (prefix, str(index), inner)))
                found[name] = Layer(name, index, shape_of(module), float("nan"))
    return found


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
    """What is never adapted inside the blocks: the experts of a mixture, where they are one three-dimensional parameter, and layers
    that PEFT takes for them.

    Returns:
        One sentence a kind of parameter; empty for most models.
    """
    lines = [
        f"Not adapted: {kind} in {count} blocks, {shape[0]} experts in one parameter of shape {shape}."
        for kind, (count, shape) in _in_one_parameter(model).items()
    ]
    prefix, _ = find_blocks(model)
    taken = _taken_for_experts(model, _linear_layers(model))
    kinds = Counter(name.removeprefix(f"{prefix}.").partition(".")[2] for name in taken)
    return lines + [f"Not adapted: {kind} in {count} blocks, which PEFT takes for an expert's." for kind, count in kinds.items()]


def _in_one_parameter(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Three-dimensional parameters inside the blocks: kind -> in how many blocks, and their shape."""
    prefix, _ = find_blocks(model)
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{prefix}.") and parameter.dim() == 3:
            kind = name.removeprefix(f"{prefix}.").partition(".")[2]
            found[kind] = (found.get(kind, (0,))[0] + 1, tuple(parameter.shape))
    return found


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def accepts(model: Any, argument: str) -> bool:
    """Whether the forward of a model, or of the model in a `PeftModel`, takes an argument of this name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, on compact rows; every module's own mode is restored."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with compact_head(model):
            yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def compact_head(model: Any) -> Iterator[None]:
    """Give the output layer contiguous rows.

    Where only the last positions of each row are kept, they are a view with gaps. On CPUs torch multiplies such a view by a copy of
    the whole output weight for each row. For the last 20 of 80 positions of 40 rows on Gemma 3 270M: 8.0 s instead of 3.5 s in
    float32, 54 s instead of 0.9 s in bfloat16.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hook = None if head is None else head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


ORIGINAL = "farss_original"
"""Attribute of a linear layer that holds its own weight while a residual stands in its place."""


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a base model without what PEFT and we put into it."""
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, ORIGINAL):
            state[f"{name.removesuffix('.base_layer')}.weight"] = getattr(module, ORIGINAL)
    return state


def base_fingerprint(model: Any) -> str:
    """The `fingerprint` of a model's untouched base, whether adapters are on it or not."""
    return _hash(base_weights(model.get_base_model() if hasattr(model, "get_base_model") else model))


def fingerprint(model: nn.Module) -> str:
    """Hash of the architecture and of a spread of every weight, independent of the precision it is loaded in
    as long as that precision holds the stored values."""
    return _hash(model.state_dict())


def _hash(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 256)]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(picked.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary and special tokens, but for the padding: many have none, and are given one to train."""
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    entries = json.dumps([sorted(tokenizer.get_vocab().items()), special], default=str)
    return hashlib.sha256(entries.encode()).hexdigest()[:16]


def quiet() -> None:
    """Keep the libraries' own progress bars and notices out of our output."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def layer_shapes(config: ModelConfig) -> tuple[dict[str, Layer], int]:
    """Target layers and number of blocks from `config.json` alone, without loading a weight."""
    model = empty_model(config)
    return target_layers(model, config.targets), len(find_blocks(model)[1])


def empty_model(config: ModelConfig) -> Any:
    """The model without its weights, from `config.json` alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = _from_pretrained(AutoConfig, config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code)
