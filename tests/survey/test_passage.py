"""What is refused or named while blocks are gone through one by one, and that the model is left as it was."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from oracle import read_activations, read_against, survey_of
from small_models import VOCABULARY, collated, examples, small
from torch import nn
from torch.utils._pytree import tree_leaves

from farss.errors import ModelError, NumericalError
from farss.structure import find_blocks
from farss.survey import Site, survey
from farss.survey.gradients import gradients
from farss.survey.passage import enter, returned_by, sampled, uniform_draws


def test_blocks_that_hand_on_more_than_one_state_a_token_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"the blocks of Gemma3nForCausalLM hand on states of shape \(2, 1, 11, 32\), not \[batch, tokens"):
        survey(Site(small("gemma3n"), tmp_path, 4), collated(examples()))


def test_a_model_that_cannot_be_kept_from_caching_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("farss.forward.accepts_or_hands_on", lambda model, argument: False)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM caches keys and values whatever it is told"):
        survey(Site(small("llama"), tmp_path, 4), collated(examples()))


def test_the_model_is_left_as_it_was(llama, tmp_path):
    llama.train()
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    survey(Site(llama, tmp_path, 4), collated(examples()))
    assert llama.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in llama.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_what_follows_the_blocks_sees_no_more_positions_than_it_knows(tmp_path):
    """All supervised tokens of a batch together are more than a table of 16 positions holds."""
    model = small("gpt2", max_position_embeddings=16)
    rows = [{**row, "input_ids": row["input_ids"][:14], "completion_mask": row["completion_mask"][:14]} for row in examples(12)]
    together, alone = (survey(Site(model, tmp_path / str(size), 4), collated(rows, size)) for size in (12, 1))
    for name, layer in together.layers.items():
        assert layer.importance == pytest.approx(alone.layers[name].importance, rel=1e-9)


def test_every_module_has_its_own_mode_back(llama, tmp_path):
    llama.train()
    llama.model.layers[1].eval()
    before = [module.training for module in llama.modules()]
    survey(Site(llama, tmp_path, 4), collated(examples()))
    assert [module.training for module in llama.modules()] == before


def test_blocks_that_are_gone_through_again_are_refused(tmp_path):
    options = {"embedding_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    model = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(vocab_size=97, **options)).double()
    batch = {"input_ids": torch.arange(3, 13)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long), "labels": torch.tensor([1])}
    with pytest.raises(ModelError, match=r"calls its last block 3 times: this architecture is not supported"):
        survey(Site(model, tmp_path, 4), [batch])


def test_what_blocks_are_called_with_is_held_once(llama):
    """A padded batch's mask is the square of its length, and all blocks are given the same."""
    blocks = find_blocks(llama)[1]
    batch = collated(examples(4), 4)[0]
    passage = enter(llama, blocks, batch, returned_by(llama, blocks, batch))
    held = [leaf for call in passage.calls for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    assert len(held) > len({id(leaf) for leaf in held}) * (len(blocks) - 1)
    assert all(leaf.device.type == "cpu" for leaf in held)


def test_nothing_is_dropped_out_while_it_is_looked_at(tmp_path):
    """GPT-2 has a dropout of its own, and a model may come in training."""
    for look in (survey, gradients):
        quiet, training = (
            look(Site(small("gpt2").train(mode), tmp_path / f"{look.__name__}-{mode}", 4), collated(examples())) for mode in (False, True)
        )
        for name, layer in quiet.layers.items():
            assert training.layers[name].importance == layer.importance


def test_sampled_labels_are_the_models_own(llama, tmp_path, monkeypatch):
    asked, original = [], nn.functional.cross_entropy

    def noted(logits, targets, **options):
        asked.append((logits.detach(), targets))
        return original(logits, targets, **options)

    monkeypatch.setattr(nn.functional, "cross_entropy", noted)
    batches = collated(examples(), 1)
    survey(Site(llama, tmp_path, 4), batches, fisher="sampled", seed=3)
    assert len(asked) == len(batches)
    for place, (batch, (logits, targets)) in enumerate(zip(batches, asked, strict=True)):
        wanted = batch["labels"][:, 1:] != -100
        assert torch.equal(targets, sampled(logits, uniform_draws(batch, 3, place)[:, : wanted.shape[1]][wanted]))


def test_labels_are_drawn_with_the_models_probabilities():
    logits = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64).log().expand(20_000, 3)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = sampled(logits, uniforms).bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.6, 0.3]), rtol=0, atol=0.015)


