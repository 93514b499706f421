"""What all prompts of a benchmark begin with (the examples shown before each question) is read by the model once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farss.forward import accepts

BY_SLOT = ("mpt",)
"""Models that count positions by the slot, padding or not: it cannot be moved in them."""
WORTH = 16
"""Tokens below which a common beginning is not worth keeping."""


@dataclass(frozen=True)
class Prefix:
    """The common beginning of several prompts, and the keys and values that a model computed for it."""

    ids: Tensor
    """`[p]` tokens."""
    cache: Any
    """transformers' `Cache` of one row."""

    def spread(self, rows: int) -> Any:
        """The cache for a batch of this many rows, to be appended to."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def begins(self, tokens: Tensor) -> bool:
        """Whether every row of `tokens [b, t]` begins with it and goes on after it."""
        length = len(self.ids)
        return tokens.shape[1] > length and bool((tokens[:, :length] == self.ids).all())

    def to_front(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Move the padding of left-padded rows `[b, t]` from before the prefix to behind it; None: a row begins otherwise.

        Returns:
            Tokens and mask, where every row begins with the prefix. Models count positions by the mask, so the padding
            in the middle changes nothing.
        """
        starts = mask.argmax(1)  # [b] padding before each row
        turned = torch.stack([_turn(row, len(self.ids), int(start)) for row, start in zip(tokens, starts, strict=True)])
        masks = torch.stack([_turn(row, len(self.ids), int(start)) for row, start in zip(mask, starts, strict=True)])
        return (turned, masks) if self.begins(turned) and bool(masks[:, : len(self.ids)].all()) else None


def _turn(row: Tensor, length: int, start: int) -> Tensor:
    """[padding, prefix, rest] -> [prefix, padding, rest]."""
    return torch.cat([row[start : start + length], row[:start], row[start + length :]])


def shared_prefix(model: Any, prompts: Sequence[list[int]], room: int) -> Prefix | None:
    """Read the common beginning of these prompts, if it is long enough to be worth it and the model can go on from it.

    Args:
        prompts: token ids of each; at least the last token of each stays outside the prefix.
        room: tokens of the longest row that will follow. Layers with a sliding window count slots and not positions, so
            nothing is shared where such a row would not fit into the window.
    """
    cut = [prompt[:-1] for prompt in prompts]
    pairs = zip(min(cut), max(cut), strict=False)  # in their order, what the first and the last share, all share
    shared = [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    settings = model.config.get_text_config()
    window = getattr(settings, "sliding_window", None) or getattr(settings, "window_size", None)  # GPT-Neo calls it so
    if (
        settings.model_type in BY_SLOT
        or len(prompts) < 2
        or len(shared) < WORTH
        or (window and room > window)
        or not accepts(model, "cache")
    ):
        return None
    ids = torch.tensor(shared, device=model.device)
    keep = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    with torch.no_grad():
        cache = model(input_ids=ids[None], use_cache=True, **keep).cache
    return Prefix(ids, cache) if _grows(cache) else None


def _grows(cache: Any) -> bool:
    """Whether a cache holds keys and values by position, so that rows can go on from it: recurrent states do not."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    return isinstance(cache, DynamicCache) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
