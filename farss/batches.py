"""Examples as tensors: which of them, how many at a time, and how they are padded."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from farss import processes
from farss.config import CalibrationConfig

Row = dict[str, list[int]]
"""One example: `input_ids` and `completion_mask`, of the same length."""
T = TypeVar("T")


def labels_of(row: Row) -> list[int]:
    """The targets of one row in the words of transformers: -100 where nothing is learnt."""
    return [token if learnt else -100 for token, learnt in zip(row["input_ids"], row["completion_mask"], strict=True)]


def plain_rows(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[Row]:
    """Texts as examples that are only looked at: tokenised with the special tokens in front, and nothing to be learnt."""
    return unlearnt([tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts])


def unlearnt(rows: Iterable[list[int]]) -> list[Row]:
    """Token ids as examples that are only looked at."""
    return [{"input_ids": ids, "completion_mask": [0] * len(ids)} for ids in rows]


def choose(rows: Sequence[T], count: int, seed: int) -> list[T]:
    """Draw `count` rows without replacement, in their own order; all of them where there are no more."""
    if count >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]


def batches(rows: Sequence[T], batch_size: int) -> Iterator[list[T]]:
    """Consecutive rows, `batch_size` at a time; the last batch may be smaller."""
    for start in range(0, len(rows), batch_size):
        yield list(rows[start : start + batch_size])


def calibration_batches(
    rows: Sequence[Row], config: CalibrationConfig, pad_id: int, seed: int, max_length: int = 0
) -> list[dict[str, Tensor]]:
    """The batches on which statistics are estimated: rows drawn with the seed, similar lengths together.

    There is at least one for each process, if there are as many rows.

    Args:
        max_length: `data.max_length`, to which rows are padded where `config.padding` is `count`.
    """
    chosen = sorted(choose(rows, config.examples, seed), key=lambda row: -len(row["input_ids"]))
    size = max(1, min(config.batch_size, len(chosen) // processes.size()))
    if config.padding == "ignore":
        return [collate(part, pad_id) for part in batches(chosen, size)]
    wide = [collate(part, pad_id, length=max_length) for part in batches(chosen, size)]
    return [{**batch, "counted": torch.ones_like(batch["input_ids"])} for batch in wide]


def collate(rows: Sequence[Row], pad_id: int, length: int = 0) -> dict[str, Tensor]:
    """Pad rows on the right to one length t: that of the longest, or `length` where that is more.

    Returns:
        `input_ids`, `attention_mask` (0 on padding), `position_ids` (counted over real tokens) and `labels` (-100 on
        prompts and padding), each int64 [rows, t].
    """
    longest = max(length, *(len(row["input_ids"]) for row in rows))

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([value + [fill] * (longest - len(value)) for value in values], dtype=torch.long)

    mask = padded([[1] * len(row["input_ids"]) for row in rows], 0)
    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_id),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": padded([labels_of(row) for row in rows], -100),
    }
