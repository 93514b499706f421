"""Data: prompts, tokens and masks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from farss import data, world
from farss.batches import Row, choose
from farss.config import DataConfig, QuestionSet
from farss.errors import DataError
from farss.prompts import prompt_text
from farss.tasks.questions import prompt_of

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


def learnt(tokenizer: Any, row: Row) -> str:
    return tokenizer.decode([t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m])


def text(tokenizer: Any, row: Row) -> str:
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
        prompt = prompt_text(template, f"q{index}")
        assert text(tokenizer, row) == f"<s>{prompt} a{index}</s>"
        assert learnt(tokenizer, row) == f" a{index}</s>"
        assert row["input_ids"].count(1) == row["input_ids"].count(2) == 1
        assert row["input_ids"][: -len(f" a{index}") - 1] == tokenizer(prompt)["input_ids"]
    assert tokenized.dropped == tokenized.truncated == 0
    assert tokenized.tokens == sum(len(row["input_ids"]) for row in tokenized.rows)


def test_a_template_that_ends_in_white_space_brings_it_itself(pairs: str) -> None:
    """As other trainers' Alpaca does, which ends in a line break."""
    tokenizer, template = byte_tokenizer(), "Q: {instruction}\nA:\n"
    row = data.load_examples(DataConfig(train=pairs, template=template), tokenizer, seed=0).rows[3]
    assert text(tokenizer, row) == "<s>Q: q3\nA:\na3</s>"
    assert learnt(tokenizer, row) == "a3</s>"
    assert prompt_of(QuestionSet(name="x", data="x"), "task", DataConfig(template=template), tokenizer).delimiter == ""


def test_chat_template_writes_everything_itself(pairs: str) -> None:
    tokenizer = byte_tokenizer(CHAT)
    row = data.load_examples(DataConfig(train=pairs, template="chat"), tokenizer, seed=0).rows[3]
    assert text(tokenizer, row) == "<s>user: q3\n<s>assistant: a3</s>\n"
    assert learnt(tokenizer, row) == "a3</s>\n"
    prompt = prompt_text("chat", "q3", tokenizer)
    assert text(tokenizer, row).startswith(prompt)


@pytest.mark.parametrize(("border", "delimiter"), [("<think>\n\n</think>\n\n", ""), (" ", " "), ("final: ", " "), ("", "")])
def test_models_are_asked_as_they_were_trained_to_answer(pairs: str, border: str, delimiter: str) -> None:
    """Qwen3's template writes empty thoughts before an answer, Llama 2's a space."""
    thinking = CHAT.replace("assistant: {% endif %}", "assistant:{% endif %}").replace(
        "{{ m['role'] }}: {{ m['content'] }}",
        "{{ m['role'] }}:{% if m['role'] == 'assistant' %}" + border + "{% endif %}{{ m['content'] }}",
    )
    tokenizer = byte_tokenizer(thinking)
    row = data.load_examples(DataConfig(train=pairs, template="chat"), tokenizer, seed=0).rows[3]
    prompt = prompt_of(QuestionSet(name="x", data="x"), "task", DataConfig(template="chat"), tokenizer)
    assert prompt.delimiter == delimiter
    assert prompt.text("q3").endswith(f"assistant:{border}".rstrip(" "))
    assert text(tokenizer, row) == f"{prompt.text('q3')}{delimiter}a3</s>\n"


def test_a_chat_template_sees_the_same_day_every_day(pairs: str) -> None:
    tokenizer = byte_tokenizer("{{ strftime_now('%d %B %Y') }} " + CHAT)
    row = data.load_examples(DataConfig(train=pairs, template="chat"), tokenizer, seed=0).rows[0]
    assert text(tokenizer, row).startswith("26 July 2024 ")


def test_every_assistant_message_is_learnt(tmp_path: Path) -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"{role[0]}{index}"} for index, role in enumerate(roles)]
    tokenizer = byte_tokenizer(CHAT)
    config = DataConfig(train=write_rows(tmp_path / "chat.jsonl", [{"messages": messages}]), template="chat")
    (row,) = data.load_examples(config, tokenizer, seed=0).rows
    assert learnt(tokenizer, row) == "a2</s>\na4</s>\n"
    assert text(tokenizer, row).endswith("<s>user: u3\n<s>assistant: a4</s>\n")


