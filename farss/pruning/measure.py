"""What a model without some blocks is worth: perplexity of windows of text, and tokens a second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from farss.data import Row, choose
from farss.errors import DataError
from farss.forward import evaluating, without_cache
from farss.tasks.likelihood import token_loglikelihoods

REPEATS = 3
"""Of every timing; the median counts."""
PROMPT, WRITTEN = 512, 64
"""Tokens that are read at once, and that are written one by one, for the timings."""


def windows(texts: Sequence[str], tokenizer: Any, length: int, count: int, seed: int, path: str) -> list[Row]:
    """Windows of text of equal length: the texts one after the other, cut every `length` tokens, each window begun as the tokenizer
    begins a text. Every token but the first is to be predicted.

    Args:
        length: tokens of a window.
        count: draw so many with the seed, or take all there are.
        path: where the texts are from, for the message.

    Raises:
        DataError: they do not fill one window.
    """
    bare, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    begin = whole[: next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)]
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False).input_ids
    size = length - len(begin)
    rows = [[*begin, *ids[start : start + size]] for start in range(0, len(ids) - size + 1, size)]
    if not rows:
        raise DataError(
            f"{path} has {len(ids):,} tokens, fewer than a window of prune.length={length}: give more text, or lower prune.length"
        )
    return [{"input_ids": row, "completion_mask": [0] + [1] * (length - 1)} for row in choose(rows, count, seed)]


def perplexity(model: Any, rows: Sequence[Row], batch_size: int, pad_id: int, tell: Any) -> float:
    """`exp` of the mean loss of a token."""
    means = token_loglikelihoods(model, rows, batch_size, pad_id, lambda done, total: tell(done, total, ""))
    return math.exp(-statistics.fmean(means))  # all windows are equally long


def speeds(models: dict[str, Any], tell: Any) -> dict[str, dict[str, float]]:
    """Tokens a second of each model, of reading a prompt and of writing; in turns, so that all see the same machine.

    Returns:
        For each model `prompt` and `generation`, medians.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "generation": []} for name in models}
    rounds = REPEATS + 1
    for turn in range(rounds):
        for name, model in models.items():
            read, written = _prompt_seconds(model), _generation_seconds(model)
            if turn:  # the first one warms up
                found[name]["prompt"].append(PROMPT / read)
                found[name]["generation"].append(WRITTEN / written)
        tell(turn + 1, rounds, "")
    return {name: {what: round(statistics.median(values), 1) for what, values in both.items()} for name, both in found.items()}


def _ids(model: Any, count: int) -> torch.Tensor:
    vocabulary: int = model.config.get_text_config().vocab_size
    return (torch.arange(count, device=model.device)[None] * 7 + 3) % vocabulary


def _prompt_seconds(model: Any) -> float:
    length = min(PROMPT, getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT)
    with evaluating(model), torch.no_grad():
        begun = _now(model)
        model(input_ids=_ids(model, length), **without_cache(model))
        return (_now(model) - begun) * PROMPT / length


def _generation_seconds(model: Any) -> float:
    ids = _ids(model, 8)
    with evaluating(model), torch.no_grad():
        begun = _now(model)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=WRITTEN, max_new_tokens=WRITTEN, do_sample=False, pad_token_id=0
        )
        return _now(model) - begun


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
