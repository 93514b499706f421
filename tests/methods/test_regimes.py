"""The laws of the methods that train more than A and B, or train by rules of their own."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from peft import AdaLoraConfig, KasaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.variants import _kasa_layer_regularization_loss
from small_models import logits, prompts, small
from trainings import Killed, difference, killed_at, options, tokenizer, weights, whole_model
from trainings import examples as rows_to_learn

from farss.adapter import START, TRAINED, attach, changed_weight, lora_layers, start_of
from farss.artifacts import Layer
from farss.config import PlanConfig
from farss.errors import ConfigError, FarssError
from farss.merging import in_layers
from farss.methods import METHODS
from farss.methods.base import Context
from farss.methods.singular import read
from farss.plan import make_plan, make_plan_without_survey
from farss.portable import export, in_float32
from farss.prepared import write_prepared
from farss.structure import find_blocks, is_transposed, target_layers, weight_of
from farss.survey import Site, read_layers
from farss.train import restore, train

CONFIG = PlanConfig(rank=6)


def attached(method, model, folder=None, dropout=0.0, **changes):
    """The model with a method's adapters, its plan and its regime."""
    config = dataclasses.replace(CONFIG, method=method, **changes)
    known = read_layers(Site(model, folder, 8), read) if METHODS[method].needs else None
    plan = make_plan(config, known) if known else make_plan_without_survey(config, target_layers(model), len(find_blocks(model)[1]))
    regime = METHODS[method].regime(config, plan) if METHODS[method].regime else None
    return attach(model, plan, known, dropout, seed=3, regime=regime), plan, regime


def shaken(adapted):
    """Made-up training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return adapted.eval()


@pytest.mark.parametrize("method", ["dora", "adalora"])
@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2"])
def test_step_zero_is_the_base_and_the_plan_counts_what_trains(method, kind):
    model = small(kind).float()
    before = logits(model)
    adapted, plan, _ = attached(method, model)
    assert (logits(adapted.eval()) - before).abs().max() <= 1e-5 * before.abs().max()
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.parameters


# --- DoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2"])
def test_merged_dora_is_pefts(kind, tmp_path):
    adapted, plan, _ = attached("dora", small(kind).float())
    shaken(adapted)
    expected = logits(adapted)
    weight_names = [f"{name}.weight" for name in plan.layers]
    ours = {}
    for name in weight_names:
        base = adapted.base_model.model.get_submodule(name.removesuffix(".weight")).base_layer
        ours[name] = in_layers(adapted, plan.layers, partial(changed_weight, adapted))(name, base.weight.detach())
        assert ours[name].shape == base.weight.shape
        assert is_transposed(base) == (kind == "gpt2")
    merged = adapted.merge_and_unload()
    for name, weight in ours.items():
        torch.testing.assert_close(merged.get_parameter(name), weight, rtol=1e-4, atol=1e-5)
    assert (logits(merged.eval()) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_dora_begins_as_a_bfloat16_base(tmp_path):
    """PEFT rounds the lengths of its rows as the base is rounded, which scales every row by up to 2^-9."""
    model = small("llama").bfloat16()
    with in_float32(model):
        expected = logits(model).float()
    adapted, _, _ = attached("dora", model)
    with in_float32(adapted):
        found = logits(adapted).float()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dora_is_handed_over_as_a_whole_model():
    assert not METHODS["dora"].plain_lora
    assert all(method.plain_lora for name, method in METHODS.items() if name not in ("dora", "full"))


# --- KaSA ------------------------------------------------------------------------------------------------------------


def theirs_like_ours(adapted, plan):
    """PEFT's own KaSA with our values."""
    theirs = get_peft_model(
        small("llama-gqa").float(), LoraConfig(r=6, lora_alpha=6, target_modules=list(plan.layers), kasa_config=KasaConfig())
    )
    for name, module in lora_layers(adapted, plan).items():
        other = theirs.base_model.model.get_submodule(name)
        other.lora_A["default"].weight.data.copy_(module.lora_A[TRAINED].weight.data)
        other.lora_B["default"].weight.data.copy_(module.lora_B[TRAINED].weight.data)
        other.lora_diag["default"].data.copy_(module.lora_E[TRAINED].weight.data[:, 0])
    return theirs.eval()


