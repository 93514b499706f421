"""Trained model -> a plain LoRA on the untouched base model.

The exported adapter has one rank in every layer, alpha equal to the rank, and no patterns: PEFT, vLLM and llama.cpp
scale such an adapter alike, while they disagree on everything else.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from farss.adapter import activate, adapter_change, untouched_base
from farss.artifacts import Plan
from farss.batches import Row, collate
from farss.card import write_card
from farss.config import ExportConfig
from farss.errors import FarssError, FolderError, NumericalError
from farss.files import read_json, read_tensors, whole_folder, write_json, write_tensors
from farss.forward import attribute, evaluating, unwrapped, without_cache
from farss.llamacpp import FILE
from farss.maths.compress import compress
from farss.models import base_fingerprint, quantization_of, tensors_fingerprint, tokenizer_fingerprint
from farss.places import outside, placed, placed_in_turn
from farss.precision import dtype_name, float32_products
from farss.structure import PEFT_PREFIX, check_loaded, find_blocks, has_adapter, is_linear, is_packed, is_rearranged, uncompiled, weight_of

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM accepts these and no others (`max_lora_rank`), so the exported rank is padded up to one of them."""
OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "farss.json", "README.md", FILE)
"""The files of an adapter."""
PREPARED = "prepared.json"
"""In a folder of `farss prepare`."""
CHECKED = "farss_checked"
CHECKED_PROMPTS = 4
CHECKED_TOKENS = 128
"""Of each prompt: the logits of thousands of tokens over a large vocabulary fill a memory."""
TOLERANCE = 1e-4
"""Largest difference of an exact adapter's logits in float32, relative to the largest logit. Other sums of the same numbers
differ by 2e-6 on 18 blocks, more on deeper and wider models; a wrong adapter differs by far more."""


class Portable(NamedTuple):
    """An adapter in memory."""

    state: dict[str, Tensor]
    """PEFT's state dict, float32."""
    rank: int
    lost: float
    """Largest relative Frobenius error of a layer (0 unless compressed)."""
    effective_ranks: dict[str, float]
    """How many directions of each layer's change count (see `maths.compress`)."""


class Exported(NamedTuple):
    """What was handed over, and how exact it is."""

    folder: Path
    rank: int
    lost: float
    """Largest relative Frobenius error of a layer's change (0 unless compressed)."""
    logit_difference: float
    """Largest |logit difference| in float32 between the trained model and the exported adapter on the original base."""
    effective_ranks: dict[str, float]
    """How many directions of each layer's change count."""

    @property
    def facts(self) -> dict[str, Any]:
        """How exact it is, and of what rank, for records and people."""
        mean = sum(self.effective_ranks.values()) / len(self.effective_ranks)
        return {"logit_difference": self.logit_difference, "rank": self.rank, "lost": self.lost, "effective_rank": round(mean, 2)}


def portable(changes: Iterable[tuple[str, tuple[Tensor, Tensor]]], rank: int | None = None, energy: float | None = None) -> Portable:
    """Plain LoRA factors of one rank, on the original weights.

    Args:
        changes: layer by layer its name and thin factors `P [m, q]`, `Q [q, n]` of what training changed, `dW = P Q`; of an iterator
            one layer's are held at a time.
        rank: compress to this rank; None: exact.
        energy: compress each layer to this share of its squared Frobenius norm; None: exact.

    Raises:
        ConfigError: a rank below 1, or a share that is none.
    """
    ExportConfig(rank=rank, energy=energy)  # checks them
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    lost, counting = 0.0, dict[str, float]()
    for name, change in changes:
        small = compress(*change, rank, energy)
        factors[name], lost = (small.a.float().cpu(), small.b.float().cpu()), max(lost, small.lost)
        counting[name] = round(small.effective_rank, 2)
        del change, small  # before the next is made
    needed = max(1, *(a.shape[0] for a, _ in factors.values()))
    served = next((allowed for allowed in SERVED_RANKS if allowed >= needed), needed)
    state: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        padding = served - a.shape[0]
        state[f"{PEFT_PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, padding))
        state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b, (0, padding))
    return Portable(state, served, lost, counting)


