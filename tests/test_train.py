"""Training: the loss, the micro-batches, exact resume, and the stop at a number that is none."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast, TrainerCallback

from farss import train as room
from farss.config import Config, ModelConfig, TrainConfig
from farss.data import Tokenized
from farss.errors import ConfigError, FarssError, FolderError, NumericalError
from farss.train import TrainResult, restore, train

VOCABULARY = 64


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def whole_model(kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted_model(dropout: float = 0.05) -> Any:
    """A trainable adapter `default` beside a frozen one, both active."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(whole_model(), lora)
    model.add_adapter("frozen", LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "frozen"])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.requires_grad_(".default." in name)
    return model.eval()


def examples(count: int = 22, seed: int = 0) -> Tokenized:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, answer = draw.randint(2, 6), draw.randint(1, 9)
        ids = [1] + [draw.randint(3, VOCABULARY - 1) for _ in range(prompt + answer)] + [2]
        rows.append({"input_ids": ids, "completion_mask": [0] * (prompt + 1) + [1] * (answer + 1)})
    return Tokenized(rows)


def options(**train_options: Any) -> Config:
    given = {"learning_rate": 1e-2, "batch_size": 4, "precision": "fp32", "gradient_checkpointing": False, "save_steps": 2}
    return Config(model=ModelConfig(path="tiny"), train=TrainConfig(**{**given, "logging_steps": 3, **train_options}), seed=5)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Raise before a step, as late as a kill can come after the checkpoint of the step before."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise Killed


# --- the loss --------------------------------------------------------------------------------------------------------


def test_one_full_step_is_adamw_on_the_mean_over_answer_tokens(tmp_path: Path) -> None:
    """The whole step from first principles: token mean, right padding, clipping, AdamW."""
    model, data = whole_model(), examples(4)
    train(model, tokenizer(), data, options(max_steps=1, micro_batch_size=2, warmup_ratio=0.0), tmp_path)

    other = whole_model().train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for row in data.rows:  # one by one, without padding
        logits = other(torch.tensor([row["input_ids"]])).logits[0, :-1]
        chosen = torch.tensor(row["completion_mask"][1:]).bool()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row["input_ids"][1:]), reduction="none")[chosen])
    torch.cat(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    optimizer.step()
    # Adam's first step is lr * sign(gradient): compare where the gradient is more than rounding
    solid = {name: p.grad.abs() > 1e-6 for name, p in other.named_parameters()}
    assert sum(int(mask.sum()) for mask in solid.values()) > 5_000
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter[solid[name]], other.get_parameter(name)[solid[name]], atol=2e-6, rtol=0)


def test_micro_batches_do_not_change_the_result(tmp_path: Path) -> None:
    def trained(micro: int) -> tuple[dict[str, torch.Tensor], TrainResult]:
        model = adapted_model(dropout=0.0)
        result = train(model, tokenizer(), examples(), options(micro_batch_size=micro, learning_rate=1e-3), tmp_path / str(micro))
        return weights(model), result

    whole, one, two = trained(4), trained(1), trained(2)  # 22 = 5 * 4 + 2: the last step is a short one
    assert difference(whole[0], one[0]) < 1e-6
    assert difference(whole[0], two[0]) < 1e-6
    assert difference(whole[0], weights(adapted_model(0.0))) > 1e-3
    assert whole[1].steps == one[1].steps == 6
    assert whole[1].loss == pytest.approx(one[1].loss, abs=1e-5)


