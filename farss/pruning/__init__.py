"""A model folder in, a smaller model folder out: whole blocks are chosen and deleted (TRSP, and what it is compared with)."""

from farss.pruning.steps import RECIPES, prune

__all__ = ["RECIPES", "prune"]
