"""Examples as texts: the prompt of a template, a chat, and what is asked and answered in turn."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from farss.config import DataConfig
from farss.errors import DataError, RowError
from farss.rows import cell, unread, whole_instruction

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ANSWER = "farss-answer"
"""Stands for an answer in a chat."""
PROMPT_FACTS = ("template", "system", "thinking", "border", "day")
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
DAY = datetime(2024, 7, 26)
"""The date in chat templates that write one (the one that Llama 3.2's falls back to)."""


def prompt_text(template: str, instruction: str, tokenizer: Any = None, system: str | None = None, thinking: bool = False) -> str:
    """Put an instruction into a template: alpaca, plain, chat, or a text with `{instruction}` in it.

    Args:
        system: message that stands before it in a chat.
        thinking: an answer begins with thoughts of its own, so nothing of it (`answer_border`) is put behind the prompt.

    Raises:
        DataError: `chat`, but the tokenizer has no chat template.
    """
    if template == "chat":
        opening = [{"role": "system", "content": system}] if system else []
        messages = [*opening, {"role": "user", "content": instruction}]
        return _render(tokenizer, messages, ask=True) + ("" if thinking else answer_border(tokenizer).rstrip(" "))
    if template == "plain":
        return instruction
    # not str.format: instructions and templates may hold other braces
    return (ALPACA if template == "alpaca" else template).replace("{instruction}", instruction)


def prompt_facts(config: DataConfig, tokenizer: Any = None) -> dict[str, Any]:
    """How whoever asks the model must ask it: `template`, `system` where there is one, and `thinking` where answers begin with thoughts.

    Args:
        tokenizer: to add the `border` that a chat's answers have been trained behind, and the `day` that its template has written.
    """
    chat = tokenizer and config.template == "chat"
    border = answer_border(tokenizer).rstrip(" ") if chat and not config.thinking else ""
    named = tokenizer.chat_template if chat else None
    day = _TODAY.search(named) if isinstance(named, str) else None
    written = DAY.strftime(day[2]) if day else ""
    facts = dict(zip(PROMPT_FACTS, (config.template, config.system, config.thinking, border, written), strict=True))
    return {name: fact for name, fact in facts.items() if fact}


def separator(template: str) -> str:
    """What stands between a prompt and its answer: a space, or nothing more where a template of the user's own ends in white space."""
    return "" if template[-1:].isspace() else " "


def answer_border(tokenizer: Any) -> str:
    """What a chat template writes between its invitation to answer and the answer, such as the empty thoughts of Qwen3: trained
    models have seen it there, so it belongs to what they are asked with. A space at its end belongs to the answer. Empty where
    the template writes the answer otherwise: training refuses it.
    """
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    asked, whole = _render(tokenizer, messages[:1], ask=True), _render(tokenizer, messages)
    border, found, _ = whole[len(asked) :].partition(ANSWER)
    return border if found and whole.startswith(asked) else ""


def answer_end(tokenizer: Any) -> list[str]:
    """What a chat template writes behind an answer, where the tokenizer does not know it for a special token (ChatML on a base model):
    trained models write it too, and it is no part of the answer. Empty where there is no such text."""
    whole = _render(tokenizer, [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}])
    end = whole.rpartition(ANSWER)[2]
    for token in tokenizer.all_special_tokens:
        end = end.replace(token, "")
    return [end.strip()] if end.strip() else []


def _render(tokenizer: Any, messages: list[dict[str, Any]], ask: bool = False) -> str:
    """A chat as its template writes it, on the same day every day: some templates write today's date, and a run that is killed and
    goes on tomorrow must see the same texts."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError("data.template=chat, but the model's tokenizer has no chat template: choose alpaca or plain")
    named = tokenizer.chat_template  # several, by their names, or one
    fixed = _TODAY.sub(lambda call: repr(DAY.strftime(call[2])), named) if isinstance(named, str) else None
    text: str = tokenizer.apply_chat_template(messages, chat_template=fixed, add_generation_prompt=ask, tokenize=False)
    return text


def stages_of(
    rows: Sequence[tuple[int, dict[str, Any]]], columns: tuple[str, str], config: DataConfig, tokenizer: Any
) -> Iterator[list[str]]:
    """Write each row as texts that grow: prompt, prompt + answer, (that + next prompt, that + next answer, ...). Where a chat template
    writes earlier messages otherwise when later ones follow (Qwen3 leaves their thoughts out), each answer becomes an example of its own.
    """
    prompt, response = columns
    for number, row in rows:
        if prompt != response:
            instruction, answer = instruction_of(row, prompt, number, config), cell(row, response, number)
            yield from _pair_stages(instruction, answer, number, config, tokenizer)
        elif turn := first_turn(row.get(prompt)):
            yield from _pair_stages(cell(turn, "human", number), cell(turn, "assistant", number), number, config, tokenizer)
        elif config.template != "chat":
            raise DataError(f"column {prompt!r} holds chats, but data.template={config.template!r}: set data.template=chat")
        else:
            yield from _chat_stages(row.get(prompt), prompt, number, config, tokenizer)


def instruction_of(row: dict[str, Any], column: str, number: int, config: DataConfig) -> str:
    """The instruction of a row.

    Raises:
        RowError: data.prompt is not named, and what belongs to the instruction stands in another column that is not read.
    """
    if config.prompt is None and (left_out := unread(row, column)):
        raise RowError(
            f"row {number}: column {left_out[0]!r} stands beside {column!r} and would be left out: write both into one column, or name "
            f"data.prompt={column} to train without it"
        )
    return whole_instruction(row, column, number)


def first_turn(turns: Any) -> dict[str, Any] | None:
    """WizardLM's `conversation[0]`, a dictionary with `human` and `assistant`; None: it is another chat."""
    first = turns[0] if isinstance(turns, list) and turns else None
    return first if isinstance(first, dict) and "human" in first else None


