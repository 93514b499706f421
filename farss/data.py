"""The only door to data sets: files and hub names in; columns, prompts, tokens, masks and batches out."""

from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import itertools
import json
import random
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import torch
from torch import Tensor

from farss import processes
from farss.config import CalibrationConfig, DataConfig, QuestionSet, nearest
from farss.errors import DataError

Row = dict[str, list[int]]
"""One example: `input_ids` and `completion_mask`, of the same length."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
PROMPTS = ("prompt", "instruction", "query", "question")
RESPONSES = ("completion", "response", "output", "answer")
CHATS = ("messages", "conversation")
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")

T = TypeVar("T")


# --- rows ------------------------------------------------------------------------------------------------------------


def read_rows(path: str, split: str = "train") -> list[dict[str, Any]]:
    """Read a table: a .jsonl, .json, .csv or .parquet file (.gz too), or a data set on a hub.

    Args:
        path: the file; or the data set's name, with its configuration behind a colon (`openai/gsm8k:main`).
        split: which split of a hub data set.

    Raises:
        DataError: it is missing, unreadable, empty or broken.
    """
    if not path:
        raise DataError("no data file is named: give a .jsonl, .csv or .parquet file, or a data set's name on a hub")
    file = Path(path).expanduser()
    if file.is_file():
        rows = _read_file(file)
    elif _looks_local(path) and not file.is_dir():
        raise DataError(f"there is no file {path}: check the path, or give a data set's name on a hub")
    else:
        rows = _read_hub(path, split)
    if not rows:
        raise DataError(f"{path} is empty: give a file with at least one row")
    return rows


def _looks_local(path: str) -> bool:
    name = path.lower().removesuffix(".gz")
    return name.endswith((*KINDS, ".txt", ".tsv")) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _read_file(file: Path) -> list[dict[str, Any]]:
    kind = Path(file.name.lower().removesuffix(".gz")).suffix
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    try:
        if kind == ".parquet" and file.suffix.lower() == ".parquet":
            return _read_parquet(file)
        if kind not in readers:
            raise DataError(f"{file} is of no known kind: give a .jsonl, .json, .csv or .parquet file (all but .parquet also as .gz)")
        opener: Any = gzip.open if file.suffix.lower() == ".gz" else open
        with opener(file, "rt", encoding="utf-8-sig", newline="") as stream:
            return readers[kind](stream, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}): check the file, or write it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error


def _read_jsonl(stream: IO[str], file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number} is not valid JSON ({error.msg}): mend or remove the line") from error
        if not isinstance(row, dict):
            raise DataError(f'{file}, line {number} holds a {type(row).__name__}, not an object: write {{"column": value}}')
        rows.append(row)
    return rows


def _read_json(stream: IO[str], file: Path) -> list[dict[str, Any]]:
    text = stream.read()
    if text.lstrip()[:1] != "[":  # many data sets name their JSON lines .json
        return _read_jsonl(iter(text.splitlines(keepends=True)), file)  # type: ignore[arg-type]
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno} is not valid JSON ({error.msg}): mend the file") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f'{file}, row {number} is a {type(row).__name__}, not an object: write {{"column": value}}')
    return list(rows)


def _read_csv(stream: IO[str], file: Path) -> list[dict[str, Any]]:
    with _long_cells():
        reader = csv.DictReader(stream, strict=True)
        rows: list[dict[str, Any]] = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{file}, line {reader.line_num} has more or fewer cells than the header: mend the line")
                rows.append(row)
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num} is not valid CSV ({error}): mend the line") from error
    return rows


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters a cell for a while."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a readable parquet file ({_first_line(error)}): write it again") from error
    return rows


def _read_hub(path: str, split: str) -> list[dict[str, Any]]:
    import datasets
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever HTTP library it uses

    name, _, subset = path.partition(":")
    try:
        return [dict(row) for row in datasets.load_dataset(name, subset or None, split=split)]
    except (datasets.exceptions.DatasetsError, OSError, ValueError, HTTPError) as error:
        raise DataError(
            f"{path!r} is neither a file here nor a data set that can be loaded from a hub (split {split!r}): "
            f"{_first_line(error)}; check the name, data.split and the network"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300]


# --- columns ---------------------------------------------------------------------------------------------------------


def columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Column names of a table, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def find_columns(rows: Sequence[dict[str, Any]], prompt: str | None, response: str | None) -> tuple[str, str]:
    """Find the columns with the instruction and the answer; both are the same one where it holds whole chats.

    Raises:
        DataError: a named column is missing, or none is named and none has a usual name.
    """
    columns = columns_of(rows)
    for key, name in (("data.prompt", prompt), ("data.response", response)):
        if name is not None and name not in columns:
            raise DataError(f"{key}={name!r}: there is no such column; {nearest(name, columns)}")
    chat = next((name for name in CHATS if name in columns), None)
    found_prompt = prompt or next((name for name in PROMPTS if name in columns), None)
    found_response = response or next((name for name in RESPONSES if name in columns and name != found_prompt), None)
    if prompt in CHATS and response is None:
        return prompt, prompt  # type: ignore[return-value]
    if found_prompt and found_response:
        return found_prompt, found_response
    if chat and prompt is None and response is None:
        return chat, chat
    missing = "an instruction" if not found_prompt else "an answer"
    raise DataError(f"no column looks like {missing}; the columns are {', '.join(columns)}: name yours with data.prompt and data.response")


def _named_columns(rows: Sequence[dict[str, Any]], names: Iterable[str], path: str) -> None:
    columns = columns_of(rows)
    for name in names:
        if name not in columns:
            raise DataError(f"{path} has no column {name!r} (it has {', '.join(columns)}): {nearest(name, columns)}")


def text_rows(path: str, column: str = "text") -> list[str]:
    """Read general text, one document a row.

    Raises:
        DataError: the file or the column is missing, or a row holds no text.
    """
    rows = read_rows(path)
    _named_columns(rows, [column], path)
    return [_text(row, column, number) for number, row in enumerate(rows, 1)]


def question_rows(entry: QuestionSet) -> list[dict[str, Any]]:
    """Read a question set as `{"question": str, "answers": [str, ...]}`, every row of it.

    Raises:
        DataError: a column is missing, or a row has no question or no answer.
    """
    rows = read_rows(entry.data)
    _named_columns(rows, (entry.question, entry.answers), entry.data)
    return [
        {"question": _text(row, entry.question, number), "answers": _answers(row, entry.answers, number)}
        for number, row in enumerate(rows, 1)
    ]


def example_rows(entry: QuestionSet) -> list[dict[str, Any]] | None:
    """The questions of the file whose questions are shown; None: they come from the file that is asked."""
    return question_rows(replace(entry, data=entry.examples)) if entry.examples and entry.fewshot else None


def knowledge_texts(source: str | QuestionSet) -> list[str]:
    """Read knowledge as plain text: a column `text`, or questions with their (first) answer, as they are asked.

    Raises:
        DataError: see `text_rows` and `question_rows`.
    """
    if isinstance(source, str):
        columns = columns_of(read_rows(source))
        if "text" in columns:
            return text_rows(source)
        source = QuestionSet(name="knowledge", data=source, answers="answers" if "answers" in columns else "answer")
    rows = question_rows(source)
    return [f"Question: {row['question']}\nAnswer: {row['answers'][0]}" for row in rows]


def _answers(row: dict[str, Any], column: str, number: int) -> list[str]:
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _listed(value)
    if not isinstance(value, list):
        return [_text(row, column, number)]
    if not value:
        raise DataError(f"row {number} has no answer in column {column!r}: fill it or remove the row")
    return [_text({column: item}, column, number) for item in value]


def _listed(text: str) -> Any:
    """Read a cell such as `["a", "b"]` or `['a', 'b']` (CSV has no lists); anything else stays a text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _text(row: dict[str, Any], column: str, number: int) -> str:
    """The text in one cell; a number is written out."""
    value = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise DataError(f"row {number}: column {column!r} holds a {type(value).__name__}, not a text: name another column")
    if value is None or not value.strip():
        raise DataError(f"row {number} has nothing in column {column!r}: fill it or remove the row")
    return value


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt_text(template: str, instruction: str, tokenizer: Any = None) -> str:
    """Put an instruction into a template: alpaca, plain, chat, or a text with `{instruction}` in it.

    Raises:
        DataError: `chat`, but the tokenizer has no chat template.
    """
    if template == "chat":
        return _render(tokenizer, [{"role": "user", "content": instruction}], ask=True)
    if template == "plain":
        return instruction
    # not str.format: instructions and templates may hold other braces
    return (ALPACA if template == "alpaca" else template).replace("{instruction}", instruction)