def test_a_system_message_is_asked_with_as_it_is_trained_with(tmp_path: Path) -> None:
    user, answer, system = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "system", "content": "s"}
    tokenizer = byte_tokenizer(CHAT)

    def load(chats: list[Any], **options: Any) -> data.Tokenized:
        path = write_rows(tmp_path / "chat.jsonl", [{"messages": chat} for chat in chats])
        return data.load_examples(DataConfig(train=path, template="chat", **options), tokenizer, seed=0)

    found = load([[system, user, answer]] * 2)
    assert found.system == "s"
    assert load([[system, user, answer], [user, answer]]).system is None
    assert load([[user, answer]]).system == ""
    assert load([[system, user, answer]], system="other").rows == found.rows[:1]  # what is trained is the examples'
    asked = prompt_of(QuestionSet(name="x", data="x"), "task", DataConfig(template="chat", system="s"), tokenizer).text("q")
    assert text(tokenizer, found.rows[0]).startswith(asked)


def test_messages_in_parts_and_empty_system_messages_are_texts(tmp_path: Path) -> None:
    roles = ["system", "user", "assistant"]
    plain = [{"role": role, "content": content} for role, content in zip(roles, ("", "u1u2", "a"), strict=True)]
    parts = [
        {"role": "system", "content": None},
        {"role": "user", "content": [{"type": "text", "text": text} for text in ("u1", "u2")]},
        plain[2],
    ]
    tokenizer = byte_tokenizer(CHAT)
    found = [
        data.load_examples(
            DataConfig(train=write_rows(tmp_path / f"{name}.jsonl", [{"messages": messages}]), template="chat"), tokenizer, seed=0
        ).rows
        for name, messages in (("plain", plain), ("parts", parts))
    ]
    assert found[0] == found[1]


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


