"""The adapted model equals the base at step 0, whatever the method, and leaves the base untouched."""

import copy

import pytest
import torch
from small_models import ARCHITECTURES, logits, small, surveyed

from farss.adapter import START, TRAINED, active_adapters, adapter_change, attach, lora_layers, untouched_base
from farss.config import PlanConfig
from farss.errors import FarssError, ModelError, NumericalError
from farss.maths.directions import decompose
from farss.plan import make_plan_without_survey
from farss.portable import step_zero
from farss.structure import find_blocks, target_layers, weight_of


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_step_zero_equals_the_base(kind, tmp_path):
    """Law 3, in float32."""
    model, found, plan = surveyed(kind, tmp_path)
    before = logits(model)
    adapted = attach(model, plan, found, dropout=0.05).eval()
    scale = max(1.0, before.abs().max().item())
    assert (logits(adapted) - before).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("base", ["untouched", "residual"])
def test_dropout_is_of_the_change_where_the_base_is_whole(base, tmp_path):
    """And of all that trains, as in PEFT, where the start was subtracted from the weights."""
    model, found, plan = surveyed("llama", tmp_path)
    adapted = attach(model, plan, found, dropout=0.5, base=base).train()
    module, x = next(iter(lora_layers(adapted, plan).values())), torch.randn(3, 5, 32)
    module.lora_B[TRAINED].weight.data += 0.1
    torch.manual_seed(0)
    after = module(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    changed = sum(module.scaling[name] * module.lora_B[name](module.lora_A[name](dropped)) for name in active_adapters(adapted))
    torch.testing.assert_close(after, module.base_layer(x) + changed)
    assert not torch.allclose(after, module(x))
    again = copy.deepcopy(adapted).eval()
    assert torch.equal(logits(again), logits(adapted.eval()))


def test_weights_that_are_no_numbers_are_told_before_training(tmp_path):
    model, found, plan = surveyed("llama", tmp_path)
    adapted = attach(model, plan, found)
    model.get_input_embeddings().weight.data[:] = torch.nan
    with pytest.raises(NumericalError, match="before any training the model's logits in float32 are not finite: its weights hold NaN"):
        step_zero(adapted, {"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)})


def test_step_zero_in_bfloat16_is_the_base_too(tmp_path):
    model, found, plan = surveyed("llama", tmp_path, torch.bfloat16)
    before = logits(model)
    difference = (logits(attach(model, plan, found).eval()) - before).abs().max().item()
    assert difference <= 2**-7 * before.abs().max().item()  # one unit in the last place of the largest logit


def test_the_start_is_the_chosen_part_of_the_weight(tmp_path):
    model, found, plan = surveyed("gpt2", tmp_path)
    weights = {name: weight_of(model.get_submodule(name)).double() for name in plan.layers}
    adapted = attach(model, plan, found)
    for name, module in lora_layers(adapted, plan).items():
        parts = decompose(weights[name])
        (u, v), sigma = parts.vectors(), parts.sigma
        chosen = plan.layers[name].directions
        start = module.scaling[TRAINED] * module.lora_B[TRAINED].weight @ module.lora_A[TRAINED].weight
        torch.testing.assert_close(start.double(), (u[:, chosen] * sigma[chosen]) @ v[:, chosen].T, rtol=1e-4, atol=1e-5)


def test_the_base_is_untouched_and_only_the_adapter_trains(tmp_path):
    model, found, plan = surveyed("llama", tmp_path)
    before = {name: weight_of(model.get_submodule(name)).clone() for name in plan.layers}
    adapted = attach(model, plan, found)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == plan.parameters
    for parameter in trainable:
        parameter.data += 1
    for name, weight in before.items():
        assert torch.equal(weight_of(adapted.base_model.model.get_submodule(name).base_layer), weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the second stores its layers transposed
def test_residual_and_untouched_compute_and_train_the_same(kind, tmp_path):
    """The same weights to 1e-6 after training steps in float32, and the same logits before any."""
    changes = []
    for base in ("untouched", "residual"):
        model, found, plan = surveyed(kind, tmp_path / base, torch.float32)
        before = logits(model)
        adapted = attach(model, plan, found, base=base)
        assert (logits(adapted) - before).abs().max() <= 1e-5 * before.abs().max()
        optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        ids = torch.arange(3, 23).reshape(2, 10)
        for _ in range(5):
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        changes.append({name: adapter_change(adapted, name) for name in plan.layers})
        with untouched_base(adapted), adapted.disable_adapter():
            assert torch.equal(logits(adapted), before)
    for name, (left, right) in changes[0].items():
        other = changes[1][name]
        torch.testing.assert_close(left @ right, other[0] @ other[1], rtol=0, atol=1e-6)
    assert max((left @ right).abs().max().item() for left, right in changes[0].values()) > 1e-3


def test_no_start_is_taken_out_of_a_weight_that_several_layers_share(tmp_path):
    model, found, plan = surveyed("llama", tmp_path)
    first, second = (model.get_submodule(f"model.layers.{block}.mlp.up_proj") for block in (0, 2))
    second.weight = first.weight
    before = first.weight.clone()
    with pytest.raises(ModelError, match=r"layers.0.mlp.up_proj shares its weight with model.layers.2.mlp.up_proj"):
        attach(model, plan, found, base="residual")
    assert torch.equal(weight_of(model.get_submodule("model.layers.0.mlp.up_proj.base_layer")), before)


def test_both_adapters_are_rounded_alike(tmp_path):
    model, found, plan = surveyed("llama", tmp_path)
    for module in lora_layers(attach(model, plan, found), plan).values():
        assert torch.equal(module.lora_A[TRAINED].weight, module.lora_A[START].weight)
        assert torch.equal(module.lora_B[TRAINED].weight, -module.lora_B[START].weight)


def test_lora_starts_at_the_base_and_depends_on_the_seed():
    starts = []
    for seed in (0, 0, 1):
        model = small("llama").float()
        before = logits(model)
        plan = make_plan_without_survey(PlanConfig(method="lora", rank=4), target_layers(model), len(find_blocks(model)[1]))
        adapted = attach(model, plan, seed=seed).eval()
        assert torch.equal(logits(adapted), before)
        starts.append(next(iter(lora_layers(adapted, plan).values())).lora_A[TRAINED].weight)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_full_fine_tuning_trains_the_model_itself():
    model = small("llama")
    plan = make_plan_without_survey(PlanConfig(method="full"), target_layers(model), 4)
    assert attach(model, plan) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_directions_without_their_survey_are_refused(tmp_path):
    model, _, plan = surveyed("llama", tmp_path)
    with pytest.raises(FarssError, match="give the survey its plan was made from"):
        attach(model, plan)


def test_layers_that_nobody_planned_get_no_adapter(tmp_path):
    """PEFT goes by the ends of names, and another head's blocks may have the same."""
    model = small("llama")
    plan = make_plan_without_survey(PlanConfig(method="lora", rank=2), target_layers(model), 4)
    model.head = torch.nn.ModuleDict({"model": small("llama", num_hidden_layers=1).model})
    with pytest.raises(FarssError, match=r"PEFT put adapters on 7 layers whose names end as those of planned ones do, head.model.layers.0"):
        attach(model, plan)
