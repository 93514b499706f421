"""A training step in less time, with the same loss. Each measure changes a library for as long as it is entered."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from farss.forward import attribute

COLUMNS, CELLS = 2048, 2**18
"""Of the logits: columns that are computed, and numbers that are gone over at a time on a CPU, whose cache they fit into."""
LEVELS = 2**16


@contextlib.contextmanager
def faster_steps(device: torch.device) -> Iterator[None]:
    """All of them, as far as they help on this device."""
    with answers_only(), contextlib.ExitStack() as measures:
        if device.type == "cpu":
            measures.enter_context(small_tiles())
            measures.enter_context(sums_of_bfloat16())
            measures.enter_context(cheap_dropout())
            measures.enter_context(thin_products())
        yield


def answers_only() -> contextlib.AbstractContextManager[None]:
    """Let TRL's output layer score answer tokens only, on every device.

    Without Triton it scores the prompts and the padding too, and multiplies by zero: with short answers and a
    vocabulary of 262,144 that is four fifths of a step's time.
    """
    from trl.trainer import utils

    return _replaced(utils, "_use_triton", lambda device: True)


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Let TRL's output layer go over its logits a few columns and tokens at a time: it reads and writes each of them two dozen
    times, and a CPU's memory is slow."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    with contextlib.ExitStack() as measures:
        measures.enter_context(_replaced(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", COLUMNS))
        for name in ("_forward_tile", "_backward_tile"):
            measures.enter_context(_replaced(chunked_logprob, name, _few_tokens(getattr(chunked_logprob, name, None))))
        yield


def _few_tokens(fold: Any) -> Callable[..., None]:
    """The same on a few rows at a time of its tensors, of which each has a row a token."""

    def folded(tile: Tensor, *others: Any, **options: Any) -> None:
        rows = max(1, CELLS // tile.shape[1])
        parts = (each.split(rows) if isinstance(each, Tensor) else itertools.repeat(each) for each in others)
        for few in zip(tile.split(rows), *parts, strict=False):
            fold(*few, **options)

    return folded


def sums_of_bfloat16() -> contextlib.AbstractContextManager[None]:
    """Let TRL's output layer multiply bfloat16 as such where it sums the products in float32, which it has GPUs do. For CPUs it
    copies both to float32, whose products take several times as long and are the same: the copies have the same eight bits."""
    from trl.kernels import chunked_logprob

    name = "_addmm_fp32"
    original: Any = getattr(chunked_logprob, name, None)

    def add(total: Tensor, a: Tensor, b: Tensor) -> None:
        short = a.dtype == b.dtype == torch.bfloat16
        with _products_of_bfloat16() if short else contextlib.nullcontext():
            original(total, a, b)

    return _replaced(chunked_logprob, name, add)


@contextlib.contextmanager
def _products_of_bfloat16() -> Iterator[None]:
    """Let a CPU round the factors of float32 products to bfloat16."""
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def cheap_dropout() -> contextlib.AbstractContextManager[None]:
    """Let `nn.Dropout` draw 16 random bits an element on the CPU, where torch draws a Bernoulli variable each, on one core.

    The rate is rounded to a multiple of 2^-16, and what is kept is scaled by the rounded one, so the expectation stays exact.
    """
    original = nn.Dropout.forward

    def forward(self: nn.Dropout, x: Tensor) -> Tensor:
        if not _draws(self, x):
            return original(self, x)
        kept, factor = _draw(self, x)
        return x * kept.to(x.dtype) * factor

    return _replaced(nn.Dropout, "forward", forward)


def _draws(dropout: nn.Dropout, x: Tensor) -> bool:
    """Whether `_draw` can do what a dropout does to an input."""
    return dropout.training and not dropout.inplace and x.device.type == "cpu" and 0 < round(dropout.p * LEVELS) < LEVELS


def _draw(dropout: nn.Dropout, x: Tensor) -> tuple[Tensor, float]:
    """Which elements stay, and by how much they grow."""
    dropped = round(dropout.p * LEVELS)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return bits[: x.numel()].view(x.shape) >= dropped - LEVELS // 2, LEVELS / (LEVELS - dropped)


def thin_products() -> contextlib.AbstractContextManager[None]:
    """Let PEFT's LoRA layers add their change to the layer's output while they multiply, and read their input once, in the precision of
    the products.

    PEFT copies the input to float32, drops elements of it there, and makes two more tensors as large as the output; with a frozen adapter
    beside the trained one all but the dropout twice. On a CPU, whose memory is slow, that is a sixth of a step. Here the factors of both
    stand one above the other, `A x` is multiplied by what dropout and alpha ask for, and a sum is rounded once.
    """
    from peft.tuners.lora import layer

    original = layer.Linear.forward

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if args or options or not names or not _are_plain(self, names, dtype):
            return original(self, x, *args, **options)  # type: ignore[no-any-return]
        result = self.base_layer(x)
        down, up = ([side[name].weight.to(dtype) for name in names] for side in (self.lora_A, self.lora_B))
        above, beside = torch.cat(down), torch.cat(up, 1)
        read, factor = x.to(dtype), 1.0
        if isinstance(dropout := self.lora_dropout[names[0]], nn.Dropout):
            if _draws(dropout, x):
                kept, factor = _draw(dropout, x)
                read = torch.where(kept, read, torch.zeros((), dtype=dtype))
            else:
                read = dropout(read)
        scales = torch.cat([torch.full((len(a),), factor * self.scaling[name]) for name, a in zip(names, down, strict=True)])
        inner = (nn.functional.linear(read, above) * scales).to(dtype)  # 16 bits times float32 is float32
        if result.dtype != dtype:
            changed: Tensor = result + nn.functional.linear(inner, beside)
            return changed.to(result.dtype)
        return torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), beside.T).view(result.shape)

    return _replaced(layer.Linear, "forward", forward)


def _are_plain(layer: Any, names: list[str], dtype: torch.dtype) -> bool:
    """Whether these adapters of PEFT's `Linear` are plain LoRA on one input: their dropout is that of the first."""
    if layer.disable_adapters or layer.merged or any(name in layer.lora_variant for name in names):
        return False
    factors = [side[name] for side in (layer.lora_A, layer.lora_B) for name in names]
    if any(type(factor) is not nn.Linear or factor.bias is not None or factor._forward_hooks for factor in factors):
        return False
    if dtype != factors[0].weight.dtype and not torch.is_autocast_enabled("cpu"):
        return False
    first, *others = (layer.lora_dropout[name] for name in names)
    bare = isinstance(first, nn.Identity)
    return all(getattr(other, "first", None) is first or (bare and isinstance(other, nn.Identity)) for other in others)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while; not where a library of another version has none of that name, which is slower at worst."""
    with attribute(owner, name, value) if hasattr(owner, name) else contextlib.nullcontext():
        yield