def test_of_a_long_chat_no_more_is_tokenised_than_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts hold those before them: all of them would be quadratic in its answers."""
    monkeypatch.setattr(data, "TEXTS", 3)  # several parts
    tokenizer, encode, read = byte_tokenizer(CHAT), data._encode, list[int]()

    def counted(texts: Any, tokenizer: Any) -> Any:
        texts = list(texts)
        read.extend(map(len, texts))
        return encode(texts, tokenizer)

    monkeypatch.setattr(data, "_encode", counted)
    turns = [{"role": role, "content": f"{role} {at}"} for at in range(40) for role in ("user", "assistant")]
    rows = [{"messages": turns[: 2 * answers]} for answers in (1, 2, 40, 3, 40, 1, 30)]
    found = data.tokenize_rows(rows, DataConfig(template="chat", max_length=100), tokenizer, 0)
    whole = [tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False) for row in rows]
    assert [row["input_ids"] for row in found.rows] == [ids[:100] for ids in whole]
    assert (found.truncated, found.dropped) == (sum(len(ids) > 100 for ids in whole), 0)
    assert max(read) < 200 < max(map(len, whole)) // 5


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
    for ids, mask, labels in zip(*tokenized.rows[0].values(), table["labels"][0], strict=True):
        assert labels == (ids if mask else -100)


def test_no_file_is_named() -> None:
    with pytest.raises(DataError, match=r"data.train is empty: give a .jsonl"):
        data.load_examples(DataConfig(), byte_tokenizer(), seed=0)


# --- unusable examples ---------------------------------------------------------------------------------------------


def test_wizardlm_and_the_input_column(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()

    def first(row: dict[str, Any], **options: Any) -> str:
        path = write_rows(tmp_path / "x.jsonl", [row])
        return text(tokenizer, data.load_examples(DataConfig(train=path, template="plain", **options), tokenizer, 0).rows[0])

    assert first({"conversation": [{"human": "hi", "assistant": "ho"}]}) == "<s>hi ho</s>"
    assert first({"instruction": "add", "input": "1 2", "output": 3}) == "<s>add\n\n1 2 3</s>"
    assert first({"instruction": "add", "input": "", "output": 3}) == "<s>add 3</s>"
    assert first({"instruction": "add", "input": "1 2", "output": 3}, prompt="instruction") == "<s>add\n\n1 2 3</s>"  # as it is asked
    assert first({"question": "add", "input": "1 2", "output": 3}, prompt="question") == "<s>add 3</s>"


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"question": "q", "answer": ""}, "plain", "row 2 has nothing in column 'answer': fill it or remove the row"),
        ({"question": None, "answer": "a"}, "plain", "row 2 has nothing in column 'question'"),
        ({"question": "q"}, "plain", "row 2 has nothing in column 'answer'"),
        ({"question": "q", "answer": float("nan")}, "plain", "row 2 has nothing in column 'answer'"),
        ({"question": "q", "answer": "\ud83d"}, "plain", "row 2: column 'answer' holds half of a character"),
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
        ([{"role": "user", "content": "u"}], "chat", r"row 1 has no message of the 'assistant' \(its roles: 'user'\)"),
        ([{"role": "user", "content": "u"}, {"role": "me", "content": "a"}], "chat", r"\(its roles: 'user', 'me'\): rename"),
        ([{"role": ["user"], "content": "u"}], "chat", "row 1: its messages are no list of {role, content}"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "chat", "row 1 has nothing in column 'content'"),
        ("hello", "chat", "row 1: its messages are no list of {role, content}"),
        ([{"role": "assistant", "content": ""}], "chat", "row 1 has nothing in column 'content'"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}],
            "chat",
            "column 'content' holds a list",
        ),
        ([{"role": "assistant", "content": "a"}], "chat", "row 1 begins with an assistant message, which answers nothing"),
        ([{"role": "assistant", "content": "a"}], "alpaca", "holds chats, but data.template='alpaca': set data.template=chat"),
    ],
)
def test_unusable_chats_are_named(tmp_path: Path, messages: Any, template: str, message: str) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=message):
        data.load_examples(DataConfig(train=path, template=template), byte_tokenizer(CHAT), seed=0)


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    strict = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}" + CHAT
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": messages[1:]}, {"messages": messages}])
    with pytest.raises(DataError, match=r"row 2: the chat template refuses its messages \(no system role\)"):
        data.load_examples(DataConfig(train=path, template="chat"), byte_tokenizer(strict), seed=0)


def test_a_broken_chat_template_is_no_fault_of_a_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"the model's chat template is broken \("):
        data.load_examples(DataConfig(train=path, template="chat"), byte_tokenizer("{% for m in messages %}"), seed=0)


def test_a_chat_template_that_asks_otherwise_than_it_writes_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    for forgetful in ("{{ messages | length }}" + CHAT, trl_template("deepseek_r1_distill")):
        with pytest.raises(DataError, match=r"row 1: the chat template ends what is asked with .* and writes it otherwise"):
            data.load_examples(DataConfig(train=path, template="chat"), byte_tokenizer(forgetful), seed=0)


UNREAD = [
    ({"question": "q", "context": "the schema", "answer": "a"}, "column 'context' stands beside 'question' and would be left out"),
    ({"prompt": "q", "input": "1", "output": "a"}, "column 'input' stands beside 'prompt'"),
    ({"instruction": "q", "system_prompt": "s", "output": "a"}, "column 'system_prompt' stands beside 'instruction'"),
    ({"instruction": "q", "history": [["x", "y"]], "output": "a"}, "column 'history' stands beside"),
]


@pytest.mark.parametrize(("row", "message"), UNREAD)
def test_nothing_that_belongs_to_an_example_is_left_out_unsaid(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.tokenize_rows([row], DataConfig(template="plain"), byte_tokenizer(), 0)
    prompt = next(iter(row))
    assert data.tokenize_rows([row], DataConfig(template="plain", prompt=prompt), byte_tokenizer(), 0).rows  # on purpose


SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": SAID},
        {"prompt": SAID[:1], "completion": SAID[1:]},
        {"conversations": [{"from": "Human", "value": "hi"}, {"from": "chatgpt", "value": "hello"}]},
        {"conversations": [{"from": "human", "value": "hi", "role": None}, {"from": "gpt", "value": "hello", "role": None}]},
        {"messages": [{"role": "User", "content": "hi"}, {"role": "model", "content": "hello"}]},
        {"messages": [{**SAID[0], "tool_calls": None, "name": None}, {**SAID[1], "tool_calls": None, "weight": 1}], "tools": None},
    ],
)
def test_chats_of_other_forms_are_the_same_chats(row: dict[str, Any]) -> None:
    tokenizer, config = byte_tokenizer(CHAT), DataConfig(template="chat", system="")
    assert data.tokenize_rows([row], config, tokenizer, 0).rows == data.tokenize_rows([{"messages": SAID}], config, tokenizer, 0).rows
    with_system = data.tokenize_rows([row | {"system": "be kind"}], config, tokenizer, 0)
    assert with_system.system == "be kind"
    whole = [{"role": "system", "content": "be kind"}, *SAID]
    assert with_system.rows == data.tokenize_rows([{"messages": whole}], config, tokenizer, 0).rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": SAID, "tools": [{"name": "search"}]}, "row 1 has tools beside its chat"),
        ({"messages": SAID, "functions": "[{}]"}, "row 1 has functions beside its chat"),
        ({"messages": [SAID[0], {"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "row 1: a message calls tools"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": "f"}]}, "row 1: a message calls tools"),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, *SAID], "system": "Be long."},
            "row 1 has a system message in its chat and another one in column 'system': remove one",
        ),
        ({"messages": [SAID[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "row 1: a message calls tools"),
        ({"messages": [SAID[0], {**SAID[1], "weight": 0}]}, "row 1: an answer is marked as not to be learned"),
        ({"messages": [SAID[0], {**SAID[1], "train": False}]}, "row 1: an answer is marked as not to be learned"),
    ],
)
def test_what_a_chat_asks_for_and_does_not_get_is_told(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.tokenize_rows([row], DataConfig(template="chat"), byte_tokenizer(CHAT), 0)


def test_null_keys_of_messages_are_none_to_a_template() -> None:
    """Arrow fills them in, and Llama 3.2's template asks whether they are there."""
    bare = [{**turn, "tool_calls": None} for turn in SAID]
    tokenizer = byte_tokenizer(trl_template("llama3_2"))
    assert data.tokenize_rows([{"messages": bare}], DataConfig(template="chat"), tokenizer, 0).rows


