"""Is the full fine-tuning that T is relative to one that was asked the same?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farss.artifacts import TaskScore, read_records
from farss.config import Config, QuestionSet
from farss.errors import FolderError
from farss.files import reading
from farss.tasks.benchmarks import grading, list_benchmarks
from farss.tasks.outcomes import how_asked, read_scores
from farss.tasks.questions import Drawn, asked_so, prompt_of


def check_reference(config: Config, tokenizer: Any) -> None:
    """Find out before hours of training that T will have no value.

    Args:
        tokenizer: the base model's, which writes the prompts of a chat.

    Raises:
        FolderError: the full fine-tuning run of `evaluate.full_scores` was not asked the task, or other questions of it, or otherwise.
    """
    named = Path(config.evaluate.full_scores or "")
    if not named.exists():
        raise FolderError(
            f"evaluate.full_scores={named}: there is no such file; it is the scores.json of full fine-tuning, or of another run in its "
            "place, which comes first"
        )
    scores, folder = read_scores(named)
    for each in list_benchmarks(config, {}):
        if each.kind != "task":
            continue
        if each.name not in scores.task:
            raise FolderError(
                f"evaluate.full_scores={config.evaluate.full_scores}: that run was not asked the task {each.name!r}, so T would have no "
                "value: name a run that was, or leave evaluate.full_scores out"
            )
        if not isinstance(each.entry, QuestionSet) or each.drawn is None:
            limit = config.evaluate.limit
            asked_there, same_seed = scores.task[each.name].questions, scores.meta["seed"] == config.seed
            if limit and (asked_there > limit or (asked_there == limit and not same_seed)):
                raise FolderError(
                    f"evaluate.full_scores={config.evaluate.full_scores} holds answers to other questions of {each.name!r} than will be "
                    "asked: evaluate both with the same evaluate.limit and seed"
                )
            continue
        asked = {str(row["id"]): row["answers"] for row in each.drawn.asked}
        answered = {str(record["id"]): record["gold"] for record in read_records(folder, each.name)}
        if (asked, each.entry.metric) != (answered, scores.task[each.name].metric):
            raise FolderError(
                f"evaluate.full_scores={config.evaluate.full_scores} holds answers to other questions of {each.name!r} than will be "
                "asked: evaluate both with the same file, limit, metric and seed"
            )
        if otherwise := _asked_otherwise(each.entry, each.drawn, config, scores.task[each.name], folder, tokenizer):
            raise FolderError(
                f"evaluate.full_scores={config.evaluate.full_scores}: that run was asked {each.name!r} with {otherwise}, so T would be a "
                "ratio of unlike things: evaluate both in the same way"
            )


def check_not_own(config: Config) -> None:
    """Refuse to measure a run by itself.

    Raises:
        FolderError: `evaluate.full_scores` names the run's own scores.
    """
    named, own = Path(config.evaluate.full_scores or "."), Path(config.out).resolve()
    if config.evaluate.full_scores and named.resolve() in (own, own / "scores.json"):
        raise FolderError(f"evaluate.full_scores={named} is this run's own: T would be 1 whatever it learned; name another run's")


def _asked_otherwise(entry: QuestionSet, drawn: Drawn, config: Config, score: TaskScore, folder: Path, tokenizer: Any) -> str:
    """How the answers in a folder were asked for, where it is not how they will be; empty where it is."""
    will = {"fewshot": entry.fewshot, "max_tokens": entry.max_tokens, **grading([entry])}
    with reading(folder / f"{entry.name}.json", "score of a benchmark"):
        known = how_asked(folder, entry.name)
        was = {"fewshot": score.fewshot, "max_tokens": known["max_tokens"], **known}
    for key, value in was.items():
        if value != will[key]:
            return f"{key}={value}, and now {key}={will[key]}"
    same = asked_so(drawn, prompt_of(entry, "task", config.data, tokenizer), read_records(folder, entry.name))
    return "" if same else "another prompt, template or other examples than now"
