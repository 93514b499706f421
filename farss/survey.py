"""Model + calibration examples -> Survey, one block at a time.

One forward pass keeps what enters each block; then the blocks are walked from last to first. A block is re-run from
its kept input, the gradient of its output is pushed back through it, and its linear layers record the second moments
of their inputs and output gradients. The gradient of its input is the output gradient of the block before. This is
gradient checkpointing over the data set: exact, and only one block's statistics ever exist.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from farss.artifacts import Layer, Survey, fingerprint, read_json, write_json, write_tensors
from farss.errors import FolderError, ModelError, NumericalError
from farss.maths.directions import Decomposition, decompose, direction_scores, select
from farss.maths.fisher import importance
from farss.maths.moments import Moment, kept_rows
from farss.models import accepts, find_blocks, target_layers, weight_of
from farss.models import fingerprint as model_fingerprint

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Progress = Callable[[int, int, str], None]

PROGRESS = "progress.json"
"""In the survey's folder while it is unfinished."""
HEAD_POSITIONS = 256
"""Supervised positions whose logits exist at a time; 256 of a vocabulary of 262,144 are 268 MB in float32."""


@dataclass
class Kept:
    """What entered the blocks for one batch."""

    batch: Batch
    inputs: list[Tensor] = field(default_factory=list)
    """For each block, its hidden states [b, t, d]."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """For each block, the other arguments (position embeddings, masks), shared between blocks."""
    output: Tensor | None = None
    """[b, t, d] output of the last block."""


class _LastBlockDone(Exception):
    """Raised by a hook: what follows the last block is not needed in the first pass."""


# --- first pass ------------------------------------------------------------------------------------------------------


def record_inputs(model: nn.Module, blocks: nn.ModuleList, batch: Batch) -> Kept:
    """Run one batch up to the last block and keep what enters each block. No graph is built."""
    kept = Kept(batch)
    hooks = [block.register_forward_pre_hook(_keep_input(kept), with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(_keep_output(kept)))
    try:
        with torch.no_grad(), contextlib.suppress(_LastBlockDone):
            model(**_model_arguments(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _model_arguments(model: nn.Module, batch: Batch) -> dict[str, Any]:
    arguments: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels" and accepts(model, key)}
    return {**arguments, "use_cache": False} if accepts(model, "use_cache") else arguments


def _keep_input(kept: Kept) -> Callable[..., None]:
    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        kept.inputs.append(hidden.detach())
        kept.calls.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    return hook


def _keep_output(kept: Kept) -> Callable[..., None]:
    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.output = _hidden(output).detach()
        raise _LastBlockDone

    return hook


def _hidden(output: Any) -> Tensor:
    """A block returns its hidden states, or a tuple that begins with them."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


# --- the loss --------------------------------------------------------------------------------------------------------


def output_gradient(model: nn.Module, blocks: nn.ModuleList, kept: Kept, labels: Callable[..., Tensor]) -> Tensor:
    """Gradient [b, t, d] of the summed negative log-likelihood at the last block's output.

    The model's own final norm and head are run with the blocks passed over. In a language model they see each position
    alone, so the supervised positions are packed into short sequences: the logits of a whole batch can be larger than
    the model.
    """
    assert kept.output is not None
    gradient = torch.zeros_like(kept.output)
    if kept.batch["labels"].dim() == 1:  # a classifier: one label per example, and a head that may look anywhere
        hidden = kept.output.detach().requires_grad_(True)
        gradient += _tail_gradient(model, blocks, kept.batch, hidden, lambda logits: (logits, kept.batch["labels"]), labels)
        return gradient
    targets = kept.batch["labels"][:, 1:]
    rows, positions = (targets != -100).nonzero(as_tuple=True)
    for row, position in zip(rows.split(HEAD_POSITIONS), positions.split(HEAD_POSITIONS), strict=True):
        hidden = kept.output[row, position][None].detach().requires_grad_(True)
        packed = {"input_ids": kept.batch["input_ids"][row, position][None]}
        wanted = targets[row, position]
        gradient[row, position] = _tail_gradient(model, blocks, packed, hidden, partial(_first, wanted), labels)[0]
    return gradient


