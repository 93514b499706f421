"""Mean token loss on general text; its rise is what PEFT's method comparison calls forgetting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farss.errors import DataError, NumericalError

LOGITS = 2**28
"""Logits held at once (1 GiB in float32): with a vocabulary of 262,144 a batch of long rows would need many GiB."""


def rows_that_fit(batch_size: int, length: int, vocabulary: int) -> int:
    """Rows of `length` tokens whose logits fit, at most `batch_size` and at least 1."""
    return max(1, min(batch_size, LOGITS // (max(1, length) * vocabulary)))


def text_loss(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    batch_size: int,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean loss (nats per token) of a causal model in evaluation mode.

    Each text is tokenised with the tokenizer's beginning-of-sequence token and cut off after `max_length` tokens; its
    first token is not predicted. Every token counts the same, so the batches do not matter.

    Raises:
        DataError: no text has two tokens.
        NumericalError: the loss is not finite.
    """
    rows = [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]
    rows = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)
    if not rows:
        raise DataError("the general text has no token to predict: give evaluate.text a file with longer texts")
    size = rows_that_fit(batch_size, len(rows[0]), model.config.get_text_config().vocab_size)
    total, tokens = 0.0, 0
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        total += _summed_loss(model, batch)
        tokens += sum(len(row) - 1 for row in batch)
        if on_progress:
            on_progress(min(start + size, len(rows)), len(rows))
    if total != total or total in (float("inf"), float("-inf")):
        raise NumericalError(f"the loss on the general text is {total}: the model has NaN or infinite weights")
    return total / tokens


def _summed_loss(model: Any, rows: list[list[int]]) -> float:
    """Summed negative log-likelihood of right-padded rows."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)  # [b, t]
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # [b, t - 1, v]
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return float(losses)