def test_kasa_is_pefts(tmp_path):
    adapted, plan, regime = attached("kasa", small("llama-gqa").float(), tmp_path)
    shaken(adapted)
    theirs = theirs_like_ours(adapted, plan)
    expected = logits(theirs)
    assert (logits(adapted) - expected).abs().max() <= 1e-4 * expected.abs().max()
    modules = [theirs.base_model.model.get_submodule(name) for name in plan.layers]
    penalty = sum(_kasa_layer_regularization_loss(module, "default", CONFIG.kasa_beta, CONFIG.kasa_gamma) for module in modules)
    torch.testing.assert_close(regime.penalty(), penalty)


def test_what_kasa_cuts_off_gets_no_dropout(tmp_path):
    """It is gone, and so is no part of the change."""
    adapted, *_ = attached("kasa", small("llama-gqa").float(), tmp_path, dropout=0.5)
    assert torch.equal(logits(adapted.train()), logits(adapted.eval()))


def test_kasa_exports_as_a_plain_lora_on_the_whole_base(tmp_path):
    """PEFT says it cannot be; with the cut components in the adapter it can."""
    adapted, plan, _ = attached("kasa", small("llama").float(), tmp_path / "weights")
    cut = logits(adapted.eval())
    base = logits(small("llama").float())
    assert (cut - base).abs().max() > 1e-3 * base.abs().max()  # the smallest components are gone before training begins
    shaken(adapted)
    trained = logits(adapted)
    done = export(adapted, plan, tmp_path / "adapter", prompts())
    assert done.logit_difference <= 1e-5 * trained.abs().max()
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.parameters
    assert START in adapted.peft_config


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3"])
def test_kasa_leaves_every_layer_a_component(kind, tmp_path):
    """Grouped keys and values are the narrow ones: PEFT refuses a rank that takes all of them."""
    model = small(kind).float()
    known = read_layers(Site(model, tmp_path, 16), read)
    narrow = [name for name, layer in known.layers.items() if min(layer.shape) == 16]
    plan = make_plan(PlanConfig(method="kasa", rank=16), known)
    assert narrow
    for name, layer in plan.layers.items():
        weight = weight_of(model.get_submodule(name))
        assert layer.rank == (15 if name in narrow else 16)
        b, a = start_of(plan, known, name).removed
        left = torch.linalg.svdvals(weight - layer.scaling * (b @ a).float())
        assert int((left > 1e-4 * left[0]).sum()) == min(layer.shape) - layer.rank
        torch.testing.assert_close(left[0], torch.linalg.svdvals(weight)[0])
    assert plan.notes == [
        "KaSA cuts components off for good and leaves each layer one: the rank is min(m, n) - 1, below 16, in "
        f"{narrow[0]} and {len(narrow) - 1} more."
    ]
    gate = Layer("gate", 0, (1, 32), 0.0)  # one component, so nothing of it may go
    wider = dataclasses.replace(known, layers={**known.layers, "gate": gate})
    assert set(make_plan(PlanConfig(method="kasa", rank=4), wider).layers) == set(known.layers)


# --- AdaLoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [6, 12, 16])
def test_adalora_keeps_what_its_plan_says_of_narrow_layers_too(rank):
    """Layers of 16 outputs begin with 16 at most, and lose no more for it: the ranks at the end are the plan's."""
    adapted, plan, regime = attached("adalora", small("llama-gqa").float(), rank=rank)
    final = [min(rank, *layer.shape) for layer in plan.layers.values()]
    begun = sum(layer.rank for layer in plan.layers.values())
    assert min(min(layer.shape) for layer in plan.layers.values()) == 16
    regime.begin(adapted, 20)
    kept = round(sum(final) / len(final))
    assert (regime.allocator.init_bgt, regime.allocator.target_bgt) == (begun, kept * len(final))
    assert f"keeps the best {kept} per layer on average" in plan.notes[-1]


