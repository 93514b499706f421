"""What a model without some blocks is worth: perplexity, and tokens a second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from farss.batches import Row
from farss.forward import evaluating
from farss.pruning.choose import last_logits
from farss.structure import positions
from farss.tasks.likelihood import token_loglikelihoods

REPEATS = 3
"""Of every timing; the median counts."""
PROMPT, WRITTEN = 512, 64
"""Tokens that are read at once, and that are written one by one, for the timings."""


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
                found[name]["prompt"].append(1 / read)
                found[name]["generation"].append(1 / written)
        tell(turn + 1, rounds, "")
    return {name: {what: round(statistics.median(values), 1) for what, values in both.items()} for name, both in found.items()}


def _ids(model: Any, count: int) -> torch.Tensor:
    vocabulary: int = model.config.get_text_config().vocab_size
    return (torch.arange(count, device=model.device)[None] * 7 + 3) % vocabulary


def _prompt_seconds(model: Any) -> float:
    """Of a token."""
    length = min(PROMPT, positions(model) or PROMPT)
    with evaluating(model), torch.no_grad():
        begun = _now(model)
        model(input_ids=_ids(model, length), **last_logits(model))  # the last logits alone, as where a text is begun
        return (_now(model) - begun) / length


def _generation_seconds(model: Any) -> float:
    """Of a token."""
    ids = _ids(model, 8)
    count = min(WRITTEN, (positions(model) or PROMPT) - 8)
    with evaluating(model), torch.no_grad():
        begun = _now(model)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return (_now(model) - begun) / count


def _now(model: Any) -> float:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()
