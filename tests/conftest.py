"""Fixtures shared by the tests, and an environment in which nothing asks a network."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from runs import config, model_folder
from small_models import ARCHITECTURES, small

__all__ = ["config", "model_folder"]

torch.set_num_threads(1)  # tiny products: more threads only wait for each other


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays():
    """Every training collects garbage; without this it goes through the libraries' half a million objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    """Each supported architecture in turn."""
    return small(request.param)


@pytest.fixture
def llama():
    """A small LLaMA with four blocks, float64."""
    return small("llama-gqa")


@pytest.fixture
def no_figures(monkeypatch):
    """Every run's report has a dozen figures, drawn twice; `tests/report` tests them, and here they are most of the time."""
    monkeypatch.setattr("farss.report.page.save_figures", lambda figures, folder: None)
