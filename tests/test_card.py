"""The code on a card asks as the model was trained to be asked."""

import json
import re
from pathlib import Path

import pytest
import trl
from small_models import save_small
from transformers import AutoTokenizer

from farss.card import base_licence, write_card
from farss.config import DataConfig
from farss.prompts import prompt_facts, prompt_text

FACTS = {"base": "base", "method": "lora", "rank": 4, "logit_difference": 0.0, "blocks": 4, "base_dtype": "float32"}


@pytest.mark.parametrize(
    "data",
    [
        DataConfig(),
        DataConfig(template="plain"),
        DataConfig(template="chat"),
        DataConfig(template="chat", system="Be kind."),
        DataConfig(template="chat", thinking=True),
    ],
)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_card_asks_in_the_prompt_of_the_training(data, quantization, tmp_path, monkeypatch):
    folder = save_small("llama", tmp_path / "base")
    options = json.loads((folder / "tokenizer_config.json").read_text())
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"chat_template": template}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    facts = {**FACTS, **prompt_facts(data, tokenizer), **({"quantization": quantization} if quantization else {})}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "farss.json").write_text(json.dumps(facts))
    write_card(adapter)
    assert "relative to" not in (adapter / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)[1]
    compile(code, "card", "exec")
    assert ("BitsAndBytesConfig" in code) == bool(quantization)

    question = "Your question here."
    code = code.replace("'content': '...'", f"'content': {question!r}")
    lines = [line for line in code.splitlines() if line.startswith(("messages =", "prompt ="))]
    values = {"tokenizer": tokenizer}
    exec("\n".join(lines), values)
    assert values["prompt"] == prompt_text(data.template, question, tokenizer, data.system, data.thinking)


@pytest.mark.parametrize(("dtype", "loaded"), [("float32", "auto"), ("bfloat16", "bfloat16")])
def test_a_card_loads_the_base_as_it_was_in_the_training(dtype, loaded, tmp_path):
    """Rounded to 16 bits it is another base than its files; float32 holds whatever they hold."""
    facts = {**FACTS, **prompt_facts(DataConfig(), None), "base_dtype": dtype}
    (tmp_path / "farss.json").write_text(json.dumps(facts))
    (tmp_path / "adapter_config.json").write_text("{}")
    write_card(tmp_path)
    assert f'dtype="{loaded}"' in (tmp_path / "README.md").read_text()


def test_a_card_asks_on_the_day_of_the_training(tmp_path):
    folder = save_small("llama", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    facts = {**FACTS, **prompt_facts(DataConfig(template="chat"), tokenizer)}
    (tmp_path / "farss.json").write_text(json.dumps(facts))
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "the date, which in the training was always 26 Jul 2024" in card
    lines = [line for line in card.splitlines() if line.startswith(("messages =", "prompt ="))]
    values = {"tokenizer": tokenizer}
    exec("\n".join(lines), values)
    assert values["prompt"] == prompt_text("chat", "...", tokenizer)


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit\n", "mit"),
        ("license:\n- mit\n- apache-2.0\n", "mit, apache-2.0"),
        ("license:\nlanguage: en\n", None),
        ("language: en\n", None),
        ("license: [\n", None),
    ],
)
def test_the_licence_is_that_of_the_bases_card(front, licence, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{front}---\n\nlicense: in the file LICENSE\n")
    assert base_licence(str(tmp_path)) == licence


def test_a_card_says_what_t_is_relative_to(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "farss.json").write_text(json.dumps(FACTS))
    one = {"value": 1.2, "low": 1.1, "high": 1.3}
    write_card(tmp_path, {"K": one, "T": one, "reference": "the run of lora", "benchmarks": []})
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "- T, relative to the run of lora: 120.0% (95 % interval 110.0% to 130.0%)" in lines
    assert "- K: 120.0% (95 % interval 110.0% to 130.0%)" in lines
