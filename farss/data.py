"""Rows in; tokens and masks out."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, TypeVar

from farss import processes
from farss.batches import Row, choose, labels_of
from farss.config import DataConfig
from farss.errors import DataError, RowError
from farss.prompts import answer_border, first_turn, instruction_of, stages_of, text_of
from farss.rows import CHATS, SYSTEMS, TOOLS, cell, find_columns, naming, read_rows, says_nothing
from farss.structure import positions

T = TypeVar("T")
TEXTS, CHARACTERS = 1000, 4_000_000
"""Tokenised at a time, whichever comes first."""


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
    thoughtless: float | None = None
    """Share of them whose last answer begins as one without thoughts does (`farss.prompts.answer_border`); None: nothing is written
    there."""
    instructions: frozenset[int] = frozenset()
    """`same_words` of what they ask."""

    def as_asked(self, config: DataConfig) -> DataConfig:
        """How to ask a model that has learned them: with their system message, and with room for thoughts if they begin with some, where
        the configuration does not say so."""
        system = config.system if config.system is not None else self.system or None
        return replace(config, system=system, thinking=config.thinking or self.thinks)

    @property
    def thinks(self) -> bool:
        """Whether most of their last answers begin with thoughts."""
        return self.thoughtless is not None and self.thoughtless < 0.5

    def dataset(self) -> Any:
        """The same as a `datasets.Dataset`, with `labels`: TRL takes it as it is."""
        import datasets

        return datasets.Dataset.from_dict(
            {
                "input_ids": [row["input_ids"] for row in self.rows],
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
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise RowError(f"row {number} is a {type(row).__name__}, not a dictionary of its columns: give a list of rows")
    rows = [_with_chat(row, number) for number, row in enumerate(rows, 1)]
    columns = find_columns(rows, config.prompt, config.response)
    numbered = list(enumerate(rows, 1))
    chosen = choose(numbered, config.limit or len(rows), seed)
    border = cache(lambda: answer_border(tokenizer) if config.template == "chat" else "")  # later: a template may be broken
    bare = list[bool]()

    def stages() -> Iterator[list[str]]:
        for texts in stages_of(chosen, columns, config, tokenizer):
            bare.append(texts[-1].startswith(border(), len(texts[-2])))
            yield texts

    return replace(
        _cut(tokenize(stages(), tokenizer, config.template == "chat", config.max_length), config.max_length),
        thoughtless=sum(bare) / len(bare) if border() else None,
        system=_shared_system([row.get(columns[0]) for _, row in chosen]),
        instructions=frozenset(same_words(text) for number, row in chosen for text in _asked(row, columns, number, config)),
    )


def _asked(row: dict[str, Any], columns: tuple[str, str], number: int, config: DataConfig) -> list[str]:
    """What an example asks: its instruction, or what the user says in a chat."""
    prompt, response = columns
    if prompt != response:
        return [instruction_of(row, prompt, number, config)]
    if turn := first_turn(row[prompt]):
        return [cell(turn, "human", number)]
    return [str(text_of(turn)) for turn in row[prompt] if turn.get("role") == "user"]


def same_words(text: str) -> int:
    """Equal for texts that differ in case and white space alone; in this process."""
    return hash(" ".join(text.lower().split()))


ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model"), "assistant"),
    "system": "system",
}
"""Names of chat templates, by ShareGPT's and others', in lower case."""


def _with_chat(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A row whose chat is a list of `{role, content}`: of `messages`, `conversations` or `conversation`, with ShareGPT's names (`from`,
    `value`) or with roles, or, as `messages`, of a `prompt` and a `completion` that are lists of messages; with the system message of a
    column of its own. Any other as it is.

    Raises:
        RowError: tools stand beside it, or a second system message.
    """
    if "messages" not in row and _is_chat(row.get("prompt")) and _is_chat(row.get("completion")):
        others = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
        row = others | {"messages": [*row["prompt"], *row["completion"]]}
    column = next((name for name in CHATS if _is_chat(row.get(name))), None)
    if column is None:
        return row
    if tools := next((name for name in TOOLS if not says_nothing(row.get(name))), None):
        raise RowError(
            f"row {number} has {tools} beside its chat, which are not read: write them into the system message, and leave the column out"
        )
    turns = [_turn(turn) for turn in row[column]]
    beside = next((name for name in SYSTEMS if not says_nothing(row.get(name))), None)
    if beside and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": row[beside]}, *turns]
    elif beside and text_of(turns[0]) != row[beside]:
        raise RowError(f"row {number} has a system message in its chat and another one in column {beside!r}: remove one")
    return row | {column: turns}


