"""The law of each method that is one rank everywhere or an ablation of FARSS."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import collated, examples, small
from trainings import Killed, killed_at

from farss.adapter import START, TRAINED, attach, lora_layers, start_of
from farss.config import PlanConfig
from farss.errors import ConfigError
from farss.methods.singular import read
from farss.plan import make_plan, make_plan_without_survey
from farss.structure import target_layers, weight_of
from farss.survey import Site, read_layers, survey

CONFIG = PlanConfig(boundary=2, rank=6, r_min=1, r_avg=4, r_max=5)


def planned(method, known, **changes):
    return make_plan(dataclasses.replace(CONFIG, method=method, **changes), known)


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2"])
def test_pissa_is_pefts_up_to_sign(kind, tmp_path):
    model = small(kind).float()
    known = read_layers(Site(model, tmp_path, 8), read)
    plan = planned("pissa", known)
    theirs = get_peft_model(
        small(kind).float(),
        LoraConfig(r=6, lora_alpha=6, target_modules=list(plan.layers), init_lora_weights="pissa", fan_in_fan_out=kind == "gpt2"),
    )
    for name, layer in plan.layers.items():
        b, a = start_of(plan, known, name).trained
        module = theirs.base_model.model.get_submodule(name)
        their_b, their_a = (side["default"].weight.detach() for side in (module.lora_B, module.lora_A))
        expected = module.scaling["default"] * their_b @ their_a
        torch.testing.assert_close((layer.scaling * b @ a).float(), expected, rtol=1e-3, atol=1e-4)
        # neighbouring directions mix in float32, but not how a part is shared between the two factors
        torch.testing.assert_close(b.norm(dim=0).float(), their_b.norm(dim=0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a.norm(dim=1).float(), their_a.norm(dim=1), rtol=1e-3, atol=1e-5)


def test_milora_takes_the_smallest_and_pissa_the_largest(tmp_path):
    model = small("llama")
    known = read_layers(Site(model, tmp_path, 8), read)
    for method, wanted in (("pissa", slice(None, 6)), ("milora", slice(-6, None))):
        for name, layer in planned(method, known).layers.items():
            sigma = torch.linalg.svdvals(weight_of(model.get_submodule(name)))
            torch.testing.assert_close(known.directions(name).sigma[layer.directions].sort().values, sigma[wanted].float().sort().values)


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_equal_singular_values_fall_the_same_way_in_survey_and_plan(method, tmp_path):
    """Of orthogonal weights all are 1 but for rounding, which float64 tells apart and float32 does not."""
    model = small("llama-gqa").float()
    for name in target_layers(model):
        torch.nn.init.orthogonal_(model.get_submodule(name).weight)
    known = read_layers(Site(model, tmp_path, 3), read)
    for name, layer in planned(method, known, rank=3).layers.items():
        u, v = (side.double() for side in known.vectors(name, layer.directions))
        weight, values = weight_of(model.get_submodule(name)).double(), torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(u.T @ weight @ v, values.diag(), rtol=0, atol=1e-5)


def test_weights_are_a_survey_with_identity_moments(tmp_path):
    model = small("gemma3")
    known = read_layers(Site(model, tmp_path, 4), read)
    for name, layer in known.layers.items():
        weight = weight_of(model.get_submodule(name))
        assert layer.importance == pytest.approx(weight.square().mean().item(), rel=1e-5)
        torch.testing.assert_close(known.directions(name).scores, torch.linalg.svdvals(weight).square(), rtol=1e-5, atol=1e-9)


def test_a_killed_decomposition_goes_on_to_the_same_bytes(tmp_path):
    with pytest.raises(Killed):
        read_layers(Site(small("llama"), tmp_path / "one", 4, tell=killed_at(2)), read)
    first = (tmp_path / "one" / "block-0000.safetensors").stat().st_mtime_ns
    read_layers(Site(small("llama"), tmp_path / "one", 4), read)
    read_layers(Site(small("llama"), tmp_path / "two", 4), read)
    assert (tmp_path / "one" / "block-0000.safetensors").stat().st_mtime_ns == first
    for file in (tmp_path / "two").iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    assert {file.name for file in (tmp_path / "one").iterdir()} == {file.name for file in (tmp_path / "two").iterdir()}


def test_the_ablations_of_farss(tmp_path):
    model = small("llama-gqa")
    found = survey(Site(model, tmp_path, 8), collated(examples()))
    whole, init, high, fixed = (planned(method, found) for method in ("farss", "farss-init", "farss-all-high", "farss-fixed"))
    for name, layer in whole.layers.items():
        shallow = layer.block < 2
        assert init.layers[name].side == "least"
        assert init.layers[name].rank == 6
        assert high.layers[name].side == "most"
        assert high.layers[name].rank == 6
        assert fixed.layers[name].side == layer.side
        assert fixed.layers[name].rank == (4 if shallow else layer.rank)
        if not shallow:
            assert high.layers[name] == fixed.layers[name] == layer
    assert init.boundary is high.boundary is None
    turned = planned("farss", found, shallow_directions="most")  # All-high's directions with FARSS's ranks
    assert [layer.rank for layer in turned.layers.values()] == [layer.rank for layer in whole.layers.values()]
    assert {layer.side for layer in turned.layers.values()} == {"most"}


@pytest.mark.parametrize("method", ["pissa", "milora", "farss-init", "farss-all-high", "farss-fixed"])
def test_step_zero_is_the_base(method, tmp_path):
    model = small("llama").float()
    site = Site(model, tmp_path, 8)
    known = read_layers(site, read) if method in ("pissa", "milora") else survey(site, collated(examples()))
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapted = attach(model, planned(method, known), known, dropout=0.5)
        after = [adapted.train(mode)(input_ids=ids).logits for mode in (False, True)]
    assert all((each - before).abs().max() <= 1e-5 * before.abs().max() for each in after)


@pytest.mark.parametrize("base", ["untouched", "residual"])
@pytest.mark.parametrize("method", ["farss", "farss-init", "farss-all-high", "farss-fixed"])
def test_the_released_codes_alpha_takes_s_times_the_part_out(method, base, tmp_path):
    """`alpha: constant`: factors without 1 / s, scaled by alpha / rank, exactly that out of the base, and step 0 the base."""
    model = small("llama-gqa").float()
    known = survey(Site(model, tmp_path, 20), collated(examples()))
    plan = planned(method, known, alpha="constant", rank=20, match_params=None)
    weights = {name: weight_of(model.get_submodule(name)).clone() for name in plan.layers}
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapted = attach(model, plan, known, base=base).eval()
        after = adapted(input_ids=ids).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    for name, module in lora_layers(adapted, plan).items():
        layer = plan.layers[name]
        (u, v), sigma = known.vectors(name, layer.directions), known.directions(name).sigma[layer.directions]
        assert module.scaling[TRAINED] == pytest.approx(20 / layer.rank)
        torch.testing.assert_close(module.lora_B[TRAINED].weight, u * sigma.sqrt())
        torch.testing.assert_close(module.lora_A[TRAINED].weight, sigma.sqrt()[:, None] * v.T)
        left = weight_of(module.base_layer) + (adapter_part(module, START) if base == "untouched" else 0)
        torch.testing.assert_close(left, weights[name] - 20 / layer.rank * (u * sigma) @ v.T, rtol=1e-4, atol=1e-4)
    assert any(layer.rank < 20 for layer in plan.layers.values())


def adapter_part(module, adapter):
    """What an adapter adds to its layer's weight."""
    return module.scaling[adapter] * module.lora_B[adapter].weight @ module.lora_A[adapter].weight


def test_a_missing_reading_is_named():
    layers = target_layers(small("llama"))
    with pytest.raises(ConfigError, match="needs the weights"):
        make_plan_without_survey(dataclasses.replace(CONFIG, method="pissa"), layers, 4)
