"""The only door to model loading: where a model lies, on which device and in which precision it is loaded, and which one it is."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from farss.artifacts import Layer
from farss.config import ModelConfig
from farss.errors import ConfigError, ModelError, first_line
from farss.files import read_json
from farss.forward import Stop, evaluating, hooked, leaving, unwrapped, without_cache
from farss.memory import give_back, memory_of_machine
from farss.precision import computing_dtype
from farss.structure import base_weights, find_blocks, four_bit_layers, has_adapter, keep_gradients, target_layers

log = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
PLAIN = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types that hold numbers as they are, by their names in safetensors."""


def device_of(config: ModelConfig) -> torch.device:
    """The device that `model.device` means on this machine."""
    if config.device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.zeros(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device={config.device!r} cannot be used on this machine: choose auto or cpu") from error


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """The precision in which the base model's weights are stored (or used, if the configuration says so)."""
    from transformers import AutoConfig

    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    found = getattr(_from_pretrained(AutoConfig, config), "dtype", None)
    return found if isinstance(found, torch.dtype) else _dtype_in_files(local_folder(config.path))


def _dtype_in_files(folder: Path) -> torch.dtype:
    """The precision of the first weights in a folder, which is what transformers goes by where `config.json` names none."""
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                kinds = [tensors.get_slice(name).get_dtype() for name in tensors.keys()]  # noqa: SIM118 (it is no dictionary)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model.path={str(folder)!r}: {file.name} is missing or damaged ({first_line(error)})") from error
        if found := next((PLAIN[kind] for kind in kinds if kind in PLAIN), None):
            return found
    return torch.float32


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


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers loads a folder's weights: one, or else those of the index, which may have stayed behind. Others,
    such as Mistral's `consolidated.safetensors`, hold them once more under other names."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.is_file():
        return [single]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))] if index.is_file() else []


def check_room(config: ModelConfig, whole: bool, instead: str = "") -> None:
    """Find out before anything is done that a training cannot fit: what the weights alone take (on a CPU they may stay in their files).

    Args:
        whole: every weight trains: in float32, with its gradient and AdamW's two averages.
        instead: what to do where that does not fit; empty: train adapters.

    Raises:
        ConfigError: with what is needed and what is there.
    """
    device = device_of(config)
    small = config.quantization != "none" or _stored(config) is not None  # what those take is not known before they are loaded
    if not whole and (small or device.type != "cuda"):
        return
    on_gpu = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else memory_of_machine()[1]
    count = sum(parameter.numel() for parameter in empty_model(config).parameters())
    each = 16 if whole else loaded_dtype(config).itemsize
    if count * each > there:
        what = "training every weight" if whole else "the model"
        cure = instead or "train adapters instead, with any other method" if whole else "set model.quantization=nf4"
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

    give_back()  # the model before, or two would be in memory
    place = device or device_of(config)
    wanted = dtype or _dtype(config, place, as_stored)
    options: dict[str, Any] = {}
    if config.quantization != "none" and dtype is None:
        options["quantization_config"] = _four_bits(computing_dtype(torch.bfloat16, place))
    if options or _stored(config) is not None:
        options["device_map"] = {"": place}  # what is quantised is not moved afterwards
    # a weight of another shape than config.json says is named by us
    found = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _from_pretrained(AutoModelForCausalLM, config, dtype=wanted, **found, **options)
    if has_adapter(model):
        raise ModelError(f"model.path={config.path!r} is an adapter: name its base model, or merge the two first")
    _check_weights(model, info, config)
    model = model if is_quantised(model) else model.to(place)
    keep_gradients(model)
    model = model.requires_grad_(False).eval()
    if not as_stored:  # which need not compute here
        check_causal(model)
    return model


def _check_weights(model: Any, info: dict[str, Any], config: ModelConfig) -> None:
    """Refuse a model of which some weights are random numbers, for its files do not hold them; others each time it is loaded.

    Raises:
        ModelError: with the first.
    """
    for name, layer in four_bit_layers(model).items():
        if getattr(layer.weight, "quant_state", None) is None:  # of a merged model
            raise ModelError(
                f"model.path={config.path!r}: config.json there says that the weights have 4 bits (quantization_config), and those of "
                f"{name} have not: take that entry out"
            )
    for name, there, wanted in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"model.path={config.path!r}: {name} has the shape {[*there]}, and config.json there wants {[*wanted]}: "
            "take the two from one model"
        )
    if missing := sorted(set(info["missing_keys"]) & dict(model.named_parameters()).keys()):
        raise ModelError(
            f"model.path={config.path!r} holds no {missing[0]}, and {len(missing)} of its weights are missing in all: copy or download "
            "the model again"
        )
    prefix, blocks = find_blocks(model)
    beyond = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in info["unexpected_keys"])
    if unused := {int(found[1]) for found in beyond if found and int(found[1]) >= len(blocks)}:
        held = len(blocks) + len(unused)
        log.warning(f"model.path={config.path!r} holds weights of {held} blocks, of which its config.json names the first {len(blocks)}.")


