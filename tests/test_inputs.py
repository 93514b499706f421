"""What is read is checked before hours of training."""

import json
import shutil
from pathlib import Path

import pytest
import trl
from small_models import save_small
from transformers import AutoTokenizer

from farss.configfile import override
from farss.errors import ConfigError, DataError
from farss.pipeline import Run


def test_what_a_length_takes_away_is_told(config):
    lengths = sorted(len(row["input_ids"]) for row in Run(config).inputs.examples.rows)
    run = Run(override(config, [f"data.max_length={lengths[len(lengths) // 2]}", "train.max_steps=2"]))
    run.claim()
    found, data = run.train(), run.inputs.examples
    assert (found.examples, found.truncated, found.dropped) == (len(data.rows), data.truncated, data.dropped)
    assert found.truncated + found.dropped > 0
    assert found.examples + found.dropped == 64
    assert f"Of 64 training examples the end of {found.truncated} is cut off" in found.cut


def test_examples_longer_than_the_model_can_read_are_refused(config, tmp_path):
    folder = save_small("gpt2", tmp_path / "gpt2")
    stored = (folder / "config.json").read_text()
    (folder / "config.json").write_text(stored.replace('"n_positions": 256', '"n_positions": 16'))
    with pytest.raises(DataError, match=r"the longest example has \d+ tokens .*, and the model knows 16 positions: set data.max_length=16"):
        Run(override(config, [f"model.path={folder}"])).all()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("read", ["evaluate.text=text.jsonl", "calibration.knowledge=text.jsonl", "calibration.padding=count"])
def test_other_texts_may_not_be_longer_than_the_model_can_read(config, tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "Once upon a time."}\n')
    folder = save_small("gpt2", tmp_path / "gpt2")
    config = override(config, [f"model.path={folder}", "data.max_length=300", "evaluate.text=null"])
    run = Run(override(config, [read]))
    with pytest.raises(DataError, match=r"data.max_length=300\), and the model knows 256 positions: set data.max_length=256"):
        run.claim()
    Run(config).claim()


def test_a_token_that_the_model_does_not_know_is_refused(config, tmp_path, model_folder):
    """Of a tokenizer to which tokens were added, and a model whose embedding has not grown."""
    folder = shutil.copytree(model_folder, tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = next(iter(json.loads(Path(config.data.train).read_text().splitlines()[0]).values()))
    tokenizer.add_tokens([f"new{number}" for number in range(512)] + [question[:8]])
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match=r"the examples have the token \d+, and the model has vectors for \d+ tokens: take the tokenizer"):
        Run(override(config, [f"model.path={folder}"])).check_inputs()


def test_a_column_that_is_not_asked_is_told(config, tmp_path):
    file = tmp_path / "squad.jsonl"
    file.write_text(json.dumps({"question": "Who?", "context": "Ada did.", "answers": ["Ada"]}) + "\n")
    asked = override(config, [f"evaluate.knowledge=[{{name: squad, data: {file}}}]"])
    assert f"{file} has a column 'context' beside 'question', which is not asked." in Run(asked).inputs.warnings()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_targets_of_full_fine_tuning_have_no_effect(config, method):
    told = Run(override(config, [f"plan.method={method}", "model.targets=[q_proj]"])).inputs.warnings()
    assert any("model.targets=['q_proj'] has no effect" in sentence for sentence in told) == (method == "full")


