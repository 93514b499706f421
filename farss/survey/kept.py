"""Hidden states between the blocks and their gradients, on disk while a survey runs.

Each block's states are one file, mapped into memory when they are read: they take no memory of their own, and a killed
survey finds them again.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from farss import processes
from farss.files import opened_tensors, write_tensors

INPUT = "input"
"""What enters a block, [b, t, d] a batch."""
GRADIENT = "gradient"
"""The loss's gradient at the output of a block, [b, t, d] a batch."""
KNOWLEDGE = "knowledge"
"""What enters a block on knowledge text, [b, t, d] a batch."""
KINDS = (INPUT, GRADIENT, KNOWLEDGE)


class Kept:
    """The states of this process's batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, block: int) -> Path:
        """The file of one block."""
        process = f".process{processes.rank()}" if processes.size() > 1 else ""
        return self.folder / f"{kind}-{block:04d}{process}.safetensors"

    def write(self, kind: str, block: int, states: list[Tensor]) -> None:
        """Keep one tensor a batch."""
        write_tensors(self.path(kind, block), {str(place): state.cpu() for place, state in enumerate(states)})

    def read(self, kind: str, block: int) -> list[Tensor]:
        """Read one tensor a batch; they stay on disk until they are used."""
        with opened_tensors(self.path(kind, block), cure=f"delete {self.folder} to look at the model anew") as file:
            return [file.get_tensor(str(place)) for place in range(len(file.keys()))]

    def drop(self, kind: str, block: int) -> None:
        """Forget a block's states."""
        self.path(kind, block).unlink(missing_ok=True)

    def blocks(self, kind: str) -> list[int]:
        """The blocks whose states are kept, ascending."""
        return sorted(int(path.name.split("-")[1][:4]) for path in self.folder.glob(self.path(kind, 0).name.replace("0000", "????")))

    def clear(self) -> None:
        """Forget everything, of every process."""
        for kind in KINDS:
            for path in (*self.folder.glob(f"{kind}-????.*safetensors"), *self.folder.glob(f".{kind}-????.*safetensors.*.part")):
                path.unlink()  # also those that a killed process did not finish
