"""How likely a model finds given answers: one forward pass a row, nothing is generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from farss.data import Row, batches, collate
from farss.errors import NumericalError
from farss.models import accepts
from farss.tasks.text import rows_that_fit


def token_loglikelihoods(
    model: Any, rows: Sequence[Row], batch_size: int, pad_id: int, on_progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """Mean log-likelihood (nats a token) of the marked tokens of each row, of a causal model in evaluation mode.

    Raises:
        NumericalError: one is not finite.
    """
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]["input_ids"]))
    longest = len(rows[order[0]]["input_ids"])
    size = rows_that_fit(batch_size, longest, model.config.get_text_config().vocab_size)
    found = [math.nan] * len(rows)
    done = 0
    for part in batches(order, size):
        for place, value in zip(part, _means(model, [rows[place] for place in part], pad_id), strict=True):
            found[place] = value
        done += len(part)
        if on_progress:
            on_progress(done, len(rows))
    if not all(math.isfinite(value) for value in found):
        raise NumericalError("the log-likelihood of an answer is not finite: the model has NaN or infinite weights")
    return found


def _means(model: Any, rows: list[Row], pad_id: int) -> list[float]:
    batch = collate(rows, pad_id)
    first = min(row["completion_mask"].index(1) for row in rows)
    labels = batch["labels"][:, first:].to(model.device)  # [b, k]
    with torch.no_grad():
        logits = _last_logits(model, batch, labels.shape[1] + 1)[:, :-1]  # [b, k, v]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (-losses.view(labels.shape).sum(1) / (labels != -100).sum(1)).tolist()


def _last_logits(model: Any, batch: dict[str, Tensor], count: int) -> Tensor:
    """The logits of the last `count` positions, `[b, count, v]`; with a large vocabulary the others cost most of the time."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    spared = {"logits_to_keep": count} if accepts(base, "logits_to_keep") else {}
    logits: Tensor = model(**inputs, use_cache=False, **spared).logits[:, -count:]
    return logits
