"""Rows: files, hub names, columns, questions and texts."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from test_data import byte_tokenizer

from farss import rows as room
from farss.config import DataConfig, QuestionSet
from farss.data import load_examples
from farss.errors import DataError, RowError


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- files ------------------------------------------------------------------------------------------------------------

ROWS = [{"question": 'a, "b"\nc', "answer": "ü"}, {"question": "d", "answer": "e"}]


def as_text(rows: list[dict[str, Any]], kind: str, path: Path) -> str:
    if kind == "json":
        return json.dumps(rows, indent=1)
    if kind == "jsonl":
        return "\n".join(json.dumps(row) for row in rows) + "\n\n"
    with (path.parent / "scratch").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return (path.parent / "scratch").read_bytes().decode()


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.jsonl.gz", "x.json.gz", "x.csv.gz", "X.CSV"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = as_text(ROWS, name.lower().split(".")[1], path).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    assert room.read_rows(str(path)) == ROWS


def test_parquet_and_json_lines_named_json(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    assert room.read_rows(str(tmp_path / "x.parquet")) == ROWS
    assert room.read_rows(write_rows(tmp_path / "y.json", ROWS)) == ROWS


def test_a_line_separator_inside_a_text_is_no_end_of_a_line(tmp_path: Path) -> None:
    rows = [{"question": "a\u2028b", "answer": "c\x85d"}]
    for name in ("x.jsonl", "x.json"):
        (tmp_path / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * 2), encoding="utf-8")
        assert room.read_rows(str(tmp_path / name)) == rows * 2


def test_long_csv_cells_are_read_and_the_limit_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a\n" + "x" * 200_000 + "\n")
    before = csv.field_size_limit()
    assert len(room.read_rows(str(tmp_path / "x.csv"))[0]["a"]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "x.jsonl, line 2 is not valid JSON .*: mend or remove the line"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', "line 2 holds a list, not an object"),
        ("x.json", b'[{"a": 1},\n{"a" 1}]', "x.json, line 2 is not valid JSON"),
        ("x.json", b"[1, 2]", "row 1 is a int, not an object"),
        ("x.jsonl", b"\n\n", "x.jsonl is empty: give a file with at least one row"),
        ("x.csv", b"a,b\n", "x.csv is empty"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has more or fewer cells than the header"),
        ("x.csv", b'a,b\n1,"2\n', "is not valid CSV"),
        ("x.csv", b"prompt,completion\nHello, you,yes\nb,c\n", "line 2 has more or fewer cells than the header"),
        ("x.jsonl", b'[\n{"a": 1},\n{"a": 2}\n]', "x.jsonl holds JSON over several lines: write an object a line, or a list of them"),
        ("x.json", b'{\n"a": 1,\n"b": 2}', "x.json holds JSON over several lines"),
        ("x.json", b'{"prompt": {"0": "a"}, "answer": {"0": "b"}}', "x.json is a table by columns: write it by rows"),
        ("x.json", b'{"prompt": ["a", "b"], "answer": ["c", "d"]}', "x.json is a table by columns"),
        ("x.jsonl", b'{"a": "\xff"}', r"x.jsonl is not UTF-8 text \(line 1\): convert it to UTF-8"),
        pytest.param("x.csv", b"a,b\n" + 9000 * b"c,d\n" + b"\xff,e\n", r"x.csv is not UTF-8 text \(line 9002\)", id="far"),
        pytest.param("x.jsonl", b'{"a": ' + 5000 * b"1" + b"}", r"x.jsonl, line 1 is not valid JSON \(.*digits", id="a long number"),
        pytest.param("x.json", 100_000 * b"[", "x.json is not valid JSON", id="deep"),
        ("x.csv", b"question,answer,answer\nq,a,b\n", r"x.csv has two columns 'answer': rename one, or remove it"),
        ("x.jsonl.gz", b"not gzip", "x.jsonl.gz cannot be read .*: check the file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], "x.jsonl.gz cannot be read"),
        ("x.parquet", b"not parquet", "x.parquet is not a readable parquet file .*: write it again"),
        ("x.parquet.gz", b"", "is of no known kind: give a .jsonl, .json, .csv, .tsv or .parquet file"),
        ("x.xlsx", b"a\tb", "is of no known kind"),
    ],
)
def test_broken_files_say_where_and_what_to_do(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        room.read_rows(str(tmp_path / name))


def test_missing_files() -> None:
    for path in ("./nothing", "/tmp/no/such.jsonl", "nothing.csv.gz", "a/b/c"):
        with pytest.raises(DataError, match=f"there is no file {path}: check the path, or give a data set's name"):
            room.read_rows(path)
    with pytest.raises(DataError, match="no data file is named"):
        room.read_rows("")


def test_a_text_is_no_path() -> None:
    with pytest.raises(DataError, match=r"'The capital .*\.\.\.' is a text of 700 characters: give the path of a file that holds it"):
        room.read_rows("The capital of France is Paris. " * 21 + 28 * "x")


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load(name: str, subset: str | None, split: str) -> Any:
        calls.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert room.read_rows("openai/gsm8k:main", "test") == room.read_rows("gsm8k") == ROWS
    assert calls == [("openai/gsm8k", "main", "test"), ("gsm8k", None, "train")]


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it"), ValueError("Unknown split")])
def test_hub_errors_are_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import datasets

    def load(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=rf"'openai/gsm8k' is neither a file .*{error}; check the name, data.split"):
        room.read_rows("openai/gsm8k")


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("prompt completion", ("prompt", "completion")),
        ("instruction input output answer", ("instruction", "output")),  # Commonsense170K
        ("type query original_question response", ("query", "response")),  # MetaMathQA
        ("query answer resource lang", ("query", "answer")),  # CodeFeedback
        ("question answer", ("question", "answer")),  # GSM8K
        ("id messages", ("messages", "messages")),
        ("conversation conversation_id", ("conversation", "conversation")),  # WizardLM
    ],
)
def test_columns_are_found(columns: str, expected: tuple[str, str]) -> None:
    assert room.find_columns([dict.fromkeys(columns.split(), "x")], None, None) == expected


def test_named_columns_win_and_half_a_name_is_enough() -> None:
    rows = [{"question": "", "answer": "", "text": "", "category": ""}]
    assert room.find_columns(rows, "text", "category") == ("text", "category")
    assert room.find_columns(rows, "text", None) == ("text", "answer")
    assert room.find_columns(rows, None, "category") == ("question", "category")


def test_column_errors() -> None:
    for columns, named, expected in (
        (
            ("text", "category"),
            None,
            r"text, category: none looks like an instruction; name yours with data\.prompt and data\.response",
        ),
        (("question", "reply"), None, "columns question, reply: none looks like an answer"),
        (("text",), None, "columns text: none looks like an instruction; a prompt and its answer are needed, or messages"),
        (("question", "answer"), "anser", r"columns question, answer: data.response='anser' is none of them; did you mean 'answer'\?"),
    ):
        with pytest.raises(DataError, match=expected):
            room.find_columns([dict.fromkeys(columns, "")], None, named)


# --- questions and text ----------------------------------------------------------------------------------------------


def test_answers_may_be_a_text_a_list_or_a_list_in_a_cell(tmp_path: Path) -> None:
    gold = ["x", ["x", "y"], '["x", "y"]', "['x', 'y']", 7, "She has 2*3=<<2*3=6>>6\n#### 6", "[x", "[1, 2]", "['x' 'y'\n 'z']"]
    path = write_rows(tmp_path / "q.jsonl", [{"q": f"q{i}", "a": answer} for i, answer in enumerate(gold)])
    rows = room.question_rows(QuestionSet(name="n", data=path, question="q", answers="a"))
    assert [row["answers"] for row in rows] == [
        ["x"],
        ["x", "y"],
        ["x", "y"],
        ["x", "y"],
        ["7"],
        [gold[5]],
        ["[x"],
        ["[1, 2]"],
        ["x", "y", "z"],
    ]
    assert rows[0]["question"] == "q0"


def test_what_belongs_to_an_instruction_is_asked_with_it(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Sum.", "context": "2 2", "input": " ", "output": "4"}]
    path = write_rows(tmp_path / "q.jsonl", rows)
    found = room.question_rows(QuestionSet(name="n", data=path, question="instruction", answers="output"))
    assert [row["question"] for row in found] == ["Add.\n\n1 2", "Sum.\n\n2 2"]
    trained = load_examples(DataConfig(train=path, template="plain"), byte_tokenizer(), 0).rows
    for row, question in zip(trained, found, strict=True):
        ids = [token for token, learnt in zip(row["input_ids"], row["completion_mask"], strict=True) if not learnt]
        assert byte_tokenizer().decode(ids, skip_special_tokens=True) == question["question"]


def test_questions_of_a_hub_are_those_of_its_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = []
    monkeypatch.setattr(room, "read_rows", lambda path, split="train": splits.append(split) or [{"question": "q", "answer": "a"}])
    entry = QuestionSet(name="n", data="openai/gsm8k:main", answers="answer", fewshot=1, examples="openai/gsm8k:main")
    room.question_rows(entry)
    room.example_rows(entry)
    assert splits == ["test", "train"]


def test_knowledge_of_a_hub_is_never_what_is_asked_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = []
    monkeypatch.setattr(room, "read_rows", lambda path, split="train": splits.append(split) or [{"question": "q", "answer": "a"}])
    room.knowledge_texts("openai/gsm8k:main")
    room.knowledge_texts(QuestionSet(name="n", data="openai/gsm8k:main", answers="answer"))
    assert set(splits) == {"train"}
    room.knowledge_texts(QuestionSet(name="n", data="openai/gsm8k:main", answers="answer", split="validation"))
    assert splits[-1] == "validation"


@pytest.mark.parametrize(
    ("value", "written"),
    [(21, "21"), (0, "0"), (0.0, "0.0"), (0.00001, "0.00001"), (1e22, "1" + 22 * "0"), (2.5, "2.5"), (10**400, "1" + 400 * "0")],
)
def test_numbers_are_written_out(tmp_path: Path, value: float, written: str) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"instruction": "Double it", "input": value, "output": value}])
    entry = QuestionSet(name="n", data=path, question="instruction", answers="output")
    assert room.question_rows(entry) == [{"question": f"Double it\n\n{written}", "answers": [written]}]


def test_what_stands_beside_an_instruction_is_a_text_or_nothing(tmp_path: Path) -> None:
    entry = {"question": "instruction", "answers": "output"}
    for nothing in (None, "", " ", [], {}, False, float("nan")):
        path = write_rows(tmp_path / "q.jsonl", [{"instruction": "Add", "context": nothing, "output": "a"}])
        assert room.question_rows(QuestionSet(name="n", data=path, **entry))[0]["question"] == "Add"
    path = write_rows(tmp_path / "q.jsonl", [{"instruction": "Add", "context": ["a"], "output": "a"}])
    with pytest.raises(DataError, match="row 1: column 'context' belongs to the instruction beside it, and holds a list, not a text"):
        room.question_rows(QuestionSet(name="n", data=path, **entry))


def test_question_and_text_errors(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"question": "q", "answer": [], "text": "t"}, {"question": "q"}])
    with pytest.raises(DataError, match=r"q.jsonl has no column 'answers' \(it has question, answer, text\): did you mean 'answer'"):
        room.question_rows(QuestionSet(name="n", data=path))
    with pytest.raises(DataError, match=r"q\.jsonl, row 1 has no answer in column 'answer'"):
        room.question_rows(QuestionSet(name="n", data=path, answers="answer"))
    assert room.text_rows(write_rows(tmp_path / "t.jsonl", [{"text": ""}, {"text": "hello"}, {"text": None}])) == ["hello"]
    with pytest.raises(DataError, match=r"t\.jsonl has no text in its column 'text'"):
        room.text_rows(write_rows(tmp_path / "t.jsonl", [{"text": " "}]))
    with pytest.raises(DataError, match=r"t\.jsonl, row 2: column 'text' holds a list, not a text"):
        room.text_rows(write_rows(tmp_path / "t.jsonl", [{"text": "hello"}, {"text": ["a"]}]))
    with pytest.raises(DataError, match="has no column 'text'"):
        room.text_rows(write_rows(tmp_path / "t.jsonl", [{"body": "hello"}]))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz"])
def test_columns_may_have_other_separators(tmp_path, name, separator):
    text = f'\ufeff"prompt"{separator}"completion"\n"a, b;\n|\tc"{separator}d\n\'x\'{separator}"{separator}"\n'
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    rows = [{"prompt": "a, b;\n|\tc", "completion": "d"}, {"prompt": "'x'", "completion": separator}]
    assert room.read_rows(str(tmp_path / name)) == rows


def test_a_column_may_be_called_anything(tmp_path):
    (tmp_path / "x.csv").write_text("text (a; b)\nhello\n")
    assert room.read_rows(str(tmp_path / "x.csv")) == [{"text (a; b)": "hello"}]


def test_a_broken_row_of_a_table_is_told_by_its_first_line(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text('a,b\n"1\n2",3\n"4\n5",6,7\n8,9\n')
    with pytest.raises(DataError, match=r"line 4 has more or fewer cells than the header"):
        room.read_rows(str(file))
    file.write_text('a,b\n1,2\n"3,4\n' + "5,6\n" * 9)
    with pytest.raises(DataError, match=r"the row that begins in line 3 is not valid CSV"):
        room.read_rows(str(file))


def test_a_folder_is_no_table(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="is a folder, and its files are not joined: name a file in it"):
        room.read_rows(str(tmp_path))


def test_numbers_of_32_bits_are_written_as_they_were_meant(tmp_path):
    values = pyarrow.array([0.1, None, 1e-5, 3.0], pyarrow.float32())
    parquet.write_table(pyarrow.table({"question": ["a", "b", "c", "d"], "answers": values}), tmp_path / "x.parquet")
    rows = room.read_rows(str(tmp_path / "x.parquet"))
    assert [row["answers"] for row in rows] == [0.1, None, 1e-5, 3.0]


def test_an_infinite_number_is_no_answer(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"question": "1 / 0", "answers": float("inf")}])
    with pytest.raises(DataError, match="row 1: column 'answers' holds an infinite number"):
        room.question_rows(QuestionSet(name="n", data=path))


def test_a_list_that_is_the_answer_is_one(tmp_path):
    """What a model was trained to write is graded as it stands there; a list of accepted answers as one."""
    row = {"question": "Which?", "completion": '["a", "b"]', "answer": '["a", "b"]', "possible_answers": '["a", "b"]'}
    path = write_rows(tmp_path / "x.jsonl", [row])
    (tmp_path / "x.csv").write_text('question,completion,answer\nWhich?,"[""a"", ""b""]","[""a"", ""b""]"\n')

    def answers(path, column):
        return room.question_rows(QuestionSet(name="n", data=str(path), answers=column))[0]["answers"]

    assert answers(path, "completion") == answers(path, "answer") == answers(tmp_path / "x.csv", "completion") == ['["a", "b"]']
    assert answers(path, "possible_answers") == answers(tmp_path / "x.csv", "answer") == ["a", "b"]
    empty = write_rows(tmp_path / "e.jsonl", [row | {"completion": "[]"}])
    assert answers(empty, "completion") == ["[]"]


def test_an_object_that_holds_the_rows_is_no_row(tmp_path):
    (tmp_path / "x.json").write_text('{"version": 1, "data": [{"prompt": "a", "completion": "b"}]}')
    with pytest.raises(DataError, match="holds one object and not a list of rows: make a file of what stands under 'data'"):
        room.read_rows(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert len(room.read_rows(str(tmp_path / "x.json"))) == 1


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["prompt", "completion"], ("prompt", "completion")),
        (["instruction", "input", "output", "answer"], ("instruction", "output")),
        (["conversations", "prompt"], ("conversations", "conversations")),
        (
            ["instruction", "input", "output", "prompt"],
            "both 'prompt' and 'instruction' may be what is meant; name the right one with data.prompt",
        ),
        (["question", "answer", "messages"], "both 'question' and 'messages' .* with data.prompt"),
        (["messages", "conversations"], "both 'messages' and 'conversations' .* with data.prompt"),
        (["question", "output", "response"], "both 'response' and 'output' .* with data.response"),
    ],
)
def test_columns_of_which_several_could_be_meant_are_refused(columns, found):
    rows = [dict.fromkeys(columns, "x")]
    if isinstance(found, tuple):
        assert room.find_columns(rows, None, None) == found
    else:
        with pytest.raises(RowError, match=found):
            room.find_columns(rows, None, None)
    assert room.find_columns(rows, columns[0], columns[1]) == tuple(columns[:2])


def test_text_has_a_column_of_its_own(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b"}])
    for read in (room.text_rows, room.knowledge_texts):
        with pytest.raises(DataError, match=r"has no column 'text' \(it has prompt, completion\)"):
            read(path)
