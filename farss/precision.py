"""In which precision a device multiplies."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Products = Literal["highest", "high", "medium"]
"""How float32 is multiplied: in float32, in TF32, or in bfloat16 where a CPU has units for it (`torch.set_float32_matmul_precision`)."""
BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
"""Of matrix products."""
OF_BACKENDS: dict[Products, tuple[str, str]] = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}
"""The same in torch's newer words, for each of them."""


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations write it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def multiplies_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has units for matrix products in this precision.

    A CPU without them goes through 16-bit products slower than through float32 ones
    (three times, where it has AVX-512: docs/performance.md).
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    try:
        if dtype == torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        # oneDNN says yes to bfloat16 on every x86 CPU with AVX-512, and emulates it where its units are missing
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        units = not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return bool(units and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch that was built without oneDNN, or decides otherwise
        return False


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision in which to compute with values of a precision: float32, which holds them exactly, on a CPU without units for it."""
    return dtype if device.type != "cpu" or multiplies_in(dtype, device) else torch.float32


@contextmanager
def float32_products(how: Products) -> Iterator[None]:
    """Multiply float32 so for a while, whatever the user or a container chose; their choice is put back.

    It may have been made in either of torch's two ways, and after a choice for single backends torch refuses to tell the older setting.
    """
    before = [backend.fp32_precision for backend in BACKENDS]
    try:
        overall = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(how)
    except RuntimeError:
        overall = None
        _choose(OF_BACKENDS[how])
    try:
        yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        _choose(before)


def _choose(values: Iterable[str]) -> None:
    for backend, value in zip(BACKENDS, values, strict=True):
        backend.fp32_precision = value