def export(
    adapted: Any,
    plan: Plan,
    folder: Path | str,
    batch: dict[str, Tensor],
    base: str = "",
    rank: int | None = None,
    energy: float | None = None,
    tokenizer: Any = None,
    prompt: dict[str, Any] | None = None,
    command: str = "",
) -> Exported:
    """Write the portable adapter, and check it on the original base before it gets its name.

    Args:
        adapted: the trained `PeftModel`.
        plan: the plan it was made from.
        folder: where the adapter goes; an adapter that is there makes way for it, and nothing else does: other files beside it stay.
        batch: a few real prompts (`input_ids`, `attention_mask`) for the check.
        base: name or folder of the base model, for `adapter_config.json`.
        rank, energy: compress, see `portable`; None: exact.
        tokenizer: the base's; its fingerprint is kept beside that of the base.
        prompt: how the model was trained to be asked, from `farss.prompts.prompt_facts`.
        command: that makes it again, for its card.

    Raises:
        FarssError: the adapter does not give the trained model's logits. Nothing is left at `folder`.
        FolderError: something else lies there.
    """
    folder = Path(folder)
    ours = all((folder / name).is_file() for name in ("farss.json", "adapter_config.json"))  # a model of ours has the first too
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} holds something other than an adapter of farss: give a new folder")
    state, served, lost, counting = portable(((name, adapter_change(adapted, name)) for name in plan.layers), rank, energy)
    with whole_folder(folder) as unfinished:
        write_adapter(unfinished, state, target_names(plan, adapted), base, served)
        difference, scale = check(adapted, unfinished, batch)
        tolerance = TOLERANCE * max(1.0, scale)
        if rank is None and energy is None and not difference <= tolerance:
            raise FarssError(
                f"the exported adapter's logits differ by {difference:.2g} from the trained model's (allowed: {tolerance:.2g}): "
                "it was not kept"
            )
        exported = Exported(folder, served, lost, difference, counting)
        write_facts(unfinished, plan, origin_of(adapted, base, tokenizer, prompt), exported, state, command)
        for other in [path for path in folder.glob("*") if path.name not in OF_ADAPTER and not path.match(".*.part")]:
            (shutil.copytree if other.is_dir() else shutil.copy2)(other, unfinished / other.name)
    return exported


def origin_of(adapted: Any, base: str, tokenizer: Any, prompt: dict[str, Any] | None) -> dict[str, Any]:
    """What an adapter is trained on and for: the base model, its precision, its tokenizer and the prompt."""
    packed = quantization_of(unwrapped(adapted))
    return {
        **(prompt or {}),
        "base": base,
        "base_fingerprint": base_fingerprint(adapted),
        "base_dtype": dtype_name(adapted.dtype),
        **({"quantization": packed} if packed != "none" else {}),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer) if tokenizer else None,
    }


def write_facts(folder: Path, plan: Plan, origin: dict[str, Any], exported: Exported, state: dict[str, Tensor], command: str = "") -> None:
    """`farss.json`, which says what an adapter belongs to (`origin_of`) and how exact it is, and the model card."""
    ranks = [layer.rank for layer in plan.layers.values()]
    facts = {
        "method": plan.method,
        "boundary": plan.boundary,
        "blocks": plan.blocks,
        "parameters": plan.parameters,
        "planned_ranks": [min(ranks), max(ranks)],
        **origin,
        **exported._asdict(),
        "folder": exported.folder.name,
        "adapter_fingerprint": tensors_fingerprint(state),
    }
    write_json(folder / "farss.json", facts)
    write_card(folder, command=command)


