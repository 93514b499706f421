"""Checkpoints: the trainable parameters by name, and a marker that is written last.

The trainer's own hold every adapter, and on resume it would activate only the first of several. With the trainable parameters alone,
which adapters are active or frozen is never touched.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farss.errors import FolderError
from farss.files import check_space, opened_tensors, read_json, write_json, write_tensors
from farss.models import base_fingerprint

WEIGHTS = "weights.safetensors"
REGIME = "regime.safetensors"
MARKER = "complete.json"
NEWEST = 2
"""Checkpoints of a training: should the newest be damaged, there is another."""

log = logging.getLogger(__name__)


def restore(model: Any, folder: Path) -> None:
    """Load the weights of the finished training in `folder` into a freshly built, identical model.

    Raises:
        FolderError: there is no finished training, or it belongs to another model.
    """
    newest = newest_complete(Path(folder) / "checkpoints")
    if newest is None:
        place = Path(folder) / "checkpoints"
        lost = f"the weights in {place} are damaged" if any(place.glob("*")) else "the weights that were trained there are deleted"
        what = lost if (Path(folder) / "train.json").is_file() else "run `farss train` first"
        raise FolderError(f"there is no training in {folder}: {what}")
    marker = read_json(newest / MARKER)
    if marker["step"] < marker["total"]:
        raise FolderError(f"the training in {folder} stopped at step {marker['step']} of {marker['total']}: run it again to go on")
    with opened_tensors(newest / WEIGHTS) as file:
        trained = set(file.keys())
    check_base(newest, marker, base_fingerprint(model), start_fingerprint(model, trained))
    read_weights(model, newest)


def check_base(checkpoint: Path, marker: dict[str, Any], base: str, start: str) -> None:
    """Refuse trained weights that belong to another base model or another start.

    Raises:
        FolderError: with both fingerprints.
    """
    for what, expected, actual in (("base model", marker["base"], base), ("start of the adapters", marker["start"], start)):
        if expected != actual:
            raise FolderError(
                f"{checkpoint} was trained from a {what} with fingerprint {expected}, but this one has {actual}: "
                "give the one it was trained from, or choose another folder"
            )


def start_fingerprint(model: nn.Module, trained: set[str]) -> str:
    """Hash of the adapters that are not trained: they take the start out of the base."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and name not in trained:
            digest.update(name.encode())
            digest.update(parameter.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_weights(model: nn.Module, checkpoint: Path) -> None:
    """Save what is trained, by name."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    write_tensors(checkpoint / WEIGHTS, tensors)


def read_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy the saved parameters over the model's, by name; all others stay."""
    parameters = dict(model.named_parameters())
    with opened_tensors(checkpoint / WEIGHTS) as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            saved: Tensor = file.get_tensor(name)
            if name not in parameters or parameters[name].shape != saved.shape:
                raise FolderError(f"{checkpoint} belongs to another model: this one has no parameter {name} of shape {tuple(saved.shape)}")
            parameters[name].copy_(saved)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _complete(checkpoint: Path) -> bool:
    """Whether every file that the marker lists is there in full length: a killed run may also leave half of an old
    checkpoint that it was deleting."""
    if not (checkpoint / MARKER).is_file():
        return False
    try:
        files = read_json(checkpoint / MARKER).get("files")
    except FolderError:  # torn, as when the power fails
        return False
    return bool(files) and all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in files.items())


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next((path for path in _checkpoints(folder) if _complete(path)), None)


def check_room_for(checkpoints: int, trained: int, folder: Path) -> None:
    """Refuse a training whose checkpoints the disk cannot hold: the two newest, and the one that is being written.

    Args:
        checkpoints: how many are still to be written.
        trained: parameters, with AdamW's two averages of each.

    Raises:
        FarssError: see `check_space`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = len(_checkpoints(folder))
    lacking = min(there + checkpoints, NEWEST + 1) - there
    check_space(folder, lacking * 12 * trained, "the training", "choose an out on another disk")


def remove_older(folder: Path) -> None:
    """Keep the newest checkpoints."""
    for path in _checkpoints(folder)[NEWEST:]:
        shutil.rmtree(path)


def tidy(folder: Path) -> None:
    """After the last step keep what `restore` needs: the weights are a third of a checkpoint, the rest is the optimiser's."""
    newest = newest_complete(folder)
    for path in _checkpoints(folder):
        if path != newest:
            shutil.rmtree(path)
    if newest is None:
        return
    marker = read_json(newest / MARKER)
    kept = {name: size for name, size in marker["files"].items() if name in (WEIGHTS, REGIME)}
    write_json(newest / MARKER, marker | {"files": kept})
    for path in newest.iterdir():
        if path.name not in (MARKER, *kept):
            path.unlink()


def remove_broken(folder: Path) -> Path | None:
    """Delete half-written checkpoints; return the newest complete one."""
    for path in _checkpoints(folder):
        if not _complete(path):
            log.warning("removing %s: it was not written to its end", path)
            shutil.rmtree(path)
    return newest_complete(folder)
