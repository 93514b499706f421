"""What is said of memory is so."""

import os

import psutil
import pytest
import torch

from farss.errors import FarssError
from farss.memory import (
    OF_VERSION_1,
    freed_memory_kept,
    give_back,
    give_back_if_scarce,
    memory_cure,
    memory_of_machine,
    peak_gib,
    reset_peak,
    used_gib,
)

CPU = torch.device("cpu")


def test_used_and_peak_follow_what_is_held():
    before = used_gib(CPU)
    held = torch.ones(2**28, dtype=torch.uint8)  # a quarter of a GiB
    assert used_gib(CPU) >= before + 0.2
    assert peak_gib(CPU) >= 0.25
    del held


def test_freed_memory_is_kept_and_given_back_at_the_end():
    with freed_memory_kept(CPU):
        torch.ones(2**28, dtype=torch.uint8)
        inside = used_gib(CPU)
    assert used_gib(CPU) <= inside + 0.01
    with freed_memory_kept(torch.device("meta")):  # other devices are left alone
        pass


@pytest.mark.parametrize("available", [2**30, 10 * 2**30])
def test_kept_memory_is_given_back_when_it_is_scarce(available, monkeypatch):
    memory = psutil.virtual_memory()._replace(available=available, total=12 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with freed_memory_kept(CPU):
        before = used_gib(CPU)
        hole, rest = torch.ones(2**28, dtype=torch.uint8), torch.ones(2**10, dtype=torch.uint8)
        del hole
        kept = used_gib(CPU) - before
        give_back_if_scarce(CPU)
        left = used_gib(CPU) - before
        del rest
    assert kept >= 0.2
    assert (left <= 0.05) == (available < 3 * 2**30)


def test_what_nothing_refers_to_is_given_back():
    before = used_gib(CPU)
    circle = [torch.ones(2**28, dtype=torch.uint8)]
    circle.append(circle)
    assert used_gib(CPU) >= before + 0.2
    del circle
    give_back()
    assert used_gib(CPU) <= before + 0.05


@pytest.mark.parametrize(
    ("count", "of", "cure"), [(9, 18, "=3"), (15, 15, "=5"), (8, 16, "=4"), (7, 0, "=3"), (1, 16, "lower data.max_length")]
)
def test_what_does_not_fit_is_told_a_number_that_is_allowed(count, of, cure):
    with pytest.raises(FarssError, match=cure), memory_cure(count, "examples", "train.micro_batch_size", of):
        raise torch.OutOfMemoryError


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak here that can be reset")
def test_a_peak_is_not_that_of_the_run_before():
    held = torch.ones(2**29, dtype=torch.uint8)
    del held
    before = peak_gib(CPU)
    reset_peak(CPU)
    assert peak_gib(CPU) <= before - 0.4


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_container_may_use_is_what_there_is(version, tmp_path, monkeypatch):
    """Of the machine it may be a small part; a job of a cluster is limited by a group further out."""
    root = tmp_path / ("memory" if version == 1 else "")
    outer, inner = root / "job", root / "job" / "step"
    limit, used, cached = OF_VERSION_1 if version == 1 else ("memory.max", "memory.current", "inactive_file")
    for place, most in ((outer, "1000"), (inner, "9223372036854771712" if version == 1 else "max")):
        place.mkdir(parents=True)
        (place / limit).write_text(f"{most}\n")
        (place / used).write_text("700\n")
        (place / "memory.stat").write_text(f"anon 400\n{cached} 300\n")
    (tmp_path / "cgroup").write_text("3:cpu:/job/step\n2:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    monkeypatch.setattr("farss.memory.CONTROL", tmp_path)
    monkeypatch.setattr("farss.memory.GROUPS", tmp_path / "cgroup")
    assert memory_of_machine() == (600, 1000)
    monkeypatch.setattr("farss.memory.GROUPS", tmp_path / "none")  # not Linux
    assert memory_of_machine()[1] == psutil.virtual_memory().total
