"""How likely a model finds given answers: one forward pass a row, nothing is generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from farss.artifacts import Kind
from farss.batches import Row, batches, choose, collate
from farss.config import Config, QuestionSet
from farss.data import tokenize
from farss.errors import DataError, NumericalError
from farss.forward import accepts, evaluating, without_cache
from farss.rows import question_rows, text_rows
from farss.tasks.questions import Prompt, draw_from_files, prompt_of

FORWARD = 0.5
"""What a scored token costs of a trained one. Training also goes backwards, and forward again where activations are
recomputed: two to three times a forward pass."""
LEAST = 8
"""The fewest questions, and the fewest held-out examples."""
LOGITS = 2**28
"""Logits held at once (1 GiB in float32): with a vocabulary of 262,144 a batch of long rows would need many GiB."""
CACHED = 2**21
"""Logits that are normalised at once: a CPU's cache holds them, and a 16-bit model's are not copied to float32 as a whole."""


def rows_that_fit(batch_size: int, length: int, vocabulary: int) -> int:
    """Rows of `length` tokens whose logits fit, at most `batch_size` and at least 1."""
    return max(1, min(batch_size, LOGITS // (max(1, length) * vocabulary)))


def token_loglikelihoods(
    model: Any, rows: Sequence[Row], batch_size: int, pad_id: int, on_progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """Mean log-likelihood (nats a token) of the marked tokens of each row. The model's modes are restored.

    Raises:
        NumericalError: one is not finite.
    """
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]["input_ids"]))
    longest = len(rows[order[0]]["input_ids"])
    size = rows_that_fit(batch_size, longest, model.config.get_text_config().vocab_size)
    found = [math.nan] * len(rows)
    done = 0
    with evaluating(model), torch.no_grad():
        for part in batches(order, size):
            for place, value in zip(part, _means(model, [rows[place] for place in part], pad_id), strict=True):
                found[place] = value
            done += len(part)
            if on_progress:
                on_progress(done, len(rows))
    if not all(math.isfinite(value) for value in found):
        raise NumericalError("a log-likelihood is not finite: the model has NaN or infinite weights")
    return found


def _means(model: Any, rows: list[Row], pad_id: int) -> list[float]:
    batch = collate(rows, pad_id)
    first = min(row["completion_mask"].index(1) for row in rows)
    labels = nn.functional.pad(batch["labels"][:, first:], (0, 1), value=-100).to(model.device)  # [b, k + 1]: what comes next
    logits = _last_logits(model, batch, labels.shape[1])  # [b, k + 1, v]; to leave the last one out here would copy all
    return (-_losses(logits.flatten(0, 1), labels.flatten()).view(labels.shape).sum(1) / (labels != -100).sum(1)).tolist()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each token in nats, in float32 or the logits' higher precision; 0 where the label is -100."""
    tokens = max(1, CACHED // logits.shape[1])
    precision = torch.promote_types(logits.dtype, torch.float32)
    parts = zip(logits.split(tokens), labels.split(tokens), strict=True)
    return torch.cat([nn.functional.cross_entropy(some.to(precision), right, reduction="none") for some, right in parts])


def _last_logits(model: Any, batch: dict[str, Tensor], count: int) -> Tensor:
    """The logits of the last `count` positions, `[b, count, v]`; with a large vocabulary the others cost most of the time."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    spared = {"logits_to_keep": count} if accepts(model, "logits_to_keep") else {}
    logits: Tensor = model(**inputs, **without_cache(model), **spared).logits[:, -count:]
    return logits


# --- what is scored ---------------------------------------------------------------------------------------------------


def question_tokens(entry: QuestionSet, kind: Kind, config: Config, tokenizer: Any, limit: int) -> list[Row]:
    """Questions as the evaluation puts them, with the first accepted answer, that `data.max_length` leaves whole. Without the examples
    that it may show before them: they would cost most of the budget, and are the same for every candidate."""
    bare = replace(entry, fewshot=0, limit=min(limit, entry.limit or limit))
    return _scored(draw_from_files(bare, config.seed).asked, entry, kind, config, tokenizer)


def other_question_tokens(entry: QuestionSet, kind: Kind, config: Config, tokenizer: Any, limit: int, taken: set[str]) -> list[Row]:
    """The same for other questions of the file than those `taken`; none where there are no others."""
    return _scored(choose(unasked(entry, taken), limit, config.seed), entry, kind, config, tokenizer)


def asked_or_shown(config: Config) -> set[str]:
    """Every question that a set of the evaluation asks or shows: several sets may read one file."""
    sets = [entry for entry in config.evaluate.asked if isinstance(entry, QuestionSet)]
    drawn = [draw_from_files(entry, config.seed) for entry in sets]
    return {row["question"] for each in drawn for row in (*each.asked, *each.shown)}


def unasked(entry: QuestionSet, taken: set[str]) -> list[dict[str, Any]]:
    """The questions of a file that are not `taken`."""
    return [row for row in question_rows(entry) if row["question"] not in taken]


def _scored(questions: Sequence[Mapping[str, Any]], entry: QuestionSet, kind: Kind, config: Config, tokenizer: Any) -> list[Row]:
    prompt = prompt_of(replace(entry, fewshot=0), kind, config.data, tokenizer)
    if prompt.complete and config.data.thinking:  # a bare right answer is no answer of a model that thinks first
        return []
    rows = [_without_end(row, tokenizer.eos_token_id) for row in answered(questions, prompt, tokenizer)]
    return [row for row in rows if len(row["input_ids"]) <= config.data.max_length]


def answered(questions: Sequence[Mapping[str, Any]], prompt: Prompt, tokenizer: Any) -> list[Row]:
    """Questions as a prompt puts them, each with its first accepted answer and the end of sequence marked."""
    stages = [[start := prompt.text(row["question"]), start + prompt.delimiter + row["answers"][0]] for row in questions]
    return list(tokenize(stages, tokenizer, prompt.complete))


def _without_end(row: Row, eos: int) -> Row:
    """Take off the end-of-sequence token: it is no part of what the base model knows."""
    return {name: values[:-1] for name, values in row.items()} if row["input_ids"][-1] == eos else row


def text_tokens(config: Config, tokenizer: Any, limit: int) -> list[Row]:
    """General text to be scored."""
    assert config.evaluate.text is not None
    return _marked(choose(text_rows(config.evaluate.text), limit, config.seed), tokenizer, config.data.max_length)


def text_loss(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean loss (nats a token) of general text; its rise is what PEFT's method comparison calls forgetting.

    Each text is tokenised with the tokenizer's beginning-of-sequence token and cut off after `max_length` tokens; its
    first token is not predicted. Every token counts the same, so the batches do not matter.

    Raises:
        DataError: no text has two tokens.
        NumericalError: the loss is not finite.
    """
    rows = _marked(texts, tokenizer, max_length)
    means = token_loglikelihoods(model, rows, batch_size, tokenizer.pad_token_id, on_progress)
    counts = [sum(row["completion_mask"]) for row in rows]
    return -sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)


def _marked(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[Row]:
    """Every token of a text but the first marked."""
    rows = [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]
    found = [{"input_ids": ids, "completion_mask": [0] + [1] * (len(ids) - 1)} for ids in rows if len(ids) > 1]
    if not found:
        raise DataError("the general text has no token to predict: give evaluate.text a file with longer texts")
    return found


def affordable(rows: Sequence[Row], limit: int, room: float) -> int:
    """How many such rows fit into so many tokens, between `LEAST` and `limit`."""
    return min(limit, max(LEAST, int(room * len(rows) / tokens_of(rows))))


def tokens_of(rows: Sequence[Row]) -> int:
    """All tokens of these rows."""
    return sum(len(row["input_ids"]) for row in rows)