def _render(tokenizer: Any, messages: list[dict[str, Any]], ask: bool = False) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError("data.template=chat, but the model's tokenizer has no chat template: choose alpaca or plain")
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)
    return text


def _stages(rows: Sequence[tuple[int, dict[str, Any]]], columns: tuple[str, str], config: DataConfig, tokenizer: Any) -> list[list[str]]:
    """Write each row as texts that grow: prompt, prompt + answer, (that + next prompt, that + next answer, ...)."""
    prompt, response = columns
    if prompt == "messages" and response == prompt:
        return [_chat_stages(row.get(prompt), number, config, tokenizer) for number, row in rows]
    # the classic `input` column belongs to the instruction; somebody who names data.prompt gets just that column
    extra = "input" if config.prompt is None and prompt == "instruction" else None
    result = []
    for number, row in rows:
        if prompt == response:
            row = _first_turn(row.get(prompt), prompt, number)
            instruction, answer = _text(row, "human", number), _text(row, "assistant", number)
        else:
            instruction, answer = _text(row, prompt, number), _text(row, response, number)
        if extra and isinstance(row.get(extra), str) and row[extra].strip():
            instruction = f"{instruction}\n\n{row[extra]}"
        result.append(_pair_stages(instruction, answer, number, config, tokenizer))
    return result


