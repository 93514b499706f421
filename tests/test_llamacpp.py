"""GGUF adapters hold the exported change under llama.cpp's names, in llama.cpp's row order."""

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import prompts, small, trained

from farss.errors import FarssError
from farss.llamacpp import check_gguf, write_gguf
from farss.portable import export


def written(kind, folder):
    adapted, plan = trained(kind, folder)
    export(adapted, plan, folder / "adapter", prompts())
    config = small(kind).config
    if kind == "gemma3":  # so few blocks all attend to what is near, as llama.cpp has them
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    reader = gguf.GGUFReader(write_gguf(folder / "adapter", config))
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    return reader, tensors, state


@pytest.mark.parametrize(("kind", "architecture"), [("llama-gqa", "llama"), ("gemma3", "gemma3"), ("qwen3", "qwen3"), ("phi3", "phi3")])
def test_every_layer_is_there(kind, architecture, tmp_path):
    reader, tensors, state = written(kind, tmp_path)
    assert reader.fields["general.architecture"].contents() == architecture
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    rank = next(tensor.shape[0] for key, tensor in state.items() if "lora_A" in key)
    assert reader.fields["adapter.lora.alpha"].contents() == rank
    assert len(tensors) == len(state)
    assert all(name.startswith("blk.") and name.endswith((".weight.lora_a", ".weight.lora_b")) for name in tensors)
    down = "base_model.model.model.layers.2.mlp.down_proj.lora_{}.weight"
    assert torch.equal(tensors["blk.2.ffn_down.weight.lora_a"], state[down.format("A")])
    assert torch.equal(tensors["blk.2.ffn_down.weight.lora_b"], state[down.format("B")])


def test_rows_of_q_and_k_rotate_as_llama_cpp_rotates(tmp_path):
    """The same scores q.k whether halves (transformers) or neighbouring pairs (llama.cpp) of a head are rotated."""
    _, tensors, state = written("llama-gqa", tmp_path)
    heads, kv_heads, size, angle = 4, 2, 8, torch.linspace(0.3, 1.2, 4)
    x = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def halves(y):
        first, second = y[..., : size // 2], y[..., size // 2 :]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    def pairs(y):
        first, second = y[..., 0::2], y[..., 1::2]
        return torch.stack([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1).flatten(-2)

    def score(find, rotate):
        q, k = (find(kind) @ x for kind in ("q", "k"))
        q, k = rotate(q.reshape(heads, size)), k.reshape(kv_heads, size)
        return q @ k.T

    def ours(kind):
        key = f"base_model.model.model.layers.1.self_attn.{kind}_proj.lora_{{}}.weight"
        return state[key.format("B")] @ state[key.format("A")]

    def theirs(kind):
        return tensors[f"blk.1.attn_{kind}.weight.lora_b"] @ tensors[f"blk.1.attn_{kind}.weight.lora_a"]

    torch.testing.assert_close(score(theirs, pairs), score(ours, halves))


def test_rows_of_a_joined_layer_are_all_of_q_then_k_then_v(tmp_path):
    """GPT-NeoX holds q, k and v head by head; llama.cpp cuts them as three thirds."""
    _, tensors, state = written("gpt-neox", tmp_path)
    key = "base_model.model.gpt_neox.layers.1.attention.query_key_value.lora_B.weight"
    heads, size = 4, 8
    ours = state[key].reshape(heads, 3, size, -1)
    for place, part in enumerate(tensors["blk.1.attn_qkv.weight.lora_b"].chunk(3)):
        assert torch.equal(part, ours[:, place].flatten(0, 1))


def test_a_pruned_gemma_is_another_model_there():
    config = transformers.Gemma3TextConfig(num_hidden_layers=12)
    check_gguf(config)
    config.layer_types, config.num_hidden_layers = config.layer_types[1:], 11
    with pytest.raises(FarssError, match=r"knows the kinds of a gemma3_text's blocks by their places, and those of this model are others"):
        check_gguf(config)
    check_gguf(transformers.Gemma2Config(num_hidden_layers=5))


def test_an_unknown_architecture_is_refused(tmp_path):
    with pytest.raises(FarssError, match=r"no GGUF adapter for gpt2: known are gemma2, .*; export to peft, or merged"):
        write_gguf(tmp_path, transformers.GPT2Config())
    assert not list(tmp_path.iterdir())
