"""Exact resume, and what a finished training leaves."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainings
from safetensors import safe_open
from trainings import Kill, Killed, adapted_model, difference, examples, options, tokenizer, weights, whole_model

import farss
from farss.config import TrainConfig
from farss.errors import FarssError, FolderError
from farss.train import TrainResult, restore, train, training
from farss.train.checkpoints import MARKER, WEIGHTS

LONG = {"max_steps": 10, "micro_batch_size": 2, "scheduler": "cosine", "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, TrainResult]:
    """Ten steps, six an epoch, without a break."""
    folder, model = tmp_path_factory.mktemp("straight"), adapted_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "tidy", lambda folder: None)  # its optimiser's state is compared
        return folder, model, train(model, tokenizer(), examples(), options(**LONG), folder)


@pytest.mark.parametrize("after", [4, 6, 8])  # in the first epoch, at its end, and in the second
def test_a_killed_run_ends_bit_for_bit_where_the_straight_one_does(
    tmp_path: Path, straight: Any, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, first = straight
    monkeypatch.setattr(training, "tidy", lambda folder: None)
    with pytest.raises(Killed):
        train(adapted_model(), tokenizer(), examples(), options(**LONG), tmp_path, callbacks=[Kill(after)])
    half = tmp_path / "checkpoints" / f"checkpoint-{after + 2}"
    half.mkdir()
    (half / WEIGHTS).write_bytes(b"half")
    torch.manual_seed(99)
    resumed = adapted_model()
    second = train(resumed, tokenizer(), examples(), options(**LONG), tmp_path)

    assert difference(weights(model), weights(resumed)) == 0
    assert second.log == [{**entry, "seconds": second.log[i]["seconds"]} for i, entry in enumerate(first.log)]
    assert (second.steps, second.epochs, second.loss) == (first.steps, first.epochs, first.loss)
    assert resumed.base_model.active_adapters == ["default", "frozen"]
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == {n for n in weights(resumed) if ".default." in n}
    optimisers = [torch.load(run / "checkpoints/checkpoint-10/optimizer.pt") for run in (folder, tmp_path)]
    for state, other in zip(*(o["state"].values() for o in optimisers), strict=True):
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(other[key])) for key in state)
    times = [entry["seconds"] for entry in second.log] + [second.seconds]
    assert times == sorted(times)


def test_a_sigkill_in_the_middle_of_a_save(tmp_path: Path) -> None:
    config = options(max_steps=6)
    straight = adapted_model()
    train(straight, tokenizer(), examples(), config, tmp_path / "straight")
    script = (
        "import os, signal, sys, farss.train; sys.path.insert(0, os.path.dirname(sys.argv[1]))\n"
        "import torch, trainings as t, pathlib\n"
        "save = torch.save\n"
        "def dying(value, path, *rest):\n"
        "    save(value, path, *rest)\n"
        "    if 'checkpoint-4' in str(path): os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = dying\n"
        "farss.train.train(t.adapted_model(), t.tokenizer(), t.examples(), t.options(max_steps=6), pathlib.Path(sys.argv[2]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(farss.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", script, trainings.__file__, str(tmp_path / "killed")], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    checkpoints = tmp_path / "killed/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    steps: list[int] = []
    resumed = adapted_model()
    train(resumed, tokenizer(), examples(), config, tmp_path / "killed", on_progress=lambda step, *_: steps.append(step))
    assert steps == [2, 3, 4, 5, 6]
    assert difference(weights(straight), weights(resumed)) == 0


def test_a_finished_run_keeps_its_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model()
    with monkeypatch.context() as patch:
        patch.setattr(training, "tidy", lambda folder: None)  # as where it is killed before that
        train(model, tokenizer(), examples(), options(max_steps=7), tmp_path)
    assert len([*(tmp_path / "checkpoints").iterdir()]) > 1
    train(adapted_model(), tokenizer(), examples(), options(max_steps=7), tmp_path)
    (last,) = (tmp_path / "checkpoints").iterdir()
    assert (last.name, sorted(path.name for path in last.iterdir())) == ("checkpoint-7", [MARKER, WEIGHTS])
    again = adapted_model()
    restore(again, tmp_path)
    assert difference(weights(model), weights(again)) == 0


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = options(epochs=1.5)
    model = adapted_model()
    first = train(model, tokenizer(), examples(), config, tmp_path)
    assert first.steps == 9
    assert first.epochs == pytest.approx(1.5)
    again = adapted_model()
    second = train(again, tokenizer(), examples(), config, tmp_path, callbacks=[Kill(0)])
    assert first == second
    assert difference(weights(model), weights(again)) == 0


@pytest.mark.parametrize("build", [adapted_model, whole_model])
def test_restore_brings_the_trained_weights_into_a_fresh_model(tmp_path: Path, build: Any) -> None:
    model = build()
    train(model, tokenizer(), examples(), options(max_steps=3), tmp_path)
    fresh = build().requires_grad_(False)
    restore(fresh, tmp_path)
    assert difference(weights(model), weights(fresh)) == 0
    saved = safe_open(tmp_path / "checkpoints/checkpoint-3/weights.safetensors", framework="pt").keys()
    assert set(saved) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_restore_errors(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"there is no training in .*: run `farss train` first"):
        restore(whole_model(), tmp_path)
    with pytest.raises(Killed):
        train(whole_model(), tokenizer(), examples(), options(max_steps=4), tmp_path, callbacks=[Kill(2)])
    with pytest.raises(FolderError, match="stopped at step 2 of 4: run it again to go on"):
        restore(whole_model(), tmp_path)
    train(whole_model(), tokenizer(), examples(), options(max_steps=4), tmp_path)
    with pytest.raises(FolderError, match=r"from a base model with fingerprint [0-9a-f]{16}, but this one has [0-9a-f]{16}"):
        restore(whole_model(kv_heads=1), tmp_path)
    (tmp_path / "train.json").write_text("{}")
    (tmp_path / "checkpoints" / "checkpoint-4" / MARKER).unlink()
    with pytest.raises(FolderError, match=r"the weights in .*checkpoints are damaged"):
        restore(whole_model(), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(FolderError, match="the weights that were trained there are deleted"):
        restore(whole_model(), tmp_path)


def test_checkpoints_come_as_often_as_is_asked_for_now(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(whole_model(), tokenizer(), examples(), options(max_steps=6, save_steps=3), tmp_path, callbacks=[Kill(4)])
    with pytest.raises(Killed):
        train(whole_model(), tokenizer(), examples(), options(max_steps=6, save_steps=1), tmp_path, callbacks=[Kill(5)])
    assert (tmp_path / "checkpoints" / "checkpoint-5").is_dir()


@pytest.mark.parametrize(("steps", "checkpoints"), [(1, 1), (2, 2), (5, 3), (9, 3)])
def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, checkpoints: int
) -> None:
    model = whole_model()
    needed = 12 * checkpoints * sum(parameter.numel() for parameter in model.parameters())
    how = options(max_steps=steps, save_steps=1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    with pytest.raises(FarssError, match=rf"the training keeps 0\.0 GB in {tmp_path}/checkpoints while it runs, and .* choose an out"):
        train(model, tokenizer(), examples(4), how, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=needed))
    assert train(model, tokenizer(), examples(4), how, tmp_path).steps == steps


def test_less_at_a_time_goes_on_to_the_same_result(tmp_path: Path) -> None:
    """A training that filled the memory goes on in smaller forward passes."""
    whole, resumed = whole_model(), whole_model()
    train(whole, tokenizer(), examples(), options(max_steps=6), tmp_path / "whole")
    with pytest.raises(Killed):
        train(whole_model(), tokenizer(), examples(), options(max_steps=6), tmp_path / "less", callbacks=[Kill(2)])
    train(resumed, tokenizer(), examples(), options(max_steps=6, micro_batch_size=1, gradient_checkpointing=True), tmp_path / "less")
    assert difference(weights(whole), weights(resumed)) <= 1e-5
    assert difference(weights(whole), weights(whole_model())) > 1e-2


def test_a_clock_that_was_ahead_deletes_nothing_new(tmp_path: Path) -> None:
    """transformers keeps the checkpoints with the latest times, which may be those of another machine."""
    once = {"save_steps": 1, "max_steps": 4}
    train(adapted_model(), tokenizer(), examples(), options(**once), tmp_path, stop_at=2)
    for path in (tmp_path / "checkpoints").iterdir():
        os.utime(path, (4e9, 4e9))
    assert train(adapted_model(), tokenizer(), examples(), options(**once), tmp_path, stop_at=3).steps == 3
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_a_torn_mark_costs_one_checkpoint(tmp_path: Path) -> None:
    """As a power cut leaves it."""
    once = {"save_steps": 1, "max_steps": 4}
    train(adapted_model(), tokenizer(), examples(), options(**once), tmp_path, stop_at=3)
    (tmp_path / "checkpoints" / "checkpoint-3" / MARKER).write_text("")
    assert train(adapted_model(), tokenizer(), examples(), options(**once), tmp_path).steps == 4


def test_an_option_that_another_farss_adds_refuses_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(adapted_model(), tokenizer(), examples(), options(max_steps=4), tmp_path, stop_at=2)

    @dataclasses.dataclass(frozen=True)
    class Newer(TrainConfig):
        added: float = 0.5

    known = options(max_steps=4)
    newer = dataclasses.replace(known, train=Newer(**dataclasses.asdict(known.train)))
    monkeypatch.setattr(training, "TrainConfig", Newer)
    assert train(adapted_model(), tokenizer(), examples(), newer, tmp_path).steps == 4


def test_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    train(whole_model(), tokenizer(), examples(), options(max_steps=2), tmp_path)
    for data, config in [(examples(), options(max_steps=3)), (examples(seed=1), options(max_steps=2))]:
        with pytest.raises(FolderError, match="belongs to a training with other options, data or adapters: choose another"):
            train(whole_model(), tokenizer(), data, config, tmp_path)
    train(whole_model(), tokenizer(), examples(), options(max_steps=2, micro_batch_size=1), tmp_path)  # the same result


def test_another_base_or_another_start_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(adapted_model(), tokenizer(), examples(), options(max_steps=4), tmp_path, callbacks=[Kill(2)])
    for layer, what in (
        ("model.layers.0.mlp.gate_proj", "base model"),
        ("model.layers.0.self_attn.q_proj.lora_A.frozen", "start of the adapters"),
    ):
        other = adapted_model()
        other.base_model.model.get_submodule(layer).weight.data += 1
        with pytest.raises(FolderError, match=rf"trained from a {what} with fingerprint [0-9a-f]{{16}}, but this one has [0-9a-f]{{16}}"):
            train(other, tokenizer(), examples(), options(max_steps=4), tmp_path)


def test_a_training_that_stops_and_goes_on_ends_where_the_straight_one_does(tmp_path: Path, straight: Any) -> None:
    _, model, whole = straight
    for stop in (3, 3, 7):  # between two checkpoints, there already, and in the second epoch
        part = train(adapted_model(), tokenizer(), examples(), options(**LONG), tmp_path, stop_at=stop)
        assert part.steps == stop
    with pytest.raises(FolderError, match="belongs to a training with other options"):
        train(adapted_model(), tokenizer(), examples(), options(**LONG), tmp_path, cycles=2)
    resumed = adapted_model()
    last = train(resumed, tokenizer(), examples(), options(**LONG), tmp_path)
    assert difference(weights(model), weights(resumed)) == 0
    assert [entry["loss"] for entry in last.log] == [entry["loss"] for entry in whole.log]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_checkpoint_that_is_not_whole_costs_one(tmp_path: Path, damage: str) -> None:
    """As a full disk, or a kill while it was deleted, leaves it."""
    once = {"save_steps": 1, "max_steps": 4}
    whole = adapted_model()
    train(whole, tokenizer(), examples(), options(**once), tmp_path / "whole")
    train(adapted_model(), tokenizer(), examples(), options(**once), tmp_path / "run", stop_at=3)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    if damage == "cut":
        (newest / WEIGHTS).write_bytes((newest / WEIGHTS).read_bytes()[:-8])
    else:
        (newest / "optimizer.pt").unlink()
    resumed = adapted_model()
    assert train(resumed, tokenizer(), examples(), options(**once), tmp_path / "run").steps == 4
    assert difference(weights(resumed), weights(whole)) == 0
