"""Model + calibration examples -> Survey."""

from farss.survey.sweep import Progress, Svd, survey

__all__ = ["Progress", "Svd", "survey"]
