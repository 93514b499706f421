"""Text that a model writes by itself: what it knows, where the user names no knowledge."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from farss.errors import ModelError
from farss.forward import attribute, end_tokens, evaluating, seeded

LENGTH = 128
"""Tokens of a text at most."""
BATCH = 64


def own_text(
    model: Any, tokenizer: Any, count: int, length: int, seed: int, on_progress: Callable[[int, int], None] | None = None
) -> list[list[int]]:
    """Sample texts from the model's own distribution (temperature 1), from nothing but the beginning-of-sequence token
    (the model's own where the tokenizer has none, as Qwen's).

    Args:
        count: how many texts.
        length: tokens of a text at most, the first one included.
        seed: the same seed gives the same texts.

    Returns:
        The token ids of each text, with the beginning and without the end and what follows it.

    Raises:
        ModelError: there is no token to begin with.
    """
    ends = end_tokens(model, tokenizer)
    known = getattr(model.generation_config, "bos_token_id", None), getattr(model.config.get_text_config(), "bos_token_id", None)
    first = next((each for each in (tokenizer.bos_token_id, *known, *ends) if isinstance(each, int)), None)
    if first is None:
        raise ModelError("neither the tokenizer nor the model names a token that begins or ends a text: name calibration.knowledge")
    found: list[list[int]] = []
    # the model's own distribution, in whatever mode the caller has it, and none of the caller's random numbers
    with evaluating(model), seeded(seed), _cheap_draws(model.device):
        while len(found) < count:
            rows = min(BATCH, count - len(found))
            start = torch.full((rows, 1), first, device=model.device)
            with torch.no_grad():
                written = model.generate(
                    input_ids=start,
                    attention_mask=torch.ones_like(start),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_p=None,
                    repetition_penalty=1.0,
                    no_repeat_ngram_size=0,
                    max_new_tokens=max(1, length - 1),
                    eos_token_id=ends,
                    pad_token_id=tokenizer.pad_token_id,
                )
            found += [_until_the_end(row, ends) for row in written.tolist()]
            if on_progress:
                on_progress(len(found), count)
    return found


def _cheap_draws(device: torch.device) -> AbstractContextManager[None]:
    """Let `generate` draw its tokens on a CPU by inversion, with a random number for each. `torch.multinomial` draws one for every token of
    the vocabulary, on one core: with 262,144 more than half of the time."""
    return attribute(torch, "multinomial", _drawn) if device.type == "cpu" else nullcontext()


def _drawn(probabilities: Tensor, num_samples: int) -> Tensor:
    """One column for each row, [b, 1], drawn with these probabilities [b, v]."""
    assert num_samples == 1
    sums = probabilities.cumsum(-1)
    level = torch.rand(len(sums), 1) * sums[:, -1:]
    return torch.searchsorted(sums, level, right=True).clamp_max(sums.shape[1] - 1)


def _until_the_end(row: list[int], ends: list[int]) -> list[int]:
    stop = next((place for place, token in enumerate(row) if place and token in ends), len(row))
    return row[: max(2, stop)]