def test_long_chats_are_not_all_tokenised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer's text holds those before it."""
    asked, inner = [], byte_tokenizer(CHAT)

    class Counting:
        def __call__(self, texts: Any, **options: Any) -> Any:
            asked.append(sum(map(len, texts)) if isinstance(texts, list) else 0)
            return inner(texts, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    turns = [{"role": role, "content": role * 10} for _ in range(8) for role in ("user", "assistant")]
    chats, config = [{"messages": turns}] * 6, DataConfig(template="chat", max_length=4096)
    expected = data.tokenize_rows(chats, config, inner, 0)
    monkeypatch.setattr(data, "CHARACTERS", 3000)
    assert data.tokenize_rows(chats, config, Counting(), 0) == expected
    assert len(asked) > 10
    assert max(asked) <= 3000 + len(inner.apply_chat_template(turns, tokenize=False))


def trl_template(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "ONE"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "TWO"},
]


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_where_history_is_written_otherwise_each_answer_is_an_example(name: str) -> None:
    """Qwen3 writes (empty) thoughts in the last answer alone, Phi-3 the end of the text behind it: each is trained as it is asked for."""
    tokenizer, config = byte_tokenizer(trl_template(name)), DataConfig(template="chat")
    found = data.tokenize_rows([{"messages": TURNS}], config, tokenizer, 0)
    assert len(found.rows) == 2
    for row, turns in zip(found.rows, (TURNS[:1], TURNS[:3]), strict=True):
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        first = row["completion_mask"].index(1)
        assert tokenizer.decode(row["input_ids"][:first]) == asked
        assert all(row["completion_mask"][first:])
    assert "ONE" in tokenizer.decode(found.rows[0]["input_ids"])
    assert "TWO" in tokenizer.decode(found.rows[1]["input_ids"])


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2_5"])
def test_where_it_is_written_alike_a_chat_is_one_example(name: str) -> None:
    found = data.tokenize_rows([{"messages": TURNS}], DataConfig(template="chat"), byte_tokenizer(trl_template(name)), 0)
    assert len(found.rows) == 1


def test_thoughts_of_answers_are_counted() -> None:
    tokenizer, config = byte_tokenizer(trl_template("qwen3")), DataConfig(template="chat")
    rows = [{"question": "q", "answer": "<think>\nhm\n</think>\n\na"}, {"question": "q", "answer": "a"}]
    assert data.tokenize_rows(rows, config, tokenizer, 0).thoughtless == 0.5
    assert data.tokenize_rows(rows, DataConfig(), tokenizer, 0).thoughtless is None
    asked = [prompt_text("chat", "q", tokenizer, thinking=thinking) for thinking in (True, False)]
    for text, row in zip(asked, data.tokenize_rows(rows, config, tokenizer, 0).rows, strict=True):
        assert tokenizer.decode(row["input_ids"]).startswith(text)
    assert asked[1].endswith("<think>\n\n</think>\n\n")


