"""What a method looks at before it is planned, whatever that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from farss.artifacts import Survey
from farss.batches import Row, calibration_batches
from farss.config import CalibrationConfig
from farss.methods import SURVEY, Reading
from farss.places import Batch
from farss.survey.against import against
from farss.survey.gradients import gradients
from farss.survey.readings import read_layers
from farss.survey.site import Site
from farss.survey.sweep import survey


def look(site: Site, needs: Reading, texts: Sequence[list[Batch]], calibration: CalibrationConfig | None = None, seed: int = 0) -> Survey:
    """Look at a model; see `survey`, `gradients`, `against` and `read_layers`.

    Args:
        texts: in batches, one for each of `needs.texts`.
    """
    if needs is SURVEY:
        how = calibration or CalibrationConfig()
        return survey(site, texts[0], how.fisher, seed, how.svd)
    if needs.of == "gradients":
        return gradients(site, texts[0])
    assert needs.read
    if needs.of == "both":
        task, knowledge = texts
        return against(site, task, knowledge, needs.read)
    return read_layers(site, needs.read, texts[0] if texts else [], needs.over)


def batches_for(
    needs: Reading, rows: Sequence[Row], calibration: CalibrationConfig, pad_id: int, seed: int, max_length: int
) -> list[Batch]:
    """The batches of one text that are looked at; padding counts in no statistics but FARSS's."""
    how = calibration if needs is SURVEY else replace(calibration, padding="ignore")
    return calibration_batches(rows, how, pad_id, seed, max_length)