def check_causal(model: Any) -> None:
    """Refuse a model that reads ahead (BERT, RoBERTa): whoever trains it as a language model shows it the answers it is to predict.

    Four tokens go through the first block. No gradient of what it says of the first three may reach the fourth.

    Raises:
        ModelError: one does.
    """
    found: list[Tensor] = []

    def embedded(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_(True))
        return found[0].clone()  # CTRL scales it in place

    def left(block: nn.Module, args: Any, output: Any) -> None:
        found.append(leaving(output))
        raise Stop

    embeddings, blocks = model.get_input_embeddings(), find_blocks(model)[1]
    tokens = torch.arange(4, device=model.device)[None] + embeddings.weight.shape[0] // 2
    with (
        evaluating(model),
        hooked([embeddings.register_forward_hook(embedded), blocks[0].register_forward_hook(left)]),
        torch.enable_grad(),
        suppress(Stop),
    ):
        model(input_ids=tokens, **without_cache(model))
    states, after = found
    if not after.requires_grad or 4 not in after.shape:  # nothing can be said of it
        return
    before, behind = (found.shape.index(4) for found in (states, after))  # DeepSeek 4 hands on [b, t, 4, d], XLNet [t, b, d]
    (gradient,) = torch.autograd.grad(after.narrow(behind, 0, 3)[..., 0].sum(), states)
    if (gradient.select(before, 3).abs() > 0).any():  # NaN is another fault, which others name
        raise ModelError(
            f"{type(model).__name__} reads ahead: what it says of a token depends on the tokens that follow, so it would be trained with "
            "the answers before its eyes. Use a decoder-only (causal) model"
        )


def _dtype(config: ModelConfig, device: torch.device, as_stored: bool) -> torch.dtype | str:
    """What `model.dtype` means on a device, as transformers is told."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    stored = stored_dtype(config)
    return "auto" if as_stored or computing_dtype(stored, device) == stored else torch.float32


def is_quantised(model: Any) -> bool:
    """Whether transformers loaded a model in a quantised format; such a model stays where it was put."""
    return getattr(model, "hf_quantizer", None) is not None


def quantization_of(model: Any) -> str:
    """As `model.quantization` names what a model was loaded in: `nf4`, another format's name, or `none`."""
    found: Any = getattr(model.config, "quantization_config", None) if is_quantised(model) else None
    if getattr(found, "load_in_4bit", False):
        return str(found.bnb_4bit_quant_type)
    method = "int8" if getattr(found, "load_in_8bit", False) else getattr(found, "quant_method", "unknown")
    return "none" if found is None else str(getattr(method, "value", method))


def will_be_quantised(config: ModelConfig) -> bool:
    """Whether a model's weights will be quantised, by us or in its files. Formats that transformers turns into numbers on some machines
    (MXFP4, 8-bit floats) are known when they are loaded, and not before."""
    if config.quantization != "none":
        return True
    stored = _stored(config)
    return stored is not None and stored.get("quant_method") not in ("mxfp4", "fp8")


