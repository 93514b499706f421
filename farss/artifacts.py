"""What one step writes and the next one reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from farss.errors import FarssError, FolderError
from farss.files import opened_tensors, read_json, reading, write_json
from farss.maths.directions import direction_scores

Side = Literal["least", "most"]


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


def layer_tensors(
    sigma: Tensor, kept: Tensor, u: Tensor, v: Tensor, lam: Tensor | None = None, gam: Tensor | None = None
) -> dict[str, Tensor]:
    """What a survey's file holds of one layer.

    Args:
        sigma, lam, gam: [k] of every direction; None: ones.
        kept: [c] int64, indices of the directions whose vectors are kept.
        u, v: [m, c] and [n, c].
    """
    lam, gam = (torch.ones_like(sigma) if each is None else each for each in (lam, gam))
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
        with self._opened(self.layers[name].block) as file:
            return Directions(*(file.get_tensor(f"{name}.{part}") for part in ("sigma", "lam", "gam")))

    def vectors(self, name: str, directions: list[int]) -> tuple[Tensor, Tensor]:
        """Singular vectors `U_S [m, r]` and `V_S [n, r]` (float32) of the given indices into sigma order.

        Raises:
            FarssError: an index is outside what the survey kept.
        """
        with self._opened(self.layers[name].block) as file:
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

    def check_cap(self, cap: int) -> None:
        """Refuse a survey of which so many directions at each end were not kept.

        Raises:
            FolderError: with both numbers.
        """
        if self.cap < cap and not self.holds_all:
            raise FolderError(
                f"{self.folder} kept {self.cap} directions at each end, and {cap} may be needed: choose another folder, or delete it"
            )

    @property
    def holds_all(self) -> bool:
        """Whether the vectors of every direction are kept, so that any rank can be planned."""
        for name, layer in self.layers.items():
            with self._opened(layer.block) as file:
                if file.get_slice(f"{name}.kept").get_shape()[0] < min(layer.shape):
                    return False
        return True

    @contextmanager
    def _opened(self, block: int) -> Iterator[Any]:
        with opened_tensors(self.block_file(block), cure=f"delete {self.folder}, and it is made again") as file:
            yield file

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
        with reading(folder / "survey.json", "survey"):
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
        with reading(path, "plan"):
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
OF_BASE = "base_fingerprint"
"""Of the weights that an adapter is on, in `Scores.meta`: the answers depend on `weights`, which are those with the adapter."""


@dataclass(frozen=True)
class Scores:
    """One model's answers. Per-question outcomes lie beside it, one JSONL a benchmark (see `read_records`)."""

    knowledge: dict[str, TaskScore] = field(default_factory=dict)
    task: dict[str, TaskScore] = field(default_factory=dict)
    other: dict[str, TaskScore] = field(default_factory=dict)
    """Asked too, and in neither K nor T."""
    text_loss: float | None = None
    """Mean loss (nats per token) on the general text."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What they depend on: the weights and where they lie, the method, the precision, the seed, the versions."""

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
        with reading(path, "scores"):
            kinds = {kind: {name: TaskScore(**entry) for name, entry in values.get(kind, {}).items()} for kind in KINDS}
            return cls(**{**values, **kinds, "meta": values["meta"]})

    def has_records(self, folder: Path) -> bool:
        """Whether the answers to every question lie in a folder."""
        everything = [score for kind in KINDS for score in getattr(self, kind).values()]
        return all(has_records(folder, score) for score in everything)


def has_records(folder: Path, score: TaskScore) -> bool:
    """Whether the answers to every question of a benchmark lie in a folder."""
    path = folder / f"{score.name}.jsonl"
    return path.is_file() and path.read_bytes().count(b"\n") == score.questions


def read_records(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read the per-question outcomes of one benchmark: `{id, prompt, gold, answer, score, gold_loglikelihood}`."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise FolderError(f"there is no {path}: run `farss evaluate` first")
    with reading(path, "answers that are whole"):
        # Not splitlines(): answers may hold characters that it takes for line ends.
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def held_out(share: float) -> Callable[[str], bool]:
    """Whether a question is held out to choose learning rates, by its id."""
    return lambda key: int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < share * 2**32
