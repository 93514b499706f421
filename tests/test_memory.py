"""What is said of memory is so."""

import os

import pytest
import torch

from farss.memory import freed_memory_kept, give_back, peak_gib, reset_peak, used_gib

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


def test_what_nothing_refers_to_is_given_back():
    before = used_gib(CPU)
    circle = [torch.ones(2**28, dtype=torch.uint8)]
    circle.append(circle)
    assert used_gib(CPU) >= before + 0.2
    del circle
    give_back()
    assert used_gib(CPU) <= before + 0.05


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak here that can be reset")
def test_a_peak_is_not_that_of_the_run_before():
    held = torch.ones(2**29, dtype=torch.uint8)
    del held
    before = peak_gib(CPU)
    reset_peak(CPU)
    assert peak_gib(CPU) <= before - 0.4
