"""4-bit bases: statistics from the dequantised weights, training, export, and clear refusals."""

import json

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel
from small_models import CONFIG, collated, examples, logits, prompts, small
from trainings import tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from farss.adapter import attach
from farss.config import ModelConfig
from farss.configfile import from_dict
from farss.data import Tokenized
from farss.errors import ConfigError, FarssError, ModelError
from farss.merging import merge
from farss.models import base_fingerprint, load_model
from farss.places import placed, tensors_of
from farss.plan import make_plan
from farss.portable import export, in_float32, load_adapter
from farss.prepared import write_prepared
from farss.structure import base_weights, holds_packed, keep_gradients, target_layers, weight_of
from farss.survey import Site, survey
from farss.survey.gradients import gradients
from farss.train import train


@pytest.fixture
def folder(tmp_path):
    small("llama-gqa", hidden_size=64, intermediate_size=128).bfloat16().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def four_bits(folder):
    return load_model(ModelConfig(path=str(folder), quantization="nf4", device="cpu"))


def dequantised(model, folder):
    """The same model with the dequantised weights as ordinary ones."""
    plain = load_model(ModelConfig(path=str(folder), device="cpu"))
    for name in target_layers(model):
        plain.get_submodule(name).weight.data = weight_of(model.get_submodule(name))
    return plain


def test_statistics_are_those_of_the_dequantised_weights(folder, tmp_path):
    model = four_bits(folder)
    plain = dequantised(model, folder)
    assert target_layers(model).keys() == target_layers(plain).keys()
    one = survey(Site(model, tmp_path / "one", 8), collated(examples()))
    two = survey(Site(plain, tmp_path / "two", 8), collated(examples()))
    for name in one.layers:
        assert one.layers[name].shape == two.layers[name].shape
        torch.testing.assert_close(one.directions(name).sigma, two.directions(name).sigma)
        torch.testing.assert_close(one.directions(name).lam, two.directions(name).lam, rtol=0.02, atol=0)


def test_gradients_of_blocks_are_those_of_the_dequantised_weights(folder, tmp_path):
    model = four_bits(folder)
    one, two = (
        gradients(Site(each, tmp_path / str(place)), collated(examples())) for place, each in enumerate((model, dequantised(model, folder)))
    )
    for name, layer in two.layers.items():
        assert one.layers[name].importance == pytest.approx(layer.importance, rel=0.02)


def test_what_is_packed_into_numbers_of_another_kind_is_not_converted(folder):
    """As FSDP wants it: `bnb_4bit_quant_storage=torch.bfloat16`."""
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, device_map={"": "cpu"})
    layer = model.get_submodule(next(iter(target_layers(model))))
    assert layer.weight.dtype == torch.bfloat16
    assert holds_packed(model)
    before = weight_of(layer).float()
    with placed(tensors_of(layer), None, torch.float32):
        assert torch.equal(weight_of(layer).float(), before)
    with in_float32(model):
        logits(model)