def test_a_model_that_hands_more_from_block_to_block_is_refused(llama, tmp_path):
    class Counting(torch.nn.Module):
        """A block whose output depends on how often blocks were called before."""

        calls = 0

        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, hidden_states, *args, **kwargs):
            Counting.calls += 1
            return self.block(hidden_states, *args, **kwargs) * (1 + Counting.calls)

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "block" else getattr(super().__getattr__("block"), name)

    for index in range(4):
        llama.model.layers[index] = Counting(llama.model.layers[index])
    with pytest.raises(ModelError, match="more than hidden states from block to block"):
        survey(Site(llama, tmp_path, 4), collated(examples()))


def test_nan_weights_are_named(llama, tmp_path):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"weights of model.layers.1.mlp.up_proj hold NaN"):
        survey(Site(llama, tmp_path, 4), collated(examples()))
    assert not (tmp_path / "survey.json").exists()


@pytest.mark.parametrize("look", [survey_of, read_activations])
def test_what_overflows_is_not_taken_up_in_a_higher_precision(llama, tmp_path, look, monkeypatch):
    monkeypatch.setattr("farss.places.computing_dtype", lambda dtype, device: dtype)  # as on a CPU that has units for float16
    llama.model.layers[1].mlp.up_proj.weight.data *= 1e5
    half = llama.half()
    with pytest.raises(NumericalError, match=r"what leaves block 1 holds NaN or infinite values, .*: set model.dtype=float32"):
        look(half, tmp_path)
    assert torch.isfinite(torch.tensor([layer.importance for layer in look(half.float(), tmp_path).layers.values()])).all()


@pytest.mark.parametrize("texts", [1, 2])
def test_a_layer_that_runs_without_gradients_is_named(llama, tmp_path, texts):
    layer = llama.model.layers[3].self_attn.k_proj
    layer.forward = torch.no_grad()(layer.forward)
    with pytest.raises(ModelError, match=r"no gradient reaches model.layers.3.self_attn.k_proj: leave it out of model.targets"):
        survey(Site(llama, tmp_path, 4), collated(examples())) if texts == 1 else read_against(llama, tmp_path)


def test_a_classifier_is_not_asked_for_tokens(tmp_path):
    model = transformers.LlamaForSequenceClassification(small("llama").config).double().eval()
    model.config.pad_token_id = 0
    with pytest.raises(ModelError, match="says 1 things of"):
        survey(Site(model, tmp_path, 4), collated(examples(2), 2))


@pytest.mark.parametrize("shared", [0, 2])
def test_keys_and_values_of_earlier_blocks_are_refused(tmp_path, shared):
    """Gemma 4's last blocks may read them out of a dictionary, behind which no gradient finds the block that they came from."""
    config = transformers.Gemma4TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, global_head_dim=16, num_global_key_value_heads=1, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=4, num_kv_shared_layers=shared, pad_token_id=0,
    )  # fmt: skip
    site = Site(transformers.AutoModelForCausalLM.from_config(config).eval(), tmp_path, 4)
    refused = pytest.raises(ModelError, match="hands more than hidden states from block to block") if shared else nullcontext()
    with refused:
        survey(site, collated(examples(2)))


@pytest.mark.parametrize("kind", ["mamba", "falcon-mamba"])
def test_states_between_blocks_may_have_another_precision_than_the_weights(tmp_path, kind):
    model = small(kind)
    for weight in model.parameters():
        weight.data /= 5 if weight.dim() == 2 else 1  # as transformers would have begun it: in 16 bits more would be noise
    found = survey(Site(model.bfloat16(), tmp_path / "16", 4), collated(examples()))
    exact = survey(Site(model.float(), tmp_path / "32", 4), collated(examples()))
    for name, layer in exact.layers.items():
        assert found.layers[name].importance == pytest.approx(layer.importance, rel=0.2)
