"""Laws of taking blocks out of a model."""

import copy

import pytest
import torch
from small_models import logits, save_small, small
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaForCausalLM, OlmoHybridConfig

from farss.config import ModelConfig
from farss.errors import ModelError
from farss.models import empty_model, empty_of, load_model
from farss.pruning.surgery import check_deletable, delete_blocks, skipped, write_shorter
from farss.structure import find_blocks
from farss.survey.passage import returned_by

KINDS = [
    "llama",
    "llama-gqa",
    "gemma3",
    "qwen3",
    "gpt2",
    "phi3",
    "gpt-neox",
    "falcon",
    "bloom",
    "mpt",
    "granite-moe",
    "glm4-moe",
    "deepseek-v3",
]


def weights_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", [[1], [0, 2]])
def test_a_model_without_blocks_is_one_that_passes_them_over_and_comes_back_from_its_files(kind, gone, tmp_path):
    folder = save_small(kind, tmp_path / "base")
    config = ModelConfig(path=str(folder), device="cpu")
    model = load_model(config)
    check_deletable(empty_model(config), gone, False)
    ids = torch.arange(3, 15)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    returned = returned_by(model, find_blocks(model)[1], batch)
    with skipped(model, gone, returned):
        expected = model(**batch, use_cache=False).logits
    blocks = find_blocks(model)[1]
    freed = sum(weights_of(blocks[index]) for index in gone)
    before, count = weights_of(model), len(blocks)
    delete_blocks(model, gone)
    assert weights_of(model) == before - freed
    assert torch.equal(model(**batch, use_cache=False).logits, expected)
    write_shorter(model, AutoTokenizer.from_pretrained(folder), tmp_path / "shorter", config, torch.float32)
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "shorter", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.config.get_text_config().num_hidden_layers == count - len(gone)
    assert torch.equal(found.eval()(**batch, use_cache=False).logits, expected)
    written = [
        found.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize(("kind", "kept"), [("llama", None), ("gemma3", None), ("llama", ["norm", "input_layernorm"])])
def test_what_was_trained_in_float32_is_written_in_the_files_precision(kind, kept, tmp_path, monkeypatch):
    """With rotary frequencies that are not rounded with the weights. `kept` stays float32 in float16 alone, as GPT-OSS's norms."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", kept)
    folder = save_small(kind, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    config = ModelConfig(path=str(folder), device="cpu")
    model = load_model(config, dtype=torch.float32)
    delete_blocks(model, [1])
    write_shorter(model, AutoTokenizer.from_pretrained(folder), tmp_path / "shorter", config, torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "shorter").dtype == torch.bfloat16


def test_what_stays_float32_in_a_16_bit_model_is_not_rounded(tmp_path):
    """The routers' weights and biases of DeepSeek-V3."""
    folder = save_small("deepseek-v3", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert base._keep_in_fp32_modules_strict or base._keep_in_fp32_modules
    for block in base.model.layers[1:]:
        block.mlp.gate.e_score_correction_bias.data = torch.tensor([0.1, 0.2, 0.3, 0.4]) + 1e-4
        block.mlp.gate.weight.data = torch.full_like(block.mlp.gate.weight, 0.1, dtype=torch.float32)
    base.save_pretrained(folder)
    config = ModelConfig(path=str(folder), device="cpu")
    model = load_model(config, as_stored=True)
    delete_blocks(model, [1])
    write_shorter(model, AutoTokenizer.from_pretrained(folder), tmp_path / "shorter", config, torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "shorter")
    for block in found.model.layers[1:]:
        bias = block.mlp.gate.e_score_correction_bias
        assert bias.dtype == torch.float32
        assert torch.equal(bias.data, torch.tensor([0.1, 0.2, 0.3, 0.4]) + 1e-4)
        assert torch.equal(block.mlp.gate.weight.data, torch.full_like(block.mlp.gate.weight, 0.1, dtype=torch.float32))


def test_a_model_that_does_not_come_back_is_not_kept(tmp_path, monkeypatch):
    folder = save_small("llama", tmp_path / "base")
    config = ModelConfig(path=str(folder), device="cpu")
    model = load_model(config)
    delete_blocks(model, [1])
    monkeypatch.setattr("farss.pruning.surgery.load_model", lambda *_, **__: load_model(config))
    with pytest.raises(ModelError, match="does not come back from its files"):
        write_shorter(model, AutoTokenizer.from_pretrained(folder), tmp_path / "shorter", config, torch.float32)
    assert not (tmp_path / "shorter").exists()


def test_a_block_that_adds_nothing_is_not_missed():
    model = small("llama")
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        linear.weight.data.zero_()
    before = logits(model)
    delete_blocks(model, [2])
    assert torch.equal(logits(model), before)


def test_lists_of_the_configuration_lose_the_entries_of_the_blocks():
    model = small("gemma3")
    kinds = list(model.config.layer_types)
    delete_blocks(model, [0, 3])
    assert model.config.layer_types == kinds[1:3]
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]
    dense = small("deepseek-v3")
    assert dense.config.first_k_dense_replace == 1
    delete_blocks(dense, [0])
    assert dense.config.first_k_dense_replace == 0
    other = small("llama")
    other.config.num_dense_layers = 2  # as AFMoE says the same
    delete_blocks(other, [0, 3])
    assert other.config.num_dense_layers == 1


@pytest.mark.parametrize("kind", ["jamba", "gemma3n"])
def test_an_architecture_that_goes_by_places_is_refused(kind):
    model = copy.deepcopy(small(kind)).to("meta")
    with pytest.raises(ModelError, match="blocks of this architecture cannot be deleted"):
        check_deletable(model, [0], False)
    assert len(find_blocks(model)[1]) == len(find_blocks(small(kind))[1])  # and stays as it was


def test_a_hybrid_keeps_some_attention():
    """Without any, transformers' cache does not know how much was read, and neither forward passes nor generation work."""
    model = copy.deepcopy(small("granite-hybrid")).to("meta")
    attention = [place for place, kind in enumerate(model.config.layer_types) if "attention" in kind and "linear" not in kind]
    check_deletable(model, attention[:-1], False)
    with pytest.raises(ModelError, match="without any attention left"):
        check_deletable(model, attention, False)


def test_what_transformers_allows_nobody_to_load_is_refused():
    linear = {f"linear_{name}": number for name, number in {"num_key_heads": 4, "num_value_heads": 4, "key_head_dim": 8}.items()}
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    config = OlmoHybridConfig(**linear, **sizes, linear_value_head_dim=8, num_hidden_layers=4, pad_token_id=0, layer_types=kinds)
    check_deletable(empty_of(config, False), [0], False)
    with pytest.raises(ModelError, match="transformers allows no such model"):
        check_deletable(empty_of(config, False), [3], False)


def test_a_scale_that_depends_on_the_place_is_found_without_the_weights():
    config = GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=50, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="cannot be deleted"):
        check_deletable(empty_of(config, False), [0], False)
    check_deletable(empty_of(config, False), [3], False)  # the last block moves nobody's place
