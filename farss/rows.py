"""Files and hub names in, rows out: the columns of examples, questions and texts."""

from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from farss.config import QuestionSet
from farss.errors import DataError, RowError, first_line, nearest

PROMPTS = ("prompt", "instruction", "query", "question")
RESPONSES = ("completion", "response", "output", "answer")
SHORT = "answer"
"""Beside another of them it is the label or the number to which that one comes (LLM-Adapters' data)."""
CHATS = ("messages", "conversations", "conversation")
BESIDE = ("input", "context")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
KNOWLEDGE_PROMPT = "Question: {question}\nAnswer:"
"""As knowledge is asked, and as it is read where questions serve as text."""
_BETWEEN_QUOTES = re.compile(r"(?<=['\"])\s+(?=['\"])")
_HALF = re.compile("[\ud800-\udfff]")
LONGEST_NAME = 255
"""Bytes of a file's name."""
TABLES = (".csv", ".tsv")
"""Kinds of files that have no lists."""
KINDS = (".jsonl", ".ndjson", ".json", *TABLES, ".parquet")


# --- files ------------------------------------------------------------------------------------------------------------


def read_rows(path: str, split: str = "train") -> list[dict[str, Any]]:
    """Read a table: a .jsonl, .json, .csv (these also as .gz) or .parquet file, or a data set on a hub.

    Args:
        path: the file; or the data set's name, with its configuration behind a colon (`openai/gsm8k:main`).
        split: which split of a hub data set.

    Raises:
        DataError: it is missing, unreadable, empty or broken.
    """
    if not path:
        raise DataError("no data file is named: give a .jsonl, .csv or .parquet file, or a data set's name on a hub")
    refuse_text(path)
    file = Path(path).expanduser()
    if file.is_file():
        rows = _read_file(file)
    elif file.is_dir():
        raise DataError(f"{path} is a folder, and its files are not joined: name a file in it")
    elif looks_local(path):
        raise DataError(f"there is no file {path}: check the path, or give a data set's name on a hub")
    else:
        rows = _read_hub(path, split)
    if not rows:
        raise DataError(f"{path} is empty: give a file with at least one row")
    return rows


def refuse_text(path: str, key: str = "") -> None:
    """Refuse a text where a file or a name is wanted.

    Args:
        key: the option.

    Raises:
        DataError: no file system has a name as long.
    """
    if any(len(part.encode("utf-8", "ignore")) > LONGEST_NAME for part in Path(path).parts):
        found = f"{key}={path[:60] + '...'!r}".removeprefix("=")
        raise DataError(f"{found} is a text of {len(path):,} characters: give the path of a file that holds it")


def looks_local(path: str) -> bool:
    """Whether a name is a file's, and no data set's on a hub."""
    name = path.lower().removesuffix(".gz")
    return name.endswith((*KINDS, ".txt")) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _read_file(file: Path) -> list[dict[str, Any]]:
    kind = _kind(file)
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, **dict.fromkeys(TABLES, _read_csv)}
    try:
        if kind == ".parquet" and file.suffix.lower() == ".parquet":
            return _read_parquet(file)
        if kind not in readers:
            raise DataError(f"{file} is of no known kind: give a .jsonl, .json, .csv, .tsv or .parquet file (all but .parquet also as .gz)")
        opener: Any = gzip.open if file.suffix.lower() == ".gz" else open
        with opener(file, "rt", encoding="utf-8-sig", newline="") as stream:
            return readers[kind](stream, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}): check the file, or write it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (line {_undecodable(opener, file)}): convert it to UTF-8") from error


