"""A start for somebody else's trainer, on disk: a residual base, an adapter, and the way back to the original base.

Trainers that read a model and a LoRA from folders (Axolotl, LLaMA-Factory) cannot hold a second, frozen adapter. For them
the start is subtracted from a copy of the base, as the paper does; what they train is then converted to a plain LoRA on
the original base.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farss.adapter import TRAINED, lora_config, lora_layers
from farss.artifacts import Plan
from farss.config import Dtype, ModelConfig
from farss.errors import ConfigError, FarssError, FolderError, NumericalError
from farss.files import read_json, read_tensors, reading, whole_folder, write_json, write_tensors, write_text
from farss.merging import in_layers, write_model
from farss.methods import METHODS, check_elsewhere
from farss.models import load_model, load_tokenizer, weights_fingerprint
from farss.portable import PREPARED, TOLERANCE, Exported, in_float32, logits, origin_of, portable, target_names, write_adapter, write_facts
from farss.precision import dtype_name
from farss.prompts import PROMPT_FACTS
from farss.structure import PEFT_PREFIX, check_unshared, holds_packed

log = logging.getLogger(__name__)


def check_method(name: str, quantised: bool) -> None:
    """Refuse what cannot be prepared, before it is looked at for hours.

    Raises:
        ConfigError: the method takes nothing out of the base, so that it needs no change, or needs a trainer of its own; or the base is
            quantised.
    """
    method = METHODS[name]
    check_elsewhere(method)
    if method.needs is None:
        raise ConfigError(f"method {name!r} starts at zero: its adapter goes on the base as it is, nothing needs preparing")
    if method.fixed_a or not method.takes_out:
        a_trains = "keeps A as it begins, and other trainers would train it"
        why = a_trains if method.fixed_a else "takes nothing out of the base, so there is no other base to train on"
        raise ConfigError(
            f"method {name!r} {why}: call farss.prepare in a script of yours, which gives the start to any trainer, or let `farss run` "
            "train it"
        )
    if quantised:
        raise ConfigError(
            "the model's weights are quantised, and nothing can be subtracted from them: prepare the unquantised model "
            "(model.quantization=none), or train here, with the untouched base"
        )


def write_prepared(
    adapted: Any,
    plan: Plan,
    tokenizer: Any,
    folder: Path | str,
    source: Path | str,
    prompt: dict[str, Any] | None = None,
    trusted: bool = False,
) -> Path:
    """Write `base/` (the model without its start), `adapter/` (the start, to be trained) and what leads back.

    Other trainers go by the adapter's own dropout, which is 0: there it would fall on the start as well.

    Args:
        adapted: from `farss.adapter.attach`, untrained, with an untouched base.
        plan: it was made from.
        folder: must not exist.
        source: the base model's folder.
        prompt: how the model is trained to be asked, from `farss.prompts.prompt_facts`.
        trusted: `model.trust_remote_code`, which the way back needs too.

    Raises:
        FarssError: see `check_method`.
        ModelError: a weight that shall change is shared by several layers.
        FolderError: the folder exists.
    """
    folder, source = Path(folder), Path(source)
    if folder.exists():
        raise FolderError(f"{folder} exists: give a new folder")
    check_method(plan.method, holds_packed(adapted))
    check_unshared(adapted.get_base_model(), plan.layers)
    start = _start(adapted, plan)

    def residual(layer: str, weight: Tensor) -> Tensor:
        b, a = start[layer]
        return weight.cpu().float() - (plan.layers[layer].scaling * b.double() @ a.double()).float()

    model = adapted.get_base_model()
    with whole_folder(folder) as unfinished:
        change = in_layers(adapted, plan.layers, residual)
        write_model(model, plan.layers, tokenizer, unfinished / "base", next(model.parameters()).dtype, source, change)
        state = {f"{PEFT_PREFIX}{name}.lora_{side}.weight": x for name, pair in start.items() for side, x in zip("BA", pair, strict=True)}
        write_tensors(unfinished / "adapter" / "adapter_model.safetensors", state, {"format": "pt"})
        config = lora_config(plan, 0.0)
        config.base_model_name_or_path = str((folder / "base").absolute())
        config.save_pretrained(str(unfinished / "adapter"))
        write_tensors(unfinished / "start.safetensors", state)
        plan.save(unfinished / "plan.json")
        origin = origin_of(adapted, str(source), tokenizer, prompt)
        written = load_model(ModelConfig(path=str(unfinished / "base"), device="cpu", trust_remote_code=trusted), as_stored=True)
        dtypes = {next(model.parameters()).dtype, *(written.get_submodule(layer).weight.dtype for layer in plan.layers)}
        exact = dtypes == {torch.float32}  # in 16 bits the base is rounded, as it was loaded or as it is written
        facts = {"origin": origin, "trusted": trusted, "target_modules": target_names(plan, adapted), "exact": exact}
        write_json(unfinished / PREPARED, facts | {"fingerprint": weights_fingerprint(written)})
        write_text(unfinished / "README.md", GUIDE.format(source=source, folder=shlex.quote(str(folder))))
    return folder


def was_prepared(folder: Path, plan: Plan, prompt: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether a folder from `write_prepared` is of this plan and prompt, and of a base in this precision."""
    origin = read_json(folder / PREPARED)["origin"]
    same = {name: origin[name] for name in PROMPT_FACTS if name in origin} == prompt and origin["base_dtype"] == dtype_name(dtype)
    return same and Plan.load(folder / "plan.json") == plan


