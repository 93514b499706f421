"""What is recorded of a layer while its block is walked, and what is read out of it afterwards.

Both moments of a layer `W [m, n]` are summed in the smaller of its two dimensions, k. On that (near) side these are the
rows themselves. On the other (far) side they are the rows after `W`: with `z = W^T delta`,
`v_i . z = sigma_i (u_i . delta)`, so nothing of the larger dimension squared ever exists, and the importance is one sum,
`tr(G W A W^T) = tr(A E[z z^T])`. Only directions that are too weak to be divided by their sigma are summed on their far
singular vectors as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from farss import processes
from farss.artifacts import Layer, layer_tensors
from farss.errors import ModelError, NumericalError
from farss.forward import hooked
from farss.maths.directions import Decomposition, decompose, direction_scores, ends, far_rows, overlap, select
from farss.maths.fisher import importance
from farss.maths.moments import Moment, energies, kept_rows
from farss.structure import weight_of


@dataclass
class Statistics:
    """One target layer, while its block is walked."""

    layer: Layer
    weight: Tensor
    """[m, n]"""
    parts: Decomposition | None
    """Present in its owner, the process that decomposes it."""
    near: Moment
    """Of the rows of the smaller side: activations where m >= n, gradients otherwise."""
    far: Moment
    """Of the other side's rows after the weight."""
    weak: Moment | None
    """Of the far rows on the weak directions' singular vectors; None where every direction is strong."""

    @property
    def tall(self) -> bool:
        """Whether the near side is that of the activations."""
        return self.weight.shape[0] >= self.weight.shape[1]

    @property
    def moments(self) -> list[Moment]:
        """All that is summed."""
        return [self.near, self.far, *([self.weak] if self.weak else [])]

    def record_far(self, rows: Tensor) -> None:
        """Add rows [t, d] of the far side."""
        self.far.add(rows)
        if self.weak:
            self.weak.add(rows)


class Readout(NamedTuple):
    """What the survey keeps of one layer."""

    importance: float
    tensors: dict[str, Tensor]
    """sigma, lam, gam [k]; kept [c]; u [m, c], v [n, c]; float32."""
    overlap: dict[str, float] | None = None
    """Share of the exact choice that a float32 decomposition chose, at each end."""


def start(layer: Layer, weight: Tensor, module: nn.Module, owner: int, parts: Decomposition | None) -> Statistics:
    """Make room for a layer's moments; its weight's decomposition is present in its owner, and what all need of it is shared."""
    sums, rows = sums_of(module), far_rows(weight)
    weak = processes.shared(parts.far_weak.shape[1] if parts else 0, owner)
    vectors = parts.far_weak.to(sums).contiguous() if parts else rows.new_empty((rows.shape[0], weak), dtype=sums)
    on_weak = Moment(sums, processes.shared_tensor(vectors, owner)) if weak else None
    return Statistics(layer, weight, parts, Moment(sums), Moment(sums, rows), on_weak)


def sums_of(module: nn.Module) -> torch.dtype:
    """The precision of a layer's sums."""
    return torch.float64 if next(module.parameters()).dtype == torch.float64 else torch.float32


def finite_weight(layer: Layer, module: nn.Module) -> Tensor:
    """The weight `W [m, n]` of a layer.

    Raises:
        NumericalError: it holds NaN or infinite values.
    """
    weight = weight_of(module).detach()
    if not torch.isfinite(weight).all():
        raise NumericalError(f"the weights of {layer.name} hold NaN or infinite values: the model's file is damaged")
    return weight


def finite_weights(model: nn.Module, layers: dict[str, Layer], block: int) -> dict[str, Tensor]:
    """The weights of the layers inside a block, where they are; see `finite_weight`."""
    return {name: finite_weight(layer, model.get_submodule(name)) for name, layer in layers.items() if layer.block == block}


# --- recording -------------------------------------------------------------------------------------------------------


def recording(modules: dict[str, nn.Module], known: dict[str, Statistics], mask: Tensor) -> AbstractContextManager[None]:
    """While active, every forward and backward through the layers adds to their moments."""
    seen: dict[int, tuple[Tensor, Moment]] = {}
    return hooked([module.register_forward_hook(_record(known[name], mask, seen)) for name, module in modules.items()])