def _kind(file: Path) -> str:
    """A file's suffix, whether it is compressed or not."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _undecodable(opener: Any, file: Path) -> int:
    """The line of the first byte that is not UTF-8; a stream tells its place in what it had read at once."""
    with opener(file, "rb") as stream:
        return next((number for number, line in enumerate(stream, 1) if line.decode("utf-8", "ignore").encode() != line), 0)


def _read_jsonl(stream: IO[str], file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also: a number of thousands of digits, brackets within brackets
            if number == 1 and line.strip() in ("{", "["):
                raise DataError(
                    f"{file} holds JSON over several lines: write an object a line, or a list of them and name it .json"
                ) from error
            raise DataError(f"{file}, line {number} is not valid JSON ({_in_json(error)}): mend or remove the line") from error
        if not isinstance(row, dict):
            raise DataError(f'{file}, line {number} holds a {type(row).__name__}, not an object: write {{"column": value}}')
        rows.append(row)
    return rows


def _read_json(stream: IO[str], file: Path) -> list[dict[str, Any]]:
    text = stream.read()
    if text.lstrip()[:1] != "[":  # many data sets name their JSON lines .json
        _refuse_object(text, file)
        return _read_jsonl(io.StringIO(text), file)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{file}{line} is not valid JSON ({_in_json(error)}): mend the file") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f'{file}, row {number} is a {type(row).__name__}, not an object: write {{"column": value}}')
    return list(rows)


def _refuse_object(text: str, file: Path) -> None:
    """Refuse a list of rows that lies within an object, which would be read as one row."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        lists = [name for name, value in found.items() if isinstance(value, list) and name not in CHATS] if isinstance(found, dict) else []
        if within := next((name for name in lists if found[name] and isinstance(found[name][0], dict)), None):
            raise DataError(f"{file} holds one object and not a list of rows: make a file of what stands under {within!r}")
        columns = list(found.values()) if isinstance(found, dict) and not set(CHATS) & set(found) else []
        if columns and any(all(isinstance(column, kind) for column in columns) for kind in (list, dict)):
            raise DataError(f"{file} is a table by columns: write it by rows, as pandas does with to_json(orient='records', lines=True)")


def _in_json(error: Exception) -> str:
    """What is wrong, in a word."""
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def _read_csv(stream: IO[str], file: Path) -> list[dict[str, Any]]:
    with _long_cells():
        reader = csv.DictReader(stream, delimiter=_separator(stream), strict=True)
        rows: list[dict[str, Any]] = []
        begins = 1
        try:
            names = list(reader.fieldnames or ())
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{file} has two columns {twice!r}: rename one, or remove it")
            begins = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{file}, line {begins} has more or fewer cells than the header: mend the line")
                rows.append(row)
                begins = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{file}: the row that begins in line {begins} is not valid CSV ({error}): mend the row") from error
    return rows


def _separator(stream: IO[str]) -> str:
    """What stands between the columns: a comma, unless another one (of spreadsheets in half of the world, a semicolon) gives more of them,
    in the header and in the first row alike."""
    found = {}
    for each in ",;\t|":
        lines = list[list[str]]()
        with contextlib.suppress(csv.Error):
            lines += itertools.islice(csv.reader(stream, delimiter=each, strict=True), 2)
        head = lines[0] if lines else []
        alike = len({len(line) for line in lines}) == 1
        meant = alike or all(re.fullmatch(r"[\w.-]+", name) for name in head)  # where none fits both, a plain header says it
        found[each] = alike and len(head) > 1, meant and len(head)
        stream.seek(0)
    return max(found, key=found.__getitem__)


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
        return _rows_of(parquet.read_table(file))
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a readable parquet file ({first_line(error)}): write it again") from error


