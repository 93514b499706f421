"""Files and folders that appear under a temporary name and are renamed when whole; a full disk is one sentence."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from farss.errors import FarssError, FolderError

NEARLY_FULL_BYTES = 2**22
"""With less than this free, a failed write is taken for a full disk."""
FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to, and rename it when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` to fill. When the block ends well it takes the name, and only now does an older
    folder of that name make way. A link stays one, and so does a folder that cannot be replaced."""
    path = path.resolve()
    if path.is_file():
        raise FolderError(f"{path} is a file: give another folder")
    temporary = path.with_name(f".{path.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _writing(path):
            yield temporary
            if os.path.ismount(path) or path == Path.cwd():
                _refill(path, temporary)
            else:
                _take_place(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a file or folder that cannot be written into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _full(path) from error
        named = Path(str(error.filename or path))
        there = named.is_relative_to(path.parent) or path.is_relative_to(named)  # and not something that was to be read
        if error.errno in UNWRITABLE and there:
            raise FolderError(f"{path} cannot be written ({error.strerror}): check the permissions, or choose another folder") from error
        raise


def _full(path: Path) -> FarssError:
    return FarssError(f"the disk is full, or your quota of it: {path} was not written; free some space and run again")


def _take_place(folder: Path, source: Path) -> None:
    """Give a folder another one's name. The older goes aside first, and is deleted last: of what cannot be deleted something would stay
    in the way."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    old = aside / "old"
    try:
        if folder.exists():
            folder.rename(old)
        source.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    finally:
        if folder.exists():  # or the older one is all there is
            shutil.rmtree(aside, ignore_errors=True)


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
            raise _full(folder) from error
        raise


def check_space(folder: Path, needed: int, what: str, cure: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        FarssError: fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FarssError(
            f"{what} keeps {needed / 1e9:.1f} GB in {folder} while it runs, and {free / 1e9:.1f} GB are free: free some space, or {cure}"
        )


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
    except OSError as error:
        raise FolderError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
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


@contextlib.contextmanager
def opened_tensors(path: Path, device: str = "cpu", cure: str = "make it again") -> Iterator[Any]:
    """A safetensors file, of which each tensor is read when it is asked for.

    Raises:
        FolderError: the file is missing or damaged.
    """
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(safe_open(path, framework="pt", device=device))
        except (OSError, SafetensorError) as error:  # what goes wrong while it is open may be another file's
            raise FolderError(f"{path} is missing or damaged ({error}): {cure}") from error
        yield file


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file; see `opened_tensors`."""
    with opened_tensors(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)


def fingerprint(value: Any) -> str:
    """Short hash of a JSON value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever goes wrong when a JSON file's values are taken apart into one sentence.

    Raises:
        FolderError: the file holds something else.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise FolderError(f"{path} holds no {what}: name another file, or delete it and make it again") from error
