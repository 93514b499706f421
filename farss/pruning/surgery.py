"""Taking blocks out of a model: in memory, and written as an ordinary model folder."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import DynamicCache

from farss.config import ModelConfig
from farss.errors import ModelError, first_line
from farss.files import whole_folder
from farss.merging import is_rounded, write_model
from farss.models import empty_of, load_model
from farss.portable import CHECKED_TOKENS, logits
from farss.structure import find_blocks
from farss.survey.passage import Returned, blocks_replaced

PLACE = ("layer_idx", "layer_number", "layer_id", "layer_index", "block_idx")
"""What architectures call a block's place, by which it finds its keys and values in the cache."""
PLACES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "cross_attention_layers", "hybrid_layer_ids")
"""Options that name some of the blocks by their places."""
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Options that say how many of the first blocks are of another kind."""


def delete_blocks(model: Any, gone: Collection[int]) -> None:
    """Take blocks out of a model, in place, and make its configuration that of what is left.

    Args:
        gone: places of the blocks, counted in the model as it is.
    """
    name, blocks = find_blocks(model)
    left = {index: place for place, index in enumerate(index for index in range(len(blocks)) if index not in gone)}
    for index, place in left.items():
        for module in blocks[index].modules():
            for known in PLACE:
                if vars(module).get(known) == index:
                    setattr(module, known, place)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.ModuleList([blocks[index] for index in left]))
    _shorten(model.config.get_text_config(), left, len(blocks))


def _shorten(config: Any, left: dict[int, int], count: int) -> None:
    """Make a configuration that of the blocks that are left, old place -> new one, of so many."""
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and key in PLACES:
            setattr(config, key, [left[index] for index in value if index in left])
        elif isinstance(value, list | tuple) and len(value) == count and not key.endswith(("_token_id", "_ids")) and key != "architectures":
            setattr(config, key, [value[index] for index in left])
        elif isinstance(value, int) and key in FIRST:
            setattr(config, key, sum(index < value for index in left))
    config.num_hidden_layers = len(left)


def check_deletable(architecture: Any, gone: Collection[int], trusted: bool) -> None:
    """Find out without its weights whether a model without some of its blocks can be described by a configuration.

    Args:
        architecture: the model without its weights; it stays as it is.

    Raises:
        ModelError: the architecture makes something else of it, or allows no such model, or it can write nothing, as a hybrid without any
            attention.
    """
    shorter = copy.deepcopy(architecture)
    delete_blocks(shorter, gone)
    try:
        type(shorter.config).from_dict(shorter.config.to_dict())  # as whoever loads it does, who lets transformers look at the values
        described = empty_of(shorter.config, trusted)
        possible = _remembers(shorter) or not _remembers(architecture)
    except (ValueError, StrictDataclassError) as error:
        raise ModelError(f"{_without(architecture, gone)}, and transformers allows no such model ({first_line(error)})") from error
    if not possible:
        raise ModelError(f"{_without(architecture, gone)}, and without any attention left transformers' models of this kind write nothing")
    if _shapes(shorter) != _shapes(described) or _constants(shorter) != _constants(described):
        raise ModelError(
            f"{type(architecture).__name__} derives the kind of each block from its place, so that without some of them it would be "
            "another model: blocks of this architecture cannot be deleted" + (", or not the first (prune.keep_first)" if 0 in gone else "")
        )


def _without(architecture: Any, gone: Collection[int]) -> str:
    blocks = ", ".join(map(str, sorted(gone)))
    return f"the blocks {blocks} of {type(architecture).__name__} would go (other options of prune choose others)"


def _remembers(model: Any) -> bool:
    """Whether the cache of what was read, which knows its length by the blocks with attention, can be made for a model."""
    try:
        DynamicCache(config=model.config.get_text_config()).get_seq_length()
    except ValueError:
        return False
    return True


def _shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _constants(model: Any) -> dict[str, dict[str, Any]]:
    """What else the modules of the blocks were built with: the kind of an attention, or a scale that depends on the place."""
    return {
        name: {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and not key.startswith("_") and key != "training"
        }
        for name, module in find_blocks(model)[1].named_modules()
    }


def _same(found: Any, model: Any, dtype: torch.dtype) -> bool:
    """Whether two models have the same weights, written in a precision, and, with them, the same logits, bit for bit."""
    held, written = model.state_dict(), found.state_dict()
    if held.keys() != written.keys() or not all(torch.equal(tensor, written[name]) for name, tensor in held.items()):
        return False
    if any(tensor.dtype != written[name].dtype for name, tensor in held.items() if is_rounded(model, name, tensor, dtype)):
        return False
    found.load_state_dict(held, assign=True)  # the very same, for sums depend on where in memory a weight begins
    text = model.config.get_text_config()
    count = min(CHECKED_TOKENS, getattr(text, "max_position_embeddings", None) or CHECKED_TOKENS)
    ids = torch.arange(3, 3 + count)[None] % text.vocab_size
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return torch.equal(logits(found, batch), logits(model, batch))


def skipped(model: Any, gone: Collection[int], returned: Returned) -> AbstractContextManager[None]:
    """Hand on what enters some blocks as what leaves them, for a while. `returned`: see `survey.passage.returned_by`."""
    blocks = find_blocks(model)[1]
    return blocks_replaced([blocks[index] for index in gone], lambda index, hidden_states, *args, **kwargs: hidden_states, returned)


def write_shorter(model: Any, tokenizer: Any, folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write a model whose blocks were deleted, and see that plain transformers finds the same in the folder.

    Args:
        dtype: of the weights.

    Raises:
        ModelError: it does not. Nothing is left at `folder`.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():  # not the rotary frequencies, which stay float32 when a model is loaded
        tensor.data = tensor.data.to(dtype) if is_rounded(model, name, tensor, dtype) else tensor.data
    with whole_folder(folder) as unfinished:
        write_model(model, (), tokenizer, unfinished, dtype, Path(config.path))
    found = load_model(replace(config, path=str(folder), dtype="auto"), device=model.device, as_stored=True)
    if not _same(found, model, dtype):
        shutil.rmtree(folder)
        raise ModelError(
            f"{type(model).__name__} without some of its blocks does not come back from its files as it was written: blocks of this "
            "architecture cannot be deleted"
        )
