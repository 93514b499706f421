"""Rows in; prompts, tokens, masks and batches out."""

from __future__ import annotations

import itertools
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor

from farss import processes
from farss.config import CalibrationConfig, DataConfig
from farss.errors import DataError, RowError
from farss.rows import cell, find_columns, naming, read_rows, whole_instruction

Row = dict[str, list[int]]
"""One example: `input_ids` and `completion_mask`, of the same length."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

ANSWER = "farss-answer"
"""Stands for an answer in a chat."""
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
DAY = datetime(2024, 7, 26)
"""The date in chat templates that write one (the one that Llama 3.2's falls back to)."""

T = TypeVar("T")


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt_text(template: str, instruction: str, tokenizer: Any = None, system: str | None = None) -> str:
    """Put an instruction into a template: alpaca, plain, chat, or a text with `{instruction}` in it.

    Args:
        system: message that stands before it in a chat.

    Raises:
        DataError: `chat`, but the tokenizer has no chat template.
    """
    if template == "chat":
        opening = [{"role": "system", "content": system}] if system else []
        messages = [*opening, {"role": "user", "content": instruction}]
        return _render(tokenizer, messages, ask=True) + answer_border(tokenizer).rstrip(" ")
    if template == "plain":
        return instruction
    # not str.format: instructions and templates may hold other braces
    return (ALPACA if template == "alpaca" else template).replace("{instruction}", instruction)


def prompt_facts(config: DataConfig) -> dict[str, str]:
    """How whoever asks the model must ask it: `template` and, where there is one, `system`."""
    return {"template": config.template, **({"system": config.system} if config.system else {})}


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


def _render(tokenizer: Any, messages: list[dict[str, Any]], ask: bool = False) -> str:
    """A chat as its template writes it, on the same day every day: some templates write today's date, and a run that is killed and
    goes on tomorrow must see the same texts."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError("data.template=chat, but the model's tokenizer has no chat template: choose alpaca or plain")
    named = tokenizer.chat_template  # several, by their names, or one
    fixed = _TODAY.sub(lambda call: repr(DAY.strftime(call[2])), named) if isinstance(named, str) else None
    text: str = tokenizer.apply_chat_template(messages, chat_template=fixed, add_generation_prompt=ask, tokenize=False)
    return text


def _stages(rows: Sequence[tuple[int, dict[str, Any]]], columns: tuple[str, str], config: DataConfig, tokenizer: Any) -> list[list[str]]:
    """Write each row as texts that grow: prompt, prompt + answer, (that + next prompt, that + next answer, ...)."""
    prompt, response = columns
    if prompt == "messages" and response == prompt:
        return [_chat_stages(row.get(prompt), number, config, tokenizer) for number, row in rows]
    result = []
    for number, row in rows:
        if prompt == response:
            row = _first_turn(row.get(prompt), prompt, number)
            instruction, answer = cell(row, "human", number), cell(row, "assistant", number)
        else:
            instruction, answer = _instruction(row, prompt, number, config), cell(row, response, number)
        result.append(_pair_stages(instruction, answer, number, config, tokenizer))
    return result


def _instruction(row: dict[str, Any], column: str, number: int, config: DataConfig) -> str:
    """Somebody who names data.prompt gets just that column."""
    return whole_instruction(row, column, number) if config.prompt is None else cell(row, column, number)


def _first_turn(turns: Any, column: str, number: int) -> dict[str, Any]:
    """WizardLM's `conversation[0]`, a dictionary with `human` and `assistant`."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        raise RowError(f"row {number}: column {column!r} is no list of turns with `human` and `assistant`: mend the row")
    turn: dict[str, Any] = turns[0]
    return turn


def _pair_stages(instruction: str, answer: str, number: int, config: DataConfig, tokenizer: Any) -> list[str]:
    if config.template == "chat":
        messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
        return _chat_stages(messages, number, config, tokenizer)
    start = prompt_text(config.template, instruction)
    return [start, f"{start}{separator(config.template)}{answer}"]


def _chat_stages(messages: Any, number: int, config: DataConfig, tokenizer: Any) -> list[str]:
    if config.template != "chat":
        raise DataError(f"column 'messages' holds chats, but data.template={config.template!r}: set data.template=chat")
    if not isinstance(messages, list) or not all(isinstance(item, dict) and "role" in item for item in messages):
        raise RowError(f"row {number}: column 'messages' is no list of {{role, content}}: mend the row")
    stages = []
    messages = [_with_text(message, number) for message in messages]
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            if not index:
                raise RowError(f"row {number} begins with an assistant message, which answers nothing: remove the message")
            try:
                stages += [_render(tokenizer, messages[:index], ask=True), _render(tokenizer, messages[: index + 1])]
            except (TemplateError, ValueError) as error:
                raise RowError(f"row {number}: the chat template refuses its messages ({error}): mend or remove the row") from error
    if not stages:
        raise RowError(f"row {number} has no assistant message: there is nothing to learn from it, remove the row")
    for before, after in itertools.pairwise(stages):
        if not after.startswith(before):
            raise RowError(
                f"row {number}: the chat template writes earlier messages differently when later ones follow, so the "
                "answers cannot be told apart: use data.template=alpaca, or another chat template"
            )
    return stages


def _with_text(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message whose content is one text, and not a list of parts of which each is a text; an assistant's must say something."""
    content = _text_of(message)
    empty = content is None or (isinstance(content, str) and not content.strip())
    if empty and message["role"] != "assistant":
        return message | {"content": content or ""}
    return message | {"content": cell({"content": content}, "content", number)}


def _text_of(message: dict[str, Any]) -> Any:
    """The content of a message, of which parts that are texts are joined."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content


# --- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenized:
    """Examples as tokens. Calibration and training read the same ones."""

    rows: list[Row]
    """`input_ids` and `completion_mask` (1 on the tokens that are learnt: the answer and the end of sequence)."""
    dropped: int = 0
    """Examples whose whole answer lay beyond `max_length`."""
    truncated: int = 0
    """Examples that were cut and still have some of their answer."""
    system: str | None = None
    """The system message with which every one of them begins, empty where none does; None: they differ."""
    instructions: frozenset[int] = frozenset()
    """`same_words` of what they ask."""

    def dataset(self) -> Any:
        """The same as a `datasets.Dataset`, with `labels` beside the mask: TRL takes it as it is."""
        import datasets

        return datasets.Dataset.from_dict(
            {
                "input_ids": [row["input_ids"] for row in self.rows],
                "completion_mask": [row["completion_mask"] for row in self.rows],
                "labels": [labels_of(row) for row in self.rows],
            }
        )

    @property
    def cut(self) -> str:
        """What `data.max_length` took away, for people; empty where that is nothing."""
        return told_cut(len(self.rows), self.truncated, self.dropped)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens, prompts included."""
        return sum(len(row["input_ids"]) for row in self.rows)


def told_cut(used: int, truncated: int, dropped: int) -> str:
    """What became of examples that are longer than `data.max_length`; empty where there are none."""
    if not (truncated or dropped):
        return ""
    return (
        f"Of {used + dropped:,} training examples the end of {truncated:,} is cut off at data.max_length, and {dropped:,} are left out "
        "because no answer fits into it."
    )


def labels_of(row: Row) -> list[int]:
    """The targets of one row in the words of transformers: -100 where nothing is learnt."""
    return [token if learnt else -100 for token, learnt in zip(row["input_ids"], row["completion_mask"], strict=True)]


def load_examples(config: DataConfig, tokenizer: Any, seed: int) -> Tokenized:
    """Read, draw (`config.limit`, with the seed), format, tokenise and cut the training examples.

    Raises:
        DataError: see `read_rows`, `find_columns`, `prompt_text`; a row is empty; no answer fits into `max_length`.
    """
    if not config.train:
        raise DataError("data.train is empty: give a .jsonl, .csv or .parquet file, or a data set's name on a hub")
    rows = read_rows(config.train, config.split)
    with naming(config.train):
        return tokenize_rows(rows, config, tokenizer, seed)


def tokenize_rows(rows: Sequence[dict[str, Any]], config: DataConfig, tokenizer: Any, seed: int) -> Tokenized:
    """The same for rows that are in memory; `config.train` is not looked at."""
    if not rows:
        raise DataError("the data set has no rows: give at least one example")
    rows = [_with_messages(row) for row in rows]
    columns = find_columns(rows, config.prompt, config.response)
    numbered = list(enumerate(rows, 1))
    chosen = choose(numbered, config.limit or len(rows), seed)
    stages = _stages(chosen, columns, config, tokenizer)
    whole = tokenize(stages, tokenizer, chat=config.template == "chat")
    return replace(
        _cut(whole, config.max_length),
        system=_shared_system([row.get(columns[0]) for _, row in chosen]),
        instructions=frozenset(same_words(text) for number, row in chosen for text in _asked(row, columns, number, config)),
    )


def _asked(row: dict[str, Any], columns: tuple[str, str], number: int, config: DataConfig) -> list[str]:
    """What an example asks: its instruction, or what the user says in a chat."""
    prompt, response = columns
    if prompt != response:
        return [_instruction(row, prompt, number, config)]
    if prompt != "messages":
        return [cell(_first_turn(row[prompt], prompt, number), "human", number)]
    return [str(_text_of(turn)) for turn in row[prompt] if turn.get("role") == "user"]


def same_words(text: str) -> int:
    """Equal for texts that differ in case and white space alone; in this process."""
    return hash(" ".join(text.lower().split()))


ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names."""


def _with_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose `conversations` are ShareGPT's (`from`, `value`) with them as `messages`; any other as it is."""
    turns = row.get("conversations")
    if "messages" in row or not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return row
    return row | {"messages": [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")} for turn in turns]}


def _shared_system(chats: Sequence[Any]) -> str | None:
    """The system message with which all chats begin; empty where they have or are none, None where they differ."""
    first = {_text_of(chat[0]) if isinstance(chat, list) and chat and chat[0].get("role") == "system" else "" for chat in chats}
    return first.pop() if len(first) == 1 else None


def tokenize(stages: Sequence[Sequence[str]], tokenizer: Any, chat: bool = False) -> list[Row]:
    """Tokenise growing texts (prompt, prompt + answer, ...); every second step is learnt, and so is the end.

    Special tokens such as BOS stand in front once; a chat template writes its own. EOS stands at the end once.
    """
    opening = [] if chat else _opening(tokenizer)
    ids = iter(_encode([text for texts in stages for text in texts], tokenizer))
    joined = (_join(texts, [next(ids) for _ in texts], tokenizer) for texts in stages)
    return [_framed(*parts, opening, tokenizer.eos_token_id, chat) for parts in joined]


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids without special tokens, a thousand texts at a time and on every core."""
    result: list[list[int]] = []
    with processes.environment("TOKENIZERS_PARALLELISM", "true"):  # elsewhere it is off: threads do not survive a fork
        for part in batches(texts, 1000):
            result += tokenizer(part, add_special_tokens=False)["input_ids"]
    return result


def text_windows(texts: Sequence[str], tokenizer: Any, length: int) -> list[Row]:
    """The texts one after the other, empty lines between them, cut every `length` tokens. Each window begins as the tokenizer begins a
    text, and every token but the first is to be predicted. What is left at the end is no window."""
    opening, gap = _opening(tokenizer), _encode(["\n\n"], tokenizer)[0]
    ids = array("q", itertools.chain.from_iterable([*text, *gap] for text in _encode(list(texts), tokenizer)))
    size = length - len(opening)
    starts = range(0, len(ids) - size + 1, size)
    return [{"input_ids": [*opening, *ids[start : start + size]], "completion_mask": [0] + [1] * (length - 1)} for start in starts]


def _opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])


def _join(texts: Sequence[str], encoded: list[list[int]], tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Join the stages of one example: its tokens, their mask, and the tokens of its last answer.

    The tokens of a prompt are those that the model sees when it is asked.
    """
    ids, mask, new = list(encoded[0]), [0] * len(encoded[0]), encoded[0]
    for step in range(1, len(texts)):
        longer = encoded[step]
        # some tokenizers (Llama's) add a space to whatever is tokenised by itself, so the answer is read off the whole
        # text; where tokens would merge across the border it is tokenised by itself all the same
        kept = longer[: len(ids)] == ids
        new = longer[len(ids) :] if kept else _encode([texts[step][len(texts[step - 1]) :]], tokenizer)[0]
        ids, mask = ids + new, mask + [step % 2] * len(new)
    return ids, mask, new


def _framed(ids: list[int], mask: list[int], last: list[int], opening: list[int], eos: int, chat: bool) -> Row:
    """Put the opening in front and EOS behind, unless they are there. Chat templates end a turn with EOS and newline."""
    ended = eos in last if chat else last[-1:] == [eos]
    if not ended:
        ids, mask = [*ids, eos], [*mask, 1]
    if ids[: len(opening)] != opening:
        ids, mask = opening + ids, [0] * len(opening) + mask
    mask[0] = 0  # nothing comes before the first token that could predict it
    return {"input_ids": ids, "completion_mask": mask}


def check_length(examples: Tokenized, config: DataConfig, positions: int | None) -> None:
    """Refuse examples that are longer than a model can read.

    Args:
        positions: from `farss.structure.positions`.

    Raises:
        DataError: with the longest.
    """
    longest = max(len(row["input_ids"]) for row in examples.rows)
    if positions is not None and longest > positions:
        raise DataError(
            f"the longest example has {longest} tokens (data.max_length={config.max_length}), and the model knows {positions} positions: "
            f"set data.max_length={positions}"
        )


def _cut(rows: list[Row], max_length: int) -> Tokenized:
    """Cut the end off at `max_length`; drop the rows that have nothing to learn left, and count both."""
    short = [{name: values[:max_length] for name, values in row.items()} for row in rows]
    kept = [any(row["completion_mask"]) for row in short]
    cut = sum(len(row["input_ids"]) > max_length and keep for row, keep in zip(rows, kept, strict=True))
    dropped = kept.count(False)
    if dropped == len(rows):
        raise DataError(f"none of the {dropped} examples has any answer left at data.max_length={max_length}: raise data.max_length")
    return Tokenized([row for row, keep in zip(short, kept, strict=True) if keep], dropped=dropped, truncated=cut)


# --- batches ---------------------------------------------------------------------------------------------------------


def plain_rows(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[Row]:
    """Texts as examples that are only looked at: tokenised with the special tokens in front, and nothing to be learnt."""
    return unlearnt([tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts])


def unlearnt(rows: Iterable[list[int]]) -> list[Row]:
    """Token ids as examples that are only looked at."""
    return [{"input_ids": ids, "completion_mask": [0] * len(ids)} for ids in rows]


def choose(rows: Sequence[T], count: int, seed: int) -> list[T]:
    """Draw `count` rows without replacement, in their own order; all of them where there are no more."""
    if count >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]


def batches(rows: Sequence[T], batch_size: int) -> Iterator[list[T]]:
    """Consecutive rows, `batch_size` at a time; the last batch may be smaller."""
    for start in range(0, len(rows), batch_size):
        yield list(rows[start : start + batch_size])


def calibration_batches(
    rows: Sequence[Row], config: CalibrationConfig, pad_id: int, seed: int, max_length: int = 0
) -> list[dict[str, Tensor]]:
    """The batches on which statistics are estimated: rows drawn with the seed, similar lengths together.

    There is at least one for each process, if there are as many rows.

    Args:
        max_length: `data.max_length`, to which rows are padded where `config.padding` is `count`.
    """
    chosen = sorted(choose(rows, config.examples, seed), key=lambda row: -len(row["input_ids"]))
    size = max(1, min(config.batch_size, len(chosen) // processes.size()))
    if config.padding == "ignore":
        return [collate(part, pad_id) for part in batches(chosen, size)]
    wide = [collate(part, pad_id, length=max_length) for part in batches(chosen, size)]
    return [{**batch, "counted": torch.ones_like(batch["input_ids"])} for batch in wide]


def collate(rows: Sequence[Row], pad_id: int, side: Literal["right", "left"] = "right", length: int = 0) -> dict[str, Tensor]:
    """Pad rows to one length t: that of the longest, or `length` where that is more.

    Returns:
        `input_ids`, `attention_mask` (0 on padding), `position_ids` (counted over real tokens) and `labels` (-100 on
        prompts and padding), each int64 [rows, t].
    """
    longest = max(length, *(len(row["input_ids"]) for row in rows))

    def padded(values: list[list[int]], fill: int) -> Tensor:
        gaps = [[fill] * (longest - len(value)) for value in values]
        pairs = zip(values, gaps, strict=True)
        return torch.tensor([gap + value if side == "left" else value + gap for value, gap in pairs], dtype=torch.long)

    mask = padded([[1] * len(row["input_ids"]) for row in rows], 0)
    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_id),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": padded([labels_of(row) for row in rows], -100),
    }