def test_adalora_prunes_as_pefts(tmp_path):
    """The same values, losses and steps through PEFT's AdaLoraModel and through ours end in the same weights."""
    steps = 12
    ours, plan, regime = attached("adalora", small("llama").float())
    regime.begin(ours, steps)
    settings = regime.allocator.peft_config
    theirs = get_peft_model(
        small("llama").float(),
        AdaLoraConfig(
            init_r=9, target_r=6, lora_alpha=9, target_modules=list(plan.layers), total_step=steps, task_type="CAUSAL_LM",
            tinit=settings.tinit, tfinal=settings.tfinal, deltaT=settings.deltaT,
        ),
    )  # fmt: skip
    mine = lora_layers(ours, plan)
    others = {name: theirs.base_model.model.get_submodule(name) for name in plan.layers}
    for name, module in mine.items():
        others[name].lora_A["default"].data.copy_(module.lora_A[TRAINED].weight.data)
        others[name].lora_B["default"].data.copy_(module.lora_B[TRAINED].weight.data)
    batch = prompts()
    pair = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1) for model in (ours, theirs)]
    for step in range(1, steps + 1):
        (ours(**batch, labels=batch["input_ids"]).loss + regime.penalty()).backward()
        theirs(**batch, labels=batch["input_ids"]).loss.backward()
        for optimiser in pair:
            optimiser.step()
        regime.after_step(step)
        theirs.base_model.update_and_allocate(step)
        for optimiser in pair:
            optimiser.zero_grad()
    kept = 0
    for name, module in mine.items():
        torch.testing.assert_close(module.lora_E[TRAINED].weight, others[name].lora_E["default"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(module.lora_A[TRAINED].weight, others[name].lora_A["default"], rtol=1e-3, atol=1e-5)
        kept += int((module.lora_E[TRAINED].weight != 0).sum())
    assert 0 < kept <= 6 * len(mine)
    trained = logits(ours.eval())
    done = export(ours, plan, tmp_path / "adapter", prompts())
    assert done.logit_difference <= 1e-5 * trained.abs().max()


@pytest.mark.parametrize("method", ["adalora", "kasa"])
def test_a_killed_training_goes_on_to_the_same_weights(method, tmp_path):
    """Under our trainer, with what the method keeps beside the weights."""

    def go(folder, on_progress=None):
        adapted, plan, regime = attached(method, whole_model().float(), tmp_path / "weights")
        try:
            train(adapted, tokenizer(), rows_to_learn(), options(epochs=2, max_steps=10), folder, on_progress=on_progress, regime=regime)
        except Killed:
            return go(folder)
        return weights(adapted), plan, adapted

    straight, _, adapted = go(tmp_path / "one")
    resumed, _, _ = go(tmp_path / "two", killed_at(5))
    assert difference(straight, resumed) == 0
    fresh, _, _ = attached(method, whole_model().float(), tmp_path / "weights")
    restore(fresh, tmp_path / "one")
    assert difference(weights(fresh), straight) == 0
    if method == "adalora":
        zeros = sum(int((p == 0).sum()) for name, p in adapted.named_parameters() if ".lora_E." in name)
        assert zeros > 0


@pytest.mark.parametrize("method", ["adalora", "kasa"])
def test_the_penalty_is_added_once_a_step_and_is_not_in_the_logged_loss(method, tmp_path):
    found = {}
    for micro in (4, 2):
        adapted, _, regime = attached(method, whole_model().float(), tmp_path / "weights", kasa_gamma=1.0)
        config = options(max_steps=4, micro_batch_size=micro, dropout=0.0)
        result = train(adapted, tokenizer(), rows_to_learn(16), config, tmp_path / str(micro), regime=regime)
        found[micro] = (weights(adapted), result.log[0]["loss"])
    assert difference(found[4][0], found[2][0]) <= 1e-4
    assert found[4][1] == pytest.approx(found[2][1], rel=1e-4)
    plain, _, _ = attached("lora", whole_model().float())
    first = train(plain, tokenizer(), rows_to_learn(16), options(max_steps=1, dropout=0.0), tmp_path / "plain").log[0]["loss"]
    adapted, _, regime = attached(method, whole_model().float(), tmp_path / "weights", kasa_gamma=1.0)
    config = options(max_steps=1, dropout=0.0)
    own = train(adapted, tokenizer(), rows_to_learn(16), config, tmp_path / "own", regime=regime).log[0]["loss"]
    assert own == pytest.approx(first, rel=0.02)  # both start at the base (KaSA: nearly)


def test_other_trainers_are_refused_what_they_cannot_do(tmp_path):
    adapted, plan, _ = attached("kasa", small("llama").float(), tmp_path / "weights")
    with pytest.raises(FarssError, match="'kasa' trains by rules of its own, which no other trainer knows"):
        write_prepared(adapted, plan, None, tmp_path / "prepared", tmp_path)
    adapted, plan, _ = attached("dora", small("llama").float())
    with pytest.raises(FarssError, match="'dora' becomes no plain LoRA"):
        write_prepared(adapted, plan, None, tmp_path / "prepared", tmp_path)


def test_kasa_needs_a_component_to_spare():
    """A layer with one output has one, and a plan without layers would be that of full fine-tuning."""
    layer = Layer("gate", 0, (1, 32), math.nan)
    with pytest.raises(ConfigError, match="each of the target layers has one singular component"):
        METHODS["kasa"].plan(PlanConfig(method="kasa", rank=1), Context({"gate": layer}, 1))
