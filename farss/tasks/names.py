"""Names of lm_eval tasks: known ones, near misses, and those that run what the model writes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from farss.errors import ConfigError, nearest
from farss.rows import looks_local

TASKS = Path(__file__).parent
"""The harness task files that ship with the package."""

CODE_TASKS = ("humaneval", "mbpp")
"""Their modules run a program while they are loaded, so the name alone must tell."""


def task_manager(names: list[str], run_generated_code: bool) -> Any:
    """lm_eval's index of tasks, after a check of the names; None when no name is asked.

    Raises:
        ConfigError: a name that lm_eval does not know, or a task that runs generated code without permission.
    """
    if not names:
        return None
    manager = _manager(all((TASKS / f"{name}.yaml").is_file() for name in names))
    for name in names:
        if name not in manager.task_index and looks_local(name):
            raise ConfigError(f"evaluate: {name!r} is a file: write it as a question set, {{name: mine, data: {name}}}")
        if name not in manager.task_index:
            raise ConfigError(f"evaluate: lm_eval has no task {name!r}: {_nearest_task(name, manager.all_tasks)}")
        if not run_generated_code and _runs_code(name, manager.task_index):
            raise ConfigError(
                f"evaluate: {name!r} executes programs that the model writes: use a machine you can lose and set "
                "evaluate.run_generated_code=true"
            )
    return manager


@cache
def _manager(ours_only: bool) -> Any:
    """The index. Reading the harness's own 14,000 task files takes seconds, so it is kept."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=not ours_only)


def _nearest_task(name: str, known: list[str]) -> str:
    # Common abbreviations are far from the harness's names in letters.
    usual = {"siqa": "social_iqa", "obqa": "openbookqa", "math": "hendrycks_math", "nq": "nq_open", "arc": "arc_easy"}
    return f"did you mean {usual[name]!r}?" if name in usual else nearest(name, known)


def _runs_code(name: str, index: dict[str, Any]) -> bool:
    """Whether a task, or any task of a group or tag, is marked as running generated code."""
    entry = index.get(name)
    if name.startswith(CODE_TASKS):
        return True
    if entry is None:
        return False
    settings = entry.cfg or {}
    members = [*(settings["task"] if isinstance(settings.get("task"), list) else [])]
    members += sorted(entry.tags) if not settings else []
    names = [each if isinstance(each, str) else each.get("task", each.get("group", "")) for each in members]
    return bool(settings.get("unsafe_code")) or any(_runs_code(each, index) for each in names if isinstance(each, str))
