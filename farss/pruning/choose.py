"""Which blocks a model can do without, by rules that train nothing: what TRSP is compared with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farss.batches import Row, batches, collate
from farss.files import read_json, write_json
from farss.forward import accepts, entering, evaluating, hooked, leaving, without_cache
from farss.jobs import Progress, unseen
from farss.places import moved
from farss.pruning.surgery import skipped
from farss.structure import find_blocks
from farss.survey.passage import returned_by
from farss.tasks.likelihood import token_loglikelihoods


def influences(model: Any, rows: list[Row], batch_size: int, pad_id: int, tell: Progress) -> list[float]:
    """How much each block turns what enters it: 1 minus the cosine of its input and output, mean over the tokens (ShortGPT's Block
    Influence, Men et al. 2024)."""
    count = len(find_blocks(model)[1])
    total, tokens = torch.zeros(count, dtype=torch.float64), sum(len(row["input_ids"]) for row in rows)

    def see(mask: Tensor, index: int, before: Tensor, after: Tensor) -> None:
        total[index] += (1 - nn.functional.cosine_similarity(before.float(), after.float(), dim=-1))[mask].cpu().double().sum()

    _look(model, rows, range(count), batch_size, pad_id, see, tell)
    return (total / tokens).tolist()


def greedy(
    model: Any, rows: list[Row], may: Collection[int], number: int, batch_size: int, pad_id: int, path: Path, tell: Progress
) -> list[dict[str, Any]]:
    """One block after the other, each time that without which the loss of the text is smallest (SLEB, Song et al. 2024).

    Args:
        path: file of what was measured already; a killed choice goes on from there.

    Returns:
        The rounds: each one's block, and the `losses` without each of the blocks (nats a token).
    """
    rounds: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    gone: list[int] = []
    returned = returned_by(model, find_blocks(model)[1], moved(collate(rows[:1], pad_id), model.device))
    done, steps = 0, sum(len(may) - place for place in range(number))
    for place in range(number):
        if place == len(rounds):
            rounds.append({"losses": {}})
        losses = rounds[place]["losses"]
        for index in sorted(set(may) - set(gone)):
            if str(index) not in losses:
                with skipped(model, [*gone, index], returned):
                    losses[str(index)] = -sum(token_loglikelihoods(model, rows, batch_size, pad_id)) / len(rows)
                write_json(path, rounds)
            done += 1
            tell(done, steps, f"loss {losses[str(index)]:.3f} without block {index}")
        rounds[place]["block"] = smallest({int(key): loss for key, loss in losses.items()}, 1)[0]
        gone.append(rounds[place]["block"])
    return rounds


def smallest(values: dict[int, float], number: int) -> list[int]:
    """The keys of the smallest values; of equal ones the first."""
    return sorted(values, key=lambda key: (values[key], key))[:number]


def changes(model: Any, rows: list[Row], which: Collection[int], batch_size: int, pad_id: int) -> dict[int, float]:
    """How much each of these blocks changes what enters it: `||x_out - x_in||_F / ||x_in||_F`, mean over the windows."""
    found = dict.fromkeys(which, 0.0)

    def see(mask: Tensor, index: int, before: Tensor, after: Tensor) -> None:
        before, after = before.float().flatten(1), after.float().flatten(1)
        found[index] += float(((after - before).norm(dim=1) / before.norm(dim=1)).sum())

    if which:
        _look(model, rows, which, batch_size, pad_id, see)
    return {index: total / len(rows) for index, total in found.items()}


def _look(
    model: Any,
    rows: list[Row],
    which: Collection[int],
    batch_size: int,
    pad_id: int,
    see: Callable[[Tensor, int, Tensor, Tensor], None],
    tell: Progress = unseen,
) -> None:
    """Send rows through a model, and see what enters and what leaves these blocks: `see(mask, block, before, after)`, `[b, t]` true on
    the real tokens and `[b, t, d]`."""
    with evaluating(model), torch.no_grad():
        for done, part in enumerate(batches(rows, batch_size)):
            batch = moved(collate(part, pad_id), model.device)
            mask = batch["attention_mask"].bool()
            with watched(model, which, partial(see, mask)):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **last_logits(model))
            tell(done * batch_size + len(part), len(rows), "")


def watched(model: nn.Module, which: Collection[int], see: Callable[[int, Tensor, Tensor], None]) -> AbstractContextManager[None]:
    """While active, every forward pass shows what enters and what leaves these blocks: `see(block, before, after)`."""
    blocks = find_blocks(model)[1]

    def hook_of(index: int) -> Callable[..., None]:
        return lambda block, args, kwargs, output: see(index, entering(args, kwargs), leaving(output))

    return hooked([blocks[index].register_forward_hook(hook_of(index), with_kwargs=True) for index in which])


def last_logits(model: Any) -> dict[str, Any]:
    """Arguments that spare what is not looked at: the cache, and all logits but the last."""
    return without_cache(model) | ({"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {})