def test_prompts_and_padding_carry_no_loss(tmp_path: Path) -> None:
    """A prompt token whose only influence would be as a target: nothing follows it that attends to it."""
    model = whole_model()
    tokens: list[Any] = []
    original = model.model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        tokens.append(kwargs["input_ids"])
        return original(*args, **kwargs)

    model.model.forward = spy
    data = examples(4)
    data.rows[0]["completion_mask"][-1] = 0  # now a trailing token that nobody attends to and nobody learns
    changed = examples(4)
    changed.rows[0]["completion_mask"][-1] = 0
    changed.rows[0]["input_ids"][-1] = 33
    train(model, tokenizer(), data, options(max_steps=2), tmp_path / "a")
    other = whole_model()
    train(other, tokenizer(), changed, options(max_steps=2), tmp_path / "b")
    assert difference(weights(model), weights(other)) == 0
    longest = max(len(row["input_ids"]) for row in data.rows)
    assert tokens[0].shape == (4, longest)  # nothing was cut, packed or appended
    assert sorted(ids[ids != 0].tolist() for ids in tokens[0]) == sorted(row["input_ids"] for row in data.rows)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gradient_checkpointing_trains_the_same_and_leaves_no_trace(tmp_path: Path, precision: str) -> None:
    def trained(checkpointing: bool) -> Any:
        model = adapted_model()
        config = options(max_steps=2, gradient_checkpointing=checkpointing, precision=precision)
        train(model, tokenizer(), examples(), config, tmp_path / str(checkpointing))
        return model

    plain, saving = trained(False), trained(True)
    assert difference(weights(plain), weights(saving)) < 1e-6
    base = saving.get_base_model()
    assert "forward" not in vars(saving)
    assert "forward" not in vars(base)
    assert not base.is_activation_checkpointing
    assert base.config.use_cache
    assert not saving.training
    assert not base.get_input_embeddings()._forward_hooks
    assert saving(torch.tensor([[1, 2]])).logits.dtype == torch.float32


def test_bf16_differs_from_fp32_but_weights_stay_float32(tmp_path: Path) -> None:
    results = {}
    for precision in ("bf16", "fp32"):
        model = whole_model()
        train(model, tokenizer(), examples(), options(max_steps=2, precision=precision), tmp_path / precision)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        results[precision] = weights(model)
    assert 0 < difference(results["bf16"], results["fp32"]) < 0.05


# --- resume ----------------------------------------------------------------------------------------------------------