def _first(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits[0], targets


def _tail_gradient(
    model: nn.Module,
    blocks: nn.ModuleList,
    batch: Batch,
    hidden: Tensor,
    choose: Callable[[Tensor], tuple[Tensor, Tensor]],
    labels: Callable[..., Tensor],
) -> Tensor:
    """Gradient of the summed loss at `hidden`, the last block's output, through what follows it."""
    with torch.enable_grad(), passed_over(blocks, hidden):
        logits, targets = choose(model(**_model_arguments(model, batch)).logits)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(logits, labels(logits, targets), reduction="sum")
    if not torch.isfinite(loss):
        raise NumericalError(
            f"the loss of the calibration examples is {loss.item()}: look for NaN in the model's weights, or load it in float32"
        )
    (gradient,) = torch.autograd.grad(loss, hidden)
    return gradient  # type: ignore[no-any-return]


@contextlib.contextmanager
def passed_over(blocks: nn.ModuleList, output: Tensor) -> Iterator[None]:
    """Make every block hand on its input, and the last one `output`, instead of computing anything."""
    originals = [block.forward for block in blocks]

    def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def last(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return output

    for block in blocks:
        block.forward = last if block is blocks[-1] else skip
    try:
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.forward = original


def data_labels(logits: Tensor, targets: Tensor) -> Tensor:
    """Empirical Fisher: the labels of the data set."""
    return targets


def sampled_labels(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """True Fisher: labels drawn from the model (Martens 2020; Kunstner et al. 2019), example by example."""
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor, targets: Tensor) -> Tensor:
        probabilities = logits.detach().double().softmax(-1).cpu()
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(targets.device)

    return draw


# --- one block -------------------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """What is known of one layer while its block is being walked."""

    parts: Decomposition
    activation: Moment
    gradient: Moment


def start_statistics(name: str, module: nn.Module) -> Statistics:
    """Decompose a layer's weight and make room for its moments."""
    weight = weight_of(module).detach()
    if not torch.isfinite(weight).all():
        raise NumericalError(f"the weights of {name} hold NaN or infinite values: the model's file is damaged")
    parts = decompose(weight)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return Statistics(parts, Moment(parts.v, dtype), Moment(parts.u, dtype))


@contextlib.contextmanager
def recording(modules: dict[str, nn.Module], statistics: dict[str, Statistics], mask: Tensor) -> Iterator[None]:
    """While active, every forward and backward through the layers adds to their moments."""
    squares: dict[int, tuple[Tensor, Tensor]] = {}  # layers that read the same input share its product
    hooks = [module.register_forward_hook(_record(name, statistics[name], mask, squares)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _record(name: str, known: Statistics, mask: Tensor, squares: dict[int, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        entry = squares.get(id(args[0]))
        rows = _rows(name, args[0].detach(), mask)
        shared = entry[1] if entry is not None and entry[0] is args[0] else None
        square = known.activation.add(rows, shared)
        if not known.activation.projects:
            squares[id(args[0])] = (args[0], square)
        output.register_hook(lambda gradient: _add(known.gradient, _rows(name, gradient.detach(), mask)))

    return hook


def _add(moment: Moment, rows: Tensor) -> None:
    moment.add(rows)


def _rows(name: str, x: Tensor, mask: Tensor) -> Tensor:
    try:
        return kept_rows(x, mask)
    except ValueError as error:
        raise ModelError(
            f"{name} does not see every token once ({error}), as in a mixture of experts: "
            f"name the other layers in model.targets, such as [q_proj, k_proj, v_proj, o_proj]"
        ) from error


def walk_block(block: nn.Module, index: int, kept: list[Kept], gradients: list[Tensor], record: Callable[[Tensor], Any]) -> None:
    """Push the output gradients of one block back through it, in place: afterwards they belong to its input.

    Args:
        kept: one entry a batch.
        gradients: one `[b, t, d]` a batch; replaced.
        record: makes the context in which a batch with this mask [b, t] is recorded.
    """
    for place, entry in enumerate(kept):
        hidden = entry.inputs[index].detach().requires_grad_(True)
        args, kwargs = entry.calls[index]
        with torch.enable_grad(), record(entry.batch["attention_mask"].bool()):
            output = _hidden(block(hidden, *args, **kwargs))
            gradients[place] = torch.autograd.grad(output, hidden, gradients[place].to(output.dtype))[0]
        entry.inputs[index] = hidden.new_empty(0)  # no later block needs it


# --- the sweep -------------------------------------------------------------------------------------------------------


def survey(
    model: nn.Module,
    batches: list[Batch],
    folder: Path | str,
    cap: int,
    targets: list[str] | None = None,
    fisher: str = "empirical",
    seed: int = 0,
    meta: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Survey:
    """Estimate the Kronecker-factored Fisher statistics of every target layer and keep what any plan can ask for.

    Args:
        model: frozen, in `eval()` mode. Encoders with a classification head work too (labels [b]).
        batches: `input_ids`, `attention_mask`, `labels` (-100: not supervised), each [b, t].
        folder: `survey.json` and one safetensors file a block are written here; a killed survey goes on from them.
        cap: the singular vectors of this many directions at each end of the score order are kept.
        targets: names of the layers, such as `["q_proj"]`; empty: every linear layer of every block.
        fisher: `empirical` (labels of the data) or `sampled` (labels drawn from the model).
        on_progress: called with (blocks done, blocks, a line to show).

    Raises:
        NumericalError: a weight, activation, gradient or loss is NaN or infinite; the layer is named.
        ModelError: the architecture is not supported.
        FolderError: the folder holds a survey of something else.
    """
    folder = Path(folder)
    layers = target_layers(model, targets)
    _, blocks = find_blocks(model)
    key = identity(model, batches, list(layers), fisher, seed)
    if (folder / "survey.json").is_file():
        return _same_survey(Survey.load(folder), key, cap)
    spent = _begin(folder, key, cap)
    started, tell = time.monotonic() - spent, on_progress or (lambda done, total, line: None)
    device = next(model.parameters()).device
    with frozen(model):
        tell(0, len(blocks), "forward pass")
        kept = [record_inputs(model, blocks, {name: x.to(device) for name, x in batch.items()}) for batch in batches]
        first = _first_undone(folder, len(blocks))
        gradients = _gradients(model, blocks, kept, folder, first, fisher, seed)
        for index in range(first, -1, -1):
            inside = {name: model.get_submodule(name) for name, layer in layers.items() if layer.block == index}
            _survey_block(blocks[index], index, inside, kept, gradients, folder, cap)
            write_json(folder / PROGRESS, {"key": key, "cap": cap, "seconds": time.monotonic() - started})
            done = len(blocks) - index
            tell(done, len(blocks), _line(batches, done, len(blocks), started))
    facts = {**(meta or {}), "key": key, "fisher": fisher, "seed": seed, "seconds": round(time.monotonic() - started, 1)}
    return _finish(folder, layers, len(blocks), cap, batches, facts)


def identity(model: nn.Module, batches: list[Batch], layers: list[str], fisher: str, seed: int) -> str:
    """Hash of everything a survey's numbers depend on (how the examples are batched aside)."""
    rows = [tensor.tolist() for batch in batches for _, tensor in sorted(batch.items())]
    return fingerprint([model_fingerprint(model), rows, layers, fisher, seed])


def _same_survey(found: Survey, key: str, cap: int) -> Survey:
    if found.meta.get("key") != key:
        raise FolderError(f"{found.folder} holds a survey of another model or of other data: choose another folder, or delete it")
    if found.cap < cap:
        raise FolderError(
            f"{found.folder} kept {found.cap} directions at each end, and {cap} are wanted: choose another folder, or delete it"
        )
    return found


def _begin(folder: Path, key: str, cap: int) -> float:
    """Mark a folder as ours, or check that the unfinished survey in it is this one.

    Returns:
        The seconds that were spent on it before.
    """
    if (folder / PROGRESS).is_file():
        progress = read_json(folder / PROGRESS)
        if (progress["key"], progress["cap"]) != (key, cap):
            raise FolderError(f"{folder} holds an unfinished survey of another model, other data or another rank: delete it")
        return float(progress["seconds"])
    write_json(folder / PROGRESS, {"key": key, "cap": cap, "seconds": 0.0})
    return 0.0


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in `eval()` mode with every parameter frozen; both are put back afterwards."""
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _survey_block(
    block: nn.Module, index: int, modules: dict[str, nn.Module], kept: list[Kept], gradients: list[Tensor], folder: Path, cap: int
) -> None:
    statistics = {name: start_statistics(name, module) for name, module in modules.items()}
    walk_block(block, index, kept, gradients, lambda mask: recording(modules, statistics, mask))
    tensors: dict[str, Tensor] = {}
    importances = {}
    for name, known in statistics.items():
        importances[name], found = _read_out(name, known, cap)
        tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
    write_json(folder / f"block-{index:04d}.json", importances)
    write_tensors(folder / f"block-{index:04d}.safetensors", tensors)
    _save_gradients(folder, index, gradients)


def _read_out(name: str, known: Statistics, cap: int) -> tuple[float, dict[str, Tensor]]:
    """Importance and tensors of one layer."""
    if not known.gradient.count:
        raise ModelError(f"no gradient reaches {name}: leave it out of model.targets")
    u, sigma, v = known.parts
    activation, gradient = known.activation.in_basis(), known.gradient.in_basis()
    for what, moment in (("activations", activation), ("gradients", gradient)):
        if not torch.isfinite(moment).all():
            raise NumericalError(f"the {what} of {name} hold NaN or infinite values: load the model in float32 (model.dtype=float32)")
    lam, gam = activation.diagonal().float(), gradient.diagonal().float()
    kept = _ends(direction_scores(sigma.float(), lam, gam), cap)
    worth = importance(sigma, activation, gradient, (u.shape[0], v.shape[0]))
    found = {"sigma": sigma.float(), "lam": lam, "gam": gam, "kept": kept, "u": u[:, kept].float(), "v": v[:, kept].float()}
    return worth, {part: tensor.cpu().contiguous() for part, tensor in found.items()}


def _ends(scores: Tensor, cap: int) -> Tensor:
    """Indices of the `cap` highest and the `cap` lowest scores, ascending, each once."""
    size = min(cap, scores.numel())
    both: Tensor = torch.cat([select(scores, size, "most"), select(scores, size, "least")]).unique()
    return both


def _gradients(model: nn.Module, blocks: nn.ModuleList, kept: list[Kept], folder: Path, first: int, fisher: str, seed: int) -> list[Tensor]:
    """The output gradients of block `first`: from the loss, or as a killed survey left them."""
    if first < len(blocks) - 1:
        saved = load_file(folder / f"gradient-{first + 1:04d}.safetensors")
        log.info("the survey goes on at block %d", first)
        return [saved[str(place)].to(entry.batch["input_ids"].device) for place, entry in enumerate(kept)]
    labels = sampled_labels(seed) if fisher == "sampled" else data_labels
    return [output_gradient(model, blocks, entry, labels) for entry in kept]


def _save_gradients(folder: Path, index: int, gradients: list[Tensor]) -> None:
    """Keep what the next block needs, then drop what this one needed."""
    if index:  # the last one stays until `survey.json` is written
        write_tensors(folder / f"gradient-{index:04d}.safetensors", {str(place): x.cpu() for place, x in enumerate(gradients)})
        (folder / f"gradient-{index + 1:04d}.safetensors").unlink(missing_ok=True)


def _first_undone(folder: Path, blocks: int) -> int:
    """The block at which the walk starts: the last one, or the one below the newest kept gradient."""
    for index in range(1, blocks):
        if (folder / f"gradient-{index:04d}.safetensors").is_file():
            return index - 1
    return blocks - 1


def _line(batches: list[Batch], done: int, total: int, started: float) -> str:
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return f"block {total - done}, {tokens * done / (time.monotonic() - started):,.0f} tokens/s through a block"


def _finish(folder: Path, layers: dict[str, Layer], blocks: int, cap: int, batches: list[Batch], meta: dict[str, Any]) -> Survey:
    """Gather the importances and write `survey.json`."""
    importances: dict[str, float] = {}
    for path in sorted(folder.glob("block-*.json")):
        importances |= read_json(path)
    measured = {name: Layer(name, x.block, x.shape, importances[name]) for name, x in layers.items()}
    examples = sum(batch["input_ids"].shape[0] for batch in batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    result = Survey(folder, measured, blocks, cap, examples, tokens, meta)
    result.save()
    for path in [*folder.glob("block-*.json"), *folder.glob("gradient-*.safetensors"), folder / PROGRESS]:
        path.unlink()
    return result