def test_conversations_are_chats_or_one_turn() -> None:
    turns = [("system", "be kind"), ("human", "hi"), ("gpt", "hello"), ("human", "bye"), ("gpt", "see you")]
    roles = {"human": "user", "gpt": "assistant"}
    shared = {"id": 7, "conversations": [{"from": who, "value": text} for who, text in turns]}
    own = {"messages": [{"role": roles.get(who, who), "content": text} for who, text in turns]}
    tokenizer, config = byte_tokenizer(CHAT), DataConfig(template="chat", system="be kind")
    found, expected = (data.tokenize_rows([row], config, tokenizer, 0) for row in (shared, own))
    assert found == expected
    assert found.system == "be kind"
    named = dataclasses.replace(config, prompt="conversations")
    with_roles = {"id": 7, "conversations": own["messages"]}
    assert data.tokenize_rows([shared], named, tokenizer, 0) == data.tokenize_rows([with_roles], config, tokenizer, 0) == expected
    assert found.instructions == {data.same_words("HI"), data.same_words(" bye")}
    wizard = data.tokenize_rows([{"conversation": [{"human": "Hi", "assistant": "hello"}]}], DataConfig(), tokenizer, 0)
    assert wizard.instructions == {data.same_words("hi")}


def test_windows_of_text_are_equally_long_and_begin_as_texts_do():
    tokenizer = AutoTokenizer.from_pretrained(world.MODEL)
    texts = [json.loads(line)["text"] for line in Path(world.TEXT).read_text().splitlines()[:40]]
    rows, count = data.text_windows(texts, tokenizer, 16, 10**6, 0)
    assert {len(row["input_ids"]) for row in rows} == {16}
    assert {sum(row["completion_mask"]) for row in rows} == {15}
    begin = tokenizer("a").input_ids[: len(tokenizer("a").input_ids) - len(tokenizer("a", add_special_tokens=False).input_ids)]
    whole = tokenizer("\n\n".join(texts), add_special_tokens=False).input_ids
    size = 16 - len(begin)
    assert len(rows) == count == len(whole) // size
    assert [token for row in rows for token in row["input_ids"][len(begin) :]] == whole[: len(rows) * size]
    assert data.text_windows(texts, tokenizer, 16, 5, 3) == (choose(rows, 5, 3), count)
    assert data.text_windows(texts, tokenizer, 10**6, 5, 0) == ([], 0)


def test_windows_have_no_space_of_a_tokenizer_that_adds_one_to_every_text():
    """Llama's puts one in front of what is tokenised by itself."""
    backend = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, "\n": 3}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    rows, _ = data.text_windows(["ab", "b", "a b"], tokenizer, 5, 10, 0)
    assert [token for row in rows for token in row["input_ids"]] == [0, 1, 2, 3, 3, 2, 3, 3, 1, 0]


@pytest.mark.parametrize("role", ["observer", "developer"])
def test_a_message_that_the_template_leaves_out_is_told(tmp_path: Path, role: str) -> None:
    """Qwen's template knows user, system, assistant and tool, and passes over all others without a word."""
    known = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}\n{% endfor %}"
    row = {"messages": [{"role": role, "content": "What is 0+1?"}, {"role": "assistant", "content": "1"}]}
    config = DataConfig(train=write_rows(tmp_path / "chat.jsonl", [row]), template="chat")
    with pytest.raises(DataError, match=f"row 1: the chat template leaves out a message of the role {role!r}"):
        data.load_examples(config, byte_tokenizer(known), seed=0)


def test_what_a_tool_says_may_stand_in_a_chat_as_json(tmp_path: Path) -> None:
    written = "{% for m in messages %}{{ m.content | tojson if m.role == 'tool' else m.content }}\n{% endfor %}"
    said = [("user", "How many?"), ("tool", 'It says "2"\nor 3'), ("assistant", "2")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    config = DataConfig(train=write_rows(tmp_path / "chat.jsonl", [row]), template="chat")
    assert len(data.load_examples(config, byte_tokenizer(written), seed=0).rows) == 1
