"""A CPU that cannot compute with 16 bits computes in float32: with the same values, and nothing else changes."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import ARCHITECTURES, examples, save_small, small
from transformers import AutoTokenizer

from farss import precision, world
from farss.batches import batches, collate
from farss.config import ModelConfig, TrainConfig
from farss.errors import ModelError
from farss.methods import METHODS
from farss.models import check_causal, empty_model, layer_shapes, load_model, load_tokenizer, stored_dtype, weights_fingerprint
from farss.survey import Site, read_layers, survey
from farss.train import products

CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(params=[True, False], ids=["with units", "without"])
def units(request, monkeypatch):
    """A CPU with units for 16-bit products, and one without."""
    monkeypatch.setattr("farss.precision.multiplies_in", lambda dtype, device: request.param or dtype not in (torch.float16, BFLOAT16))
    monkeypatch.setattr("farss.train.trainer.multiplies_in", precision.multiplies_in)
    return request.param


@pytest.fixture
def stored(tmp_path):
    """A model's folder, in bfloat16."""
    folder = save_small("llama-gqa", tmp_path / "model")
    load_model(ModelConfig(path=str(folder)), BFLOAT16).save_pretrained(folder)
    return folder


def test_a_model_is_loaded_as_this_machine_computes(stored, units):
    config = ModelConfig(path=str(stored), device="cpu")
    kept, used = load_model(config, as_stored=True), load_model(config)
    assert kept.dtype == BFLOAT16
    assert used.dtype == (BFLOAT16 if units else torch.float32)
    assert weights_fingerprint(kept) == weights_fingerprint(used)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(kept.parameters(), used.parameters(), strict=True))


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter: give the folder of its base model"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_a_model_with_an_adapter_beside_it_is_not_loaded_as_another(stored):
    (stored / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter beside a model \(adapter_config\.json\)"):
        load_model(ModelConfig(path=str(stored)))


def test_a_precision_that_no_configuration_names_is_that_of_the_files(stored):
    file = stored / "config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "dtype"}))
    assert stored_dtype(ModelConfig(path=str(stored))) == BFLOAT16 == load_model(ModelConfig(path=str(stored)), as_stored=True).dtype


def test_a_change_of_all_columns_but_the_first_is_another_fingerprint():
    model = torch.nn.Linear(4096, 1024, bias=False)
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.weight[:, 1:] += 1
    assert weights_fingerprint(model) != before


def test_a_precision_that_is_asked_for_is_used(stored, units):
    for dtype in ("float32", "bfloat16"):
        assert load_model(ModelConfig(path=str(stored), dtype=dtype, device="cpu")).dtype == getattr(torch, dtype)
        assert load_model(ModelConfig(path=str(stored), device="cpu"), getattr(torch, dtype)).dtype == getattr(torch, dtype)


def test_training_multiplies_in_what_the_machine_has(units):
    assert products(TrainConfig(), CPU) == ("bf16" if units else "fp32")
    assert products(TrainConfig(precision="bf16"), CPU) == "bf16"
    assert products(TrainConfig(precision="fp32"), CPU) == "fp32"


def without_units(monkeypatch):
    monkeypatch.setattr("farss.precision.multiplies_in", lambda dtype, device: dtype not in (torch.float16, BFLOAT16))


def as_batches():
    return [collate(part, 0) for part in batches(examples(), 2)]


def narrow_and_wide():
    """The same weights in bfloat16 and in float32."""
    return small("llama-gqa").to(BFLOAT16), small("llama-gqa").to(BFLOAT16).float()


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("block-*.safetensors")}


def test_without_units_a_survey_is_that_of_the_same_weights_in_float32(tmp_path, monkeypatch):
    without_units(monkeypatch)
    narrow, wide = narrow_and_wide()
    found = [survey(Site(model, tmp_path / str(model.dtype), 4), as_batches()) for model in (narrow, wide)]
    assert bytes_of(found[0].folder) == bytes_of(found[1].folder)
    assert narrow.dtype == BFLOAT16
    assert all(parameter.dtype == BFLOAT16 for parameter in narrow.parameters())


def test_without_units_a_reading_is_that_of_the_same_weights_in_float32(tmp_path, monkeypatch):
    without_units(monkeypatch)
    read = METHODS["corda-kpm"].needs.read
    found = [read_layers(Site(model, tmp_path / str(model.dtype), 4), read, as_batches()) for model in narrow_and_wide()]
    assert bytes_of(found[0].folder) == bytes_of(found[1].folder)


