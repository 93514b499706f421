"""Model + calibration examples -> Survey."""

from farss.survey.look import batches_for, look
from farss.survey.own_text import LENGTH, own_text
from farss.survey.readings import read_layers
from farss.survey.site import Site
from farss.survey.sweep import survey

__all__ = ["LENGTH", "Site", "batches_for", "look", "own_text", "read_layers", "survey"]
