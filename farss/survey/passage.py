"""The way of one batch through a model, cut at the blocks: what each block is called with, and the loss at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from farss.errors import ModelError, NumericalError
from farss.forward import Stop, accepts, attribute, hooked, leaving, without_cache
from farss.places import Batch

HEAD_POSITIONS = 256
"""Supervised positions whose logits exist at a time; 256 of a vocabulary of 262,144 are 268 MB in float32."""
TRIAL_TOKENS = 16
"""Length of the example on which the model's own forward pass is compared with that of its blocks."""


class Returned(NamedTuple):
    """What the model expects of a block, and what it gives."""

    parts: int
    """How many things, the hidden states being the first; 0: those alone, and not in a tuple."""
    dtype: torch.dtype | None = None
    """Of the hidden states: Mamba's are float32 in a model of 16 bits. None: that of what enters the first block."""


@dataclass
class Passage:
    """One batch."""

    batch: Batch
    """On the device where the model computes."""
    start: Tensor
    """[b, t, d]: what enters the first block; not on a GPU, of which the states of all batches would fill much."""
    returned: Returned
    """See `returned_by`."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """For each block, its other arguments (position embeddings, masks); blocks share the same tensors. Not on a GPU either: a padded
    batch's mask is the square of its length."""
    uniforms: Tensor | None = None
    """[b, t], or [b] for a classifier: uniform draws from which labels are sampled; None: the data's own labels."""

    def here(self, states: Tensor, index: int) -> Tensor:
        """What enters this block, where the model computes and in its precision: another kind of machine may have left it on disk in
        another one."""
        dtype = (index and self.returned.dtype) or self.start.dtype
        return states.to(self.batch["input_ids"].device, dtype)

    @property
    def mask(self) -> Tensor:
        """[b, t], true on the tokens that count."""
        return counted(self.batch)

    def let_go(self) -> None:
        """Give up `start`, but for its precision: it lies on disk."""
        self.start = self.start.new_empty(0)


def counted(batch: Batch) -> Tensor:
    """[b, t], true on the tokens that count in the averages: the real ones, unless the batch says otherwise."""
    return batch.get("counted", batch["attention_mask"]).bool()


def real_count(batches: Iterable[Batch]) -> int:
    """How many tokens of these batches count."""
    return sum(int(counted(batch).sum()) for batch in batches)


