"""Whose folder it is, and what of a configuration a step depends on."""

import json
import shutil
import subprocess
import sys

import pytest

from farss import world
from farss.configfile import dump, override
from farss.errors import FolderError
from farss.files import write_json
from farss.folder import alone, read_config, resolve
from farss.options import EVALUATE_KEYS, options_of
from farss.pipeline import Run


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
    older["evaluate.knowledge"][0]["split"] = "test"  # what a file had once, for nothing
    del older["evaluate.knowledge"][0]["fewshot"]
    write_json(run.path / "steps" / "evaluate.json", {"options": older, "done": True})
    assert run.folder.is_done("evaluate", options)
    older["evaluate.knowledge"][0]["limit"] = 3
    write_json(run.path / "steps" / "evaluate.json", {"options": older, "done": True})
    assert not run.folder.is_done("evaluate", options)


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
    (tmp_path / "run" / "config.yaml").write_text(dump(config))  # one that was put there to be run
    Run(config).claim(trains=False)


def test_a_run_folder_that_was_moved_is_where_it_is(config, tmp_path):
    Run(config).claim(trains=False)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert read_config(moved / "config.yaml").out == str(moved)
    for other in ("other", "run"):
        assert read_config(moved / "config.yaml", [f"out={tmp_path / other}"]).out == str(tmp_path / other)
    shutil.copy(moved / "config.yaml", tmp_path / "config.yaml")  # of no run folder
    assert read_config(tmp_path / "config.yaml").out == str(tmp_path / "run")


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    code = f"from pathlib import Path; from farss.folder import alone\nwith alone(Path({str(tmp_path)!r})): print('in')"
    with alone(tmp_path):
        beside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "is in use by another farss process" in beside.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "in\n"


def test_paths_are_absolute_and_variables_expanded(config, monkeypatch, tmp_path):
    monkeypatch.setenv("PLACE", str(world.TASK_TRAIN.parent))
    monkeypatch.chdir(tmp_path)
    found = resolve(override(config, ["data.train=${PLACE}/task_train.jsonl", "out=here"]))
    assert found.data.train == str(world.TASK_TRAIN)
    assert found.out == str(tmp_path / "here")


def test_a_path_stays_absolute_while_what_it_names_is_gone(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"model.path": "my-model", "data.train": "rows.jsonl", "evaluate.text": "text"}
    for name in names.values():
        (tmp_path / name).mkdir()
    config = override(config, [f"{key}={name}" for key, name in names.items()])
    before = resolve(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(before))
    for name in names.values():
        (tmp_path / name).rmdir()
    assert resolve(config) == before
    assert before.model.path == str(tmp_path / "my-model")
    elsewhere = resolve(override(config, ["out=elsewhere"]))
    assert (elsewhere.model.path, elsewhere.data.train) == ("my-model", str(tmp_path / "rows.jsonl"))  # the first may be on a hub