def _rows_of(table: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow table, in which a number of 32 bits is written as 0.1, and not as 0.10000000149011612."""
    import pyarrow

    for place, column in enumerate(table.schema):
        if column.type == pyarrow.float32():
            exact = table.column(place).cast(pyarrow.string()).cast(pyarrow.float64())
            table = table.set_column(place, column.name, exact)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _read_hub(path: str, split: str) -> list[dict[str, Any]]:
    import datasets
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever HTTP library it uses

    name, _, subset = path.partition(":")
    try:
        return _rows_of(datasets.load_dataset(name, subset or None, split=split).with_format("arrow")[:])
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, HTTPError) as error:  # a script of its own: RuntimeError
        raise DataError(
            f"{path!r} is neither a file here nor a data set that can be loaded from a hub (split {split!r}): "
            f"{first_line(error)}; check the name, data.split and the network"
        ) from error


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Put a file's name before what is wrong with one of its rows: a run reads many files."""
    try:
        yield
    except RowError as error:
        raise DataError(f"{path}, {error}") from error


# --- columns ---------------------------------------------------------------------------------------------------------


def columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Column names of a table, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def find_columns(rows: Sequence[dict[str, Any]], prompt: str | None, response: str | None) -> tuple[str, str]:
    """Find the columns with the instruction and the answer; both are the same one where it holds whole chats.

    Raises:
        RowError: a named column is missing, or none is named and none has a usual name.
    """
    columns = columns_of(rows)
    for key, name in (("data.prompt", prompt), ("data.response", response)):
        if name is not None and name not in columns:
            raise RowError(f"columns {', '.join(columns)}: {key}={name!r} is none of them; {nearest(name, columns)}")
    if prompt in CHATS and response in (None, prompt):
        return prompt, prompt  # type: ignore[return-value]
    if prompt is not None and prompt == response:
        raise RowError(f"data.prompt and data.response are both {prompt!r}: name the column of the answer, or leave data.response out")
    chats = [name for name in CHATS if name in columns] if prompt is None and response is None else []
    prompts = [prompt] if prompt else [name for name in PROMPTS if name in columns and name != response]
    responses = [response] if response else [name for name in RESPONSES if name in columns and name != prompt]
    responses = [name for name in responses if name != SHORT] or responses
    if chats and not (prompts and responses):
        prompts = responses = chats
    elif prompts and responses:
        prompts += chats
    for key, names in (("prompt", prompts), ("response", responses)):
        if len(names) > 1:
            told = f"columns {', '.join(columns)}: both {names[0]!r} and {names[1]!r} may be what is meant"
            raise RowError(f"{told}; name the right one with data.{key}")
    if prompts and responses:
        return prompts[0], responses[0]
    found_prompt = next(iter(prompts), None)
    missing = "an instruction" if not found_prompt else "an answer"
    cure = "name yours with data.prompt and data.response" if len(columns) > 1 else "a prompt and its answer are needed, or messages"
    raise RowError(f"columns {', '.join(columns)}: none looks like {missing}; {cure}")


def _named_columns(rows: Sequence[dict[str, Any]], names: Iterable[str], path: str) -> None:
    columns = columns_of(rows)
    for name in names:
        if name not in columns:
            raise DataError(f"{path} has no column {name!r} (it has {', '.join(columns)}): {nearest(name, columns)}")


def text_rows(path: str) -> list[str]:
    """Read general text, one document a row of the column `text`; empty rows, as WikiText has between its articles, are passed over.

    Raises:
        DataError: the file or the column is missing, a row holds something else, or none holds text.
    """
    return _texts(read_rows(path), path)


def _texts(rows: list[dict[str, Any]], path: str) -> list[str]:
    if "text" not in (columns := columns_of(rows)):
        raise DataError(f"{path} has no column 'text' (it has {', '.join(columns)}), where general text lies: rename the one that holds it")
    with naming(path):
        texts = [cell(row, "text", number) for number, row in enumerate(rows, 1) if not _is_empty(row.get("text"))]
    if not texts:
        raise DataError(f"{path} has no text in its column 'text': give a file with at least one")
    return texts


def unread(row: dict[str, Any], column: str) -> list[str]:
    """Columns with something in them that is usually asked together with the one that is read."""
    names = (*(BESIDE if column != "instruction" else ()), *SYSTEMS, "history")
    return [name for name in names if name != column and not says_nothing(row.get(name))]


def whole_instruction(row: dict[str, Any], column: str, number: int) -> str:
    """The text in a column; an instruction with the `input` (Alpaca) or the `context` (Dolly) beside it."""
    beside = [name for name in BESIDE if column == "instruction" and not says_nothing(row.get(name))]
    for name in beside:
        if not isinstance(row[name], (str, int, float)):
            raise RowError(
                f"row {number}: column {name!r} belongs to the instruction beside it, and holds a {type(row[name]).__name__}, not a text: "
                "write it as a text, or rename the column"
            )
    return "\n\n".join(cell(row, name, number) for name in (column, *beside))


def question_rows(entry: QuestionSet) -> list[dict[str, Any]]:
    """Read a question set as `{"question": str, "answers": [str, ...]}`, every row of it; of a hub data set the test split, unless the
    entry names another.

    Raises:
        DataError: a column is missing, or a row has no question or no answer.
    """
    return _questions(read_rows(entry.data, entry.split or "test"), entry)


def _questions(rows: list[dict[str, Any]], entry: QuestionSet) -> list[dict[str, Any]]:
    _named_columns(rows, (entry.question, entry.answers), entry.data)
    with naming(entry.data):
        return [
            {"question": whole_instruction(row, entry.question, number), "answers": _answers(row, entry, number)}
            for number, row in enumerate(rows, 1)
        ]


def asked_without(entry: QuestionSet) -> str | None:
    """A column of a question set that is usually asked together with the question, and is not."""
    rows = read_rows(entry.data, entry.split or "test")
    return next((name for row in rows for name in unread(row, entry.question)), None)


def example_rows(entry: QuestionSet) -> list[dict[str, Any]] | None:
    """The questions of the file whose questions are shown; None: they come from the file that is asked."""
    return question_rows(replace(entry, data=entry.examples, split="train")) if entry.examples and entry.fewshot else None


def knowledge_texts(source: str | QuestionSet) -> list[str]:
    """Read knowledge as plain text: a column `text`, or questions with their (first) answer. Of a hub data set the training split, unless
    the entry names another: what is looked at is not to be asked afterwards.

    Raises:
        DataError: see `text_rows` and `question_rows`.
    """
    if isinstance(source, QuestionSet):
        entry, rows = source, read_rows(source.data, source.split or "train")
    else:
        rows = read_rows(source)
        columns = columns_of(rows)
        if "text" in columns or not {"answer", "answers"} & set(columns):
            return _texts(rows, source)
        entry = QuestionSet(name="knowledge", data=source, answers="answers" if "answers" in columns else "answer")
    return [as_text(row["question"], row["answers"][0]) for row in _questions(rows, entry)]


def as_text(question: str, answer: str) -> str:
    """A question of a knowledge set and its answer, as one text."""
    return f"{KNOWLEDGE_PROMPT.replace('{question}', question)} {answer}"


def _answers(row: dict[str, Any], entry: QuestionSet, number: int) -> list[str]:
    column = entry.answers
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("[") and not _holds_one(entry):
        value = _listed(value)
    if not isinstance(value, list):
        return [cell(row, column, number)]
    if not value:
        raise RowError(f"row {number} has no answer in column {column!r}: fill it or remove the row")
    return [cell({column: item}, column, number) for item in value]


def _holds_one(entry: QuestionSet) -> bool:
    """Whether `["a", "b"]` is the one answer that a model is to give, as where it was trained, and not two accepted ones."""
    return entry.answers in RESPONSES and (entry.answers != SHORT or _kind(Path(entry.data)) not in TABLES)


def _listed(text: str) -> Any:
    """Read a cell such as `["a", "b"]`, `['a', 'b']` or `['a' 'b']` (CSV has no lists, and pandas writes an array as the last);
    anything else stays a text, numbers such as `[1, 2]` too."""
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text if parse is json.loads else _BETWEEN_QUOTES.sub(", ", text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # literal_eval raises any of them
            continue
        return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else text
    return text


def cell(row: dict[str, Any], column: str, number: int) -> str:
    """The text in one cell; a number is written out."""
    value = None if _is_empty(row.get(column)) else row[column]
    if isinstance(value, float):
        if math.isinf(value):
            raise RowError(f"row {number}: column {column!r} holds an infinite number: write what is meant, or remove the row")
        value = format(Decimal(repr(float(value))), "f")  # 0.00001, not 1e-05
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise RowError(f"row {number}: column {column!r} holds a {type(value).__name__}, not a text: name another column")
    if value is None:
        raise RowError(f"row {number} has nothing in column {column!r}: fill it or remove the row")
    if _HALF.search(value):
        raise RowError(f"row {number}: column {column!r} holds half of a character (a surrogate without its pair): mend the row")
    return value


def says_nothing(value: Any) -> bool:
    """Whether a cell beside an instruction adds nothing to it; 0 adds something."""
    return _is_empty(value) or value is False or (isinstance(value, (list, dict)) and not value)


def _is_empty(value: Any) -> bool:
    """Nothing, white space, or NaN, which pandas writes for nothing."""
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))