def load_adapter(model: Any, folder: Path | str, tokenizer: Any = None, trainable: bool = False) -> Any:
    """Put an exported adapter on its base model, and on no other.

    Plain `PeftModel.from_pretrained` does the same without asking whether the base is the right one.

    Args:
        model: the base model.
        folder: an exported adapter.
        tokenizer: the base's; checked where it is given.
        trainable: whether its training is to be continued.

    Raises:
        FarssError: it was made for another model, another version of it or another tokenizer, or is not what was exported.
    """
    from peft import PeftModel

    folder, model = Path(folder), uncompiled(model)
    check_loaded(model)
    if has_adapter(model):
        raise FarssError("this model has an adapter already, and two would mix: load its base once more, or take the first off (unload)")
    if not folder.is_dir():
        raise FarssError(f"there is no folder {folder}: give that of an exported adapter")
    if not (folder / "farss.json").is_file():
        cure = "load it with PeftModel.from_pretrained"
        if (start := _prepared(folder)) is not None:
            convert = shlex.join(["farss", "convert", str(start), str(folder), "NEW"])
            cure = f"it belongs to the base in {start}: turn it into one of the original base by `{convert}`"
        raise FarssError(f"{folder} is no adapter of farss: there is no farss.json in it; {cure}")
    facts = read_json(folder / "farss.json")
    if not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        raise FarssError(f"{folder} is a whole model: load it with AutoModelForCausalLM.from_pretrained")
    if is_rearranged(model):
        raise FarssError(
            "a forward pass on this CPU has rearranged this model's 4-bit weights, and rounded their scales: load the base anew, and put "
            "the adapter on before you ask it"
        )
    found = {"base": base_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None}
    for what, actual in found.items():
        expected = facts.get(f"{what}_fingerprint")
        if actual and expected and actual != expected:
            known = [facts[key] for key in ("base_dtype", "quantization") if facts.get(key)]
            cure = f" ({', '.join(known)})" if known and what == "base" else ""
            raise FarssError(
                f"{folder} was made for a {what} with fingerprint {expected}, but this one has {actual}: "
                f"load {facts.get('base')!r} as it was{cure}"
            )
    held = tensors_fingerprint(read_tensors(folder / "adapter_model.safetensors"))
    if facts.get("adapter_fingerprint", held) != held:
        raise FarssError(
            f"the weights in {folder} are not those that farss.json there describes: copy or export it as a whole or, if they were "
            "trained on there, load it with PeftModel.from_pretrained"
        )
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def _prepared(folder: Path) -> Path | None:
    """The folder of `farss prepare` in which an adapter lies, or whose base it is for."""
    file = folder / "adapter_config.json"
    named = [Path(read_json(file).get("base_model_name_or_path") or "").parent] if file.is_file() else []
    return next((place for place in (folder.parent, *named) if (place / PREPARED).is_file()), None)


def write_adapter(folder: Path, state: dict[str, Tensor], targets: list[str], base: str, rank: int) -> None:
    """Write PEFT's two files of an adapter with one rank and alpha equal to it. `targets`: from `target_names`."""
    from peft import LoraConfig

    folder.mkdir(parents=True)
    write_tensors(folder / "adapter_model.safetensors", state, {"format": "pt"})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))


def target_names(plan: Plan, adapted: Any) -> list[str]:
    """PEFT's `target_modules`: short names, which servers prefer, where each kind of layer is adapted in every block and no other module
    of the model is named alike; else full ones."""
    kinds: dict[str, set[int]] = {}
    for name, layer in plan.layers.items():
        kinds.setdefault(name.rsplit(".", 1)[-1], set()).add(layer.block)
    alike = [name for name, _ in adapted.get_base_model().named_modules() if name.rsplit(".", 1)[-1] in kinds]
    everywhere = all(len(blocks) == plan.blocks for blocks in kinds.values())
    return sorted(kinds) if everywhere and set(alike) <= set(plan.layers) else list(plan.layers)


