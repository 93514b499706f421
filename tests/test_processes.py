"""Several processes find what one finds."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from farss.artifacts import Survey

SCRIPT = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from small_models import examples, small
    from test_survey import collated
    from farss import processes
    from farss.methods import METHODS
    from farss.survey import read_layers, survey
    with processes.joined():
        model, task = small("gemma3"), collated(examples(), int(sys.argv[3]))
        if sys.argv[4] == "survey":
            survey(model, task, sys.argv[2], 4, fisher="sampled")
        else:
            read_layers(model, sys.argv[2], METHODS["farss-plus"].needs.read, 4, [task, collated(examples(7, seed=1), int(sys.argv[5]))])
""")


def launch(folder, batch_size=2, processes=2, what="survey", knowledge=2):
    """Look at a model with so many processes."""
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [str(script), os.path.dirname(__file__), str(folder), str(batch_size), what, str(knowledge)]
    command = [*launcher, *arguments] if processes > 1 else [sys.executable, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("what", ["survey", "both texts"])
def test_two_processes_find_what_one_finds(what, tmp_path):
    for count in (1, 2):
        result = launch(tmp_path / f"by{count}", processes=count, what=what)
        assert result.returncode == 0, result.stderr
    one, two = Survey.load(tmp_path / "by1"), Survey.load(tmp_path / "by2")
    assert two.meta["processes"] == 2
    assert {file.name for file in (tmp_path / "by1").iterdir()} == {file.name for file in (tmp_path / "by2").iterdir()}
    for name, layer in one.layers.items():
        assert two.layers[name].importance == pytest.approx(layer.importance, rel=1e-5)
        known, found = one.directions(name), two.directions(name)
        for expected, actual in ((known.sigma, found.sigma), (known.lam, found.lam), (known.gam, found.gam)):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-12)
        assert found.scores.argsort(stable=True).tolist() == known.scores.argsort(stable=True).tolist()


@pytest.mark.parametrize("options", [{"batch_size": 6}, {"what": "both texts", "knowledge": 7}])
def test_more_processes_than_batches_are_refused(options, tmp_path):
    result = launch(tmp_path / "run", **options)
    assert result.returncode != 0
    assert "2 processes for 1 batches: start fewer processes, or lower calibration.batch_size" in result.stderr
