"""Taking blocks out of a model: in memory, and written as an ordinary model folder."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farss.artifacts import Plan
from farss.config import ModelConfig
from farss.errors import ModelError
from farss.forward import attribute, evaluating, without_cache
from farss.merging import is_rounded, merge
from farss.models import empty_of, load_model
from farss.structure import find_blocks

PLACE = ("layer_idx", "layer_number", "layer_id", "layer_index", "block_idx")
"""What architectures call a block's place, by which it finds its keys and values in the cache."""
PLACES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "cross_attention_layers", "hybrid_layer_ids")
"""Options that name some of the blocks by their places."""
FIRST = ("first_k_dense_replace",)
"""Options that say how many of the first blocks are of another kind."""
TRIED = 64
"""Tokens on which what was written is compared with what is in memory."""


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
        ModelError: the architecture makes something else of it.
    """
    shorter = copy.deepcopy(architecture)
    delete_blocks(shorter, gone)
    described = empty_of(shorter.config, trusted)
    if _shapes(shorter) != _shapes(described) or _constants(shorter) != _constants(described):
        raise ModelError(
            f"{type(architecture).__name__} derives the kind of each block from its place, so that without some of them it would be "
            "another model: blocks of this architecture cannot be deleted"
        )


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


@contextmanager
def skipped(model: Any, gone: Collection[int], returned: int) -> Iterator[None]:
    """Hand on what enters some blocks as what leaves them, for a while.

    Args:
        returned: see `survey.passage.returned_by`.
    """

    def passed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (returned - 1)) if returned else hidden_states

    blocks = find_blocks(model)[1]
    with ExitStack() as stack:
        for index in gone:
            stack.enter_context(attribute(blocks[index], "forward", passed))
        yield


def write_shorter(model: Any, tokenizer: Any, folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write a model whose blocks were deleted, and see that plain transformers finds the same in the folder.

    Args:
        dtype: of the weights.

    Raises:
        ModelError: it does not. Nothing is left at `folder`.
    """
    blocks = len(find_blocks(model)[1])
    for name, tensor in model.state_dict(keep_vars=True).items():  # not the rotary frequencies, which stay float32 when a model is loaded
        tensor.data = tensor.data.to(dtype) if is_rounded(model, name, tensor) else tensor.data
    merge(model, Plan("full", {}, blocks), tokenizer, folder, dtype, config.path)
    found = load_model(replace(config, path=str(folder), dtype="auto"), device=model.device, as_stored=True)
    ids = torch.arange(3, 3 + TRIED, device=model.device)[None] % model.config.get_text_config().vocab_size
    if _shapes(found) != _shapes(model) or not torch.equal(_logits(found, ids), _logits(model, ids)):
        shutil.rmtree(folder)
        raise ModelError(
            f"{type(model).__name__} without some of its blocks does not come back from its files as it was written: blocks of this "
            "architecture cannot be deleted"
        )


def _logits(model: Any, ids: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        logits: Tensor = model(input_ids=ids, **without_cache(model)).logits
        return logits
