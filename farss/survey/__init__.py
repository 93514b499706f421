"""Model + calibration examples -> Survey."""

from farss.survey.sweep import Progress, Svd, survey
from farss.survey.weights import weigh

__all__ = ["Progress", "Svd", "survey", "weigh"]
