"""The whole line on a small model: skipped when done, refused when changed, the same after a SIGKILL in any step."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import counted, killed, settings
from safetensors.torch import load_file

from farss import inputs, world
from farss.adapter import TRAINED
from farss.artifacts import Plan, Survey
from farss.compare import compare
from farss.configfile import from_dict, load, override
from farss.errors import ConfigError, DataError, FarssError, FolderError, ModelError
from farss.folder import read_config
from farss.methods import SURVEY
from farss.options import PLAN_KEYS, TRAIN_KEYS, options_of
from farss.pipeline import Run
from farss.train import train


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
        ("fora", [], "block-gradients"),
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
    assert (step_zero > 1e-3) == (method == "kasa")  # which cuts a part of the weights off
    before = (run.path / "plan.json").stat().st_mtime_ns
    Run(run.config).all()
    assert (run.path / "plan.json").stat().st_mtime_ns == before


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
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**18, available=2**18))
    with pytest.raises(ConfigError, match=r"training every weight needs 0 GiB for [\d,]+ weights \(16 bytes each\), and the machine"):
        Run(config).check_inputs()
    with pytest.raises(ConfigError, match=r"leave full out, and name the scores.json of another run in evaluate.full_scores"):
        Run(override(config, ["compare.methods=[full, lora]"])).check_inputs()
    with pytest.raises(ConfigError, match="training every weight needs"):  # trains in float32 whatever the others load
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
    with pytest.raises(FolderError, match=r"'train', made with train.learning_rate=0.001, .* or delete .*checkpoints to train anew"):
        Run(override(config, ["train.learning_rate=1e-4"])).claim()


def test_a_prepared_start_of_another_plan_is_not_handed_out(config):
    run = Run(config)
    run.claim()
    before = run.prepared()
    assert Run(config).prepared() == before
    other = Run(override(config, ["plan.r_max=5"]))
    other.claim()
    with pytest.raises(
        FolderError, match=r"prepared was prepared for another plan, prompt or model.dtype: delete it, or choose another out"
    ):
        other.prepared()


def test_a_prepared_start_of_another_prompt_is_not_handed_out(config):
    """Its card would tell the prompt that the other trainer does not use."""
    Run(pissa := override(config, ["plan.method=pissa"])).prepared()
    for change in ("data.template='{instruction}'", "model.dtype=bfloat16"):
        with pytest.raises(FolderError, match=r"prepared for another plan, prompt or model.dtype|made with model.dtype='auto'"):
            Run(override(pissa, [change])).prepared()


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
        (["evaluate.full_scores=/nowhere"], FolderError, "there is no such file"),
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


def test_what_is_named_after_a_survey_is_checked_before_the_training(config):
    first = Run(config)
    first.claim(trains=False)
    first.survey()
    with pytest.raises(FolderError, match=r"evaluate\.full_scores=/nowhere: there is no such file"):
        Run(override(config, ["evaluate.full_scores=/nowhere"])).all()
    assert not (Path(config.out) / "checkpoints").exists()


def test_a_finished_training_is_one_on_a_machine_of_another_precision(config, monkeypatch):
    config = override(config, ["train.precision=auto"])
    for bits, steps in (("bf16", 1), ("fp32", 0)):
        monkeypatch.setattr("farss.train.trainer.products", lambda *_, bits=bits: bits)
        calls = []
        monkeypatch.setattr("farss.pipeline.train", counted(calls, "train", train))
        run = Run(config)
        run.claim()
        run.train()
        assert len(calls) == steps
        assert run.folder.record("train")["options"]["train.precision"] == "bf16"


def test_an_unfinished_run_is_told_from_a_finished_one_on_a_machine_without_its_device(config):
    run = Run(override(config, ["train.precision=auto", "model.device=cuda:7"]))
    assert not run.complete


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


@pytest.mark.parametrize(
    ("question_set", "error", "message"),
    [
        (f"{{name: facts, data: '{world.KNOWLEDGE}', question: qestion}}", DataError, "did you mean 'question'"),
        (f"{{name: facts, data: '{world.KNOWLEDGE}', prompt: Q}}", ConfigError, "{question}"),
        (f"{{name: a/b, data: '{world.KNOWLEDGE}'}}", ConfigError, "is also a file name"),
        (f"{{name: {'a' * 201}, data: '{world.KNOWLEDGE}'}}", ConfigError, "is also a file name, and has 201 characters: shorten it"),
    ],
)
def test_questions_that_cannot_be_asked_of_a_finished_run_change_nothing(done, question_set, error, message):
    before = {path: path.read_bytes() for path in done.path.rglob("*") if path.is_file()}
    with pytest.raises(error) as caught:
        Run(override(done.config, [f"evaluate.knowledge=[{question_set}]"])).claim()
    assert message in str(caught.value)
    assert {path: path.read_bytes() for path in done.path.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("no_figures")
def test_what_is_missing_in_a_folder_is_made_again(config):
    run = Run(config)
    run.all()
    for name in ("plan.json", "train.json", "scores.json", "base/scores.json", "adapter/adapter_model.safetensors"):
        before = (run.path / name).read_bytes()
        (run.path / name).unlink()
        Run(config).all()
        assert (run.path / name).read_bytes() == before


@pytest.mark.usefixtures("no_figures")
def test_what_is_damaged_in_a_folder_is_made_again_or_named(config):
    run = Run(config)
    run.all()
    kept = run.path / "checkpoints"
    for name, change in (
        ("scores/facts.jsonl", lambda content: content[:-20]),
        ("base/scores/facts.jsonl", lambda content: content[: content.index(b"\n") + 1]),
        ("adapter/adapter_model.safetensors", lambda content: content[:1000]),
    ):
        before = (run.path / name).read_bytes()
        (run.path / name).write_bytes(change(before))
        Run(config).all()
        assert (run.path / name).read_bytes() == before
    (weights,) = kept.rglob("weights.safetensors")
    for path, content, message in (
        (run.path / "scores.json", b"{}", r"scores\.json holds no scores: name another file, or delete it"),
        (run.path / "steps" / "train.json", b"{}", r"train\.json holds no record of a step"),
        (weights, bytes(weights.stat().st_size), r"weights\.safetensors is missing or damaged"),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(FolderError, match=message):
            Run(override(config, ["export.rank=2"] if path == weights else [])).all()
        path.write_bytes(before)


def test_a_copy_without_its_versions_is_no_reason_to_work_elsewhere(config):
    run = Run(config)
    run.claim()
    copy = shutil.copytree(run.path, run.path.with_name("copy"))
    with run.folder.step("plan", {}):
        pass
    (copy / "steps").mkdir(exist_ok=True)
    (copy / "versions.json").unlink()
    assert read_config(copy / "config.yaml").out == str(copy)
    with pytest.raises(FolderError, match="is not empty and is no run folder"):
        Run(read_config(copy / "config.yaml")).claim()


def test_the_dropout_of_the_training_is_that_of_the_adapter(config):
    run = Run(override(config, ["train.dropout=0.125"]))
    run.claim()
    assert run._adapted(run.plan()).peft_config[TRAINED].lora_dropout == 0.125


def test_dropout_on_the_start_of_a_residual_base_is_told(config, caplog):
    for changes, told in (["train.dropout=0.1"], True), (["train.dropout=0"], False), (["train.dropout=0.1", "plan.method=lora"], False):
        caplog.clear()
        Run(override(config, ["adapter.base=residual", *changes])).warn()
        assert ("dropout falls on the adapter's start as well" in caplog.text) == told


def test_a_damaged_survey_is_one_sentence(config):
    run = Run(config)
    run.claim()
    run.survey()
    block = run.path / "survey" / "block-0003.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(FolderError, match=r"block-0003\.safetensors is missing or damaged .*: delete .*survey, and it is made again"):
        run.plan()


def test_a_training_needs_its_data_no_more_when_it_is_over(config, tmp_path, monkeypatch):
    data = tmp_path / "mine.jsonl"
    data.write_bytes(world.TASK_TRAIN.read_bytes())
    monkeypatch.chdir(tmp_path)
    config = override(config, ["data.train=mine.jsonl"])
    run = Run(config)
    run.claim()
    run.train()
    data.unlink()
    again = Run(config)
    again.claim()
    assert again.config.data.train == load(run.path / "config.yaml").data.train == str(data)
    assert again.train() == run.train()
    with pytest.raises(DataError, match=r"there is no file .*mine\.jsonl"):
        again.export()  # which looks at a few prompts
    data.write_text("{}")
    with pytest.raises(FolderError, match=r"made with content of data\.train=.*: choose another out$"):
        Run(config).claim()
    with pytest.raises(FolderError, match=r"made with model\.path=.* put a link to it in its old place"):
        Run(override(config, [f"model.path={world.MODEL}"])).claim()


def test_a_finished_chat_is_asked_more_though_its_data_is_gone(config, tmp_path, model_folder):
    folder, data = shutil.copytree(model_folder, tmp_path / "chat"), tmp_path / "mine.jsonl"
    options = json.loads((folder / "tokenizer_config.json").read_text())
    options["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    data.write_bytes(world.TASK_TRAIN.read_bytes())
    config = override(config, [f"model.path={folder}", f"data.train={data}", "data.template=chat", "plan.method=lora"])
    run = Run(config)
    run.claim()
    run.train()
    with pytest.raises(ConfigError, match="questions of the task would be asked with 'Be brief'"):
        Run(override(config, ["data.system=Be brief"])).check_inputs()
    data.unlink()
    Run(override(config, ["evaluate.limit=3"])).claim()


def test_a_run_is_no_reference_of_itself(done):
    for named in (done.path, done.path / "scores.json"):
        with pytest.raises(FolderError, match="is this run's own: T would be 1 whatever it learned"):
            Run(override(done.config, [f"evaluate.full_scores={named}"])).claim()


@pytest.mark.parametrize(
    "change",
    [
        *("seed=1", "data.limit=32", "data.template=plain", "data.max_length=80", "model.targets=[q_proj]", "model.dtype=bfloat16"),
        *("model.quantization=nf4", "train.max_steps=5", "train.dropout=0.2", "adapter.base=residual", "plan.rank=3"),
    ],
)
def test_a_training_without_statistics_holds_to_all_it_depends_on(config, change):
    """No survey answers for its data and its seed."""
    run = Run(override(config, ["plan.method=lora"]))
    with run.folder.step("train", options_of(run.config, (*PLAN_KEYS, *TRAIN_KEYS))):
        pass
    with pytest.raises(FolderError, match=rf"'train', made with {change.partition('=')[0]}="):
        Run(override(run.config, [change])).check_unchanged()


@pytest.mark.parametrize(
    "change", ["seed=1", "calibration.fisher=sampled", "calibration.padding=count", "calibration.svd=fast", "data.limit=32"]
)
def test_a_survey_holds_to_all_it_depends_on(config, change):
    run = Run(config)
    with run.folder.step("survey", run.surveys.steps(SURVEY)["survey"]):
        pass
    with pytest.raises(FolderError, match=rf"'survey', made with {change.partition('=')[0]}="):
        Run(override(config, [change])).check_unchanged()


def test_the_seed_decides_the_start(config):
    """Of those that draw it."""
    found = []
    for seed in (0, 1, 1):
        run = Run(override(config, ["plan.method=lora", f"seed={seed}", f"out={config.out}-{len(found)}"]))
        found.append(next(p.detach() for name, p in run._adapted(run.plan()).named_parameters() if "lora_A" in name))
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[1])
