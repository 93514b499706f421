"""OLoRA: start from the first columns of the weight's QR decomposition (Buyukakyuz 2024)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from farss.artifacts import layer_tensors
from farss.methods.base import Method, Reading, Start
from farss.methods.uniform import uniform_plan


def read(weight: Tensor, cap: int) -> dict[str, Tensor]:
    """The first `cap` columns of Q and rows of R; a direction's score falls with its place."""
    q, r = torch.linalg.qr(weight.double())
    count = q.shape[1]
    return layer_tensors(torch.ones(count), torch.arange(min(cap, count)), q[:, :cap], r[:cap].T, lam=torch.arange(count, 0, -1))


def start(u: Tensor, sigma: Tensor, v: Tensor, scaling: float) -> Start:
    """`B = Q_r` and `A = R_r`, whatever the scaling, and `s B A` out of the base."""
    return Start((u, v.T), (u, v.T))


OLORA = Method(
    name="olora",
    title="OLoRA (Buyukakyuz 2024)",
    changes="one rank in every layer, starting from the first columns of Q and rows of R",
    plan=partial(uniform_plan, side="most"),
    needs=Reading("orthogonal", "weights", read),
    start=start,
)