def test_a_system_message_that_would_not_be_asked_with_is_refused(config, tmp_path, model_folder):
    folder = shutil.copytree(model_folder, tmp_path / "chat")
    options = json.loads((folder / "tokenizer_config.json").read_text())
    options["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    file = tmp_path / "chats.jsonl"
    roles = ["system", "user", "assistant"]
    file.write_text(json.dumps({"messages": [{"role": role, "content": f"the {role}"} for role in roles]}) + "\n")
    changed = override(config, [f"model.path={folder}", f"data.train={file}", "data.template=chat"])
    with pytest.raises(
        ConfigError, match=r"begins with the system message 'the system', .*: set data.system to the same text, or data.system: ''"
    ):
        Run(changed).check_inputs()
    with pytest.raises(ConfigError, match=r"would be asked with 'another': set data.system to the same text"):
        Run(override(changed, ["data.system=another"])).check_inputs()
    for system in ("the system", "''"):
        Run(override(changed, [f"data.system={system}"])).check_inputs()


def test_thoughts_are_asked_for_where_they_were_trained(config, tmp_path, model_folder):
    folder, file = shutil.copytree(model_folder, tmp_path / "chat"), tmp_path / "chats.jsonl"
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    options = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    changed = override(config, [f"model.path={folder}", f"data.train={file}", "data.template=chat"])
    thinks, not_ = '{"prompt": "q", "completion": "<think>hm</think>a"}\n', '{"prompt": "q", "completion": "a"}\n'
    file.write_text(thinks * 2 + not_)
    with pytest.raises(ConfigError, match=r"67% of the answers in .* begin with thoughts, .* set data.thinking=true"):
        Run(changed).check_inputs()
    Run(override(changed, ["data.thinking=true"])).check_inputs()
    with pytest.raises(ConfigError, match=r"evaluate.learned_by=likelihood, but .*: set evaluate.learned_by=score"):
        Run(override(changed, ["data.thinking=true", "evaluate.learned_by=likelihood"])).check_inputs()
    file.write_text(thinks + not_ * 2)
    Run(changed).check_inputs()
    with pytest.raises(ConfigError, match=r"data.thinking=true, but 67% of the answers in .* begin without thoughts"):
        Run(override(changed, ["data.thinking=true"])).check_inputs()


def test_what_would_be_missed_at_the_end_is_told_before_anything_is_done(config, tmp_path, caplog):
    def told(*changes):
        return "\n".join(Run(override(config, list(changes))).inputs.warnings())

    lengths = sorted(len(row["input_ids"]) for row in Run(config).inputs.examples.rows)
    assert "are left out because no answer fits" in told(f"data.max_length={lengths[len(lengths) // 2]}")
    assert "No knowledge questions are given (evaluate.knowledge): nothing will say what was lost." in told("evaluate.knowledge=[]")
    assert "nothing will say what was learned" in told("evaluate.task=[]")
    assert "T and KT will be missing" in told()
    assert "T and KT will be missing" not in told("plan.method=full")
    assert "T and KT will be missing" not in told("compare.methods=[full, lora]")
    assert "plan.boundary=1 has no effect: lora treats all blocks alike." in told("plan.method=lora")
    assert "no effect" not in told() + told("plan.method=lora", "plan.boundary=null") + told("compare.methods=[full, lora]")
    rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    first = next(iter(rows[0]))
    asked = tmp_path / "asked.jsonl"
    questions = f" {rows[0][first].upper()}", "something new"
    asked.write_text("".join(json.dumps({"question": text, "answers": "x"}) + "\n" for text in questions))
    asking = f"evaluate.task=[{{name: mine, data: {asked}}}]"
    assert f"1 of the 2 questions in {asked} are training examples too." in told("data.limit=null", asking)
    assert "training examples" not in told()
    assert "calibration.knowledge" not in told(asking)
    assert f"2 of the 2 questions in {asked} are in calibration.knowledge too" in told(asking, f"calibration.knowledge={asked}")
    asked.write_text(json.dumps({"question": "q", "answers": ["x" * 99, "short"]}) + "\n")
    assert f"{asked} have more than max_tokens" not in told(asking)
    asked.write_text(json.dumps({"question": "q", "answers": ["word " * 99, "word " * 88]}) + "\n")
    assert f"The right answers to 1 of the 1 questions in {asked} have more than max_tokens=32 tokens" in told(asking)
    words = tmp_path / "words.jsonl"
    words.write_text('{"text": "some words"}\n')
    both = f"evaluate.text={words}", f"calibration.knowledge={words}"
    assert f"1 of the 1 texts in {words} are in calibration.knowledge too" in told(*both)
    Run(override(config, ["evaluate.knowledge=[]", "evaluate.task=[]", "plan.method=lora", "train.max_steps=1"])).all()
    assert "nothing will say what was lost" in caplog.text


def test_an_answer_of_several_lines_to_a_prompt_of_its_own_is_told(config, tmp_path):
    file = tmp_path / "poems.jsonl"
    file.write_text(json.dumps({"question": "Which?", "answers": ["one\ntwo"]}) + "\n")
    template = ", prompt: 'Q {question}'"
    for kind, own, told in (("knowledge", "", 1), ("task", "", 0), ("task", template, 1), ("knowledge", ", prompt: train", 0)):
        asked = override(config, [f"evaluate.{kind}=[{{name: poems, data: {file}{own}}}]"])
        assert sum("have several lines, and an answer ends with its first" in each for each in Run(asked).inputs.warnings()) == told


@pytest.mark.usefixtures("no_figures")
def test_questions_that_are_named_after_the_training_are_looked_at_too(config, caplog):
    run = Run(override(config, ["train.max_steps=2"]))
    run.all()
    trained = f"evaluate.task=[{{name: trained, data: {config.data.train}, question: instruction, answers: output, limit: 8}}]"
    for change, told in ([], 0), ([trained], 1):
        caplog.clear()
        Run(override(run.config, change)).warn()
        assert sum("are training examples too" in record.message for record in caplog.records) == told
