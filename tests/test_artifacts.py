"""What one step wrote, the next one reads, and nothing else."""

import json

import pytest

from farss.artifacts import Plan, Scores, Survey, read_records
from farss.boundary import Boundary
from farss.errors import FolderError
from farss.train import TrainResult


@pytest.mark.parametrize(
    ("kind", "what"),
    [(Plan, "plan"), (Scores, "scores"), (TrainResult, "result of a training"), (Boundary, "search for a boundary")],
)
@pytest.mark.parametrize("text", ["[]", '{"rows": []}', '{"layers": {"a": {}}}', '{"knowledge": {"facts": {"K": 1}}}'])
def test_another_file_is_named(tmp_path, kind, what, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FolderError, match=rf"x\.json holds no {what}: name another file"):
        kind.load(tmp_path / "x.json")


def test_a_folder_of_something_else_is_no_survey(tmp_path):
    (tmp_path / "survey.json").write_text(json.dumps({"layers": {"a": {"block": 0}}}))
    with pytest.raises(FolderError, match=r"survey\.json holds no survey"):
        Survey.load(tmp_path)


def test_answers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FolderError, match="run `farss evaluate` first"):
        read_records(tmp_path, "facts")


def test_answers_may_hold_any_line_separator(tmp_path):
    text = '{"answer": "a\u2028b\u0085c"}\n{"answer": "d"}\n'
    (tmp_path / "facts.jsonl").write_text(text, encoding="utf-8")
    assert [entry["answer"] for entry in read_records(tmp_path, "facts")] == ["a\u2028b\u0085c", "d"]
