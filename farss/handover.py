"""What is handed over: a plain LoRA for the untouched base, or a whole model. It is written, read back as its user loads it, and refused
before hours of training where it cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farss.adapter import check_residual
from farss.artifacts import Plan
from farss.card import write_card
from farss.config import REFERENCE, Config
from farss.errors import ConfigError, FolderError
from farss.files import opened_tensors, write_json
from farss.llamacpp import FILE, check_gguf, write_gguf
from farss.merging import is_rounded, merge, merged_difference
from farss.models import load_model, loaded_dtype, stored_dtype, weight_files, will_be_quantised
from farss.plan import method_of
from farss.portable import export, load_adapter
from farss.prompts import prompt_facts
from farss.structure import check_unshared


def is_whole(config: Config) -> bool:
    """Whether a model is handed over, and not an adapter."""
    return config.export.to == "merged" or not method_of(config.plan).plain_lora


def is_merged(config: Config) -> bool:
    """Whether that model's weights hold an adapter's change, rounded as the base's are."""
    return is_whole(config) and config.plan.method != "full"


def place_of(config: Config, folder: Path) -> Path:
    """Where it lies in a run's folder."""
    return folder / ("model" if is_whole(config) else "adapter")


def made_by(config: Config, folder: Path) -> Path:
    """What is there once it is written."""
    target = place_of(config, folder)
    return target / FILE if config.export.to == "gguf" and not is_whole(config) else target


def weights_are_there(target: Path) -> bool:
    """Whether weights lie in a folder, in files of full length, of a model in several files all of them."""
    files = weight_files(target) or [*target.glob("*.safetensors")]
    try:
        for file in files:
            with opened_tensors(file):
                pass
    except FolderError:
        return False
    return bool(files)


def check_form(config: Config) -> None:
    """Refuse to compress what is no adapter.

    Raises:
        ConfigError: with the option.
    """
    for name in ("rank", "energy"):
        given = getattr(config.export, name)
        if is_whole(config) and given is not None:
            why = "export.to=merged" if config.export.to == "merged" else f"plan.method={config.plan.method}"
            raise ConfigError(f"export.{name}={given} compresses an adapter, and {why} hands over a model: set export.{name}=null")


def check(config: Config, model: Any, layers: Iterable[str]) -> None:
    """Find out before hours of training what cannot be handed over after it.

    Args:
        model: with its weights or without.
        layers: names of the target layers.

    Raises:
        ConfigError: a whole model is wanted compressed, or of quantised weights; or weights would be rounded without their start.
        ModelError: a change shall be written into weights that several layers share.
        FarssError: llama.cpp does not know the architecture.
    """
    check_form(config)
    method, quantised = method_of(config.plan), will_be_quantised(config.model)
    if config.adapter.base == "residual" and method.takes_out:
        rounded = [] if config.export.to == "merged" else [loaded_dtype(config.model)]
        check_residual(model, layers, quantised, rounded, "adapter.base")
    elif is_merged(config):
        check_unshared(model, layers)
    if config.export.to == "gguf" and not is_whole(config):
        check_gguf(model.config)
    if config.plan.method == REFERENCE:
        if will_be_quantised(replace(config.model, quantization="none")):
            raise ConfigError(
                f"plan.method=full trains every weight, and those in model.path={config.model.path!r} are stored quantised: name a folder "
                "with unquantised ones, or train adapters"
            )
        return
    if not quantised:
        return
    if not method.plain_lora:
        raise ConfigError(
            f"plan.method={config.plan.method!r} is handed over as a whole model, and nothing can be merged into quantised weights: "
            "train on unquantised ones, or choose a method that exports as plain LoRA (`farss methods`)"
        )
    if config.export.to == "merged":
        raise ConfigError("export.to='merged', but nothing can be merged into quantised weights: set export.to=peft")


def write(
    trained: Any, plan: Plan, tokenizer: Any, config: Config, folder: Path, batch: dict[str, Tensor], command: str
) -> tuple[Path, dict[str, Any]]:
    """Write it into a run's folder.

    Args:
        trained: the trained model.
        batch: a few real prompts, on which it is compared with what was written.
        command: that makes it again.

    Returns:
        Where it lies, and how exact it is.
    """
    target, base, prompt = place_of(config, folder), config.model.path, prompt_facts(config.data, tokenizer)
    if not is_whole(config):
        done = export(trained, plan, target, batch, base, config.export.rank, config.export.energy, tokenizer, prompt, command)
        if config.export.to == "gguf":
            write_gguf(target, trained.get_base_model().config)
        return target, done.facts
    merge(trained, plan, tokenizer, target, stored_dtype(config.model), base)
    # Where a GPU has room for one model only, the one that was written stays in its files and the CPU's memory.
    written = replace(config.model, path=str(target), dtype="auto", quantization="none")
    stored = load_model(written, device=torch.device("cpu"), as_stored=True)
    exactness = {"logit_difference": merged_difference(trained, stored, batch)}
    origin = {**prompt, "base": base, "boundary": plan.boundary, "blocks": plan.blocks, "parameters": plan.parameters}
    write_json(target / "farss.json", {"method": plan.method, **origin, **exactness})
    write_card(target, command=command)
    return target, exactness


def read(config: Config, folder: Path, tokenizer: Any) -> Any:
    """The result as its user loads it.

    Raises:
        FolderError: its weights are deleted.
        FarssError: they, the base or the tokenizer are not those that were exported.
    """
    target = place_of(config, folder)
    if not any(target.glob("*.safetensors")):
        raise deleted(target)
    if is_whole(config):
        return load_model(replace(config.model, path=str(target), quantization="none"))
    return load_adapter(load_model(config.model), target, tokenizer)


def deleted(target: Path) -> FolderError:
    """What to say where weights are needed that are gone."""
    return FolderError(f"the weights in {target} are deleted (compare.keep=scores): what needs them takes another out")


def is_as_trained(config: Config) -> bool:
    """Whether the trained model answers as what is handed over does: a compressed adapter is another one than was trained, and a merged
    model is rounded."""
    return not is_merged(config) and (is_whole(config) or (config.export.rank is None and config.export.energy is None))


def as_handed_over(trained: Any, config: Config) -> Any:
    """A model that was trained as a whole, in float32, with the weights that are handed over: those of the base's precision."""
    stored, loaded = stored_dtype(config.model), loaded_dtype(config.model)
    for name, parameter in trained.named_parameters():  # not the buffers: whoever loads it has exact rotary frequencies
        if is_rounded(trained, name, parameter, stored):
            parameter.data = parameter.data.to(stored).to(loaded)
    return trained


def delete_weights(folder: Path) -> None:
    """Delete a run's trained weights in every form."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in (folder / name for name in ("adapter", "model", "recovered")):
        for file in [*path.rglob("*.safetensors"), *path.rglob("*.gguf"), *path.rglob("*.bin")]:
            file.unlink()