def _first_turn(turns: Any, column: str, number: int) -> dict[str, Any]:
    """WizardLM's `conversation[0]`, a dictionary with `human` and `assistant`."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        raise DataError(f"row {number}: column {column!r} is no list of turns with `human` and `assistant`: mend the row")
    turn: dict[str, Any] = turns[0]
    return turn


def _pair_stages(instruction: str, answer: str, number: int, config: DataConfig, tokenizer: Any) -> list[str]:
    if config.template == "chat":
        messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
        return _chat_stages(messages, number, config, tokenizer)
    start = prompt_text(config.template, instruction)
    return [start, f"{start} {answer}"]


def _chat_stages(messages: Any, number: int, config: DataConfig, tokenizer: Any) -> list[str]:
    if config.template != "chat":
        raise DataError(f"column 'messages' holds chats, but data.template={config.template!r}: set data.template=chat")
    if not isinstance(messages, list) or not all(isinstance(item, dict) and "role" in item for item in messages):
        raise DataError(f"row {number}: column 'messages' is no list of {{role, content}}: mend the row")
    stages = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            _text(message, "content", number)
            stages += [_render(tokenizer, messages[:index], ask=True), _render(tokenizer, messages[: index + 1])]
    if not stages:
        raise DataError(f"row {number} has no assistant message: there is nothing to learn from it, remove the row")
    for before, after in itertools.pairwise(stages):
        if not after.startswith(before):
            raise DataError(
                f"row {number}: the chat template writes earlier messages differently when later ones follow, so the "
                "answers cannot be told apart: use data.template=alpaca, or another chat template"
            )
    return stages


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

    @cached_property
    def tokens(self) -> int:
        """Number of tokens, prompts included."""
        return sum(len(row["input_ids"]) for row in self.rows)


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
    return tokenize_rows(read_rows(config.train, config.split), config, tokenizer, seed)


def tokenize_rows(rows: Sequence[dict[str, Any]], config: DataConfig, tokenizer: Any, seed: int) -> Tokenized:
    """The same for rows that are in memory; `config.train` is not looked at."""
    if not rows:
        raise DataError("the data set has no rows: give at least one example")
    columns = find_columns(rows, config.prompt, config.response)
    numbered = list(enumerate(rows, 1))
    chosen = choose(numbered, config.limit or len(rows), seed)
    stages = _stages(chosen, columns, config, tokenizer)
    whole = tokenize(stages, tokenizer, chat=config.template == "chat")
    return _cut(whole, config.max_length)


def tokenize(stages: Sequence[Sequence[str]], tokenizer: Any, chat: bool = False) -> list[Row]:
    """Tokenise growing texts (prompt, prompt + answer, ...); every second step is learnt, and so is the end.

    Special tokens such as BOS stand in front once; a chat template writes its own. EOS stands at the end once.
    """
    opening = [] if chat else _opening(tokenizer)
    ids = iter(_encode([text for texts in stages for text in texts], tokenizer))
    joined = (_join(texts, [next(ids) for _ in texts], tokenizer) for texts in stages)
    return [_framed(*parts, opening, tokenizer.eos_token_id, chat) for parts in joined]


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids without special tokens, a thousand texts at a time."""
    result: list[list[int]] = []
    for part in batches(texts, 1000):
        result += tokenizer(part, add_special_tokens=False)["input_ids"]
    return result


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
