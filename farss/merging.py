"""Weights + trained change -> a whole model's files, one by one, so that the model may be larger than memory."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from farss.adapter import changed_weight
from farss.artifacts import Plan
from farss.errors import FarssError
from farss.files import opened_tensors, whole_folder, write_json, write_tensors
from farss.forward import attribute
from farss.models import INDEX, PLAIN, local_folder, weight_files
from farss.portable import in_float32, logits
from farss.structure import base_weights, check_unshared, holds_packed, is_transposed

Change = Callable[[str, Tensor], Tensor]
"""(name of a weight, its value) -> its new value."""

COPIED = (".json", ".model", ".txt", ".jinja", ".py", ".tiktoken")
"""Files of a base model that go with one made from it."""
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"
"""A folder of a base model of which the same files go along."""
DAMAGED = "copy or download the model again"
SHARD = 4 * 2**30
"""Bytes of weights in one file, which are held in memory together while it is written."""


def merge(adapted: Any, plan: Plan, tokenizer: Any, folder: Path | str, dtype: torch.dtype, source: Path | str | None = None) -> Path:
    """Write a whole model: the base with the trained change added in float32 (or the fully fine-tuned model).

    Args:
        dtype: of the written weights; where the base's files are merged one by one, theirs stays.
        source: the base model's folder; None: it was made in memory.

    Raises:
        FarssError: the base is quantised.
        ModelError: a changed weight is shared by several layers.
    """
    folder = Path(folder)
    model = adapted.get_base_model() if plan.layers else adapted
    if holds_packed(model):
        raise FarssError(
            "the adapter was trained on quantised weights, and merged into the unquantised ones it would be another model: "
            "serve the adapter on the quantised base, or train with model.quantization=none"
        )
    check_unshared(model, plan.layers)

    with whole_folder(folder) as unfinished:
        change = in_layers(adapted, plan.layers, partial(changed_weight, adapted))
        write_model(model, plan.layers, tokenizer, unfinished, dtype, source, change)
    return folder


def merged_difference(adapted: Any, merged: Any, batch: dict[str, Tensor]) -> float:
    """Largest |logit difference| on real tokens, in float32, between a trained model and the whole model that was written of it:
    what rounding the merged weights costs. The two may lie on different devices."""
    found = []
    for model in (adapted, merged):
        with in_float32(model):
            found.append(logits(model, batch))
    return float((found[0] - found[1]).abs().max())


def write_model(
    model: Any,
    layers: Collection[str],
    tokenizer: Any,
    target: Path,
    dtype: torch.dtype,
    source: Path | str | None,
    change: Change = lambda name, weight: weight,
) -> None:
    """Write a model with changed weights: from the base's files where they have the model's names, from memory otherwise.

    Args:
        layers: those that change; none: all of the model is written from memory.
    """
    base = None if source is None else local_folder(source)
    if base and layers and holds_layers(base, layers):
        _rewrite_files(base, target, change)
        return
    state = base_weights(model) if layers else dict(model.state_dict())
    state = {name: change(name, tensor) for name, tensor in state.items()}
    state = _rounded(model, state, dtype)
    model.config.dtype = dtype
    # The base's file is copied as it is: transformers reads temperatures of models that do not sample, and refuses to write them.
    with attribute(model, "generation_config", model.generation_config.from_model_config(model.config)):
        model.save_pretrained(str(target), state_dict=state)
    if not (base and (base / "tokenizer_config.json").is_file()):  # the base's own has not been given a token for padding
        tokenizer.save_pretrained(str(target))
    if base and base.is_dir():  # a processor's, and a model's own code
        _copy_files(base, target, stays=lambda file: file.name != GENERATION and file.exists())


def _rounded(model: Any, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in the precision of the files. One tensor under two names, such as a tied embedding, stays one, and is written once."""
    found, made = {}, dict[tuple[int, torch.Size], Tensor]()
    for name, tensor in state.items():
        if is_rounded(model, name, tensor, dtype):
            place = tensor.data_ptr(), tensor.shape
            if place not in made:
                made[place] = tensor.to(dtype)
            tensor = made[place]
        found[name] = tensor
    return found


def _copied(source: Path) -> list[Path]:
    """The files of a base that go with a model made from it: no list of its weights, nor Mistral's params.json, which belongs to others."""
    files = [file for file in (*source.iterdir(), *(source / TEMPLATES).glob("*")) if file.suffix in COPIED]
    return sorted(file for file in files if not file.name.endswith(".index.json") and file.name != "params.json")


def _copy_files(source: Path, target: Path, stays: Callable[[Path], bool] = lambda file: False) -> None:
    """Copy them, but where what lies there stays."""
    for file in _copied(source):
        place = target / file.relative_to(source)
        if not stays(place):
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)


def is_rounded(model: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight is written in the precision of the others: some stay float32 when a model is loaded in 16 bits (routers), of these
    some in float16 alone."""
    kept = {*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or () if dtype == torch.float16 else ())}
    return tensor.is_floating_point() and not any(f".{part}." in f".{name}." for part in kept)


def holds_layers(source: Path, layers: Collection[str]) -> bool:
    """Whether the files of a folder hold the weight of every layer under the name it has in the model, as plain numbers."""
    held: dict[str, str] = {}
    for file in weight_files(source):
        with opened_tensors(file, cure=DAMAGED) as tensors:
            held |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (it is no dictionary)
    return all(held.get(f"{name}.weight") in PLAIN for name in layers)


def _rewrite_files(source: Path, target: Path, change: Change) -> None:
    target.mkdir(parents=True)
    _copy_files(source, target)
    with ExitStack() as opened:
        files = [opened.enter_context(opened_tensors(file, cure=DAMAGED)) for file in weight_files(source)]
        held = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        split = split_state_dict_into_shards_factory(
            {name: file.get_slice(name) for name, file in held.items()},
            get_storage_size=_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD,
        )
        for written, names in split.filename_to_tensors.items():
            write_tensors(target / written, {name: change(name, held[name].get_tensor(name)) for name in names}, {"format": "pt"})
    if split.is_sharded:
        write_json(target / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _bytes(values: Any) -> int:
    """Of a weight that is not read yet."""
    bits = re.search(r"\d+", values.get_dtype())  # BOOL has a byte
    return int(math.prod(values.get_shape())) * (int(bits[0]) if bits else 8) // 8


def in_layers(adapted: Any, layers: Collection[str], changed: Callable[[str, Tensor], Tensor]) -> Change:
    """What becomes of a weight where these layers change: `changed(layer, W [m, n])`, float32, rounded once."""

    def change(name: str, weight: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer not in layers or not name.endswith(".weight"):
            return weight
        turned = is_transposed(adapted.base_model.model.get_submodule(layer).base_layer)
        result = changed(layer, weight.T if turned else weight)
        return (result.T if turned else result).to(weight.dtype)

    return change