def test_training_and_export_on_a_4_bit_base(folder, tmp_path):
    model = four_bits(folder)
    before = logits(model).float()
    packed = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    assert packed
    found = survey(Site(model, tmp_path / "survey", 8), collated(examples()))
    plan = make_plan(CONFIG, found)
    adapted = attach(model, plan, found, dropout=0.5)
    scale = before.abs().max().item()
    for training in (False, True):
        assert (logits(adapted.train(training)).float() - before).abs().max().item() <= 2**-6 * scale  # bfloat16 products
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trainable)
    optimiser = torch.optim.AdamW(trainable, lr=1e-2)
    batch = prompts()
    losses = []
    for _ in range(8):
        loss = adapted(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    done = export(adapted, plan, tmp_path / "adapter", prompts(), base=str(folder), prompt={"template": "alpaca"})
    assert done.logit_difference <= 1e-5 * max(1.0, scale)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"' in card
    assert "base's precision: nf4" in card
    with pytest.raises(FarssError, match=r"load '.*' as it was \(\w+, nf4\)"):
        load_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    asked = four_bits(folder)
    for module in asked.modules():  # as a model that transformers loads
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = has_avx512bf16()
    logits(asked)
    if has_avx512bf16():
        with pytest.raises(FarssError, match=r"has rearranged this model's 4-bit weights, .*: load the base anew"):
            load_adapter(asked, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(four_bits(folder), str(tmp_path / "adapter")).eval()
    assert (logits(stock).float() - logits(adapted.eval()).float()).abs().max().item() <= 2**-5 * scale
    assert base_fingerprint(adapted) == base_fingerprint(four_bits(folder))
    after = base_weights(adapted.get_base_model())
    assert all(torch.equal(after[name], tensor) for name, tensor in packed.items())


def test_weights_that_are_not_packed_are_refused(folder):
    """As those of a merged model that kept its base's config.json."""
    config = json.loads((folder / "config.json").read_text())
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": four}))
    with pytest.raises(ModelError, match=r"says that the weights have 4 bits .* have not: take that entry out"):
        load_model(ModelConfig(path=str(folder), device="cpu"))


def test_its_adapters_train_in_float32(folder, tmp_path):
    """TRL makes adapters of 4-bit models bfloat16, where steps of this size are lost."""
    model = four_bits(folder)
    found = survey(Site(model, tmp_path / "survey", 8), collated(examples()))
    adapted = attach(model, make_plan(CONFIG, found), found)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    options = {"learning_rate": 1e-5, "max_steps": 2, "batch_size": 4, "gradient_checkpointing": False}
    train(adapted, tokenizer(), Tokenized(examples(8)), from_dict({"train": options}), tmp_path)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert (parameter != before[name]).float().mean() > 0.9


def test_what_a_4_bit_base_cannot_do_is_refused(folder, tmp_path):
    model = four_bits(folder)
    found = survey(Site(model, tmp_path / "survey", 8), collated(examples()))
    plan = make_plan(CONFIG, found)
    with pytest.raises(ConfigError, match=r"takes the start out of weights that are quantised: set adapter.base=untouched"):
        attach(four_bits(folder), plan, found, base="residual")
    adapted = attach(model, plan, found)
    with pytest.raises(FarssError, match="trained on quantised weights, and merged into the unquantised ones it would be another model"):
        merge(adapted, plan, None, tmp_path / "merged", torch.bfloat16, folder)
    with pytest.raises(FarssError, match="weights are quantised, and nothing can be subtracted from them: prepare the unquantised"):
        write_prepared(adapted, plan, None, tmp_path / "prepared", folder)
    assert not (tmp_path / "prepared").exists()


def test_weights_that_were_rearranged_for_inference_are_put_back(folder):
    """bitsandbytes rearranges them on the first forward pass on a CPU, and then no gradient comes back."""
    model = four_bits(folder)
    layer = model.model.layers[0].mlp.up_proj
    packed, weight = layer.weight.data.clone(), weight_of(layer)
    layer.support_avx512bf16_for_cpu = has_avx512bf16()
    with torch.no_grad():
        layer(torch.ones(1, 64, dtype=torch.bfloat16))
    keep_gradients(model)
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(weight_of(layer), weight)
    rows = torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(rows).sum(), rows)
    torch.testing.assert_close(gradient.float(), weight.float().sum(0)[None], rtol=0.02, atol=0.02)


def test_a_sharded_weight_is_refused(folder, tmp_path):
    """ZeRO-3 leaves empty parameters behind; FSDP and accelerate leave some on the meta device."""
    model = load_model(ModelConfig(path=str(folder), device="cpu"))
    layer = model.model.layers[1].mlp.up_proj
    for weight in (torch.empty(0, dtype=torch.bfloat16), torch.empty(layer.weight.shape, device="meta", dtype=torch.bfloat16)):
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ModelError, match=r"holds no weights in this process .*: prepare the model before it is sharded"):
            weight_of(layer)


def test_an_unknown_packed_format_is_refused(folder, tmp_path):
    model = load_model(ModelConfig(path=str(folder), device="cpu"))
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ModelError, match=r"packed weights \(torch.int8, shape .*load the model unquantised, or in bitsandbytes' 4-bit format"
    ):
        weight_of(layer)