def _stored(config: ModelConfig) -> dict[str, Any] | None:
    """How a model's files are quantised, in transformers' words; None: they are not."""
    from transformers import AutoConfig

    found = getattr(_from_pretrained(AutoConfig, config), "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _four_bits(dtype: torch.dtype) -> Any:
    """bitsandbytes' NF4, as in QLoRA (Dettmers et al. 2023)."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.quantization=nf4 needs bitsandbytes: pip install -e '.[quantized]'")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's tokenizer; a missing pad token becomes the end-of-sequence token."""
    from transformers import AutoTokenizer

    check_path(config.path)
    try:
        # with mistral-common installed transformers would give its own kind, which knows no chat template and lm_eval does not take
        tokenizer = _from_pretrained(AutoTokenizer, config, mistral_format=False)
    except ModelError as error:
        if not Path(config.path).is_dir():
            raise
        reason = first_line(error.__cause__ or error).rstrip(": ")
        raise ModelError(
            f"the tokenizer in {config.path} cannot be read ({reason}): copy the model's tokenizer.json and tokenizer_config.json there"
        ) from error
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer in {config.path} has no end-of-sequence token: set eos_token in tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_pretrained(kind: Any, config: ModelConfig, **options: Any) -> Any:
    check_path(config.path)
    try:
        return kind.from_pretrained(config.path, trust_remote_code=config.trust_remote_code, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError, StrictDataclassError) as error:
        reason = first_line(error.__cause__ or error if isinstance(error, StrictDataclassError) else error)
        if not Path(config.path).exists():
            raise ModelError(
                f"model.path={config.path!r} is no folder here, and cannot be read from a hub ({reason}): check the path, the name and "
                "the network; a gated model wants its licence accepted, and `hf auth login`"
            ) from error
        raise ModelError(f"model.path={config.path!r} cannot be read: {reason}") from error
    except SafetensorError as error:
        raise ModelError(f"model.path={config.path!r} holds a damaged safetensors file: {error}") from error
    except ImportError as error:  # of the package that its quantisation needs
        raise ModelError(f"model.path={config.path!r} cannot be loaded as this environment is: {first_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # which is all that tokenizers says of a file that it does not know
            raise
        raise ModelError(f"model.path={config.path!r} cannot be read: {first_line(error)}") from error


def check_path(path: str) -> None:
    """Refuse an empty path, and a path that is neither a model folder nor could be a hub name."""
    if not path:
        raise ModelError("model.path is empty: give the folder of a model (with config.json) or its name on a hub")
    folder = Path(path)
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        what = "there is no such folder" if not folder.is_dir() else "there is no config.json in it"
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"model.path={path!r} is an adapter: give the folder of its base model, or merge the two first")
        raise ModelError(f"model.path={path!r}: {what}; give the folder of a model in Hugging Face format")
    if (folder / "adapter_config.json").is_file():  # transformers would load the model that it names, with the adapter on it
        raise ModelError(
            f"model.path={path!r} holds an adapter beside a model (adapter_config.json): move that file away, or merge the two first"
        )


def base_fingerprint(model: Any) -> str:
    """The `weights_fingerprint` of a model's untouched base, whether adapters are on it or not."""
    return tensors_fingerprint(base_weights(unwrapped(model)))


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of the names and shapes of all weights and of a spread of every one, independent of the precision it is loaded in
    as long as that precision holds the stored values."""
    return tensors_fingerprint(model.state_dict())


def tensors_fingerprint(state: dict[str, Tensor]) -> str:
    """Hash of the names and shapes of tensors and of a spread of every one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().reshape(-1)
        picked = flat[:: (flat.numel() // 256) | 1]  # odd, so that it goes through the columns of a matrix and not down one of them
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(picked.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary and special tokens, but for the padding: many have none, and are given one to train."""
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    entries = json.dumps([sorted(tokenizer.get_vocab().items()), special], default=str)
    return hashlib.sha256(entries.encode()).hexdigest()[:16]


@contextmanager
def hushed() -> Iterator[None]:
    """Keep transformers' notices out of our output for a while."""
    from transformers import logging as notices

    before = notices.get_verbosity()
    notices.set_verbosity_error()
    try:
        yield
    finally:
        notices.set_verbosity(before)


def quiet() -> None:
    """Keep the libraries' own progress bars and notices out of our output."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "huggingface_hub"):  # the second tells of each of its retries
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def layer_shapes(config: ModelConfig) -> tuple[dict[str, Layer], int]:
    """Target layers and number of blocks from `config.json` alone, without loading a weight."""
    model = empty_model(config)
    return target_layers(model, config.targets), len(find_blocks(model)[1])


def empty_model(config: ModelConfig) -> Any:
    """The model without its weights, from `config.json` alone."""
    from transformers import AutoConfig

    return empty_of(_from_pretrained(AutoConfig, config), config.trust_remote_code)


def empty_of(architecture: Any, trusted: bool) -> Any:
    """The model without its weights that a configuration of transformers describes."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(architecture, trust_remote_code=trusted)
    except KeyError as error:
        raise ModelError(f"the model's config.json names {error}, which transformers does not know: mend it") from error
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        if not (isinstance(error, ValueError) and "AutoModelForCausalLM" in str(error)):
            raise ModelError(f"the model cannot be built from its config.json in this environment: {first_line(error)}") from error
        kind = getattr(architecture, "model_type", type(architecture).__name__)
        raise ModelError(f"a model of type {kind!r} writes no text one token after the other: name a causal language model") from error
