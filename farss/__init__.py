"""FARSS: fine-tune a language model on your data without losing what it knew.

`prepare`, `export` and `load_adapter` are for your own scripts. The steps of `farss run` are functions of their own:
`farss.survey.survey`, `farss.plan.make_plan`, `farss.adapter.attach`, `farss.train.train`, `farss.evaluate.evaluate`,
`farss.portable.export`, `farss.report.write_report`; `farss.pipeline.Run` puts them in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farss.config import CalibrationConfig, DataConfig, PlanConfig, QuestionSet
    from farss.errors import FarssError
    from farss.library import export, prepare, trainer_callback
    from farss.methods import METHODS
    from farss.portable import load_adapter

__all__ = [
    "METHODS",
    "CalibrationConfig",
    "DataConfig",
    "FarssError",
    "PlanConfig",
    "QuestionSet",
    "export",
    "load_adapter",
    "prepare",
    "trainer_callback",
]

_HOMES = {
    "METHODS": "farss.methods",
    "CalibrationConfig": "farss.config",
    "DataConfig": "farss.config",
    "FarssError": "farss.errors",
    "PlanConfig": "farss.config",
    "QuestionSet": "farss.config",
    "export": "farss.library",
    "load_adapter": "farss.portable",
    "prepare": "farss.library",
    "trainer_callback": "farss.library",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import farss` itself loads nothing heavy."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'farss' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
