"""Words to calls, user errors to one sentence and an exit code."""

import codecs
import json
import subprocess
import sys

import pytest
import yaml
from small_models import save_small
from test_boundary import settings
from typer.testing import CliRunner

from farss import cli, world
from farss.artifacts import Survey
from farss.cli import app
from farss.config import Config
from farss.configfile import from_dict
from farss.methods import METHODS

COMMANDS = [
    *("demo", "config", "run", "survey", "plan", "train", "evaluate", "export", "report", "compare", "methods", "gemma"),
    *("boundary", "prepare", "convert"),
]


def farss(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "farss.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)


def test_every_command_has_help():
    listed = CliRunner().invoke(app, ["--help"]).output
    for command in COMMANDS:
        assert command in listed
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_config_prints_a_usable_file():
    output = CliRunner().invoke(app, ["config"]).output
    assert from_dict(yaml.safe_load(output.replace("2.0e-05", "0.00002").replace("2e-05", "0.00002"))) == Config()


def test_methods_lists_them_all():
    output = CliRunner().invoke(app, ["methods"]).output
    assert all(name in output for name in METHODS)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "missing.yaml"], 2, "there is no configuration file missing.yaml"),
        (["run", "run.yaml", "train.lr=1"], 2, "unknown key 'train.lr'"),
        (["run", "run.yaml", "model.path=nowhere/at/all"], 2, "there is no such folder"),
        (["run", "run.yaml", f"model.path={world.MODEL}", "plan.boundary=77"], 2, "the model has 12 blocks"),
        (["train", "run.yaml", "compare.methods=[farss, lora]"], 2, "run.yaml compares methods, and this is a step of a single run"),
        (["report", "."], 2, "holds no run of ours"),
        (["report", "run.yaml", "out=nowhere"], 2, "nowhere"),
        (["report", ".", "out=nowhere"], 2, "a folder has no options to override"),
        (["boundary", "run.yaml", "plan.method=lora"], 2, "treats all blocks alike"),
        (["survey", "run.yaml", "plan.method=lora"], 2, "plan.method=lora looks at nothing before it is planned"),
        (["survey", "run.yaml", "compare.methods=[lora, full]"], 2, "compare.methods=['lora', 'full'] looks at nothing before"),
        (["survey", "run.yaml", "compare.methods=[lora, farss]", "compare.settings={lora: }"], 2, "write its options as"),
        (["survey", "run.yaml", "compare.methods=[farss@a/b]"], 2, "give a method, or a method, @ and a word of letters"),
        (["run", "run.yaml", "seed=-1"], 2, "seed is -1: give a number from 0 to 4294967295"),
        (["compare", "run.yaml", "--seeds", "4294967296"], 2, "compare.seeds is 4294967296"),
        (["boundary", "run.yaml", f"model.path={world.MODEL}"], 2, "something to measure forgetting on"),
        (["evaluate", "run.yaml", f"model.path={world.MODEL}"], 2, "run.yaml asks nothing"),
        (
            ["export", "run.yaml", f"model.path={world.MODEL}", "--to", "merged", "--rank", "8"],
            2,
            "export.rank=8 compresses",
        ),
        (
            ["export", "run.yaml", f"model.path={world.MODEL}", "plan.method=full", "--rank", "8"],
            2,
            "and plan.method=full hands over a model",
        ),
        (["compare", "run.yaml", "--methods", ""], 2, "--methods is empty: give it a value, or leave it out"),
        (["compare", "run.yaml", "--seeds", ","], 2, "--seeds is empty"),
        (["export", "run.yaml", "--to", ""], 2, "--to is empty"),
        (["run", "x" * 300], 2, "cannot be reached (File name too long)"),
        (["report", "x" * 300], 2, "cannot be reached (File name too long)"),
        (["run", "run.yaml", "y" * 300 + ".yaml"], 2, "cannot be reached (File name too long)"),
    ],
)
def test_one_sentence_and_an_exit_code(tmp_path, monkeypatch, capsys, arguments, code, message):
    (tmp_path / "run.yaml").write_text(f"data: {{train: '{world.TASK_TRAIN}', limit: 20}}\nplan: {{rank: 16}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["farss", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    shown = capsys.readouterr().err
    assert left.value.code == code
    assert message in " ".join(shown.split())
    assert shown.startswith("farss: ")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_the_command_itself(tmp_path):
    result = farss("run", "missing.yaml", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("farss: there is no configuration file missing.yaml")
    assert "Traceback" not in result.stderr


def test_characters_that_an_encoding_does_not_have_are_spelt():
    codecs.register_error("farss", cli._spelt)
    assert "−2.4 ■ ░█ é 字".encode("cp1252", errors="farss") == "-2.4 # .# é ?".encode("cp1252")


def test_importing_loads_nothing_heavy():
    heavy = ("torch", "transformers", "peft", "trl", "lm_eval", "datasets")
    code = f"import sys, farss, farss.config; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_boundary_shows_its_curve_and_leaves_a_page(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(settings(save_small("llama-gqa", tmp_path / "model"), tmp_path / "run")))
    result = CliRunner().invoke(app, ["boundary", str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.exception
    found = json.loads((tmp_path / "run" / "boundary.json").read_text())
    assert [each["boundary"] for each in found["candidates"]] == [1, 2]
    shown = " ".join(result.output.split())
    assert f"The search chose boundary {found['chosen']}" in shown
    assert "are asked in the evaluation too" in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Chosen: {found['chosen']} shallow block" in page.replace("\u202f", " ").replace("\xa0", " ")


def test_a_search_leaves_a_comparisons_configuration_alone(tmp_path):
    values = settings(save_small("llama-gqa", tmp_path / "model"), tmp_path / "run") | {"compare": {"methods": ["farss", "lora"]}}
    values["plan"]["boundary"] = 1
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(before := "# the comparison's\n")
    (tmp_path / "run" / "versions.json").write_text("{}")
    result = CliRunner().invoke(app, ["boundary", str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    own = "{farss: {train.learning_rate: 1e-3}}"
    result = CliRunner().invoke(app, ["boundary", str(tmp_path / "run.yaml"), f"compare.settings={own}"])
    assert "gives 'farss' its own train.learning_rate, which this search would not have" in str(result.exception)


def test_survey_collects_what_every_method_of_a_comparison_looks_at(tmp_path):
    values = settings(save_small("llama-gqa", tmp_path / "model"), tmp_path / "run")
    values["plan"] |= {"boundary": 1, "method": "pissa"}
    values["calibration"]["knowledge"] = str(world.TEXT)
    values["compare"] = {"methods": ["lora", "farss", "farss@wide", "farss-plus"], "settings": {"farss@wide": {"plan.r_max": 9}}}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["survey", str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.exception
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"steps", "survey", "task-against-knowledge"}
    assert Survey.load(tmp_path / "run" / "survey").cap == 9
    assert Survey.load(tmp_path / "run" / "task-against-knowledge").cap == 8


def test_report_draws_from_artifacts_alone_and_opens_the_page(tmp_path, monkeypatch):
    values = {"K": {"value": 0.9}, "T": {"value": 0.8}, "KT": {"value": 0.847}, "benchmarks": []}
    (tmp_path / "summary.json").write_text(json.dumps(values))
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or len(opened) < 2)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0
    assert "84.7" in result.output
    assert not opened
    assert "no browser" not in CliRunner().invoke(app, ["report", str(tmp_path), "--open"]).output
    assert opened == [(tmp_path / "report.html").as_uri()]
    assert "no browser was found" in CliRunner().invoke(app, ["report", str(tmp_path), "--open"]).output


def test_a_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("farss.cli.commented", interrupted)
    monkeypatch.setattr(sys, "argv", ["farss", "config"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
    assert "stopped; the same command continues where it was" in capsys.readouterr().err
