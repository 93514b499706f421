"""Where a model's tensors lie while it is looked at, and its state before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from farss.forward import modes_kept
from farss.models import is_quantised
from farss.precision import computing_dtype
from farss.structure import holds_numbers

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` and what else belongs to some examples, each [b, t]."""


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def placed(tensors: list[Tensor], device: torch.device | None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Have these tensors' values on a device (None: each on its own) for a while: numbers in this precision or, without one, in
    one in which the device can compute."""
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            place = device or tensor.device
            wanted = (dtype or computing_dtype(tensor.dtype, place)) if holds_numbers(tensor) else tensor.dtype
            tensor.data = tensor.data.to(place, wanted)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def fits_beside(tensors: list[Tensor], gpu: torch.device) -> bool:
    """Whether a GPU has room for all of these, and for half as much again to compute with them."""
    return 1.5 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) < torch.cuda.mem_get_info(gpu)[0]


@contextmanager
def placed_in_turn(parts: Iterable[nn.Module], device: torch.device | None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Have each block or other part of a model on a device, and in a precision, while it runs, whoever calls it."""
    with ExitStack() as hooks, ExitStack() as running:

        def enter(part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            running.enter_context(placed(tensors_of(part), device, dtype))
            if dtype is None:
                return args
            # some models (Mamba) round what the head is given to the precision that its weights had before
            return tuple(arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)

        def leave(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            running.close()

        for part in parts:
            hooks.callback(part.register_forward_pre_hook(enter).remove)
            hooks.callback(part.register_forward_hook(leave).remove)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in `eval()` mode with every parameter frozen; both are put back afterwards."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with modes_kept(model):
        model.eval().requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def outside(model: nn.Module, parts: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers that belong to none of these parts; to none of the blocks: embeddings, final norm, head."""
    inside = {id(tensor) for part in parts for tensor in tensors_of(part)}
    return [tensor for tensor in tensors_of(model) if id(tensor) not in inside]


def computing_device(model: nn.Module, device: torch.device | None) -> torch.device:
    """Where a model computes: the device that is asked for, unless it is quantised, which ties it to where it lies. Not on Apple's GPUs,
    which have no float64."""
    own: torch.device = next(model.parameters()).device
    place = device if device is not None and not is_quantised(model) else own
    return place if place.type != "mps" else torch.device("cpu")
