"""The singular directions of every weight, for methods that look at no data.

They are written as a survey with A = G = I: a direction's score is then its squared singular value, and a layer's
importance the mean of its squared weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farss.artifacts import Layer, Survey, read_json, write_json, write_tensors
from farss.maths.directions import decompose, ends
from farss.models import find_blocks, keep_gradients, target_layers
from farss.survey.statistics import finite_weight, kept_tensors
from farss.survey.sweep import Progress, silent


def weigh(
    model: nn.Module,
    folder: Path | str,
    cap: int,
    targets: list[str] | None = None,
    meta: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Survey:
    """Decompose every target layer, one block after the other; a killed one goes on at its block.

    Args:
        folder: `survey.json` and one safetensors file a block are written here.
        cap: the vectors of this many directions at each end of the spectrum are kept.
        on_progress: called with (blocks done, blocks, a line to show).
    """
    folder, tell = Path(folder), on_progress or silent
    keep_gradients(model)
    layers, count = target_layers(model, targets), len(find_blocks(model)[1])
    squares: dict[str, float] = {}
    for index in sorted({layer.block for layer in layers.values()}):
        mark = folder / f"block-{index:04d}.json"
        if not mark.is_file():
            inside = [layer for layer in layers.values() if layer.block == index]
            found = {layer.name: _decomposed(layer, model.get_submodule(layer.name), cap) for layer in inside}
            tensors = {f"{name}.{part}": tensor for name, (_, parts) in found.items() for part, tensor in parts.items()}
            write_tensors(folder / f"block-{index:04d}.safetensors", tensors)
            write_json(mark, {name: square for name, (square, _) in found.items()})
        squares |= read_json(mark)
        tell(index + 1, count, f"block {index}")
    measured = {name: Layer(name, x.block, x.shape, squares[name]) for name, x in layers.items()}
    result = Survey(folder, measured, count, cap, 0, 0, meta or {})
    result.save()
    for mark in folder.glob("block-????.json"):
        mark.unlink()
    return result


def _decomposed(layer: Layer, module: nn.Module, cap: int) -> tuple[float, dict[str, Tensor]]:
    """Mean squared weight, and the tensors of one layer."""
    weight = finite_weight(layer, module)
    parts = decompose(weight)
    ones = torch.ones(parts.sigma.numel())
    tensors = kept_tensors(parts, ones, ones.clone(), ends(parts.sigma.double().square(), cap))
    return weight.float().square().mean().item(), tensors