LONG = {"max_steps": 10, "micro_batch_size": 2, "scheduler": "cosine", "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, TrainResult]:
    """Ten steps, six an epoch, without a break."""
    folder, model = tmp_path_factory.mktemp("straight"), adapted_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_tidy", lambda folder: None)  # its optimiser's state is compared
        return folder, model, train(model, tokenizer(), examples(), options(**LONG), folder)


@pytest.mark.parametrize("after", [4, 6, 8])  # in the first epoch, at its end, and in the second
def test_a_killed_run_ends_bit_for_bit_where_the_straight_one_does(
    tmp_path: Path, straight: Any, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, first = straight
    monkeypatch.setattr(room, "_tidy", lambda folder: None)
    with pytest.raises(Killed):
        train(adapted_model(), tokenizer(), examples(), options(**LONG), tmp_path, callbacks=[Kill(after)])
    half = tmp_path / "checkpoints" / f"checkpoint-{after + 2}"
    half.mkdir()
    (half / room.WEIGHTS).write_bytes(b"half")
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
        "import os, signal, sys; sys.path.insert(0, os.path.dirname(sys.argv[1]))\n"
        "import torch, test_train as t, pathlib\n"
        "save = torch.save\n"
        "def dying(value, path, *rest):\n"
        "    save(value, path, *rest)\n"
        "    if 'checkpoint-4' in str(path): os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = dying\n"
        "t.train(t.adapted_model(), t.tokenizer(), t.examples(), t.options(max_steps=6), pathlib.Path(sys.argv[2]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(room.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", script, __file__, str(tmp_path / "killed")], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    checkpoints = tmp_path / "killed/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    steps: list[int] = []
    resumed = adapted_model()
    train(resumed, tokenizer(), examples(), config, tmp_path / "killed", on_progress=lambda step, *_: steps.append(step))
    assert steps == [2, 3, 4, 5, 6]
    assert difference(weights(straight), weights(resumed)) == 0


def test_a_finished_run_keeps_its_weights_alone(tmp_path: Path) -> None:
    model = adapted_model()
    train(model, tokenizer(), examples(), options(max_steps=7), tmp_path)
    (last,) = (tmp_path / "checkpoints").iterdir()
    assert (last.name, sorted(path.name for path in last.iterdir())) == ("checkpoint-7", [room.MARKER, room.WEIGHTS])
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
    saved = room.safe_open(tmp_path / "checkpoints/checkpoint-3/weights.safetensors", framework="pt").keys()
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


# --- numbers that are none -------------------------------------------------------------------------------------------


def poison(model: Any) -> None:
    """A weight that an update reaches, made NaN by hand."""
    next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")


class Poison(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            poison(model)


def test_a_nan_loss_stops_and_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"the loss is nan at training step 4: lower train.learning_rate"):
        train(whole_model(), tokenizer(), examples(), options(max_steps=6), tmp_path, callbacks=[Poison()])
    (checkpoint,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    with room.safe_open(checkpoint / room.WEIGHTS, framework="pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_infinite_gradient_stops_before_the_update(tmp_path: Path, clip: float) -> None:
    model = whole_model()
    before = weights(model)
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NumericalError, match=r"the gradient norm is (inf|nan) at training step 1"):
        train(model, tokenizer(), examples(), options(max_steps=2, max_grad_norm=clip), tmp_path)
    assert difference(before, weights(model)) == 0


# --- records and options ---------------------------------------------------------------------------------------------


def test_the_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int, float | None]] = []
    model = adapted_model()
    result = train(
        model, tokenizer(), examples(), options(max_steps=7, warmup_ratio=0.2), tmp_path,
        on_progress=lambda *values: told.append(values),
    )  # fmt: skip
    assert [step for step, *_ in told] == list(range(8))
    assert told[0] == (0, 7, None)
    assert {total for _, total, _ in told} == {7}
    assert [entry["step"] for entry in result.log] == [3, 6, 7]
    losses = [loss for *_, loss in told if loss is not None]
    assert result.log[0]["loss"] == pytest.approx(sum(losses[:3]) / 3)
    assert result.loss == result.log[-1]["loss"] == pytest.approx(losses[6])
    assert [entry["learning_rate"] for entry in result.log] == pytest.approx([1e-2, 4e-3, 2e-3])  # 2 steps up, 5 down
    assert result.parameters == sum(p.numel() for n, p in model.named_parameters() if ".default." in n)
    assert result.peak_memory_gib > 0.05
    result.save(tmp_path / "train.json")
    assert TrainResult.load(tmp_path / "train.json") == result
    assert json.loads((tmp_path / "train.json").read_text())["steps"] == 7
    assert capfd.readouterr() == ("", "")


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


def test_a_callback_may_stop_early(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    result = train(adapted_model(), tokenizer(), examples(), options(max_steps=7), tmp_path, callbacks=[Stop()])
    assert result.steps == 4
    assert [entry["step"] for entry in result.log] == [3, 4]


def test_option_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: Any, **train_options: Any) -> None:
        train(model, tokenizer(), examples(), options(**train_options), tmp_path)

    with pytest.raises(ConfigError, match=r"train.scheduler='liner': did you mean 'linear'\?"):
        run(whole_model(), scheduler="liner")
    with pytest.raises(ConfigError, match=r"train.report_to: 'nobody' is not installed or not known"):
        run(whole_model(), report_to=["nobody"])
    with pytest.raises(FarssError, match="no parameter of the model is trainable"):
        run(whole_model().requires_grad_(False))
    with pytest.raises(FarssError, match=r"embed_tokens.weight is trainable but torch.bfloat16: .* make it float32"):
        run(whole_model().bfloat16())

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LlamaModel, "forward", full)
    with pytest.raises(
        FarssError,
        match=r"memory is full with 4 examples .*: set train.micro_batch_size=2, or fewer compare.jobs where they share it, and run again",
    ):
        run(whole_model())
