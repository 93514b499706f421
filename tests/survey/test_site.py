"""Which layers are looked at and adapted, and which are left out and said."""

import pytest
import torch
import transformers
from oracle import assert_equals, brute_force
from peft import LoraConfig, get_peft_model
from small_models import collated, examples, small

from farss.errors import ConfigError
from farss.structure import left_out, target_layers
from farss.survey import Site, survey


def test_a_single_target_layer(llama, tmp_path):
    found = survey(Site(llama, tmp_path, 4, targets=["model.layers.2.mlp.down_proj"]), collated(examples()))
    assert list(found.layers) == ["model.layers.2.mlp.down_proj"]


def test_unknown_target_names_the_nearest(llama):
    with pytest.raises(ConfigError, match=r"no linear layer is called 'q_prj': did you mean 'q_proj'"):
        target_layers(llama, ["q_prj"])


def test_mixture_of_experts_is_adapted_outside_the_experts(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    found = survey(Site(model, tmp_path, 4), collated(examples()))
    assert {name.rsplit(".", 1)[-1] for name in found.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert left_out(model) == [
        "Not adapted: mlp.experts.gate_up_proj in 2 blocks, 4 experts in one parameter of shape (4, 96, 32).",
        "Not adapted: mlp.experts.down_proj in 2 blocks, 4 experts in one parameter of shape (4, 32, 48).",
    ]
    assert left_out(small("llama")) == []


@pytest.mark.parametrize("kind", ["deepseek-v3", "glm4-moe"])
def test_what_peft_takes_for_experts_is_left_out_and_said(kind):
    """A plan with these layers would be trained without them, or stop when the survey is done."""
    model = small(kind)
    assert not [name for name in target_layers(model) if ".mlp." in name]
    said = left_out(model)
    assert "Not adapted: mlp.gate_proj in 1 blocks, which PEFT takes for an expert's." in said
    assert "Not adapted: mlp.shared_experts.down_proj in 3 blocks, which PEFT takes for an expert's." in said
    with pytest.raises(ConfigError, match=r"model.targets: no adapter fits 'up_proj' of this model, which PEFT takes for an expert's"):
        target_layers(model, ["up_proj"])


READ_PAST = "{} blocks, whose weight Mamba's kernels read past any adapter"


LEFT = {
    "llama4": {"feed_forward.router": "4 blocks, which does more than a linear layer"},
    "phimoe": {"mlp.router": "4 blocks, which does more than a linear layer"},
    "mamba": {f"mixer.{name}": READ_PAST.format(4) for name in ("x_proj", "dt_proj", "out_proj")},
    "mamba2": {"mixer.out_proj": READ_PAST.format(4)},
    "falcon-h1": {"mamba.out_proj": READ_PAST.format(4)},
    "jamba": {f"mamba.{name}": READ_PAST.format(2) for name in ("x_proj", "dt_proj", "out_proj")},
    "nemotron-h": {"mixer.out_proj": READ_PAST.format(2)},
    "granite-hybrid": {"mamba.out_proj": READ_PAST.format(2)},
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_no_adapter_fits_is_left_out_and_said_and_the_rest_equals_brute_force(kind, tmp_path):
    model, rows = small(kind), examples()
    assert [line for line in left_out(model) if ".experts." not in line] == [
        f"Not adapted: {name} in {why}." for name, why in LEFT[kind].items()
    ]
    left = next(iter(LEFT[kind]))
    with pytest.raises(ConfigError, match=rf"model.targets: no adapter fits '{left}' of this model, wh.*: leave it out"):
        target_layers(model, [left])
    found = survey(Site(model, tmp_path, 4), collated(rows))
    assert_equals(found, model, brute_force(model, rows))

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=list(found.layers), init_lora_weights=False))
    adapted(**collated(rows)[0]).loss.backward()
    assert all(parameter.grad.any() for name, parameter in adapted.named_parameters() if "lora_" in name)
