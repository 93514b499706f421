"""The whole line on a small model: skipped when done, refused when changed, the same after a SIGKILL in any step."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_models import save_small

from farss import inputs, llamacpp, world
from farss.artifacts import Plan, Survey, read_json, write_json
from farss.compare import compare
from farss.configfile import from_dict, load, override
from farss.errors import ConfigError, DataError, FarssError, FolderError, ModelError
from farss.evaluate import _identity
from farss.folder import EVALUATE_KEYS, READING_KEYS, alone, options_of, read_config, resolve
from farss.models import load_model
from farss.pipeline import Run
from farss.train import train


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small random LLaMA with the world's tokenizer, on disk."""
    return save_small("llama-gqa", tmp_path_factory.mktemp("model"))


def settings(model_folder, out):
    return {
        "model": {"path": str(model_folder)},
        "data": {"train": str(world.TASK_TRAIN), "max_length": 96, "limit": 64},
        "calibration": {"examples": 8, "batch_size": 4},
        "plan": {"boundary": 1, "rank": 8, "r_avg": 4, "r_max": 6},
        "train": {"learning_rate": 1e-3, "max_steps": 6, "batch_size": 4, "save_steps": 2, "logging_steps": 1, "precision": "fp32"},
        "evaluate": {
            "knowledge": [{"name": "facts", "data": str(world.KNOWLEDGE), "limit": 6, "max_tokens": 2}],
            "task": [
                {"name": "seals", "data": str(world.TASK_TEST), "question": "instruction", "answers": "output", "limit": 6, "max_tokens": 2}
            ],
            "text": str(world.TEXT),
            "text_rows": 20,
            "resamples": 100,
        },
        "out": str(out),
    }


@pytest.fixture
def config(model_folder, tmp_path):
    return from_dict(settings(model_folder, tmp_path / "run"))


def counted(calls, name, function):
    """The same function, which leaves its name among the calls."""

    @functools.wraps(function)
    def call(*arguments, **options):
        calls.append(name)
        return function(*arguments, **options)

    return call


@pytest.fixture(scope="module")
def done(model_folder, tmp_path_factory):
    """A finished run."""
    run = Run(from_dict(settings(model_folder, tmp_path_factory.mktemp("done") / "run")))
    run.all()
    return run


