"""Exported adapter -> a LoRA file for llama.cpp (GGUF)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from farss.errors import FarssError
from farss.files import read_json, read_tensors, whole_file
from farss.structure import PEFT_PREFIX

ARCHITECTURES = {
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "gpt_neox": "GPTNEOX",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
}
"""transformers' names of the architectures whose tensors llama.cpp stores as they are (or permuted, see below)."""
PERMUTED = ("llama", "mistral")
"""llama.cpp rotates neighbouring pairs where transformers rotates halves, so it stores the rows of q and k permuted."""
FULL = {"gemma2": 2, "gemma3_text": 6}
"""Every so manieth block attends to the whole text, for llama.cpp, whatever the configuration says."""
FILE = "adapter.gguf"


def write_gguf(adapter: Path | str, config: Any) -> Path:
    """Write `adapter.gguf` beside an exported adapter.

    Args:
        adapter: an exported adapter's folder.
        config: the base model's configuration from transformers.

    Raises:
        FarssError: the architecture is not one of `ARCHITECTURES`, a layer has no name there, or gguf is missing.
    """
    check_gguf(config)
    import gguf

    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    folder = Path(adapter)
    with whole_file(folder / FILE) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_string(gguf.Keys.General.TYPE, gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(read_json(folder / "adapter_config.json")["lora_alpha"]))
        for key, tensor in read_tensors(folder / "adapter_model.safetensors").items():
            layer, side = _parts(key)
            known = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
            if known is None:
                raise FarssError(f"llama.cpp has no name for {layer}: name other layers in model.targets")
            values = _reordered(tensor, layer, config) if side == "lora_b" else tensor
            writer.add_tensor(f"{known}.{side}", values.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / FILE


def check_gguf(config: Any) -> None:
    """Refuse a base model of which llama.cpp would not know the adapter's layers.

    Raises:
        FarssError: with the architectures that are known; or gguf is missing.
    """
    if find_spec("gguf") is None:
        raise FarssError("a GGUF file needs the package gguf: pip install -e '.[gguf]'")
    if config.model_type not in ARCHITECTURES:
        raise FarssError(f"no GGUF adapter for {config.model_type}: known are {', '.join(ARCHITECTURES)}; export to peft, or merged")
    if every := FULL.get(config.model_type):
        kinds = ["sliding_attention" if place % every else "full_attention" for place in range(1, config.num_hidden_layers + 1)]
        if config.layer_types != kinds:
            raise FarssError(
                f"llama.cpp knows the kinds of a {config.model_type}'s blocks by their places, and those of this model are others, as "
                "after deleting some: export to peft, or merged"
            )


def _parts(key: str) -> tuple[str, str]:
    """`base_model.model.X.lora_A.weight` -> (X, lora_a)."""
    layer, _, side = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
    return layer, side.lower()


def _reordered(b: Tensor, layer: str, config: Any) -> Tensor:
    """Rows of `B [m, r]` in the order in which llama.cpp stores those of the layer."""
    if config.model_type == "gpt_neox" and layer.endswith("query_key_value"):  # head by head in transformers; all q, all k, all v there
        return b.reshape(config.num_attention_heads, 3, -1, b.shape[1]).transpose(0, 1).reshape(b.shape)
    if config.model_type not in PERMUTED:
        return b
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rpartition(".")[2])
    if heads is None:
        return b
    return b.reshape(heads, 2, b.shape[0] // heads // 2, -1).transpose(1, 2).reshape(b.shape)