def _is_chat(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and all(isinstance(turn, dict) and _speaker(turn) is not None for turn in turns)


def _speaker(turn: dict[str, Any]) -> Any:
    return turn.get("from") if turn.get("role") is None else turn["role"]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates know it."""
    who, content = _speaker(turn), turn.get("value") if turn.get("content") is None else turn["content"]
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return others | {"role": ROLES.get(str(who).lower(), who), "content": content}


def _shared_system(chats: Sequence[Any]) -> str | None:
    """The system message with which all chats begin; empty where they have or are none, None where they differ."""
    first = {text_of(chat[0]) if isinstance(chat, list) and chat and chat[0].get("role") == "system" else "" for chat in chats}
    return first.pop() if len(first) == 1 else None


def tokenize(stages: Iterable[Sequence[str]], tokenizer: Any, chat: bool = False, enough: int | None = None) -> Iterator[Row]:
    """Tokenise growing texts (prompt, prompt + answer, ...); every second step is learnt, and so is the end.

    Special tokens such as BOS stand in front once; a chat template writes its own. EOS stands at the end once.

    Args:
        enough: a row that has more tokens than these grows no further.
    """
    opening = [] if chat else _opening(tokenizer)
    for part in _parts(stages, lambda texts: sum(map(len, texts))):  # of a chat each text holds those before it
        for ids, mask, last in _joined(part, tokenizer, enough):
            yield _framed(ids, mask, last, opening, tokenizer.eos_token_id, chat)


def _parts(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """As many at a time as are worth a core each. All at once would be gigabytes."""
    part, size = list[T](), 0
    for item in items:
        part.append(item)
        size += characters(item)
        if len(part) == TEXTS or size >= CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _encode(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids without special tokens, many texts at a time and on every core."""
    for part in _parts(texts, len):
        with processes.environment("TOKENIZERS_PARALLELISM", "true"):  # elsewhere it is off: threads do not survive a fork
            found = tokenizer(part, add_special_tokens=False)["input_ids"]
        yield from found


def text_windows(texts: Sequence[str], tokenizer: Any, length: int, count: int, seed: int) -> tuple[list[Row], int]:
    """The texts one after the other, empty lines between them, cut every `length` tokens. Each window begins as the tokenizer begins a
    text, and every token but the first is to be predicted. What is left at the end is no window.

    Returns:
        `count` of the windows, drawn with the seed, and how many there are.
    """
    opening, before = _opening(tokenizer), "a\n\n"
    whole, known = (next(_encode([text], tokenizer)) for text in (before, "a"))
    # some tokenizers (Llama's) add a space to whatever is tokenised by itself, so what follows is read off behind something
    skipped, before = (len(known), before) if whole[: len(known)] == known else (0, "\n\n")
    follow = (each[skipped:] for each in _encode((before + text for text in texts[1:]), tokenizer))
    ids = array("q", itertools.chain.from_iterable(itertools.chain(_encode(texts[:1], tokenizer), follow)))
    size = length - len(opening)
    starts = range(0, len(ids) - size + 1, size)
    mask = [0] + [1] * (length - 1)
    rows = [{"input_ids": [*opening, *ids[start : start + size]], "completion_mask": mask} for start in choose(starts, count, seed)]
    return rows, len(starts)


def _opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])


def _joined(part: Sequence[Sequence[str]], tokenizer: Any, enough: int | None) -> list[tuple[list[int], list[int], list[int]]]:
    """Join the stages of each example: its tokens, their mask, and the tokens of its last answer.

    The tokens of a prompt are those that the model sees when it is asked.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = [([], [], []) for _ in part]
    for step in range(max(map(len, part))):
        growing = [at for at, texts in enumerate(part) if step < len(texts) and (enough is None or len(rows[at][0]) <= enough)]
        for at, longer in zip(growing, _encode([part[at][step] for at in growing], tokenizer), strict=True):
            texts, (ids, mask, _) = part[at], rows[at]
            # some tokenizers (Llama's) add a space to whatever is tokenised by itself, so the answer is read off the whole
            # text; where tokens would merge across the border it is tokenised by itself all the same
            kept = longer[: len(ids)] == ids
            new = longer[len(ids) :] if kept else next(_encode([texts[step][len(texts[step - 1]) :]], tokenizer))
            rows[at] = ids + new, mask + [step % 2] * len(new), new
    return rows


def _framed(ids: list[int], mask: list[int], last: list[int], opening: list[int], eos: int, chat: bool) -> Row:
    """Put the opening in front and EOS behind, unless they are there. Chat templates end a turn with EOS and newline."""
    ended = eos in last if chat else last[-1:] == [eos]
    if not ended:
        ids, mask = [*ids, eos], [*mask, 1]
    if ids[: len(opening)] != opening:
        ids, mask = opening + ids, [0] * len(opening) + mask
    mask[0] = 0  # nothing comes before the first token that could predict it
    return {"input_ids": ids, "completion_mask": mask}


def check_readable_by(model: Any, examples: Tokenized, config: DataConfig, others: bool = False) -> None:
    """Refuse examples that a model cannot read.

    Args:
        model: with its weights or without.
        others: other texts are read too, or padding, up to `data.max_length` tokens.

    Raises:
        DataError: one is too long, or has a token for which the model has no vector.
    """
    longest, known = max(len(row["input_ids"]) for row in examples.rows), positions(model)
    if known is not None and (longest > known or (others and config.max_length > known)):
        found = f"the longest example has {longest} tokens" if longest > known else "other texts are as long as they may be"
        raise DataError(
            f"{found} (data.max_length={config.max_length}), and the model knows {known} positions: set data.max_length={known}"
        )
    last, vectors = max(max(row["input_ids"]) for row in examples.rows), model.get_input_embeddings().weight.shape[0]
    if last >= vectors:
        raise DataError(
            f"the examples have the token {last}, and the model has vectors for {vectors} tokens: take the tokenizer that belongs to the "
            "model, or give the model vectors for its new tokens (resize_token_embeddings) and train them first"
        )


def _cut(rows: Iterable[Row], max_length: int) -> Tokenized:
    """Cut the end off at `max_length`; drop the rows that have nothing to learn left, and count both."""
    kept, truncated, dropped = list[Row](), 0, 0
    for row in rows:
        long = len(row["input_ids"]) > max_length
        short = {name: values[:max_length] for name, values in row.items()} if long else row
        if any(short["completion_mask"]):
            kept.append(short)
            truncated += long
        else:
            dropped += 1
    if not kept:
        raise DataError(f"none of the {dropped} examples has any answer left at data.max_length={max_length}: raise data.max_length")
    return Tokenized(kept, dropped=dropped, truncated=truncated)
