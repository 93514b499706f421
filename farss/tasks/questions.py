"""A file of questions becomes a task of lm_eval, without a line of YAML."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from farss.artifacts import Kind
from farss.config import DataConfig, QuestionSet
from farss.errors import ConfigError, DataError
from farss.prompts import answer_border, answer_end, prompt_text, separator
from farss.rows import KNOWLEDGE_PROMPT, example_rows, question_rows
from farss.tasks.grading import METRICS, final_number, without_thoughts

Row = dict[str, Any]
"""One question: `{id, question, answers}`; the id is its place in the file."""
Source = Mapping[str, Any]
"""`{question, answers}`."""


class Drawn(NamedTuple):
    """The questions that are asked, and those shown before them with their answers."""

    asked: list[Row]
    shown: list[Row]


class Prompt(NamedTuple):
    """How a question is put, and where its answer ends."""

    text: Callable[[str], str]
    """Question -> prompt."""
    delimiter: str
    """What stands between the prompt and the answer."""
    until: list[str]
    """The answer ends before the first of these texts, or at the end-of-sequence token."""
    complete: bool = False
    """Whether the text already has its special tokens (a chat template writes them)."""


def draw(entry: QuestionSet, rows: Sequence[Source], seed: int, examples: Sequence[Source] | None = None) -> Drawn:
    """Choose the questions with the seed: the same ones for every model, in the order of the file.

    Args:
        rows: of the whole file, from `farss.rows.question_rows`.
        examples: of the file whose questions are shown; None: `rows`.

    Raises:
        ConfigError: the file has too few questions for the examples that are shown.
        DataError: numbers are compared, but an accepted answer has none.
    """
    order = _shuffled(rows, seed)
    others = order if examples is None else _shuffled(examples, seed)
    shown = others[: entry.fewshot]
    if len(shown) < entry.fewshot:
        raise ConfigError(
            f"question set {entry.name!r}: {entry.examples or entry.data} has {len(others)} questions, and fewshot={entry.fewshot} "
            "are to be shown: choose a smaller fewshot"
        )
    # The same question may stand in a file twice: its answer must not be shown before it.
    seen = {row["question"] for row in shown}
    asked = [row for row in order if row["question"] not in seen][: entry.limit]
    if not asked:
        raise ConfigError(
            f"question set {entry.name!r}: {entry.data} has {len(order)} questions, none is left to ask after "
            f"showing fewshot={entry.fewshot}: choose a smaller fewshot"
        )
    asked.sort(key=lambda row: int(row["id"]))
    if entry.metric == "number":
        _check_numbers(entry, asked)
    return Drawn(asked, shown)


def draw_from_files(entry: QuestionSet, seed: int) -> Drawn:
    """The same, read from the files that the set names."""
    return draw(entry, question_rows(entry), seed, example_rows(entry))


def _shuffled(rows: Sequence[Source], seed: int) -> list[Row]:
    numbered = [{"id": place, "question": row["question"], "answers": list(row["answers"])} for place, row in enumerate(rows)]
    return random.Random(seed).sample(numbered, len(numbered))


def _check_numbers(entry: QuestionSet, rows: list[Row]) -> None:
    for row in rows:
        if all(final_number(answer) is None for answer in row["answers"]):
            raise DataError(
                f"question set {entry.name!r}: metric=number, but the answer {row['answers'][0]!r} of question "
                f"{row['id'] + 1} in {entry.data} has no number: choose metric: exact_match"
            )


def prompt_of(entry: QuestionSet, kind: Kind, data: DataConfig, tokenizer: Any) -> Prompt:
    """The prompt of a question set: its own, the training prompt, or the usual one for knowledge.

    Args:
        data: with the template and the system message of the training prompt.

    Raises:
        ConfigError: the prompt does not contain `{question}`, or examples are shown in a chat.
    """
    chosen = entry.prompt or ("train" if kind == "task" else KNOWLEDGE_PROMPT)
    if chosen == "train":
        template = data.template
        if template == "chat" and entry.fewshot:
            raise ConfigError(
                f"question set {entry.name!r}: fewshot={entry.fewshot} cannot be shown in a chat: set fewshot: 0, or give a prompt"
            )
        # An answer in the training format may have several lines; the model ends it with its end-of-sequence token.
        # Between a template and an answer stands what stands there in training, also the end of a chat template's border.
        asked = tokenizer, data.system, data.thinking
        delimiter, until, chat = separator(template), list[str](), template == "chat"
        if chat:
            border = answer_border(tokenizer) if tokenizer and not data.thinking else ""
            delimiter, until = border[len(border.rstrip(" ")) :], answer_end(tokenizer) if tokenizer else []
        return Prompt(lambda question: prompt_text(template, question, *asked), delimiter, until, chat)
    if "{question}" not in chosen:
        raise ConfigError(f"question set {entry.name!r}: prompt={chosen!r} has no {{question}} in it: add it, or write train")
    # Reasoning that ends in a number has several lines; any other answer is one line.
    until = ["\n\n"] if entry.metric == "number" else ["\n"]
    # str.replace because questions and prompts may hold other braces.
    return Prompt(lambda question: chosen.replace("{question}", question), separator(chosen), until)


def prompts_of(drawn: Drawn, prompt: Prompt) -> dict[str, str]:
    """What a model reads before each answer, by the question's id: the examples that are shown, and the question."""
    shown = "".join(f"{prompt.text(row['question'])}{prompt.delimiter}{row['answers'][0]}\n\n" for row in drawn.shown)
    return {str(row["id"]): shown + prompt.text(row["question"]) for row in drawn.asked}


def asked_so(drawn: Drawn, prompt: Prompt, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the answers in these records were given to these prompts."""
    prompts = prompts_of(drawn, prompt)
    return all(record["prompt"] == prompts[str(record["id"])] for record in records)


class Rows(list[Row]):
    """The little of a `datasets.Dataset` that lm_eval looks at; nothing is written to a cache or read from a path."""

    @property
    def features(self) -> dict[str, None]:
        """Column names."""
        return dict.fromkeys(self[0])


def task_settings(entry: QuestionSet, drawn: Drawn, prompt: Prompt) -> dict[str, Any]:
    """The configuration of lm_eval's `ConfigurableTask`: greedy generation, scored by the entry's metric."""
    grade = METRICS[entry.metric]
    return {
        "task": entry.name,
        "custom_dataset": lambda **_: {"test": Rows(drawn.asked)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda row: prompt.text(row["question"]),
        "doc_to_target": lambda row: row["answers"],
        "target_delimiter": prompt.delimiter,
        "num_fewshot": len(drawn.shown),
        "fewshot_config": {"sampler": "first_n", "samples": drawn.shown},
        "generation_kwargs": {"until": list(prompt.until), "max_gen_toks": entry.max_tokens, "do_sample": False},
        # Models answer " Paris": without this filter no answer would ever match.
        "filter_list": [{"name": "remove_whitespace", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "process_results": lambda row, results: {entry.metric: grade(without_thoughts(results[0]), row["answers"])},
        "metric_list": [{"metric": entry.metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