GUIDE = """# A prepared start

Train the LoRA in `adapter/` on the model in `base/`: that base is `{source}` without the start of the adapter, and of no use without it.
Afterwards `farss convert {folder} TRAINED OUT` turns what was trained into a plain LoRA on the original base. What the trainer wrote is
never to be used on the original base.
"""


def _start(adapted: Any, plan: Plan) -> dict[str, tuple[Tensor, Tensor]]:
    """`B0 [m, r]` and `A0 [r, n]` of every layer, float32."""
    modules = lora_layers(adapted, plan).items()
    return {
        name: (module.lora_B[TRAINED].weight.detach().float().cpu(), module.lora_A[TRAINED].weight.detach().float().cpu())
        for name, module in modules
    }


def convert(prepared: Path | str, trained: Path | str, out: Path | str, rank: int | None = None, energy: float | None = None) -> Exported:
    """Turn an adapter that was trained on a prepared base into a plain LoRA on the original base.

    Args:
        prepared: from `write_prepared`.
        trained: the adapter's folder as the trainer wrote it.
        out: where the portable adapter goes; it must not exist.
        rank, energy: compress, see `farss.portable.portable`; None: exact.

    Raises:
        FarssError: `trained` is not an adapter that began as this start, or holds more than that; or the two differ by more than rounding.
        FolderError: `out` exists, or a folder is not what it should be.
    """
    prepared, trained, out = Path(prepared), Path(trained), Path(out)
    if out.exists():
        raise FolderError(f"{out} exists: give a new folder")
    if not (prepared / PREPARED).is_file():
        raise FolderError(
            f"{prepared} is not what `farss prepare` wrote: name that folder first, then the trained adapter, then a new folder"
        )
    plan, facts = Plan.load(prepared / "plan.json"), read_json(prepared / PREPARED)
    with reading(prepared / PREPARED, "facts about a prepared start"):
        origin, trusted, targets = (facts[key] for key in ("origin", "trusted", "target_modules"))
        base = origin["base"]
    start, end = read_tensors(prepared / "start.safetensors"), _trained_state(trained)
    if strange := next((key for key, factor in start.items() if key not in end or end[key].shape != factor.shape), None):
        layer = strange.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
        raise FarssError(f"{trained} is not an adapter that began as this start: {layer} is missing or has another rank")
    if broken := next((key for key, tensor in end.items() if not torch.isfinite(tensor).all()), None):
        raise NumericalError(f"{trained} holds NaN or infinite numbers, in {broken}: its training diverged")
    before, after = (read_json(folder / "adapter_config.json") for folder in (prepared / "adapter", trained))
    if not isinstance(after, dict):
        raise FolderError(f"{trained / 'adapter_config.json'} holds no adapter's options: give the folder that the trainer wrote")
    for option in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        if (after.get(option) or None) != (before.get(option) or None):
            raise FarssError(
                f"{trained} was trained with another {option} than was prepared, which changes what the factors mean: train the adapter as "
                "it lies there"
            )
    if more := sorted(set(end) - set(start)):
        raise FarssError(
            f"{trained} holds {more[0]}, {len(more)} tensors in all that were not prepared, and a plain LoRA of the prepared layers does "
            "not hold them: train it again without modules_to_save, biases, new tokens or other layers"
        )
    if all(torch.equal(end[key].float(), factor.float()) for key, factor in start.items()):
        log.warning(f"{trained} holds the start as it was prepared: nothing was trained, and what is converted changes nothing.")
    made = portable(((name, _change(name, layer.scaling, start, end)) for name, layer in plan.layers.items()), rank, energy)
    with whole_folder(out) as unfinished:
        write_adapter(unfinished, made.state, targets, base, made.rank)
        bases = (
            _Base(str(prepared / "base"), trained, facts.get("fingerprint")),
            _Base(base, unfinished, origin.get("base_fingerprint"), origin.get("base_dtype", "float32")),
        )
        difference, scale = _compare(bases, trusted)
        exact = rank is None and energy is None and facts.get("exact", origin.get("base_dtype") == "float32")
        if exact and not difference <= TOLERANCE * max(1.0, scale):
            raise FarssError(
                f"the converted adapter's logits differ by {difference:.2g} from those of {trained} on the prepared base (allowed: "
                f"{TOLERANCE * max(1.0, scale):.2g}): it was not kept"
            )
        exported = Exported(out, made.rank, made.lost, difference, made.effective_ranks)
        write_facts(unfinished, plan, origin, exported, made.state)
    return exported


