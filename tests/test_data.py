"""Data: rows, columns, prompts, tokens, masks and batches."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from farss import data
from farss.config import DataConfig, QuestionSet
from farss.errors import DataError

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def byte_tokenizer(chat: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, BOS in front: every mask can be read as text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = chat
    return fast


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learnt(tokenizer: Any, row: data.Row) -> str:
    return tokenizer.decode([t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m])


def text(tokenizer: Any, row: data.Row) -> str:
    return tokenizer.decode(row["input_ids"])


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)])


# --- tokens: laws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["alpaca", "plain", "Q: {instruction} {x}\nA:"])
def test_only_the_answer_and_one_eos_are_learnt_after_one_bos(pairs: str, template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenized = data.load_examples(DataConfig(train=pairs, template=template), tokenizer, seed=0)
    for index, row in enumerate(tokenized.rows):
        prompt = data.prompt_text(template, f"q{index}")
        assert text(tokenizer, row) == f"<s>{prompt} a{index}</s>"
        assert learnt(tokenizer, row) == f" a{index}</s>"
        assert row["input_ids"].count(1) == row["input_ids"].count(2) == 1
        assert row["input_ids"][: -len(f" a{index}") - 1] == tokenizer(prompt)["input_ids"]
    assert tokenized.dropped == tokenized.truncated == 0
    assert tokenized.tokens == sum(len(row["input_ids"]) for row in tokenized.rows)


def test_the_alpaca_prompt_is_the_papers() -> None:
    assert data.prompt_text("alpaca", "Add {1}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nAdd {1}.\n\n### Response:"
    )


def test_chat_template_writes_everything_itself(pairs: str) -> None:
    tokenizer = byte_tokenizer(CHAT)
    row = data.load_examples(DataConfig(train=pairs, template="chat"), tokenizer, seed=0).rows[3]
    assert text(tokenizer, row) == "<s>user: q3\n<s>assistant: a3</s>\n"
    assert learnt(tokenizer, row) == "a3</s>\n"
    prompt = data.prompt_text("chat", "q3", tokenizer)
    assert text(tokenizer, row).startswith(prompt)


def test_every_assistant_message_is_learnt(tmp_path: Path) -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"{role[0]}{index}"} for index, role in enumerate(roles)]
    tokenizer = byte_tokenizer(CHAT)
    config = DataConfig(train=write_rows(tmp_path / "chat.jsonl", [{"messages": messages}]), template="chat")
    (row,) = data.load_examples(config, tokenizer, seed=0).rows
    assert learnt(tokenizer, row) == "a2</s>\na4</s>\n"
    assert text(tokenizer, row).endswith("<s>user: u3\n<s>assistant: a4</s>\n")


def test_a_chat_template_without_eos_gets_one(tmp_path: Path, pairs: str) -> None:
    tokenizer = byte_tokenizer(CHAT.replace("</s>", ""))
    row = data.load_examples(DataConfig(train=pairs, template="chat"), tokenizer, seed=0).rows[0]
    assert learnt(tokenizer, row) == "a0\n</s>"


def test_the_prompt_ends_where_inference_ends_though_the_tokenizer_adds_spaces() -> None:
    """Llama's tokenizer puts a space before whatever it is given: the answer must not get a second one."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, "▁": 3, "▁Why": 4, "▁so": 5}, unk_token="?"))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    assert tokenizer(" so")["input_ids"] == [3, 5]
    (row,) = data.tokenize([["Why", "Why so"]], tokenizer)
    assert row == {"input_ids": [4, 5, 1], "completion_mask": [0, 1, 1]}


def test_tokens_that_merge_across_the_border_are_kept_apart() -> None:
    vocabulary = {"</s>": 0, "a": 1, "b": 2, "ab": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")])), eos_token="</s>")
    (row,) = data.tokenize([["a", "ab"]], tokenizer)
    assert row == {"input_ids": [1, 2, 0], "completion_mask": [0, 1, 1]}


def test_cut_and_dropped_examples_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * n, "completion": "c" * m} for n, m in [(3, 2), (3, 20), (12, 2), (9, 1), (4, 4)]]
    config = DataConfig(train=write_rows(tmp_path / "x.jsonl", rows), template="plain", max_length=10)
    tokenizer = byte_tokenizer()
    tokenized = data.load_examples(config, tokenizer, seed=0)
    assert [learnt(tokenizer, row) for row in tokenized.rows] == [" cc</s>", " ccccc", " cccc"]
    assert (tokenized.dropped, tokenized.truncated) == (2, 2)
    assert max(len(row["input_ids"]) for row in tokenized.rows) == 10


def test_nothing_left_names_the_count_and_the_cure(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "p" * 30, "completion": "c"}] * 3)
    with pytest.raises(DataError, match=r"none of the 3 examples .* data.max_length=10: raise data.max_length"):
        data.load_examples(DataConfig(train=path, template="plain", max_length=10), byte_tokenizer(), seed=0)


