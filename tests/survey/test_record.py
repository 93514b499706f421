"""The folder of a survey: read back, refused, killed and gone on with."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from oracle import read_activations, read_against, survey_of
from small_models import collated, examples, small
from trainings import Killed, killed_at

from farss.artifacts import Survey
from farss.errors import FarssError, FolderError
from farss.jobs import unseen
from farss.methods import METHODS
from farss.survey import Site, survey
from farss.survey.against import against
from farss.survey.gradients import gradients
from farss.survey.kept import Kept


def test_same_seed_same_bytes(llama, tmp_path):
    for place in ("one", "two"):
        survey(Site(llama, tmp_path / place, 4), collated(examples()))
    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_survey_is_read_back_and_leaves_no_working_files(llama, tmp_path):
    (tmp_path / ".input-0001.safetensors.123.part").touch()  # of a process that was killed
    written = survey(Site(llama, tmp_path, 4), collated(examples()))
    assert Survey.load(tmp_path) == written
    assert {file.name for file in tmp_path.iterdir()} == {"survey.json", *(f"block-{index:04d}.safetensors" for index in range(4))}


@pytest.mark.parametrize("moment", ["forward pass, block 2", "block 2, "])
def test_a_killed_survey_goes_on_to_the_same_bytes(tmp_path, moment):
    script = textwrap.dedent("""
        import sys, os, signal
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from small_models import collated, examples, small
        from farss.survey import Site, survey
        def tell(done, total, line):
            if line.startswith(sys.argv[4]) and sys.argv[3] == "kill": os.kill(os.getpid(), signal.SIGKILL)
        survey(Site(small("llama-gqa"), Path(sys.argv[2]), 4, tell=tell), collated(examples()))
    """)
    here = os.path.dirname(os.path.dirname(__file__))

    def start(folder, how):
        return subprocess.run([sys.executable, "-c", script, here, str(tmp_path / folder), how, moment], check=False).returncode

    assert start("whole", "run") == 0
    assert start("killed", "kill") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "survey.json").exists()
    pattern = "input-000[012].safetensors" if moment.startswith("forward") else "block-000[23].safetensors"
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob(pattern)}
    assert len(done) == (3 if moment.startswith("forward") else 2)
    assert start("killed", "run") == 0
    if not moment.startswith("forward"):
        assert all(file.stat().st_mtime_ns == time for file, time in done.items())
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def test_a_folder_of_another_survey_is_refused_and_the_same_one_read(llama, tmp_path):
    first = survey(Site(llama, tmp_path, 4), collated(examples()))
    stamp = (tmp_path / "survey.json").stat().st_mtime_ns
    assert survey(Site(llama, tmp_path, 3), collated(examples())) == first
    assert (tmp_path / "survey.json").stat().st_mtime_ns == stamp
    with pytest.raises(FolderError, match="other data"):
        survey(Site(llama, tmp_path, 4), collated(examples(seed=1)))
    with pytest.raises(FolderError, match="kept 4 directions at each end, and 5 may be needed"):
        survey(Site(llama, tmp_path, 5), collated(examples()))


def test_other_batches_of_the_same_examples_are_the_same_survey(llama, tmp_path):
    first = survey(Site(llama, tmp_path, 4), collated(examples(), 2))
    assert survey(Site(llama, tmp_path, 4), collated(examples(), 3, "left")) == first


def test_an_unfinished_survey_of_other_data_is_refused(llama, tmp_path):
    with pytest.raises(Killed):
        survey(Site(llama, tmp_path, 4, tell=killed_at(1)), collated(examples()))
    with pytest.raises(FolderError, match="unfinished survey"):
        survey(Site(llama, tmp_path, 4), collated(examples(seed=1)))
    with pytest.raises(FolderError, match=r"begun with another calibration.batch_size: go on with that, or delete it"):
        survey(Site(llama, tmp_path, 4), collated(examples(), 1))  # what was kept on the way are states of other batches
    with pytest.raises(FolderError, match=r"for another method, seed or rank: delete it"):
        survey(Site(llama, tmp_path, 5), collated(examples()))
    found = survey(Site(llama, tmp_path, 3), collated(examples()))  # fewer directions than it was begun with
    assert (found.examples, found.cap) == (6, 4)


def test_an_unfinished_survey_of_two_texts_holds_to_how_both_are_batched(llama, tmp_path):
    site, read = Site(llama, tmp_path, 4, tell=killed_at(1)), METHODS["farss-plus"].needs.read
    with pytest.raises(Killed):
        against(site, collated(examples()), collated(examples(seed=1), 2), read)
    with pytest.raises(FolderError, match=r"begun with another calibration.batch_size"):
        against(replace(site, tell=unseen), collated(examples()), collated(examples(seed=1), 3), read)
    assert against(replace(site, tell=unseen), collated(examples()), collated(examples(seed=1), 2), read).examples == 6


def test_a_survey_that_was_killed_before_it_was_tidied_is_tidied(llama, tmp_path, monkeypatch):
    def killed(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "clear", killed)
        with pytest.raises(Killed):
            survey(Site(llama, tmp_path, 4), collated(examples()))
    (tmp_path / "input-0001.safetensors").touch()
    assert survey(Site(llama, tmp_path, 4), collated(examples())).examples == 6
    assert {file.name for file in tmp_path.iterdir()} == {"survey.json", *(f"block-{index:04d}.safetensors" for index in range(4))}


def test_a_disk_without_room_is_refused_before_anything_is_computed(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(FarssError, match=r"keeps 0\.0 GB in .* while it runs, and 0\.0 GB are free"):
        survey(Site(llama, tmp_path, 4), collated(examples()))
    assert {file.name for file in tmp_path.iterdir()} == {"progress.json"}


MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="reads what Linux says of the files in use")
@pytest.mark.parametrize("look", [survey_of, read_activations, read_against])
def test_no_file_is_in_use_when_it_is_deleted(llama, tmp_path, monkeypatch, look):
    """Windows does not delete one that is."""
    deleted, unlink = {}, Path.unlink

    def noted(path, missing_ok=False):
        deleted[path.name] = str(path) in MAPS.read_text()
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    look(llama, tmp_path)
    assert not any(deleted.values())
    assert {f"input-{block:04d}.safetensors" for block in range(4)} <= deleted.keys()


LOOKS = [survey_of, read_activations, read_against, lambda model, folder: gradients(Site(model, folder), collated(examples()))]


@pytest.mark.parametrize("look", LOOKS)
def test_a_survey_of_other_weights_is_refused(tmp_path, look):
    """Whoever calls the library has no other guard."""
    model = small("llama-gqa")
    look(model, tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data *= 1.1
    with pytest.raises(FolderError, match="of another model"):
        look(model, tmp_path)


@pytest.mark.parametrize("how", [{"fisher": "sampled"}, {"seed": 1}, {"svd": "fast"}])
def test_a_survey_that_was_made_otherwise_is_refused(llama, tmp_path, how):
    survey(Site(llama, tmp_path, 4), collated(examples()))
    with pytest.raises(FolderError, match="method or seed"):
        survey(Site(llama, tmp_path, 4), collated(examples()), **how)
