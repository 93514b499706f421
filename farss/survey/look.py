"""What a method looks at before it is planned, whatever that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farss.artifacts import Survey
from farss.batches import Row, calibration_batches
from farss.config import CalibrationConfig
from farss.jobs import Progress
from farss.methods import SURVEY, Reading
from farss.places import Batch
from farss.survey.against import against
from farss.survey.gradients import gradients
from farss.survey.readings import read_layers
from farss.survey.sweep import survey


def look(
    model: nn.Module,
    needs: Reading,
    texts: Sequence[list[Batch]],
    folder: Path | str,
    cap: int,
    calibration: CalibrationConfig | None = None,
    targets: list[str] | None = None,
    seed: int = 0,
    meta: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
    device: torch.device | None = None,
) -> Survey:
    """Look at a model; see `survey`, `gradients`, `against` and `read_layers`.

    Args:
        texts: in batches, one for each of `needs.texts`.
        cap: how many directions are kept at each end.
    """
    if needs is SURVEY:
        how = calibration or CalibrationConfig()
        return survey(model, texts[0], folder, cap, targets, how.fisher, seed, meta, on_progress, how.svd, device)
    if needs.of == "gradients":
        return gradients(model, texts[0], folder, targets, meta, on_progress, device)
    assert needs.read
    if needs.of == "both":
        task, knowledge = texts
        return against(model, task, knowledge, folder, needs.read, cap, targets, meta, on_progress, device)
    return read_layers(model, folder, needs.read, cap, texts[0] if texts else [], targets, meta, on_progress, device, needs.over)


def batches_for(
    needs: Reading, rows: Sequence[Row], calibration: CalibrationConfig, pad_id: int, seed: int, max_length: int
) -> list[Batch]:
    """The batches of one text that are looked at; padding counts in no statistics but FARSS's."""
    how = calibration if needs is SURVEY else replace(calibration, padding="ignore")
    return calibration_batches(rows, how, pad_id, seed, max_length)
