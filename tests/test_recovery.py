"""Knowledge asked once more after a few steps of question answering: on other questions, the same for every model."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import settings

from farss import world
from farss.artifacts import read_records
from farss.compare import compare
from farss.configfile import from_dict, override
from farss.errors import ConfigError, FolderError
from farss.models import load_model, load_tokenizer
from farss.pipeline import Run
from farss.recovery import BATCH, knowledge_alone, recover, recovery_rows
from farss.rows import question_rows
from farss.tasks.questions import draw


@pytest.fixture
def values(model_folder, tmp_path):
    found = settings(model_folder, tmp_path / "run")
    found["evaluate"]["knowledge"][0] |= {"limit": 30}
    found["evaluate"] |= {"recovery": 2, "looks": 0}
    found["train"]["max_steps"] = 2
    return found


@pytest.fixture
def knowing(values):
    """The same with a model that answers some of the questions: without any there is nothing to be recovered of."""
    return values | {"model": {"path": str(world.MODEL)}}


def test_recovery_trains_on_what_is_not_asked(values):
    config = from_dict(values)
    tokenizer = load_tokenizer(config.model)
    found = recovery_rows(config, tokenizer)
    run = Run(config)
    run.evaluate_base()
    asked = {record["prompt"] for record in read_records(run.path / "base" / "scores", "facts")}
    trained = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in found.rows]
    learnt = [tokenizer.decode([t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]) for row in found.rows]
    assert len(found.rows) == 2 * BATCH
    assert not any(text.startswith(prompt) for text in trained for prompt in asked)
    answers = {row["answers"][0] for row in question_rows(config.evaluate.knowledge[0])}
    assert all(text.replace(tokenizer.eos_token, "").strip() in answers for text in learnt)
    with pytest.raises(ConfigError, match=r"evaluate.recovery=100000 trains on 1600000 knowledge questions that are not asked"):
        recovery_rows(override(config, ["evaluate.recovery=100000"]), tokenizer)
    with pytest.raises(ConfigError, match=r"evaluate.recovery needs a question file"):
        override(config, ["evaluate.knowledge=[triviaqa]"])


def test_several_sets_of_one_file_keep_their_questions_from_recovery(values):
    (entry,) = values["evaluate"]["knowledge"]
    values["evaluate"]["knowledge"] = [entry | {"name": "few", "limit": 5, "fewshot": 0}, entry | {"limit": 30, "fewshot": 5}]
    values["evaluate"]["other"] = [entry | {"name": "many", "limit": 300}]
    config = from_dict(values)
    tokenizer = load_tokenizer(config.model)
    trained = "\n".join(tokenizer.decode(row["input_ids"]) for row in recovery_rows(config, tokenizer).rows)
    for each in (*config.evaluate.knowledge, *config.evaluate.other):
        drawn = draw(each, question_rows(each), config.seed)
        assert not any(row["question"] in trained for row in (*drawn.asked, *drawn.shown))


def test_recovery_takes_more_of_a_file_where_others_have_nothing_left(values, tmp_path):
    (entry,) = values["evaluate"]["knowledge"]
    values["evaluate"]["knowledge"] = [entry]
    for name in ("one", "two"):  # asked as a whole
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"Who is {name}?", "answers": [name]}))
        values["evaluate"]["knowledge"].append({"name": name, "data": str(tmp_path / f"{name}.jsonl")})
    config = from_dict(values)
    assert len(recovery_rows(config, load_tokenizer(config.model)).rows) == 2 * BATCH


def test_a_model_that_learned_nothing_recovers_as_the_base_does(knowing):
    knowing["train"]["learning_rate"] = 1e-30
    for method in ("lora", "full"):
        own = knowing | {"plan": {"method": method, "rank": 4}, "out": f"{knowing['out']}-{method}"}
        run = Run(from_dict(own))
        run.all()
        summary = json.loads((run.path / "summary.json").read_text())
        assert summary["recovered"]["value"] == pytest.approx(1)
        before, after = (read_records(run.path / name / "scores", "facts") for name in ("base-recovered", "recovered"))
        gold = [[record["gold_loglikelihood"] for record in records] for records in (before, after)]
        assert gold[0] == pytest.approx(gold[1], abs=1e-3)
        assert gold[0] != [record["gold_loglikelihood"] for record in read_records(run.path / "base" / "scores", "facts")]
        assert "K after a few steps of question answering" in (run.path / "report.html").read_text()


def test_what_was_learned_stays_while_it_recovers(values, monkeypatch, tmp_path):
    """The fresh adapter lies on top of the one that was trained, or on the weights."""
    monkeypatch.setattr("farss.recovery.RATE", 1e-30)
    config = from_dict(values)
    tokenizer = load_tokenizer(config.model)
    batch, rows = tokenizer("Where is it?", return_tensors="pt"), recovery_rows(config, tokenizer)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted, whole = get_peft_model(load_model(config.model), lora).eval(), load_model(config.model)
    whole.model.layers[0].mlp.up_proj.weight.data *= 1.5
    for place, learned in (("adapted", adapted), ("whole", whole)):
        before = learned(**batch).logits
        torch.testing.assert_close(recover(learned, tokenizer, rows, config, tmp_path / place)(**batch).logits, before)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_recovered_is_relative_to_the_base(values, method):
    run = Run(from_dict(values | {"plan": {"method": method, "rank": 4}}))
    run.all()
    for place, every in (("base-recovered", 1), ("recovered", 2)):
        file = run.path / place / "scores" / "facts.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"score": float(count % every == 0)}) + "\n" for count, row in enumerate(rows)))
    assert run.summarise(None).recovered.value == pytest.approx(0.5)


@pytest.mark.usefixtures("no_figures")
def test_a_comparison_recovers_the_base_once(knowing):
    knowing["compare"] = {"methods": ["lora", "pissa"]}
    folder = compare(from_dict(knowing), lambda *_: None)
    comparison = json.loads((folder / "comparison.json").read_text())
    assert all(row["recovered"]["low"] <= row["recovered"]["value"] <= row["recovered"]["high"] for row in comparison["rows"])
    assert [path.parent.name for path in folder.rglob("base-recovered")] == [folder.name]
    assert "K recovered %" in (folder / "comparison.md").read_text()


@pytest.mark.usefixtures("no_figures")
def test_a_recovery_of_other_steps_begins_anew(values):
    values["plan"] = {"method": "lora", "rank": 4}
    Run(config := from_dict(values)).all()
    run = Run(override(config, [f"evaluate.recovery={config.evaluate.recovery + 1}"]))
    run.all()
    assert run.folder.record("recover")["options"]["evaluate.recovery"] == config.evaluate.recovery + 1


@pytest.mark.usefixtures("no_figures")
def test_both_sides_recover_in_one_precision(values, monkeypatch):
    values["plan"], values["train"]["precision"] = {"method": "lora", "rank": 4}, "auto"
    config, used = from_dict(values), []
    for units in (False, True):  # it goes on where there are units for bfloat16, after a first machine without
        monkeypatch.setattr("farss.train.trainer.multiplies_in", lambda *_, units=units: units)
        run = Run(config)
        run.claim()
        run.all() if units else run.recover_base()
        used.append(run.folder.record("train")["options"]["train.precision"] if units else None)
    records = [run.folder.record(step)["options"]["train.precision"] for step in ("recover-base", "recover")]
    assert (records, used[-1]) == (["fp32", "fp32"], "bf16")
    assert run.answers.complete
    assert not Run(override(config, ["train.precision=bf16"])).answers.complete


@pytest.mark.usefixtures("no_figures")
def test_other_questions_are_recovered_on_both_sides_or_on_none(knowing):
    def recovered():
        return json.loads((Path(knowing["out"]) / "summary.json").read_text())["recovered"]

    knowing["plan"] = {"method": "lora", "rank": 4}
    Run(from_dict(knowing)).all()
    assert recovered() is not None
    knowing["evaluate"]["knowledge"][0] |= {"limit": 20}
    Run(from_dict(knowing)).evaluate()
    assert recovered() is None  # what came back of the old questions says nothing of these
    Run(from_dict(knowing)).all()
    assert recovered() is not None
    assert len(read_records(Path(knowing["out"]) / "recovered" / "scores", "facts")) == 20


@pytest.mark.usefixtures("no_figures")
def test_where_the_weights_are_deleted_what_was_recovered_stays(knowing):
    knowing["compare"] = {"methods": ["lora"], "keep": "scores"}
    folder = compare(from_dict(knowing), lambda *_: None)
    before = json.loads((folder / "comparison.json").read_text())["rows"]
    knowing["evaluate"]["recovery"] = 1
    with pytest.raises(FolderError, match=r"the weights in .*adapter are deleted"):
        compare(from_dict(knowing), lambda *_: None)
    knowing["evaluate"]["recovery"] = 2
    assert json.loads((compare(from_dict(knowing), lambda *_: None) / "comparison.json").read_text())["rows"] == before


@pytest.mark.parametrize(("batch", "micro", "expected"), [(24, 12, 8), (4, None, 4), (64, None, 16), (16, 1, 1)])
def test_no_more_at_once_than_in_training(values, monkeypatch, batch, micro, expected):
    used = []
    monkeypatch.setattr("farss.recovery.train", lambda model, tokenizer, rows, config, *_, **__: used.append(config.train.micro_batch_size))
    config = override(from_dict(values), [f"train.batch_size={batch}", f"train.micro_batch_size={micro or 'null'}"])
    tokenizer = load_tokenizer(config.model)
    recover(load_model(config.model), tokenizer, recovery_rows(config, tokenizer), config, None)
    assert used == [expected]


def test_the_same_layers_recover_whatever_a_method_adapts(values):
    config = override(from_dict(values), ["model.targets=[q_proj]", "plan.method=lora"])
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    adapted = recover(model, tokenizer, recovery_rows(config, tokenizer), config, Path(values["out"]))
    trained = {name.split(".")[-4] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {"q_proj", "v_proj", "down_proj"} <= trained


def test_the_same_questions_are_asked_again(values):
    config = override(from_dict(values), ["evaluate.limit=7"])
    again = knowledge_alone(config).evaluate
    assert (again.knowledge, again.other, again.limit) == (config.evaluate.knowledge, config.evaluate.other, 7)
    assert (again.task, again.text) == ([], None)