def test_everything_lies_where_it_should(done):
    names = {path.name for path in done.path.iterdir()}
    expected = (
        "config.yaml versions.json survey plan.json checkpoints train.json adapter base scores scores.json summary.json "
        "report.html figures steps"
    )
    assert names == set(expected.split())
    assert {path.name for path in (done.path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "farss.json",
        "README.md",
    }
    assert not list(done.path.rglob("adapter_config.json"))[1:]  # nowhere else could one be loaded by mistake
    assert not list(done.path.rglob("*.part"))


def test_the_promised_content_of_survey_and_plan(done):
    survey = json.loads((done.path / "survey" / "survey.json").read_text())
    plan = json.loads((done.path / "plan.json").read_text())
    tensors = {}
    for file in (done.path / "survey").glob("*.safetensors"):
        tensors |= load_file(file)
    assert set(survey["layers"]) == set(plan["layers"])
    for name, layer in survey["layers"].items():
        assert layer["importance"] > 0
        k = min(layer["shape"])
        for part in ("sigma", "lam", "gam"):
            assert tensors[f"{name}.{part}"].shape == (k,)
            assert tensors[f"{name}.{part}"].dtype == torch.float32
        assert (tensors[f"{name}.sigma"].diff() <= 0).all()
        planned = plan["layers"][name]
        assert planned["side"] == ("least" if layer["block"] < 1 else "most")
        assert len(planned["directions"]) == planned["rank"]
        assert planned["alpha"] == planned["rank"]


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_is_not_done_again(done):
    files = [path for path in done.path.rglob("*") if path.is_file() and path.parent.name != "figures"]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = Run(load(done.path / "config.yaml"))  # replayed from its own folder
    again.all()
    rewritten = {path.name for path in before if path.stat().st_mtime_ns != before[path]}
    assert rewritten <= {"config.yaml", "versions.json", "summary.json", "report.html", "README.md"}


@pytest.mark.parametrize(
    ("text", "key"), [("train.learning_rate=2e-3", "train.learning_rate"), ("data.limit=32", "data.limit"), ("plan.rank=4", "plan.rank")]
)
def test_a_folder_of_another_configuration_is_refused(done, text, key):
    before = {path: path.read_bytes() for path in done.path.rglob("*") if path.is_file()}
    with pytest.raises(FolderError, match=f"made with {key}="):
        Run(override(done.config, [text])).all()
    assert {path: path.read_bytes() for path in done.path.rglob("*") if path.is_file()} == before


def test_training_can_be_rebuilt_in_another_process(done):
    fresh = Run(done.config)
    live, before = fresh.trained(), (done.path / "summary.json").read_bytes()
    fresh.evaluate()
    assert (done.path / "summary.json").read_bytes() == before
    state = load_file(done.path / "adapter" / "adapter_model.safetensors")
    fresh.folder.path.joinpath("steps", "export.json").unlink()
    fresh.export()
    again = load_file(done.path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert live is fresh.trained()


def test_a_card_has_the_scores_of_its_own_adapter_alone(config):
    run = Run(config)
    run.all()
    card = run.path / "adapter" / "README.md"
    assert "| facts |" in card.read_text()
    Run(override(config, ["export.rank=2"])).export()
    Run(config).evaluate()  # of the exact one, which was asked before
    assert "| facts |" not in card.read_text()
    Run(override(config, ["export.rank=2"])).evaluate()
    assert "| facts |" in card.read_text()
    merged = Run(override(config, ["export.to=merged"]))
    merged.export()
    merged.evaluate()
    assert "| facts |" in (run.path / "model" / "README.md").read_text()


def test_shallow_ranks_are_the_same_plan_whether_they_are_named_or_not(config):
    named, unnamed = (
        options_of(override(config, ["plan.rank=16", f"plan.r_avg={average}", f"plan.r_max={largest}"]), ("plan",))
        for average, largest in ((6, 8), ("null", "null"))
    )
    assert named == unnamed
    assert (named["plan.r_avg"], named["plan.r_max"]) == (6, 8)


def test_replanning_needs_no_new_survey(config):
    run = Run(config)
    run.claim()
    first = run.plan()
    stamp = (run.path / "survey" / "survey.json").stat().st_mtime_ns
    second = Run(override(config, ["plan.boundary=2", "plan.budget=exact"]))
    second.claim()
    assert second.plan() != first
    assert (run.path / "survey" / "survey.json").stat().st_mtime_ns == stamp
    assert Plan.load(run.path / "plan.json").boundary == 2


def test_a_survey_of_another_model_is_refused(config, model_folder, tmp_path):
    run = Run(config)
    run.claim()
    run.plan()
    file = run.path / "survey" / "survey.json"
    values = json.loads(file.read_text())
    values["meta"]["model"] = "0123456789abcdef"
    file.write_text(json.dumps(values))
    with pytest.raises(FolderError, match=r"fingerprint 0123456789abcdef, but this one has [0-9a-f]{16}"):
        Run(config).train()


@pytest.mark.usefixtures("no_figures")
def test_comparison_shares_survey_and_base(model_folder, tmp_path, monkeypatch):
    read = []
    for name in ("load_tokenizer", "load_examples"):
        monkeypatch.setattr(inputs, name, counted(read, name, getattr(inputs, name)))
    values = settings(model_folder, tmp_path / "all")
    values["plan"]["match_params"] = "lora"
    values["compare"] = {"methods": ["full", "lora", "farss"], "seeds": [0, 1], "settings": {"full": {"train.learning_rate": 1e-4}}}
    folder = compare(from_dict(values), lambda *_: None)
    comparison = json.loads((folder / "comparison.json").read_text())
    assert [(row["method"], row["seed"]) for row in comparison["rows"]] == [(m, s) for s in (0, 1) for m in ("full", "lora", "farss")]
    assert {row["learning_rate"] for row in comparison["rows"] if row["method"] == "full"} == {1e-4}
    assert sorted(read) == ["load_examples"] * 2 + ["load_tokenizer"]  # the examples once a seed
    assert not list(folder.glob("*-seed*/survey"))
    assert not list(folder.glob("*-seed*/base"))
    assert Survey.load(folder / "survey").examples == 8
    by_method = {row["method"]: row["parameters"] for row in comparison["rows"]}
    assert by_method["farss"] == pytest.approx(by_method["lora"], rel=0.15)
    assert (folder / "comparison.md").read_text().count("\n| ") >= 4
    assert (folder / "full-seed0" / "model" / "model.safetensors").is_file()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("method", "changes", "reading"),
    [
        ("corda-kpm", [], "corda-knowledge"),
        ("lora-null", [f"calibration.knowledge={world.KNOWLEDGE}"], "null-space"),
        ("farss-plus", [], "task-against-knowledge"),
        ("eva", [], "eva-answers"),
        ("adalora", [], None),
        ("kasa", [], "weights"),
        ("dora", ["evaluate.task=[]"], None),
    ],
)
def test_every_kind_of_method_goes_the_whole_way(config, method, changes, reading):
    run = Run(override(config, [f"plan.method={method}", *changes]))
    run.all()
    assert {path.name for path in run.path.iterdir() if (path / "survey.json").is_file()} == ({reading} if reading else set())
    assert (run.path / "own_text.jsonl").is_file() == (method in ("corda-kpm", "farss-plus"))
    assert (run.path / ("model" if method == "dora" else "adapter") / "farss.json").is_file()
    record = json.loads((run.path / "steps" / "export.json").read_text())
    assert method == "dora" or record["logit_difference"] <= 1e-3
    step_zero = json.loads((run.path / "steps" / "train.json").read_text())["step_zero"]["float32"]
    assert step_zero <= 1e-3 or method == "kasa"
    before = (run.path / "plan.json").stat().st_mtime_ns
    Run(run.config).all()
    assert (run.path / "plan.json").stat().st_mtime_ns == before


@pytest.mark.usefixtures("no_figures")
def test_general_text_alone_is_measured_too(config):
    run = Run(override(config, ["evaluate.knowledge=[]", "evaluate.task=[]"]))
    run.all()
    assert run.summarise(None).forgetting is not None


def test_a_name_that_is_wrong_is_found_before_anything_is_done(config):
    for name, message in (
        ("cosin", "did you mean 'cosine'"),
        ("cosine_with_min_lr", "needs options of its own"),
        ("reduce_lr_on_plateau", ""),
    ):
        with pytest.raises(ConfigError, match=rf"train.scheduler='{name}'.*{message}"):
            Run(override(config, [f"train.scheduler={name}"])).all()
    assert not Path(config.out).exists()


def test_full_fine_tuning_that_cannot_fit_is_found_before_anything_is_done(config, monkeypatch):
    config = override(config, ["plan.method=full", "model.device=cpu"])
    Run(config).check_inputs()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**18))
    with pytest.raises(ConfigError, match=r"full fine-tuning needs 0 GiB for [\d,]+ weights \(16 bytes each\), and the machine"):
        Run(config).check_inputs()
    with pytest.raises(ConfigError, match="full fine-tuning needs"):  # trains in float32 whatever the others load
        Run(override(config, ["model.quantization=nf4"])).check_inputs()
    Run(override(config, ["plan.method=lora"])).check_inputs()  # whose weights may stay in their files