def returned_by(model: nn.Module, blocks: nn.ModuleList, batch: Batch) -> Returned:
    """What a block returns: a short example goes through the first one."""
    found: list[Returned] = []

    def note(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(Returned(len(output) if isinstance(output, tuple) else 0, leaving(output).dtype))
        raise Stop

    with torch.no_grad(), hooked([blocks[0].register_forward_hook(note)]), contextlib.suppress(Stop):
        model(**_arguments(model, _short(batch)))
    return found[0]


def enter(model: nn.Module, blocks: nn.ModuleList, batch: Batch, returned: Returned, uniforms: Tensor | None = None) -> Passage:
    """Embed a batch and keep what each block would be called with. No block computes anything.

    Args:
        returned: see `returned_by`.
        uniforms: see `Passage`.

    Raises:
        ModelError: the blocks are given a cache, in which each pass through them would find the keys of the passes before.
    """
    from transformers import Cache

    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[Tensor] = []

    def note(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ModelError(f"{type(model).__name__} caches keys and values whatever it is told: this architecture is not supported")
        first.append(hidden_states.detach())
        found.append((args, kwargs))
        if index == len(blocks) - 1:
            raise Stop
        return hidden_states

    with torch.no_grad(), blocks_replaced(blocks, note, returned), contextlib.suppress(Stop):
        model(**_arguments(model, batch))
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        if id(tensor) not in held:
            held[id(tensor)] = tensor.cpu()
        return held[id(tensor)]

    calls = tree_map_only(Tensor, hold, found)
    return Passage(batch, first[0].cpu(), returned, calls, uniforms)


def through(block: nn.Module, index: int, passage: Passage, hidden: Tensor) -> Tensor:
    """The output [b, t, d] of a block for its input [b, t, d], wherever that lies."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(passage.batch["input_ids"].device), passage.calls[index])
    return leaving(block(passage.here(hidden, index), *args, **kwargs))


def check_passage(model: nn.Module, blocks: nn.ModuleList, batch: Batch) -> None:
    """Compare the model's own forward pass with that of its blocks, one after the other, on a short example.

    Raises:
        ModelError: they differ, because the model hands something from block to block beside the hidden states, or other states.
    """
    short = _short(batch)
    own: list[Tensor] = []

    def keep(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        own.append(leaving(output))

    with torch.no_grad(), hooked([blocks[-1].register_forward_hook(keep)]):
        model(**_arguments(model, short))
    if len(own) != 1:
        raise ModelError(f"{type(model).__name__} calls its last block {len(own)} times: this architecture is not supported")
    if own[0].dim() != 3:  # Gemma 3n's [4, b, t, d]
        raise ModelError(
            f"the blocks of {type(model).__name__} hand on states of shape {tuple(own[0].shape)}, not [batch, tokens, width]: "
            "this architecture is not supported"
        )
    passage = enter(model, blocks, short, returned_by(model, blocks, short))
    # Gemma 4's last blocks may find the keys and values of earlier ones in a dictionary, behind which the way back does not reach these
    notes = [leaf for leaf in tree_leaves(passage.calls) if isinstance(leaf, MutableMapping)]
    hidden, missing = passage.start, ""
    try:
        with torch.no_grad():
            for index, block in enumerate(blocks):
                for note in notes:
                    note.clear()
                hidden = through(block, index, passage, hidden)
    except KeyError as error:
        if not notes:
            raise
        missing = f"block {index} looks for {error} of an earlier one"
    distance = (hidden - own[0]).abs().max().item()
    if missing or (not distance <= 1e-2 * own[0].abs().max().item() and torch.isfinite(own[0]).all()):
        found = missing or f"walking its blocks one by one changes the result by {distance:.2g}"
        raise ModelError(
            f"{type(model).__name__} hands more than hidden states from block to block ({found}): this architecture is not supported"
        )


def _short(batch: Batch) -> Batch:
    """The first real tokens of a batch's first example."""
    real = batch["attention_mask"][0].bool()
    return {key: x[:1, real][:, :TRIAL_TOKENS] for key, x in batch.items() if x.dim() == 2 and key != "labels"}


def _arguments(model: nn.Module, batch: Batch) -> dict[str, Any]:
    arguments: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels" and accepts(model, key)}
    return arguments | without_cache(model)


@contextlib.contextmanager
def blocks_replaced(blocks: Iterable[nn.Module], stand_in: Callable[..., Tensor], returned: Returned) -> Iterator[None]:
    """Call `stand_in(index, hidden_states, ...)` in the place of every block, and hand on hidden states as `returned_by` the blocks."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = stand_in(*args, **kwargs)
        return (hidden, *[None] * (returned.parts - 1)) if returned.parts else hidden

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(attribute(block, "forward", partial(forward, index)))
        yield


def check_finite(states: list[Tensor], what: str, blame: Callable[[], object] = lambda: None) -> None:
    """Refuse states that must not be kept, and read again when the survey goes on.

    Args:
        blame: raises where a weight is the cause.

    Raises:
        NumericalError: they hold something else than numbers.
    """
    if not all(bool(torch.isfinite(state).all()) for state in states):
        blame()
        raise NumericalError(f"{what} holds NaN or infinite values, too large for the model's precision: set model.dtype=float32")


# --- the loss --------------------------------------------------------------------------------------------------------


def output_gradient(model: nn.Module, blocks: nn.ModuleList, passage: Passage, output: Tensor) -> Tensor:
    """Gradient [b, t, d] of the summed negative log-likelihood at the last block's output [b, t, d].

    The model's own final norm and head are run with the blocks passed over. In a language model they see each position
    alone, so the supervised positions are packed into short sequences: the logits of a whole batch can be larger than
    the model.
    """
    labels, tail = passage.batch["labels"], partial(_tail_gradient, model, blocks, passage.returned)
    if labels.dim() == 1:  # a classifier: one label per example, and a head that may look anywhere
        return tail(passage.batch, output, labels, passage.uniforms)
    gradient = torch.zeros_like(output)
    targets = labels[:, 1:]
    places = (targets != -100).nonzero()
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or HEAD_POSITIONS  # of a table of positions
    for rows, positions in (part.T for part in places.split(min(HEAD_POSITIONS, longest))):
        packed = {"input_ids": passage.batch["input_ids"][rows, positions][None]}
        wanted = targets[rows, positions]
        uniforms = passage.uniforms[rows, positions] if passage.uniforms is not None else None
        gradient[rows, positions] = tail(packed, output[rows, positions][None], wanted, uniforms)[0]
    return gradient


def _tail_gradient(
    model: nn.Module, blocks: nn.ModuleList, returned: Returned, batch: Batch, output: Tensor, targets: Tensor, uniforms: Tensor | None
) -> Tensor:
    """Gradient of the summed loss at `output`, the last block's output, through what follows it."""
    hidden = output.detach().requires_grad_(True)

    def pass_over(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden if index == len(blocks) - 1 else hidden_states

    with torch.enable_grad(), blocks_replaced(blocks, pass_over, returned):
        logits = model(**_arguments(model, batch)).logits
        logits = logits.reshape(-1, logits.shape[-1])
        if len(logits) != len(targets):
            raise ModelError(
                f"{type(model).__name__} says {len(logits)} things of {len(targets)} labels: where tokens are the labels give a language "
                "model, and a classifier one label for each example"
            )
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(logits, targets if uniforms is None else sampled(logits, uniforms), reduction="sum")
    if not torch.isfinite(loss):
        raise NumericalError(
            f"the loss of the calibration examples is {loss.item()}: look for NaN in the model's weights, or load it in float32"
        )
    (gradient,) = torch.autograd.grad(loss, hidden)
    return gradient


def sampled(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels [n] drawn from the model's own distribution (true Fisher: Martens 2020; Kunstner et al. 2019).

    Args:
        logits: [n, c].
        uniforms: [n], uniform in [0, 1).
    """
    cumulative = logits.detach().double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniforms.to(cumulative) * cumulative[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[-1] - 1)


def uniform_draws(batch: Batch, seed: int, first: int) -> Tensor:
    """[b, t] (or [b]) uniform numbers that depend on the seed and each example's place in the data, and on nothing else.

    Args:
        first: place of the batch's first example.
    """
    labels = batch["labels"]
    draws = torch.zeros(labels.shape, dtype=torch.float64)
    for row in range(labels.shape[0]):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first + row)
        if labels.dim() == 1:
            draws[row] = torch.rand((), generator=generator, dtype=torch.float64)
            continue
        supervised = (labels[row, 1:] != -100).nonzero()[:, 0]
        draws[row, supervised] = torch.rand(supervised.numel(), generator=generator, dtype=torch.float64)
    return draws
