"""What a training does to knowledge and task on its way: how likely a few answers are, now and then."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

from farss.batches import Row
from farss.config import Config, QuestionSet
from farss.memory import memory_cure
from farss.tasks.likelihood import FORWARD, LEAST, affordable, question_tokens, text_tokens, token_loglikelihoods, tokens_of

SHARE = 0.05
"""What all looks together may cost, as a share of the training's tokens; more only for two looks at `LEAST` questions of each set."""
MOST = 200
"""Questions of one set, however long the training is."""

Look = dict[str, dict[str, float]]
"""Kind (knowledge, task, text) -> set -> mean log-likelihood of its answers, nats a token."""


class Watched(NamedTuple):
    """One set of questions, or general text."""

    kind: str
    name: str
    rows: list[Row]


@dataclass(frozen=True)
class Course:
    """What is looked at, and how often."""

    sets: list[Watched]
    looks: int
    """Beside the one before the first step."""
    batch_size: int
    pad_id: int

    def due(self, step: int, total: int) -> bool:
        """Whether to look after this step: before the first, after the last, and evenly between."""
        return step in {round(total * look / self.looks) for look in range(self.looks + 1)}

    def look(self, model: Any) -> Look:
        """The mean log-likelihoods now. The model's modes are restored; no random number is drawn."""
        found: Look = defaultdict(dict)
        with memory_cure(self.batch_size, "answers that are looked at in training (evaluate.looks)", "evaluate.batch_size"):
            for kind, name, rows in self.sets:
                values = token_loglikelihoods(model, rows, self.batch_size, self.pad_id)
                found[kind][name] = round(sum(values) / len(values), 5)
        return dict(found)


def prepare_course(config: Config, tokenizer: Any, tokens: float) -> Course | None:
    """Draw what is looked at: the question files of `evaluate`, as they are asked but without examples before them, and
    the general text. None: nothing to look at, or `evaluate.looks: 0`.

    Args:
        tokens: that the training reads in all; every set gets an equal share of what the looks may cost.

    Left out are tasks of lm_eval, which are asked after the training, and questions that are longer than `data.max_length`.
    """
    options = config.evaluate
    asked = [(kind, entry) for kind, entries in (("knowledge", options.knowledge), ("task", options.task)) for entry in entries]
    files = [(kind, entry) for kind, entry in asked if isinstance(entry, QuestionSet)]
    if not options.looks:
        return None
    found = [Watched(kind, entry.name, question_tokens(entry, kind, config, tokenizer, MOST)) for kind, entry in files]  # type: ignore[arg-type]
    if options.text:
        found.append(Watched("text", "general text", text_tokens(config, tokenizer, MOST)))
    found = [one for one in found if one.rows]
    if not found:
        return None
    spent = SHARE * tokens / FORWARD  # tokens of all looks
    fewest = sum(tokens_of(one.rows[:LEAST]) for one in found)  # of one look
    looks = max(1, min(options.looks, int(spent / fewest) - 1))
    room = spent / (looks + 1) / len(found)  # tokens of one set at one look
    sets = [one._replace(rows=one.rows[: affordable(one.rows, len(one.rows), room)]) for one in found]
    return Course(sets, looks, options.batch_size, tokenizer.pad_token_id)
