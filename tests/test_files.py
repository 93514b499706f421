"""Files that exist are whole, and a full disk is one sentence."""

import errno
import pathlib

import pytest
import torch

from farss.errors import FarssError, FolderError
from farss.files import disk_cure, read_json, read_tensors, whole_file, whole_folder, write_json, write_tensors


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "x.json"
    with pytest.raises(KeyError):
        write_half(path)
    assert list(path.parent.iterdir()) == []
    write_json(path, {"a": 1})
    with pytest.raises(KeyError):
        write_half(path)
    assert read_json(path) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    for text in ("first", "second"):
        with whole_folder(tmp_path / "a") as folder:
            folder.mkdir()
            (folder / "x").write_text(text)
        assert [*tmp_path.iterdir()] == [tmp_path / "a"]
    with pytest.raises(KeyError):
        begin_folder(tmp_path / "a")
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]
    assert (tmp_path / "a" / "x").read_text() == "second"


@pytest.mark.parametrize("kept", ["link", "mount", "here"])
def test_a_folder_that_cannot_be_replaced_is_filled(tmp_path, monkeypatch, kept):
    place = tmp_path / "a"
    real = tmp_path / "elsewhere" / "b" if kept == "link" else place
    real.mkdir(parents=True)
    if kept == "link":
        place.symlink_to(real)
    elif kept == "mount":
        monkeypatch.setattr("os.path.ismount", lambda path: path == place)
        monkeypatch.setattr(type(place), "rename", lambda *_: pytest.fail("a mount point has no other name"))
    else:
        monkeypatch.chdir(place)
        place = pathlib.Path()
    number = real.stat().st_ino
    for text in ("first", "second"):
        with whole_folder(place) as folder:
            (folder / "inner").mkdir(parents=True)
            (folder / "inner" / text).write_text(text)
        assert [*real.rglob("*")] == [real / "inner", real / "inner" / text]
    assert kept == "link" or real.stat().st_ino == number
    assert kept != "link" or place.is_symlink()
    assert [*real.parent.iterdir()] == [real]


def begin_folder(path):
    """A folder that is cut off."""
    with whole_folder(path) as folder:
        folder.mkdir()
        raise KeyError


def write_half(path):
    """A write that is cut off."""
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(FarssError, match=r"the disk is full, or your quota of it: .* free some space"), whole_file(tmp_path / "x"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(FolderError, match=r"x cannot be written \(Permission denied\): check the permissions"), whole_file(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(PermissionError), whole_file(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/that/was/read")
    with pytest.raises(FarssError, match="the disk is full"), disk_cure(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RuntimeError, match="unexpected pos"), disk_cure(tmp_path):
        raise RuntimeError("unexpected pos")  # the disk has room: another error, which must be seen
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with pytest.raises(FarssError, match="the disk is full"), disk_cure(tmp_path):
        raise RuntimeError("unexpected pos")


def test_safetensors_on_a_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise ValueError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("farss.files.save_file", full)
    with pytest.raises(FarssError, match="the disk is full"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_broken_and_missing_files_are_named(tmp_path):
    with pytest.raises(FolderError, match=r"there is no .*x\.json: run the step that writes it"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(FolderError, match="is not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(FolderError, match=r"y\.safetensors is missing or damaged"):
        read_tensors(tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(FolderError, match=r"y\.safetensors is missing or damaged"):
        read_tensors(tmp_path / "y.safetensors")


def test_what_cannot_be_deleted_loses_nothing(tmp_path, monkeypatch):
    for text in ("first", "second", "third"):
        with whole_folder(tmp_path / "a") as folder:
            folder.mkdir()
            (folder / "x").write_text(text)
        monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
    assert (tmp_path / "a" / "x").read_text() == "third"
    assert {file.read_text() for file in tmp_path.rglob("old/x")} == {"first", "second"}


def test_a_name_that_cannot_be_had_leaves_the_older_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("first")
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "a"):
        pass  # nothing was made
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "x"]
    (tmp_path / "b").write_text("a file")
    with pytest.raises(FolderError, match="b is a file: give another folder"), whole_folder(tmp_path / "b"):
        pytest.fail("it is known before anything is made")
    with pytest.raises(FolderError, match=r"c cannot be written \(Not a directory\)"), whole_folder(tmp_path / "b" / "c") as folder:
        folder.mkdir(parents=True)
    assert (tmp_path / "b").read_text() == "a file"