def _pair_stages(instruction: str, answer: str, number: int, config: DataConfig, tokenizer: Any) -> list[list[str]]:
    if config.template == "chat":
        messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
        return _chat_stages(messages, "messages", number, config, tokenizer)
    start = prompt_text(config.template, instruction)
    return [[start, f"{start}{separator(config.template)}{answer}"]]


def _chat_stages(messages: Any, column: str, number: int, config: DataConfig, tokenizer: Any) -> list[list[str]]:
    if not isinstance(messages, list) or not all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in messages):
        raise RowError(f"row {number}: its {column} are no list of {{role, content}}: mend the row")
    turns: list[list[str]] = []
    messages = [_with_text(message, number) for message in messages]
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            if not index:
                raise RowError(f"row {number} begins with an assistant message, which answers nothing: remove the message")
            try:
                turns.append([_render(tokenizer, messages[:index], ask=True), _render(tokenizer, messages[: index + 1])])
            except TemplateSyntaxError as error:
                raise DataError(f"the model's chat template is broken ({error}): mend or replace the tokenizer's template") from error
            except (TemplateError, TypeError, ValueError) as error:
                raise RowError(f"row {number}: the chat template refuses its messages ({error}): mend or remove the row") from error
            others = [other for other in messages[:index] if other["role"] != "assistant"]
            if gone := [other["role"] for other in others if not _stands_in(other["content"].strip(), turns[-1][0])]:
                raise RowError(
                    f"row {number}: the chat template leaves out a message of the role {gone[0]!r}, and the answer would be learned "
                    "without it: rename the role (user, system) as the template knows it, or remove the row"
                )
    if not turns:
        roles = ", ".join(dict.fromkeys(repr(message["role"]) for message in messages)) or "none"
        raise RowError(
            f"row {number} has no message of the 'assistant' (its roles: {roles}): rename the one who answers, or remove the row"
        )
    for asked, whole in turns:
        if not whole.startswith(asked):
            raise RowError(
                f"row {number}: the chat template ends what is asked with {asked[-40:]!r} and writes it otherwise when an answer follows, "
                "so the answer cannot be told apart: put another chat_template.jinja into the model's folder"
            )
    stages = [*itertools.chain.from_iterable(turns)]
    return [stages] if all(after.startswith(before) for before, after in itertools.pairwise(stages)) else turns


def _stands_in(text: str, chat: str) -> bool:
    """As it is, or as Llama 3.1's template writes what a tool says: in JSON."""
    return text in chat or json.dumps(text, ensure_ascii=False)[1:-1] in chat


def _with_text(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message whose content is one text, and not a list of parts of which each is a text; an assistant's must say something."""
    message = {name: value for name, value in message.items() if value is not None}  # templates ask whether a name is there
    content = text_of(message)
    if message["role"] == "function_call" or message.get("tool_calls") or message.get("function_call"):
        raise RowError(f"row {number}: a message calls tools, which are not trained: write the call as its content, or remove the row")
    if message["role"] == "assistant" and (message.get("weight") == 0 or message.get("train") is False):
        raise RowError(f"row {number}: an answer is marked as not to be learned, and all answers of a chat are: end the chat before it")
    empty = content is None or (isinstance(content, str) and not content.strip())
    if empty and message["role"] not in ("assistant", "user"):
        return message | {"content": content or ""}
    return message | {"content": cell({"content": content}, "content", number)}


def text_of(message: dict[str, Any]) -> Any:
    """The content of a message, of which parts that are texts are joined."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content