def _trained_state(folder: Path) -> dict[str, Tensor]:
    if not (folder / "adapter_model.safetensors").is_file():
        raise FolderError(f"{folder} holds no adapter_model.safetensors: give the folder that the trainer wrote the adapter to")
    return read_tensors(folder / "adapter_model.safetensors")


def _change(name: str, scaling: float, start: dict[str, Tensor], end: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Thin factors of `s (B A - B0 A0)`, float64."""
    keys = [f"{PEFT_PREFIX}{name}.lora_{side}.weight" for side in "BA"]
    (b, a), (b0, a0) = ([state[key].double() for key in keys] for state in (end, start))
    return torch.cat([scaling * b, -scaling * b0], 1), torch.cat([a, a0])


class _Base(NamedTuple):
    """A base, and the adapter for it."""

    path: str
    adapter: Path
    fingerprint: str | None
    dtype: Dtype = "auto"
    """In which it was prepared, and its weights were rounded to: `model.dtype` may have been another than that of the files."""


def _compare(bases: tuple[_Base, _Base], trusted: bool) -> tuple[float, float]:
    """Largest |logit difference| (float32) between what was trained and the converted adapter, each on its base, and the largest |logit|.

    Raises:
        FolderError: a base has another fingerprint than when it was prepared.
    """
    from peft import PeftModel

    options = ModelConfig(device="cpu", trust_remote_code=trusted)
    tokenizer = load_tokenizer(replace(options, path=bases[0].path))
    batch = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    found = []
    for base in bases:
        loaded = load_model(replace(options, path=base.path, dtype=base.dtype), as_stored=True)
        if base.fingerprint not in (None, weights_fingerprint(loaded)):
            raise FolderError(f"{base.path} is not the base that was prepared: put it back, or prepare and train anew")
        model = PeftModel.from_pretrained(loaded, str(base.adapter))
        with in_float32(model):
            found.append(logits(model, batch))
        del model, loaded  # one at a time in memory
    return (found[0] - found[1]).abs().max().item(), found[0].abs().max().item()
