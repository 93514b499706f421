"""Folders of artifacts to draw."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import complete_run, write_comparison


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A complete run."""
    return complete_run(tmp_path / "run")


@pytest.fixture
def comparison_folder(tmp_path: Path) -> Path:
    """A complete comparison."""
    return write_comparison(tmp_path / "comparison")
