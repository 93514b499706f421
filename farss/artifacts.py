"""What one step writes and the next one reads. Files appear under a temporary name and are renamed when whole."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from farss.errors import FarssError, FolderError
from farss.maths.directions import direction_scores

Side = Literal["least", "most"]

NEARLY_FULL_BYTES = 2**22
"""With less than this free, a failed write is taken for a full disk."""
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


# --- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to, and rename it when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in FULL:
            raise FarssError(f"the disk is full, or your quota of it: {path} was not written; free some space and run again") from error
        if error.errno in FORBIDDEN:
            raise FolderError(f"{path} cannot be written ({error.strerror}): check the permissions, or choose another folder") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` to fill. When the block ends well it takes the name, and only now does an older
    folder of that name make way. A link stays one, and so does a folder that cannot be replaced."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        if os.path.ismount(path) or path == Path.cwd():
            _refill(path, temporary)
        else:
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refill(folder: Path, source: Path) -> None:
    """Replace what a folder holds."""
    for old in folder.iterdir():
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    for new in source.iterdir():
        shutil.move(new, folder)


@contextlib.contextmanager
def disk_cure(folder: Path) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into one sentence; torch says `unexpected pos`, for example."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if full or shutil.disk_usage(folder).free < NEARLY_FULL_BYTES:
            raise FarssError(
                f"the disk is full, or your quota of it: {folder} could not be written; free some space and run again"
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole text file."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        FolderError: the file is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"there is no {path}: run the step that writes it first") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FolderError(f"{path} is not valid JSON: delete it and run the step that writes it again") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a whole safetensors file."""
    with whole_file(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except Exception as error:  # safetensors wraps the operating system's error in one of its own
            if found := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
            raise


def fingerprint(value: Any) -> str:
    """Short hash of a JSON value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


# --- survey ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One target linear layer `y = W h`, `W [m, n]`, as the survey saw it."""

    name: str
    """Full module name, such as model.layers.0.self_attn.q_proj."""
    block: int
    """Index of its block."""
    shape: tuple[int, int]
    """(m, n): output and input size."""
    importance: float
    """Fisher importance (eq. 8)."""


@dataclass(frozen=True)
class Directions:
    """The singular directions of one layer and their statistics; k = min(m, n)."""

    sigma: Tensor
    """[k] float32, descending."""
    lam: Tensor
    """[k] float32, `v_i^T A v_i`: activation energy along each right direction."""
    gam: Tensor
    """[k] float32, `u_i^T G u_i`: gradient energy along each left direction."""

    @property
    def scores(self) -> Tensor:
        """[k] float64, of each direction (eq. 15)."""
        return direction_scores(self.sigma, self.lam, self.gam)


def layer_tensors(sigma: Tensor, lam: Tensor, gam: Tensor, kept: Tensor, u: Tensor, v: Tensor) -> dict[str, Tensor]:
    """What a survey's file holds of one layer.

    Args:
        sigma, lam, gam: [k] of every direction.
        kept: [c] int64, indices of the directions whose vectors are kept.
        u, v: [m, c] and [n, c].
    """
    found = {"sigma": sigma.float(), "lam": lam.float(), "gam": gam.float(), "kept": kept, "u": u.float(), "v": v.float()}
    return {part: tensor.cpu().contiguous() for part, tensor in found.items()}


@dataclass(frozen=True)
class Survey:
    """Everything any plan can ask about a model and a task. The tensors stay on disk until they are asked for."""

    folder: Path
    layers: dict[str, Layer]
    blocks: int
    """Number of blocks of the model, L."""
    cap: int
    """For the `cap` highest and `cap` lowest scores of each layer the singular vectors are kept."""
    examples: int
    tokens: int
    """Real (not padding) tokens in the calibration examples."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Model and data fingerprints, seed, seconds, peak memory."""

    def directions(self, name: str) -> Directions:
        """Read sigma, lambda and gamma of one layer."""
        with safe_open(self.block_file(self.layers[name].block), framework="pt") as file:
            return Directions(*(file.get_tensor(f"{name}.{part}") for part in ("sigma", "lam", "gam")))

    def vectors(self, name: str, directions: list[int]) -> tuple[Tensor, Tensor]:
        """Singular vectors `U_S [m, r]` and `V_S [n, r]` (float32) of the given indices into sigma order.

        Raises:
            FarssError: an index is outside what the survey kept.
        """
        with safe_open(self.block_file(self.layers[name].block), framework="pt") as file:
            kept: Tensor = file.get_tensor(f"{name}.kept")
            u: Tensor = file.get_tensor(f"{name}.u")
            v: Tensor = file.get_tensor(f"{name}.v")
        place = {index: position for position, index in enumerate(kept.tolist())}
        missing = [index for index in directions if index not in place]
        if missing:
            raise FarssError(
                f"the survey kept {self.cap} directions at each end of {name}, but the plan asks for more: "
                "survey again with a higher plan.rank"
            )
        rows = torch.tensor([place[index] for index in directions], dtype=torch.long)
        return u[:, rows], v[:, rows]

    @property
    def holds_all(self) -> bool:
        """Whether the vectors of every direction are kept, so that any rank can be planned."""
        for name, layer in self.layers.items():
            with safe_open(self.block_file(layer.block), framework="pt") as file:
                if file.get_slice(f"{name}.kept").get_shape()[0] < min(layer.shape):
                    return False
        return True

    def block_file(self, block: int) -> Path:
        """The safetensors file of one block."""
        return self.folder / f"block-{block:04d}.safetensors"

    def save(self) -> None:
        """Write `survey.json` (the tensors are there already): the survey is complete."""
        layers = {name: {"block": x.block, "shape": list(x.shape), "importance": x.importance} for name, x in self.layers.items()}
        rest = {key: getattr(self, key) for key in ("blocks", "cap", "examples", "tokens", "meta")}
        write_json(self.folder / "survey.json", {**rest, "layers": layers})

    @classmethod
    def load(cls, folder: Path | str) -> Survey:
        """Read a complete survey."""
        folder = Path(folder)
        values = read_json(folder / "survey.json")
        layers = {
            name: Layer(name, entry["block"], (entry["shape"][0], entry["shape"][1]), entry["importance"])
            for name, entry in values.pop("layers").items()
        }
        return cls(folder=folder, layers=layers, **values)


# --- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPlan:
    """What is done to one layer."""

    rank: int
    alpha: float
    """PEFT's alpha of this layer: the adapter is scaled by alpha / rank."""
    block: int
    shape: tuple[int, int]
    side: Side | None = None
    """Which end of the score order the directions come from; None: random start, as in LoRA."""
    directions: list[int] = field(default_factory=list)
    """Indices into sigma order, from the highest score to the lowest; empty for a random start."""
    beside: int = 0
    """Trainable parameters beside A and B."""
    fixed_a: bool = False
    """A stays as it starts, and of the two B alone trains."""

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    @property
    def parameters(self) -> int:
        """Trainable parameters: `r (m + n)`, or `r m` where A is fixed, and what is beside A and B."""
        return self.rank * (self.shape[0] if self.fixed_a else sum(self.shape)) + self.beside


@dataclass(frozen=True)
class Plan:
    """Ranks, sides and directions of every target layer. A plan of full fine-tuning has no layers."""

    method: str
    layers: dict[str, LayerPlan]
    blocks: int
    boundary: int | None = None
    """Number of shallow blocks; None for methods without a boundary."""
    rank: int = 0
    """Rank R of the deep layers."""
    notes: list[str] = field(default_factory=list)
    """What was decided on the way, in sentences (matched rank, lost budget, ...)."""
    unscaled: bool = False
    """The factors do without 1 / s, so that s times the chosen part of a weight leaves the base (`alpha: constant`)."""

    @property
    def parameters(self) -> int:
        """Trainable parameters of all adapters."""
        return sum(layer.parameters for layer in self.layers.values())

    def save(self, path: Path) -> None:
        """Write `plan.json`."""
        write_json(path, {**dataclasses.asdict(self), "parameters": self.parameters})

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read `plan.json`."""
        values = read_json(path)
        values.pop("parameters", None)
        layers = {name: LayerPlan(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in values.pop("layers").items()}
        return cls(layers=layers, **values)


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskScore:
    """The outcome of one benchmark."""

    name: str
    metric: str
    score: float
    """Mean of the metric, 0 .. 1."""
    questions: int
    fewshot: int = 0
    gold_loglikelihood: float | None = None
    """Mean log-likelihood (nats) of the gold answer, summed over its tokens; None where there is no single gold answer."""
    seconds: float = 0.0
    version: str = ""
    """Version of the task and of the harness."""


Kind = Literal["knowledge", "task", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What is asked: to be kept, to be learned, and the rest."""


@dataclass(frozen=True)
class Scores:
    """One model's answers. Per-question outcomes lie beside it, one JSONL a benchmark (see `questions`)."""

    knowledge: dict[str, TaskScore] = field(default_factory=dict)
    task: dict[str, TaskScore] = field(default_factory=dict)
    other: dict[str, TaskScore] = field(default_factory=dict)
    """Asked too, and in neither K nor T."""
    text_loss: float | None = None
    """Mean loss (nats per token) on the general text."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Model and adapter fingerprints, seed, versions."""

    def save(self, path: Path) -> None:
        """Write `scores.json`."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read `scores.json`.

        Raises:
            FolderError: it is another file.
        """
        values = read_json(path)
        try:
            kinds = {kind: {name: TaskScore(**entry) for name, entry in values.get(kind, {}).items()} for kind in KINDS}
            return cls(**{**values, **kinds})
        except (AttributeError, TypeError) as error:
            raise FolderError(f"{path} holds no scores: name a scores.json, or the folder of one") from error


def questions(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read the per-question outcomes of one benchmark: `{id, prompt, gold, answer, score, gold_loglikelihood}`."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise FolderError(f"there is no {path}: run `farss evaluate` first")
    # Not splitlines(): answers may hold characters that it takes for line ends.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def held_out(share: float) -> Callable[[str], bool]:
    """Whether a question is held out to choose learning rates, by its id."""
    return lambda key: int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < share * 2**32