def test_a_survey_asks_for_no_room_for_a_whole_model(config, monkeypatch):
    """It walks the blocks one at a time, and on any GPU: a model may be larger than it, and torchrun's second process has the second."""
    monkeypatch.setattr("farss.pipeline.device_of", lambda options: torch.device("cuda:1"))
    monkeypatch.setattr("farss.models.device_of", lambda options: torch.device("cuda:0"))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=2**10))
    Run(config).claim(trains=False)
    with pytest.raises(ConfigError, match="set CUDA_VISIBLE_DEVICES=1"):
        Run(config).check_inputs()
    monkeypatch.setattr("farss.pipeline.device_of", lambda options: torch.device("cuda:0"))
    with pytest.raises(ConfigError, match=r"the model needs 0 GiB .* and the GPU has 0: set model.quantization=nf4"):
        Run(config).check_inputs()
    stored = Path(config.model.path) / "config.json"
    before = stored.read_text()
    try:  # what such files take is not known before they are loaded
        stored.write_text(json.dumps(json.loads(before) | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
        Run(config).check_inputs()
    finally:
        stored.write_text(before)


def test_a_residual_base_of_quantised_weights_is_found_before_anything_is_done(config):
    with pytest.raises(ConfigError, match=r"adapter.base='residual' takes the start out of weights that are quantised"):
        Run(override(config, ["adapter.base=residual", "model.quantization=nf4"])).all()
    assert not Path(config.out).exists()


@pytest.mark.parametrize("changes", [["export.to=merged"], ["plan.method=dora"], ["adapter.base=residual", "model.dtype=float32"]])
def test_a_change_of_weights_that_lie_quantised_is_found_before_anything_is_done(config, tmp_path, changes):
    folder = save_small("llama-gqa", tmp_path / "quantised")
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="quantised"):
        Run(override(config, [f"model.path={folder}", *changes])).all()
    assert not Path(config.out).exists()


@pytest.mark.parametrize("changes", [["export.to=merged"], ["plan.method=dora"], ["plan.method=pissa", "adapter.base=residual"]])
def test_weights_that_layers_share_take_no_change(config, tmp_path, changes):
    """Every second block of Zamba 2 is the same one."""
    options = [f"model.path={save_small('zamba2', tmp_path / 'zamba')}", "model.targets=[q_proj,o_proj]", "plan.method=lora"]
    Run(override(config, options)).check_inputs()
    with pytest.raises(ModelError, match=r"layers.1.shared_transformer.self_attn.q_proj shares its weight with model.layers.3."):
        Run(override(config, [*options, *changes])).all()
    assert not Path(config.out).exists()


def test_a_start_that_cannot_be_prepared_is_refused_before_anything_is_looked_at(config):
    for method, message in (
        ("full", "trains the model itself"),
        ("dora", "no plain LoRA"),
        ("farss-plus", "takes nothing out of the base"),
    ):
        run = Run(override(config, [f"plan.method={method}"]))
        with pytest.raises(FarssError, match=message):
            run.prepared()
    assert not Path(config.out).exists()


def test_a_training_that_made_no_step_is_no_reason_to_refuse(config, monkeypatch):
    monkeypatch.setattr("farss.pipeline.train", killed)
    with pytest.raises(KeyboardInterrupt):
        Run(override(config, ["train.learning_rate=1"])).all()
    monkeypatch.undo()
    run = Run(override(config, ["train.learning_rate=1e-3"]))
    run.claim()
    run.train()
    (run.path / "steps" / "train.json").write_text(json.dumps(run.folder.record("train") | {"done": False}))
    with pytest.raises(FolderError, match=r"holds a train made with train.learning_rate=0.001, .* or delete .*checkpoints to train anew"):
        Run(override(config, ["train.learning_rate=1e-4"])).claim()


def killed(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_holds_to_the_knowledge_it_looked_at(config):
    config = override(config, ["plan.method=lora-null", f"calibration.knowledge={world.KNOWLEDGE}"])
    Run(config).all()
    for change in ("calibration.knowledge=null", "calibration.examples=6"):
        with pytest.raises(FolderError, match=rf"holds a null-space made with {change.partition('=')[0]}="):
            Run(override(config, [change])).claim()


@pytest.mark.usefixtures("no_figures")
def test_answers_are_those_of_the_form_that_is_handed_over(config):
    """A compressed adapter's answers are not those of the whole model that is merged afterwards."""
    config = override(config, ["plan.method=lora", "train.learning_rate=0.02", "export.rank=1"])
    Run(config).all()
    compressed = asked(config)
    merged = override(config, ["export.to=merged", "export.rank=null"])
    assert not Run(merged).complete
    Run(merged).all()
    assert Run(merged).complete
    assert asked(config) != compressed


def asked(config):
    return json.loads((Path(config.out) / "scores.json").read_text())["meta"]["weights"]


@pytest.mark.usefixtures("no_figures")
def test_what_changes_no_answer_asks_nothing_again(config):
    config = override(config, ["plan.method=lora", "evaluate.recovery=1"])
    Run(config).all()
    assert Run(override(config, ["evaluate.resamples=200", "evaluate.looks=0", "evaluate.batch_size=3"])).complete
    assert not Run(override(config, ["evaluate.recovery=2"])).complete


@pytest.mark.usefixtures("no_figures")
def test_a_compressed_adapter_is_what_is_asked(config):
    def scored(*changes):
        run = Run(override(config, ["plan.method=lora", "train.learning_rate=0.02", *changes]))
        run.all()
        return json.loads((run.path / "scores.json").read_text())["meta"]["weights"], Run(run.config)

    whole, _ = scored()
    compressed, run = scored("export.rank=1")
    assert compressed != whole
    assert compressed == _identity(run._read_back())


def test_full_fine_tuning_is_scored_as_it_is_handed_over(config):
    """In the precision of the base's files, and with the exact rotary frequencies that whoever loads it has."""
    run = Run(override(config, ["plan.method=full", "model.dtype=float32"]))
    run.claim()
    run.export()
    scored, loaded = run._scored().state_dict(), run._read_back()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(dict(run._scored().named_buffers())[name], buffer), name
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.float(), scored[name].float()), name


def test_a_prepared_start_of_another_plan_is_not_handed_out(config):
    run = Run(config)
    run.claim()
    before = run.prepared()
    assert Run(config).prepared() == before
    other = Run(override(config, ["plan.r_max=5"]))
    other.claim()
    with pytest.raises(FolderError, match=r"prepared was prepared for another plan: delete it, or choose another out"):
        other.prepared()


def test_another_precision_is_another_untouched_model(config):
    def base(*changes):
        run = Run(override(config, list(changes)))
        return run.evaluate_base(), (run.path / "base" / "scores.json").stat().st_mtime_ns

    first, written = base("model.dtype=float32")
    assert base("model.dtype=float32")[1] == written
    second, written_again = base("model.dtype=bfloat16")
    assert written_again > written
    assert second.knowledge["facts"].gold_loglikelihood != first.knowledge["facts"].gold_loglikelihood


def test_what_a_length_takes_away_is_told(config):
    lengths = sorted(len(row["input_ids"]) for row in Run(config).inputs.examples.rows)
    run = Run(override(config, [f"data.max_length={lengths[len(lengths) // 2]}", "train.max_steps=2"]))
    run.claim()
    found, data = run.train(), run.inputs.examples
    assert (found.examples, found.truncated, found.dropped) == (len(data.rows), data.truncated, data.dropped)
    assert found.truncated + found.dropped > 0
    assert found.examples + found.dropped == 64
    assert f"Of 64 training examples the end of {found.truncated} was cut off" in found.cut


def test_the_versions_are_those_of_the_training(config):
    run = Run(override(config, ["train.max_steps=2"]))
    run.claim()
    run.train()
    file = run.path / "versions.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"torch": "1.0"}))
    Run(run.config).claim()
    assert json.loads(file.read_text())["torch"] == "1.0"
    assert "# torch 1.0\n" in (run.path / "config.yaml").read_text()


def test_knowledge_may_have_columns_of_other_names(config, tmp_path):
    file = tmp_path / "webqs.jsonl"
    rows = [json.loads(line) for line in world.KNOWLEDGE.read_text().splitlines()]
    file.write_text("".join(json.dumps({"qText": row["question"], "golden": row["answers"]}) + "\n" for row in rows))
    named = f"calibration.knowledge={{name: webqs, data: {file}, question: qText, answers: golden}}"
    run, other = (Run(override(config, ["plan.method=lora-null", text])) for text in (named, f"calibration.knowledge={world.KNOWLEDGE}"))
    assert run.surveys.knowledge() == other.surveys.knowledge()
    run.claim()
    run.statistics()
    file.write_text(file.read_text()[:-1])
    assert not run.place.is_done("null-space", options_of(resolve(run.config), READING_KEYS["knowledge"]), redo=True)


def test_a_folder_from_before_an_option_existed_is_taken_up(config):
    run = Run(config)
    run.claim()
    run.train()
    for step in ("plan", "train"):
        file = run.path / "steps" / f"{step}.json"
        record = json.loads(file.read_text())
        del record["options"]["plan.kasa_beta"]
        file.write_text(json.dumps(record))
    begun = (run.path / "train.json").stat().st_mtime_ns
    Run(config).train()
    assert (run.path / "train.json").stat().st_mtime_ns == begun
    with pytest.raises(FolderError, match=r"made with plan.kasa_beta=0.0001, and now plan.kasa_beta=0.5"):
        Run(override(config, ["plan.kasa_beta=0.5"])).claim()


def test_a_question_set_from_before_an_option_existed_is_the_same(config):
    run = Run(config)
    run.claim()
    options = options_of(run.config, EVALUATE_KEYS)
    older = json.loads(json.dumps(options))
    del older["evaluate.knowledge"][0]["split"]
    write_json(run.path / "steps" / "evaluate.json", {"options": older, "done": True})
    assert run.folder.is_done("evaluate", options, redo=True)
    older["evaluate.knowledge"][0]["limit"] = 3
    write_json(run.path / "steps" / "evaluate.json", {"options": older, "done": True})
    assert not run.folder.is_done("evaluate", options, redo=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["model.path=/nowhere"], ModelError, "there is no such folder"),
        (["model.path=''"], ModelError, "model.path is empty"),
        (["data.train=''"], DataError, "data.train is empty"),
        (["data.train=/nowhere.jsonl"], DataError, "/nowhere.jsonl"),
        (["data.prompt=nothing"], DataError, "nothing"),
        (["data.max_length=8"], DataError, "data.max_length"),
        (["plan.boundary=9"], ConfigError, "the model has 4 blocks"),
        (["plan.rank=99"], ConfigError, "plan.rank=99"),
        (["calibration.knowledge=/nowhere.jsonl"], DataError, "/nowhere.jsonl"),
        (["plan.kasa_gamma=-1"], ConfigError, "plan.kasa_gamma=-1"),
        (["plan.method=dora", "model.quantization=nf4"], ConfigError, "nothing can be merged into quantised weights"),
        (["export.to=merged", "model.quantization=nf4"], ConfigError, "nothing can be merged into quantised weights: set export.to=peft"),
        (
            ["calibration.knowledge={name: x, data: x.jsonl, limit: 3}"],
            ConfigError,
            "has limit=3, but its rows are looked at and not asked",
        ),
        (["data.system=Be brief."], ConfigError, "data.system='Be brief.' is a message of a chat"),
        (["adapter.base=residual", "model.dtype=bfloat16"], ConfigError, "'residual' rounds the weights without their start to bfloat16"),
        (["evaluate.full_scores=/nowhere"], FolderError, "there is no /nowhere/scores.json"),
        (["plan.method=frass"], ConfigError, "did you mean 'farss'"),
        (["evaluate.knowledge=[{name: x, data: /nowhere.jsonl}]"], DataError, "/nowhere.jsonl"),
        (["out=${NOT_SET_ANYWHERE}/x"], ConfigError, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(config, tmp_path, changes, error, message):
    with pytest.raises(error) as caught:
        Run(override(config, changes)).all()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_llama_cpp_does_not_know_is_refused_before_anything_is_written(config, tmp_path):
    folder = save_small("gpt2", tmp_path / "gpt2")
    with pytest.raises(FarssError, match="no GGUF adapter for gpt2"):
        Run(override(config, ["export.to=gguf", f"model.path={folder}"])).all()
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_refused_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    with pytest.raises(FarssError, match=r"a GGUF file needs the package gguf: pip install"):
        Run(override(config, ["export.to=gguf"])).all()
    assert not (tmp_path / "run").exists()


def test_what_is_named_after_a_survey_is_checked_before_the_training(config):
    first = Run(config)
    first.claim(trains=False)
    first.survey()
    with pytest.raises(FolderError, match=r"there is no /nowhere/scores\.json"):
        Run(override(config, ["evaluate.full_scores=/nowhere"])).all()
    assert not (Path(config.out) / "checkpoints").exists()


def test_a_folder_that_is_not_ours_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(FolderError, match="is not empty and is no run folder"):
        Run(config).all()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_configuration_of_somebody_elses_is_no_run_folder(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("defaults: [hydra]\n")
    with pytest.raises(FolderError, match="is not empty and is no run folder"):
        Run(config).all()
    assert (tmp_path / "run" / "config.yaml").read_text() == "defaults: [hydra]\n"


def test_a_run_folder_that_was_moved_is_where_it_is(config, tmp_path):
    Run(config).claim(trains=False)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert read_config(moved / "config.yaml").out == str(moved)
    assert read_config(moved / "config.yaml", [f"out={tmp_path / 'other'}"]).out == str(tmp_path / "other")
    shutil.copy(moved / "config.yaml", tmp_path / "config.yaml")  # of no run folder
    assert read_config(tmp_path / "config.yaml").out == str(tmp_path / "run")


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    code = f"from pathlib import Path; from farss.folder import alone\nwith alone(Path({str(tmp_path)!r})): print('in')"
    with alone(tmp_path):
        beside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "is in use by another farss process" in beside.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "in\n"


def test_examples_longer_than_the_model_can_read_are_refused(config, tmp_path):
    folder = save_small("gpt2", tmp_path / "gpt2")
    stored = (folder / "config.json").read_text()
    (folder / "config.json").write_text(stored.replace('"n_positions": 256', '"n_positions": 16'))
    with pytest.raises(DataError, match=r"the longest example has \d+ tokens .*, and the model knows 16 positions: set data.max_length=16"):
        Run(override(config, [f"model.path={folder}"])).all()
    assert not (tmp_path / "run").exists()


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
    with pytest.raises(ConfigError, match=r"begins with the system message 'the system', .*: set data.system to the same text, or to ''"):
        Run(changed).check_inputs()
    for system in ("the system", "''"):
        Run(override(changed, [f"data.system={system}"])).check_inputs()


def test_a_finished_training_is_one_on_a_machine_of_another_precision(config, monkeypatch):
    config = override(config, ["train.precision=auto"])
    for bits, steps in (("bf16", 1), ("fp32", 0)):
        monkeypatch.setattr("farss.pipeline.products", lambda *_, bits=bits: bits)
        calls = []
        monkeypatch.setattr("farss.pipeline.train", counted(calls, "train", train))
        run = Run(config)
        run.claim()
        run.train()
        assert len(calls) == steps
        assert run.folder.record("train")["options"]["train.precision"] == "bf16"


def test_a_merged_model_is_asked_as_it_is_written(config):
    """In bfloat16 its weights are rounded, and it answers otherwise than the adapter that was trained."""
    config = override(config, ["plan.method=lora", "train.learning_rate=0.02", "model.dtype=bfloat16"])
    merged = override(config, ["export.to=merged"])
    Run(config).all()
    adapter = asked(config)
    Run(merged).all()
    model = load_model(replace(merged.model, path=str(Path(config.out) / "model")))
    assert read_json(Path(config.out) / "scores.json")["meta"]["weights"] == _identity(model)
    assert asked(config) != adapter


def test_paths_are_absolute_and_variables_expanded(config, monkeypatch, tmp_path):
    monkeypatch.setenv("PLACE", str(world.TASK_TRAIN.parent))
    monkeypatch.chdir(tmp_path)
    found = resolve(override(config, ["data.train=${PLACE}/task_train.jsonl", "out=here"]))
    assert found.data.train == str(world.TASK_TRAIN)
    assert found.out == str(tmp_path / "here")


# --- killed in any step ----------------------------------------------------------------------------------------------

MOMENTS = {
    "evaluate the base": "base/scores/facts.json",
    "survey": "survey/block-0002.safetensors",
    "train": "checkpoints/checkpoint-2/complete.json",
    "export": "steps/export.json",
    "evaluate": "scores/facts.json",
}


def start(config_file, until=None):
    """Run the command line; SIGKILL it as soon as the file `until` exists."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "farss.cli", "run", str(config_file)], env=environment, stdout=subprocess.DEVNULL)
    while until is not None and process.poll() is None:
        if until.exists():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    return process.wait()


def test_killed_in_every_step_it_ends_at_the_same_result(model_folder, done, tmp_path):
    values = settings(model_folder, tmp_path / "run")
    config_file = tmp_path / "run.yaml"
    config_file.write_text(json.dumps(values))
    for moment in MOMENTS.values():
        assert start(config_file, tmp_path / "run" / moment) == -signal.SIGKILL, moment
    assert start(config_file) == 0
    whole, killed = done.path, tmp_path / "run"
    for file in sorted((whole / "survey").glob("*.safetensors")):
        assert file.read_bytes() == (killed / "survey" / file.name).read_bytes(), file.name
    assert (whole / "plan.json").read_bytes() == (killed / "plan.json").read_bytes()
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    for name in ("facts", "seals"):
        assert (whole / "scores" / f"{name}.jsonl").read_bytes() == (killed / "scores" / f"{name}.jsonl").read_bytes()