def check(adapted: Any, folder: Path, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Load an exported adapter with stock PEFT on the same, untouched base and compare logits on real tokens, in float32.

    Returns:
        (largest |difference|, largest |logit|)
    """
    with in_float32(adapted):
        expected = logits(adapted, batch)
        adapted.load_adapter(str(folder), CHECKED, torch_device="cpu")
        try:
            adapted.base_model.set_adapter([CHECKED])
            with untouched_base(adapted):
                found = logits(adapted, batch)
        finally:
            activate(adapted)  # first: PEFT warns of an active adapter that is deleted
            adapted.delete_adapter(CHECKED)
    return (found - expected).abs().max().item(), expected.abs().max().item()


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[tokens, vocabulary] float32, on the CPU: of the first `CHECKED_TOKENS` real tokens of each prompt, one prompt at a time."""
    found = []
    options = without_cache(model)
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            prompt = ids[mask][None, :CHECKED_TOKENS].to(model.device)
            found.append(model(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options).logits[0].float().cpu())
    return torch.cat(found)


def check_batch(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """A few real prompts, on which models are compared."""
    batch = collate(rows[:CHECKED_PROMPTS], pad)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def step_zero(adapted: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """How far an adapted model is from its base before training: largest |logit difference| by precision.

    Measured on real tokens in float32 and in the precision of the weights.

    Raises:
        NumericalError: it is no number.
    """
    found, own = {}, dtype_name(next(adapted.get_base_model().parameters()).dtype)
    precisions: dict[str, contextlib.AbstractContextManager[None]] = {own: contextlib.nullcontext()} | {"float32": in_float32(adapted)}
    for name, precision in precisions.items():
        with precision, evaluating(adapted):
            expected = logits(adapted, batch)
            with adapted.disable_adapter(), untouched_base(adapted):
                found[name] = (logits(adapted, batch) - expected).abs().max().item()
        if not math.isfinite(found[name]):
            raise NumericalError(
                f"before any training the model's logits in {name} are not finite: its weights hold NaN or infinite numbers, or {name} "
                "cannot hold what it computes; take another copy of the model, or set model.dtype=float32"
            )
    activate(adapted)  # PEFT's context lets every adapter train again
    return found


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """The model in `eval()` mode and in float32, a block, the embedding or the head at a time. Everything is put back. Quantised weights
    stay as they are, and are multiplied dequantised and in float32; a trainer's autocast, which accelerate hangs on `forward` for good,
    does not count."""
    base = unwrapped(model)
    parts = [*find_blocks(model)[1], *filter(None, (base.get_input_embeddings(), base.get_output_embeddings()))]
    packed = [module for module in model.modules() if is_linear(module) and is_packed(module)]
    rest = placed(outside(model, parts), None, torch.float32)
    turns = placed_in_turn(parts, None, torch.float32)
    plain = evaluating(model), float32_products("highest"), _attention_in_float32(base), _without_autocast(model, base)
    with contextlib.ExitStack() as stack:
        for context in (*plain, rest, turns, _dequantised(packed)):
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def _without_autocast(*models: Any) -> Iterator[None]:
    """Models by their own `forward`, where accelerate has put one in its place that computes in 16 bits."""
    with contextlib.ExitStack() as stack:
        for model in models:
            if "_original_forward" in vars(model):
                stack.enter_context(attribute(model, "forward", model._original_forward))
        yield


@contextlib.contextmanager
def _attention_in_float32(model: Any) -> Iterator[None]:
    """Attention by PyTorch's own functions: kernels such as FlashAttention's take 16-bit numbers alone."""
    chosen = getattr(model.config, "_attn_implementation", None)
    if chosen in (None, "eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


@contextlib.contextmanager
def _dequantised(layers: list[nn.Module]) -> Iterator[None]:
    """Let quantised layers compute in float32, one dequantised weight at a time."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(attribute(layer, "forward", functools.partial(_float32_product, layer)))
        yield


def _float32_product(layer: Any, x: Tensor) -> Tensor:
    bias = layer.bias.float() if layer.bias is not None else None
    return nn.functional.linear(x.float(), weight_of(layer).float(), bias)