def test_limit_draws_with_the_seed(pairs: str) -> None:
    tokenizer = byte_tokenizer()

    def drawn(seed: int, limit: int | None = 5) -> list[str]:
        config = DataConfig(train=pairs, template="plain", limit=limit)
        return [learnt(tokenizer, row) for row in data.load_examples(config, tokenizer, seed).rows]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 5
    assert len(drawn(1, None)) == len(drawn(1, 99)) == 20


def test_the_dataset_holds_the_same_tokens_with_labels(pairs: str) -> None:
    tokenized = data.load_examples(DataConfig(train=pairs), byte_tokenizer(), seed=0)
    table = tokenized.dataset()
    assert table["input_ids"][0] == tokenized.rows[0]["input_ids"]
    assert table["completion_mask"][0] == tokenized.rows[0]["completion_mask"]
    for ids, mask, labels in zip(*tokenized.rows[0].values(), table["labels"][0], strict=True):
        assert labels == (ids if mask else -100)


# --- choice and batches: laws ----------------------------------------------------------------------------------------


def test_choice_is_seeded_ordered_and_without_replacement() -> None:
    rows = list(range(100))
    drawn = data.choose(rows, 10, seed=3)
    assert drawn == data.choose(rows, 10, seed=3) != data.choose(rows, 10, seed=4)
    assert drawn == sorted(set(drawn))
    assert data.choose(rows, 100, 0) == data.choose(rows, 500, 1) == rows


def test_batches_hold_every_row_once() -> None:
    assert list(data.batches(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_collate_pads_on_either_side() -> None:
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, {"input_ids": [8, 9], "completion_mask": [0, 1]}]
    right, left = data.collate(rows, pad_id=0), data.collate(rows, pad_id=0, side="left")
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert right["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert left["labels"].tolist() == [[-100, 6, 7], [-100, -100, 9]]
    real_right, real_left = (x["position_ids"][x["attention_mask"].bool()] for x in (right, left))
    assert torch.equal(real_right, real_left)


# --- rows ------------------------------------------------------------------------------------------------------------

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
    assert data.read_rows(str(path)) == ROWS


def test_parquet_and_json_lines_named_json(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    assert data.read_rows(str(tmp_path / "x.parquet")) == ROWS
    assert data.read_rows(write_rows(tmp_path / "y.json", ROWS)) == ROWS


def test_long_csv_cells_are_read_and_the_limit_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a\n" + "x" * 200_000 + "\n")
    before = csv.field_size_limit()
    assert len(data.read_rows(str(tmp_path / "x.csv"))[0]["a"]) == 200_000
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
        ("x.jsonl", b'{"a": "\xff"}', r"x.jsonl is not UTF-8 text \(byte 7\): convert it to UTF-8"),
        ("x.jsonl.gz", b"not gzip", "x.jsonl.gz cannot be read .*: check the file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], "x.jsonl.gz cannot be read"),
        ("x.parquet", b"not parquet", "x.parquet is not a readable parquet file .*: write it again"),
        ("x.parquet.gz", b"", "is of no known kind: give a .jsonl, .json, .csv or .parquet file"),
        ("x.tsv", b"a\tb", "is of no known kind"),
    ],
)
def test_broken_files_say_where_and_what_to_do(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.read_rows(str(tmp_path / name))


def test_missing_files() -> None:
    for path in ("./nothing", "/tmp/no/such.jsonl", "nothing.csv.gz", "a/b/c"):
        with pytest.raises(DataError, match=f"there is no file {path}: check the path, or give a data set's name"):
            data.read_rows(path)
    with pytest.raises(DataError, match="no data file is named"):
        data.read_rows("")
    with pytest.raises(DataError, match=r"data.train is empty: give a .jsonl"):
        data.load_examples(DataConfig(), byte_tokenizer(), seed=0)


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load(name: str, subset: str | None, split: str) -> Any:
        calls.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert data.read_rows("openai/gsm8k:main", "test") == data.read_rows("gsm8k") == ROWS
    assert calls == [("openai/gsm8k", "main", "test"), ("gsm8k", None, "train")]


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it"), ValueError("Unknown split")])
def test_hub_errors_are_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import datasets

    def load(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=rf"'openai/gsm8k' is neither a file .*{error}; check the name, data.split"):
        data.read_rows("openai/gsm8k")


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
    assert data.find_columns([dict.fromkeys(columns.split(), "x")], None, None) == expected


def test_named_columns_win_and_half_a_name_is_enough() -> None:
    rows = [{"question": "", "answer": "", "text": "", "category": ""}]
    assert data.find_columns(rows, "text", "category") == ("text", "category")
    assert data.find_columns(rows, "text", None) == ("text", "answer")
    assert data.find_columns(rows, None, "category") == ("question", "category")


def test_column_errors() -> None:
    with pytest.raises(DataError, match=r"the columns are text, category: name yours with data.prompt and data.response"):
        data.find_columns([{"text": "", "category": ""}], None, None)
    with pytest.raises(DataError, match=r"looks like an answer; the columns are question, reply"):
        data.find_columns([{"question": "", "reply": ""}], None, None)
    with pytest.raises(DataError, match=r"data.response='anser': there is no such column; did you mean 'answer'\?"):
        data.find_columns([{"question": "", "answer": ""}], None, "anser")


def test_wizardlm_and_the_input_column(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()

    def first(row: dict[str, Any], **options: Any) -> str:
        path = write_rows(tmp_path / "x.jsonl", [row])
        return text(tokenizer, data.load_examples(DataConfig(train=path, template="plain", **options), tokenizer, 0).rows[0])

    assert first({"conversation": [{"human": "hi", "assistant": "ho"}]}) == "<s>hi ho</s>"
    assert first({"instruction": "add", "input": "1 2", "output": 3}) == "<s>add\n\n1 2 3</s>"
    assert first({"instruction": "add", "input": "", "output": 3}) == "<s>add 3</s>"
    assert first({"instruction": "add", "input": "1 2", "output": 3}, prompt="instruction") == "<s>add 3</s>"


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"question": "q", "answer": ""}, "plain", "row 2 has nothing in column 'answer': fill it or remove the row"),
        ({"question": None, "answer": "a"}, "plain", "row 2 has nothing in column 'question'"),
        ({"question": "q"}, "plain", "row 2 has nothing in column 'answer'"),
        ({"question": ["q"], "answer": "a"}, "plain", "row 2: column 'question' holds a list, not a text"),
        ({"question": "q", "answer": "a"}, "chat", "the model's tokenizer has no chat template: choose alpaca or plain"),
    ],
)
def test_unusable_rows_are_named(tmp_path: Path, row: dict[str, Any], template: str, message: str) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}, row])
    with pytest.raises(DataError, match=message):
        data.load_examples(DataConfig(train=path, template=template), byte_tokenizer(), seed=0)


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"role": "user", "content": "u"}], "chat", "row 1 has no assistant message"),
        ("hello", "chat", "row 1: column 'messages' is no list of {role, content}"),
        ([{"role": "assistant", "content": ""}], "chat", "row 1 has nothing in column 'content'"),
        ([{"role": "assistant", "content": "a"}], "alpaca", "holds chats, but data.template='alpaca': set data.template=chat"),
    ],
)
def test_unusable_chats_are_named(tmp_path: Path, messages: Any, template: str, message: str) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=message):
        data.load_examples(DataConfig(train=path, template=template), byte_tokenizer(CHAT), seed=0)


