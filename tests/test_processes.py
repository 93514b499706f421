"""Several processes find what one finds."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from runs import settings
from small_models import save_small

from farss.artifacts import Survey

SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from small_models import collated, examples, small
    from farss import processes
    from farss.methods import METHODS
    from farss.survey import Site, look, survey
    from farss.survey.against import against
    if len(sys.argv) > 6:
        torch.distributed.init_process_group("gloo")  # as a trainer does before it is ours
    with processes.joined():
        site, task = Site(small("gemma3"), Path(sys.argv[2]), 4), collated(examples(), int(sys.argv[3]))
        if sys.argv[4] == "survey":
            survey(site, task, fisher="sampled")
        elif sys.argv[4] == "gradients":
            look(site, METHODS["fora"].needs, [task])
        else:
            knowledge = collated(examples(7, seed=1), int(sys.argv[5]))
            against(site, task, knowledge, METHODS["farss-plus"].needs.read)
    if len(sys.argv) > 6:
        torch.distributed.barrier()  # it is there as it was
""")


def launch(folder, batch_size=2, processes=2, what="survey", knowledge=2, beside=()):
    """Look at a model with so many processes."""
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [str(script), os.path.dirname(__file__), str(folder), str(batch_size), what, str(knowledge), *beside]
    command = [*launcher, *arguments] if processes > 1 else [sys.executable, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize(("what", "beside"), [("survey", ()), ("both texts", ("trainer",)), ("gradients", ())])
def test_two_processes_find_what_one_finds(what, beside, tmp_path):
    for count in (1, 2):
        result = launch(tmp_path / f"by{count}", processes=count, what=what, beside=beside if count > 1 else ())
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


def test_the_survey_of_farss_plus_is_shared_and_that_of_one_text_is_not(tmp_path):
    """The first process writes the knowledge text, of which each takes its share."""
    values = settings(save_small("llama-gqa", tmp_path / "model"), tmp_path / "run")
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "farss", "survey", str(tmp_path / "run.yaml")]

    def survey(*overrides):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-m", *launcher, *overrides], check=False, capture_output=True, text=True, env=environment)

    result = survey("plan.method=farss-plus")
    assert result.returncode == 0, result.stderr
    assert Survey.load(tmp_path / "run" / "task-against-knowledge").meta["processes"] == 2
    assert len((tmp_path / "run" / "own_text.jsonl").read_text().splitlines()) == 8
    assert json.loads((tmp_path / "run" / "steps" / "own_text.json").read_text())["done"]
    refused = survey("plan.method=corda-kpm", f"out={tmp_path / 'other'}")
    assert refused.returncode != 0
    assert "plan.method=corda-kpm is surveyed in one process: start this command without torchrun" in refused.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("options", [{"batch_size": 6}, {"what": "both texts", "knowledge": 7}])
def test_more_processes_than_batches_are_refused(options, tmp_path):
    result = launch(tmp_path / "run", **options)
    assert result.returncode != 0
    assert (
        "2 processes for 1 batches: start fewer processes, or lower calibration.batch_size, or raise calibration.examples" in result.stderr
    )


SPAWN = textwrap.dedent("""
    import sys
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    sys.path.insert(0, sys.argv[1])

    def work(rank, folder):
        import transformers
        import farss
        from farss import world
        from small_models import small
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        tokenizer = transformers.AutoTokenizer.from_pretrained(world.MODEL)
        model = small("llama", vocab_size=len(tokenizer), max_position_embeddings=256).float()
        rows = [{"instruction": f"Say {number}", "output": str(number)} for number in range(9)]
        quick = farss.CalibrationConfig(examples=4, batch_size=2)
        farss.prepare(model, tokenizer, rows, plan=farss.PlanConfig(boundary=1, rank=4), calibration=quick, folder=f"{folder}/survey")
        dist.barrier()
        dist.destroy_process_group()

    if __name__ == "__main__":
        mp.spawn(work, args=(sys.argv[2],), nprocs=2)
""")


def test_processes_that_no_launcher_started_do_not_wait_for_each_other(tmp_path):
    """PyTorch's own way: ranks are told to `init_process_group`, and stand in no environment."""
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    command = [sys.executable, str(script), os.path.dirname(__file__), str(tmp_path)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert Survey.load(tmp_path / "survey").meta["processes"] == 2
