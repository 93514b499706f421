"""A comparison on a small model, that takes seconds."""

import pytest
from runs import settings


@pytest.fixture
def values(model_folder, tmp_path):
    found = settings(model_folder, tmp_path / "all")
    found["evaluate"]["knowledge"][0]["limit"] = found["evaluate"]["task"][0]["limit"] = 16
    found["train"]["max_steps"] = 2
    return found


@pytest.fixture
def unasked(values):
    """The same without questions, where only the costs count."""
    return values | {"evaluate": {"knowledge": [], "task": []}}
