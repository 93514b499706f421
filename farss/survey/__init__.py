"""Model + calibration examples -> Survey."""

from farss.survey.looking import batches_for, look
from farss.survey.readings import read_layers
from farss.survey.site import Site
from farss.survey.sweep import survey
from farss.survey.writing import LENGTH, own_text

__all__ = ["LENGTH", "Site", "batches_for", "look", "own_text", "read_layers", "survey"]
