"""The law of each method that is one rank everywhere or an ablation of FARSS."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import examples, small
from test_survey import collated

from farss.adapter import attach, start_of
from farss.config import PlanConfig
from farss.errors import ConfigError
from farss.methods.singular import read
from farss.models import weight_of
from farss.plan import make_plan, make_plan_without_survey
from farss.survey import read_layers, survey

CONFIG = PlanConfig(boundary=2, rank=6, r_min=1, r_avg=4, r_max=5)


def planned(method, known, **changes):
    return make_plan(dataclasses.replace(CONFIG, method=method, **changes), known)


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2"])
def test_pissa_is_pefts_up_to_sign(kind, tmp_path):
    model = small(kind).float()
    known = read_layers(model, tmp_path, read, 8)
    plan = planned("pissa", known)
    theirs = get_peft_model(
        small(kind).float(),
        LoraConfig(r=6, lora_alpha=6, target_modules=list(plan.layers), init_lora_weights="pissa", fan_in_fan_out=kind == "gpt2"),
    )
    for name, layer in plan.layers.items():
        b, a = start_of(plan, known, name).trained
        module = theirs.base_model.model.get_submodule(name)
        expected = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
        torch.testing.assert_close((layer.scaling * b @ a).float(), expected.detach(), rtol=1e-3, atol=1e-4)


def test_milora_takes_the_smallest_and_pissa_the_largest(tmp_path):
    model = small("llama")
    known = read_layers(model, tmp_path, read, 8)
    for method, wanted in (("pissa", slice(None, 6)), ("milora", slice(-6, None))):
        for name, layer in planned(method, known).layers.items():
            sigma = torch.linalg.svdvals(weight_of(model.get_submodule(name)))
            torch.testing.assert_close(known.directions(name).sigma[layer.directions].sort().values, sigma[wanted].float().sort().values)


def test_weights_are_a_survey_with_identity_moments(tmp_path):
    model = small("gemma3")
    known = read_layers(model, tmp_path, read, 4)
    for name, layer in known.layers.items():
        weight = weight_of(model.get_submodule(name))
        assert layer.importance == pytest.approx(weight.square().mean().item(), rel=1e-5)
        torch.testing.assert_close(known.directions(name).scores, torch.linalg.svdvals(weight).square(), rtol=1e-5, atol=1e-9)


def test_a_killed_decomposition_goes_on_to_the_same_bytes(tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total, line):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        read_layers(small("llama"), tmp_path / "one", read, 4, on_progress=stop)
    first = (tmp_path / "one" / "block-0000.safetensors").stat().st_mtime_ns
    read_layers(small("llama"), tmp_path / "one", read, 4)
    read_layers(small("llama"), tmp_path / "two", read, 4)
    assert (tmp_path / "one" / "block-0000.safetensors").stat().st_mtime_ns == first
    for file in (tmp_path / "two").iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    assert {file.name for file in (tmp_path / "one").iterdir()} == {file.name for file in (tmp_path / "two").iterdir()}


def test_the_ablations_of_farss(tmp_path):
    model = small("llama-gqa")
    found = survey(model, collated(examples()), tmp_path, 8)
    whole, init, high, fixed = (planned(method, found) for method in ("farss", "farss-init", "farss-all-high", "farss-fixed"))
    for name, layer in whole.layers.items():
        shallow = layer.block < 2
        assert init.layers[name].side == "least"
        assert init.layers[name].rank == 6
        assert high.layers[name].side == "most"
        assert high.layers[name].rank == layer.rank
        assert fixed.layers[name].side == layer.side
        assert fixed.layers[name].rank == (4 if shallow else layer.rank)
        if not shallow:
            assert high.layers[name] == fixed.layers[name] == layer


@pytest.mark.parametrize("method", ["pissa", "milora", "farss-init", "farss-all-high", "farss-fixed"])
def test_step_zero_is_the_base(method, tmp_path):
    model = small("llama").float()
    known = read_layers(model, tmp_path, read, 8) if method in ("pissa", "milora") else survey(model, collated(examples()), tmp_path, 8)
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = attach(model, planned(method, known), known).eval()(input_ids=ids).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_matched_parameters_and_missing_weights():
    model = small("llama")
    from farss.models import target_layers

    layers = target_layers(model)
    with pytest.raises(ConfigError, match="needs the weights"):
        make_plan_without_survey(dataclasses.replace(CONFIG, method="pissa"), layers, 4)
