"""What is surveyed, and where its survey goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farss.artifacts import Layer
from farss.jobs import Progress, unseen
from farss.places import computing_device
from farss.structure import find_blocks, keep_gradients, target_layers


@dataclass(frozen=True)
class Site:
    """A model that is looked at, whatever is looked for.

    Raises:
        ModelError: the architecture is not supported (as `blocks` and `layers` are first asked for).
    """

    model: nn.Module
    """A causal language model, or an encoder with a classification head; its weights are only read."""
    folder: Path
    """`survey.json` and one safetensors file a block are written here; a killed survey goes on from them."""
    cap: int = 1
    """The vectors of this many directions at each end of the score order are kept."""
    targets: list[str] | None = None
    """Names of the layers, such as `["q_proj"]`; None or empty: every linear layer of every block."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What is written beside what was found."""
    tell: Progress = unseen
    """Called with (blocks done, blocks, a line to show)."""
    device: torch.device | None = None
    """Compute here, one block at a time; None: where the model is."""

    def __post_init__(self) -> None:
        keep_gradients(self.model)

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """All of its blocks."""
        return find_blocks(self.model)[1]

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The target layers by name."""
        return target_layers(self.model, self.targets)

    def inside(self, block: int) -> dict[str, Layer]:
        """Those of one block."""
        return {name: layer for name, layer in self.layers.items() if layer.block == block}

    @cached_property
    def place(self) -> torch.device:
        """Where it is computed."""
        return computing_device(self.model, self.device)
