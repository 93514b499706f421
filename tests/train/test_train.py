"""Training: the loss, the micro-batches, and the stop at a number that is none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from small_models import small
from trainings import adapted_model, difference, examples, options, tokenizer, weights, whole_model
from transformers import LlamaModel, TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from farss.batches import collate
from farss.data import Tokenized
from farss.errors import ConfigError, FarssError, NumericalError
from farss.train import TrainResult, train
from farss.train.checkpoints import WEIGHTS
from farss.train.trainer import _arguments, scored_alike, unchanged

# --- the loss --------------------------------------------------------------------------------------------------------


def test_one_full_step_is_adamw_on_the_mean_over_answer_tokens(tmp_path: Path) -> None:
    """The whole step from first principles: token mean, right padding, AdamW. (To its first step a gradient's scale is next to nothing.)"""
    model, data = whole_model(), examples(4)
    train(model, tokenizer(), data, options(max_steps=1, micro_batch_size=2, warmup_ratio=0.0, weight_decay=0.1), tmp_path)

    other = whole_model().train()
    norms = [parameter for name, parameter in other.named_parameters() if "norm" in name]  # which do not decay
    rest = [parameter for name, parameter in other.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], lr=1e-2)
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


@pytest.mark.parametrize("most", [0.05, 0.0])
def test_gradients_are_clipped_at_what_is_configured(tmp_path: Path, most: float) -> None:
    """Steps behind the first depend on the scale of the gradients before. 0: on none."""
    model, data = whole_model(), examples(4)
    how = {"max_steps": 3, "warmup_ratio": 0.0, "weight_decay": 0.0, "scheduler": "constant", "max_grad_norm": most}
    train(model, tokenizer(), data, options(**how), tmp_path)

    other, batch, norms = whole_model().train(), collate(data.rows, 0), []
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        logits = other(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(other.parameters(), most or torch.inf).item())
        optimizer.step()
    assert min(norms) > 0.05
    straight = torch.cat([p.detach().flatten() - q.detach().flatten() for p, q in zip(model.parameters(), other.parameters(), strict=True)])
    assert straight.abs().quantile(0.99) < 1e-4  # where a gradient is rounding, Adam's steps are too


@pytest.mark.parametrize(("build", "data"), [(whole_model, examples()), (lambda: adapted_model(0.5), Tokenized(examples(1).rows * 4))])
def test_the_seed_decides_the_order_and_the_dropout(tmp_path: Path, build: Any, data: Tokenized) -> None:
    """Of four times one example every order is the same."""
    found = []
    for place, seed in enumerate((5, 5, 6)):
        model = build()
        train(model, tokenizer(), data, dataclasses.replace(options(max_steps=3), seed=seed), tmp_path / str(place))
        found.append(weights(model))
    assert difference(found[0], found[1]) == 0
    assert difference(found[0], found[2]) > 1e-3


def test_a_training_of_one_step_is_one(tmp_path: Path) -> None:
    """Whose warm-up would be all of it, at a rate of zero."""
    model = whole_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    done = train(model, tokenizer(), examples(4), options(max_steps=1, warmup_ratio=0.03, logging_steps=1), tmp_path)
    assert [entry["learning_rate"] for entry in done.log if "learning_rate" in entry] == [1e-2]
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_on_a_gpu_the_optimiser_copies_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's AdamW over lists of tensors holds the root of every second moment at once: 4 bytes a weight more."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    arguments = [_arguments(options().train, 0, Path("x"), torch.device(kind), None, 8) for kind in ("cpu", "cuda")]
    assert [each.optim.value for each in arguments] == ["adamw_torch", "adamw_torch_fused"]


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
    assert tokens[-1].shape == (4, longest)  # nothing was cut, packed or appended
    assert sorted(ids[ids != 0].tolist() for ids in tokens[-1]) == sorted(row["input_ids"] for row in data.rows)


@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize(("kind", "fused"), [("llama-gqa", True), ("gemma3", True), ("modernbert-decoder", False), ("llama4", False)])
def test_the_loss_is_that_of_the_models_own_logits(tmp_path: Path, kind: str, fused: bool, micro: int) -> None:
    """TRL's output layer leaves out what some architectures do between their last block and their logits, and finds no part of others."""
    base, data = small(kind).float(), examples(4)
    batch = collate(data.rows, 0)
    with torch.no_grad():
        logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    targets = ["q_proj", "Wi", "attn.q_proj"] if kind == "modernbert-decoder" else ["q_proj"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    done = train(model, tokenizer(), data, options(max_steps=1, micro_batch_size=micro, logging_steps=1), tmp_path)
    assert done.loss == pytest.approx(own, rel=1e-5)
    with unchanged(base):
        add_fused_lm_head(base)
        assert scored_alike(base, data.rows[0]["input_ids"]) == fused


def test_the_models_special_tokens_are_those_that_it_had(tmp_path: Path) -> None:
    """TRL and transformers align them with the tokenizer, and a full fine-tuning would be written with theirs."""
    base = small("llama-gqa").float()
    base.config.pad_token_id = base.generation_config.pad_token_id = None
    base.config.eos_token_id = base.generation_config.eos_token_id = 7
    before = base.config.to_dict(), base.generation_config.to_dict()
    train(base.requires_grad_(True), tokenizer(), examples(4), options(max_steps=1), tmp_path)
    assert (base.config.to_dict(), base.generation_config.to_dict()) == before


@pytest.mark.parametrize("kind", ["mixtral", "granite-moe"])
def test_of_a_mixture_the_answers_alone_are_learnt(tmp_path: Path, kind: str) -> None:
    """TRL adds the load-balancing loss that its configuration names, and asks the model for its routers' logits from then on."""
    base, data = small(kind, router_aux_loss_coef=0.9).float(), examples(4)
    before = base.config.to_dict()
    batch = collate(data.rows, 0)
    with torch.no_grad():
        logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    done = train(base.requires_grad_(True), tokenizer(), data, options(max_steps=1, logging_steps=1), tmp_path)
    assert done.loss == pytest.approx(own, rel=1e-5)
    assert base.config.to_dict() == before
    assert base(input_ids=batch["input_ids"], output_router_logits=True).router_logits  # what collects them is still there


def test_options_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    base = whole_model().half()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), autocast_adapter_dtype=True)
    with pytest.raises(ConfigError, match=r"the weights are float16, in which small gradients vanish .*: set model.dtype=float32"):
        train(model, tokenizer(), examples(), options(precision="fp32"), tmp_path)
    japanese = small("gpt-neox-japanese").float().requires_grad_(True)
    with pytest.raises(ConfigError, match=r"cannot compute its activations anew: set train.gradient_checkpointing=false"):
        train(japanese, tokenizer(), examples(), options(gradient_checkpointing=True), tmp_path)


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
        before = weights(model)
        train(model, tokenizer(), examples(), options(max_steps=4, warmup_ratio=0.0, precision=precision), tmp_path / precision)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        results[precision] = torch.cat([(after - before[name]).flatten() for name, after in weights(model).items()])
    assert not torch.equal(results["bf16"], results["fp32"])
    assert torch.cosine_similarity(results["bf16"], results["fp32"], dim=0) > 0.9  # the same steps, but for the rounding


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
    with safe_open(checkpoint / WEIGHTS, framework="pt") as file:
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