@pytest.mark.parametrize("first", [True, False])
def test_a_survey_goes_on_where_another_kind_of_machine_left_it(tmp_path, monkeypatch, first):
    narrow, _ = narrow_and_wide()
    expected = survey(Site(narrow, tmp_path / "whole", 4), as_batches())

    def stop(done, total, line):
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("farss.precision.multiplies_in", lambda dtype, device: first)
        with pytest.raises(KeyboardInterrupt):
            survey(Site(narrow, tmp_path / "moved", 4, tell=stop), as_batches())
    monkeypatch.setattr("farss.precision.multiplies_in", lambda dtype, device: not first)
    found = survey(Site(narrow, tmp_path / "moved", 4), as_batches())
    for name in found.layers:
        torch.testing.assert_close(found.directions(name).scores, expected.directions(name).scores, rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", [*ARCHITECTURES])
def test_a_language_model_does_not_read_ahead(kind):
    check_causal(small(kind))


@pytest.mark.parametrize("kind", ["OpenAIGPT", "CTRL"])
def test_nor_do_models_with_ways_of_their_own(kind):
    """A block that returns a list, and embeddings that are scaled in place."""
    config = getattr(transformers, f"{kind}Config")(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, dff=64)
    check_causal(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("kind", ["Roberta", "Bert"])
def test_a_model_that_reads_ahead_is_refused(tmp_path, kind):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=66)
    build = transformers.RobertaForCausalLM if kind == "Roberta" else transformers.BertLMHeadModel
    build(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="reads ahead"):
        load_model(ModelConfig(path=str(tmp_path)))
    config.is_decoder = True
    check_causal(build(config))


def test_states_may_have_time_before_the_batch():
    """XLNet's have, and as it is called by a language model's trainer it reads ahead."""
    config = transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=64)
    with pytest.raises(ModelError, match="reads ahead"):
        check_causal(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("kind", ["t5", "clip", "vit", "albert"])
def test_a_model_that_writes_no_text_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=f"a model of type '{kind}' writes no text .*: name a causal language model"):
        layer_shapes(ModelConfig(path=str(tmp_path)))


def damaged(folder, change):
    """A model's folder whose weights are no more those of its `config.json`."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return ModelConfig(path=str(folder))


def test_weights_that_are_missing_or_of_another_shape_are_refused(stored, caplog):
    name, other = "model.layers.1.mlp.up_proj.weight", "model.layers.9.mlp.up_proj.weight"
    load_model(damaged(stored, lambda weights: weights.update({other: torch.zeros(2, 2)})))
    assert "holds weights of 5 blocks, of which its config.json names the first 4" in caplog.text
    with pytest.raises(ModelError, match=rf"{name} has the shape \[2, 2\], and config\.json there wants \[80, 32\]"):
        load_model(damaged(stored, lambda weights: weights.update({name: torch.zeros(2, 2)})))
    with pytest.raises(ModelError, match=rf"holds no {name}, and 1 of its weights are missing in all"):
        load_model(damaged(stored, lambda weights: weights.pop(name)))


def test_a_tokenizer_is_that_of_hugging_face(stored, monkeypatch):
    """Where mistral-common is installed transformers gives another kind for Mistral's models, unless it is told otherwise."""
    asked, original = {}, AutoTokenizer.from_pretrained

    def load(*names, **options):
        asked.update(options)
        return original(*names, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    load_tokenizer(ModelConfig(path=str(world.MODEL)))
    assert asked["mistral_format"] is False


def test_a_tokenizer_that_is_not_there_is_named(stored):
    (stored / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read \(.*[^:]\): copy the model's tokenizer\.json"):
        load_tokenizer(ModelConfig(path=str(stored)))


def test_a_tokenizer_of_another_kind_is_named(stored):
    (stored / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "Other", "vocab": {}}}))
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read \("):
        load_tokenizer(ModelConfig(path=str(stored)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "two"}, r"cannot be read: .*num_hidden_layers"),
        ({"hidden_act": "sillu"}, r"config\.json names 'sillu', which transformers does not know"),
        ({"_attn_implementation": "flash_attention_2"}, r"cannot be built from its config\.json in this environment: .*[Ff]lash"),
    ],
)
def test_a_configuration_that_transformers_does_not_take_is_one_sentence(stored, change, message):
    config = json.loads((stored / "config.json").read_text()) | change
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        empty_model(ModelConfig(path=str(stored)))


def test_a_cut_bin_file_is_one_sentence(stored):
    state = load_file(stored / "model.safetensors")
    (stored / "model.safetensors").unlink()
    torch.save(state, stored / "pytorch_model.bin")
    whole = (stored / "pytorch_model.bin").read_bytes()
    (stored / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(ModelConfig(path=str(stored)))
    (stored / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(ModelConfig(path=str(stored)))


def test_a_model_whose_quantisation_needs_a_package_says_so(tmp_path):
    config = small("llama").config.to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(ModelError, match=r"cannot be loaded as this environment is: .*GPTQ"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_nan_is_another_fault_than_reading_ahead_and_the_callers_mode_and_numbers_stay():
    model = small("llama")
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    check_causal(model)
    model = small("gpt2").float()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_causal(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