def test_a_chat_template_that_rewrites_history_is_refused(tmp_path: Path) -> None:
    forgetful = "{{ messages | length }}" + CHAT
    path = write_rows(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match="row 1: the chat template writes earlier messages differently"):
        data.load_examples(DataConfig(train=path, template="chat"), byte_tokenizer(forgetful), seed=0)


# --- questions and text ----------------------------------------------------------------------------------------------


def test_answers_may_be_a_text_a_list_or_a_list_in_a_cell(tmp_path: Path) -> None:
    gold = ["x", ["x", "y"], '["x", "y"]', "['x', 'y']", 7, "She has 2*3=<<2*3=6>>6\n#### 6", "[x"]
    path = write_rows(tmp_path / "q.jsonl", [{"q": f"q{i}", "a": answer} for i, answer in enumerate(gold)])
    rows = data.question_rows(QuestionSet(name="n", data=path, question="q", answers="a"))
    assert [row["answers"] for row in rows] == [["x"], ["x", "y"], ["x", "y"], ["x", "y"], ["7"], [gold[5]], ["[x"]]
    assert rows[0]["question"] == "q0"


def test_question_and_text_errors(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"question": "q", "answer": [], "text": "t"}, {"question": "q"}])
    with pytest.raises(DataError, match=r"q.jsonl has no column 'answers' \(it has question, answer, text\): did you mean 'answer'"):
        data.question_rows(QuestionSet(name="n", data=path))
    with pytest.raises(DataError, match="row 1 has no answer in column 'answer'"):
        data.question_rows(QuestionSet(name="n", data=path, answers="answer"))
    with pytest.raises(DataError, match="row 2 has nothing in column 'text'"):
        data.text_rows(path)
    assert data.text_rows(write_rows(tmp_path / "t.jsonl", [{"text": "hello"}])) == ["hello"]
    with pytest.raises(DataError, match="has no column 'text'"):
        data.text_rows(write_rows(tmp_path / "t.jsonl", [{"body": "hello"}]))
