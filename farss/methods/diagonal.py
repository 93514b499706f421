"""A trained diagonal between A and B, `dW = s B diag(e) A`, on PEFT's plain LoRA: AdaLoRA's and KaSA's, and of one value FoRA's gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Diagonal(nn.Module):
    """`weight [r, 1]`, or `[1, 1]` for all r alike: named and shaped as PEFT's AdaLoRA does it, so that its rank allocator finds it."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values[:, None])

    def scale(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: `A x` times the diagonal."""
        return output * self.weight[:, 0].to(output.dtype)


def add_diagonals(layers: list[Any], adapter: str, values: Callable[[int], Tensor]) -> None:
    """Put a diagonal into each of PEFT's LoRA modules, float32.

    Args:
        values: rank -> its start, [r] or [1].
    """
    for layer in layers:
        weight = layer.lora_A[adapter].weight
        diagonal = Diagonal(values(weight.shape[0]).to(weight))
        layer.lora_E = nn.ModuleDict({adapter: diagonal})
        layer.lora_A[adapter].register_forward_hook(diagonal.scale)


def orthogonality(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`||A A^T - I||_F` and `||B^T B - I||_F` of `A [r, n]` and `B [m, r]`, float32."""
    identity = torch.eye(a.shape[0], device=a.device)
    a, b = a.float(), b.float()
    return torch.linalg.norm(a @ a.T - identity), torch.linalg.norm(b.T @ b - identity)