def _record(known: Statistics, mask: Tensor, seen: dict[int, tuple[Tensor, Moment]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0]
        rows, name = real_rows(known.layer.name, x, mask), known.layer.name
        if not known.tall:
            known.record_far(rows)
            on_gradient(output, lambda gradient: known.near.add(real_rows(name, gradient, mask)))
            return
        known.near = add_once(x, rows, known.near, seen)
        on_gradient(output, lambda gradient: known.record_far(real_rows(name, gradient, mask)))

    return hook


def on_gradient(output: Tensor, take: Callable[[Tensor], None]) -> None:
    """Have a layer's output gradient taken, where one will come: an indexer (DeepSeek-V3.2) runs without, and its layers are refused when
    the gradients are counted."""
    if output.requires_grad:
        output.register_hook(take)


def recording_inputs(modules: dict[str, nn.Module], moments: dict[str, Moment], mask: Tensor) -> AbstractContextManager[None]:
    """While active, every forward pass through the layers adds their inputs to the moments."""
    seen: dict[int, tuple[Tensor, Moment]] = {}
    lengths = mask.sum(1).tolist()

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments[name] = add_once(args[0], real_rows(name, args[0], mask), moments[name], seen, lengths)

    return hooked([module.register_forward_pre_hook(partial(record, name)) for name, module in modules.items()])


def recording_pull(modules: dict[str, nn.Module], moments: dict[str, Moment], mask: Tensor) -> AbstractContextManager[None]:
    """While active, every forward and backward through the layers adds their inputs to the moments, each times the norm of the
    gradient at its output."""

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs, moment = real_rows(name, args[0], mask), moments[name]

        def pull(gradient: Tensor) -> None:
            sizes = real_rows(name, gradient, mask).to(moment.dtype).norm(dim=1, keepdim=True)
            moment.add(inputs.to(moment.dtype) * sizes)

        on_gradient(output, pull)

    return hooked([module.register_forward_hook(partial(record, name)) for name, module in modules.items()])


def add_once(x: Tensor, rows: Tensor, moment: Moment, seen: dict[int, tuple[Tensor, Moment]], lengths: Sequence[int] = ()) -> Moment:
    """Add a layer's input to its moment. Layers that read the same input share one, which is returned.

    Args:
        x: the input, [b, t, d].
        rows: its real tokens, [kept, d].
        seen: the inputs of this forward pass and their moments, by the input's `id`.
        lengths: how many of the rows each example has.
    """
    if id(x) in seen and seen[id(x)][0] is x:
        return seen[id(x)][1]
    moment.add(rows, lengths)
    seen[id(x)] = (x, moment)
    return moment


def real_rows(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """The real tokens of a layer's input or gradient, [kept, d].

    Raises:
        ModelError: the layer does not see every token.
    """
    try:
        return kept_rows(x.detach(), mask)
    except ValueError as error:
        raise ModelError(
            f"{name} does not see every token once ({error}), as in a mixture of experts: "
            f"name the other layers in model.targets, such as [q_proj, k_proj, v_proj, o_proj]"
        ) from error


def add_up_moments(moments: Iterable[Moment]) -> None:
    """Sum moments over the processes, each once."""
    for moment in {id(moment): moment for moment in moments}.values():
        if moment.total is not None:
            processes.add_up(moment.total)
            count = torch.tensor([moment.count], device=moment.total.device)
            processes.add_up(count)
            moment.count = int(count)


# --- reading out -----------------------------------------------------------------------------------------------------


def read_out(known: Statistics, cap: int, tokens: int, check: bool) -> Readout:
    """Importance, statistics and kept directions of one layer, in its owner.

    Args:
        cap: directions kept at each end of the score order.
        tokens: how many rows it must have seen.
        check: compare the choice with that of a float64 decomposition.
    """
    assert known.parts is not None
    gradients = known.far if known.tall else known.near
    for moment in known.moments:
        check_counts(known.layer.name, "gradient" if moment is gradients else "token", moment, tokens)
    worth = _importance(known)
    sigma, lam, gam = _scored(known, known.parts)
    scores = direction_scores(sigma, lam, gam)
    compared = _overlap(scores, direction_scores(*_scored(known, decompose(known.weight))), cap) if check else None
    kept = ends(scores, cap)
    return Readout(worth, layer_tensors(sigma, kept, *known.parts.vectors(kept), lam, gam), compared)


def _importance(known: Statistics) -> float:
    near, far = known.near.mean, known.far.mean
    names = ("activations", "gradients") if known.tall else ("gradients", "activations")
    for what, mean in zip(names, (near, far), strict=True):
        finite_moment(known.layer.name, what, mean)
    return importance(near, far, known.layer.shape)


def finite_moment(name: str, what: str, mean: Tensor) -> Tensor:
    """A layer's moment.

    Raises:
        NumericalError: it holds NaN or infinite values.
    """
    if not torch.isfinite(mean).all():
        raise NumericalError(f"the {what} of {name} hold NaN or infinite values: load the model in float32 (model.dtype=float32)")
    return mean


def _scored(known: Statistics, parts: Decomposition) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, lambda, gamma [k] float32."""
    near = energies(known.near.mean, parts.near)
    far = energies(known.far.mean, parts.near).double()
    weak = known.weak.mean.diagonal().double() if known.weak else far[:0]
    strong = far.numel() - weak.numel()
    far = torch.cat([far[:strong] / parts.sigma[:strong].double().square(), weak])
    lam, gam = (near, far) if known.tall else (far, near)
    return parts.sigma.float(), lam.float(), gam.float()


def check_counts(name: str, what: str, moment: Moment, rows: int) -> None:
    """Refuse a layer that not every token, or its gradient, went through once.

    Raises:
        ModelError: with the cure.
    """
    if not moment.count:
        raise ModelError(f"no {what} reaches {name}: leave it out of model.targets")
    if moment.count != rows:
        raise ModelError(f"{moment.count} {what}s of {rows} went through {name}: leave it out of model.targets")


def _overlap(scores: Tensor, exact: Tensor, cap: int) -> dict[str, float]:
    size = min(cap, scores.numel())
    return {side: overlap(select(scores, size, side), select(exact, size, side)) for side in ("most", "least")}


def summary(readouts: list[Readout]) -> dict[str, Any] | None:
    """Mean overlap of a block's layers at each end."""
    known = [readout.overlap for readout in readouts if readout.overlap]
    return {side: sum(one[side] for one in known) / len(known) for side in ("most", "least")} if known else None
