"""The sweep equals brute-force autograd, whatever the architecture, the batches and the padding."""

from functools import partial

import pytest
import torch
import transformers
from oracle import assert_equals, brute_force, read_activations
from small_models import collated, examples, small

from farss.batches import calibration_batches, collate
from farss.config import CalibrationConfig
from farss.maths.directions import decompose
from farss.structure import target_layers, weight_of
from farss.survey import Site, survey
from farss.survey.passage import Returned, enter, through
from farss.survey.sweep import shallow_end


def test_statistics_equal_brute_force(architecture, tmp_path):
    rows = examples()
    assert_equals(survey(Site(architecture, tmp_path, 4), collated(rows)), architecture, brute_force(architecture, rows))


@pytest.mark.parametrize("kind", ["granite-moe", "granite-hybrid"])
def test_no_block_sees_the_keys_of_the_passes_before(kind, tmp_path):
    """These models take `use_cache` for the model inside. With one example a batch nothing else than the numbers would tell."""
    model, rows = small(kind), examples()
    assert_equals(survey(Site(model, tmp_path, 4), collated(rows, 1)), model, brute_force(model, rows))


@pytest.mark.parametrize("kind", ["bamba", "bloom", "falcon", "falcon-h1", "gpt-neox-japanese", "mpt"])
def test_blocks_that_return_a_tuple_equal_brute_force(kind, tmp_path):
    """A model takes the hidden states out of a tuple of one or two, which a tensor in its place would be cut into."""
    model, rows = small(kind), examples()
    assert_equals(survey(Site(model, tmp_path / "task", 4), collated(rows, 3)), model, brute_force(model, rows))
    assert read_activations(model, tmp_path / "read").tokens == sum(len(row["input_ids"]) for row in rows)


def test_weak_directions_equal_brute_force(llama, tmp_path):
    """Where the weights are so ill-conditioned that the moments after the weight lose the weak directions."""
    for name in target_layers(llama):
        module, count = llama.get_submodule(name), min(llama.get_submodule(name).weight.shape)
        u, _, vh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        module.weight.data = (u * torch.logspace(0, -4, count, dtype=torch.float64)) @ vh
    rows = examples()
    assert_equals(survey(Site(llama, tmp_path, 4), collated(rows)), llama, brute_force(llama, rows))


def test_bfloat16_models_agree_with_float64_sums(tmp_path, monkeypatch):
    """Sums of a bfloat16 model are float32 or better: they are those of float64 sums of the same rows to 1e-4."""
    monkeypatch.setattr("farss.precision.multiplies_in", lambda dtype, device: True)  # computed in bfloat16 on every machine
    model, rows = small("llama-gqa").bfloat16(), examples()
    found = survey(Site(model, tmp_path, 4), collated(rows))
    layers, blocks = target_layers(model), model.model.layers

    def keep(name, inputs, module, args, output):
        inputs.append((name, args[0]))

    passages = [enter(model, blocks, batch, Returned(0)) for batch in collated(rows)]
    states = [passage.start for passage in passages]
    with torch.no_grad():
        for index, block in enumerate(blocks):
            kept, inputs = {}, []
            hooks = [
                model.get_submodule(name).register_forward_hook(partial(keep, name, inputs))
                for name, layer in layers.items()
                if layer.block == index
            ]
            states = [through(block, index, *pair) for pair in zip(passages, states, strict=True)]
            for hook in hooks:
                hook.remove()
            masks = [passage.mask for passage in passages for _ in hooks]
            for (name, x), mask in zip(inputs, masks, strict=True):
                kept.setdefault(name, []).append(x[mask].double())
            for name, parts in kept.items():
                rows_ = torch.cat(parts)
                v = decompose(weight_of(model.get_submodule(name))).vectors()[1]
                expected = (rows_ @ v.double()).square().mean(0)
                torch.testing.assert_close(found.directions(name).lam.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("size", "side", "order"), [(1, "right", 1), (6, "right", 1), (3, "left", 1), (2, "right", -1)])
def test_batches_padding_and_order_do_not_matter(llama, tmp_path, size, side, order):
    rows = examples()
    one = survey(Site(llama, tmp_path / "one", 4), collated(rows))
    two = survey(Site(llama, tmp_path / "two", 4), collated(rows[::order], size, side))
    assert one.tokens == two.tokens == sum(len(row["input_ids"]) for row in rows)
    for name in one.layers:
        assert one.layers[name].importance == pytest.approx(two.layers[name].importance, rel=1e-9)
        torch.testing.assert_close(one.directions(name).gam, two.directions(name).gam, rtol=1e-5, atol=1e-14)


def test_sampled_fisher_draws_labels_from_the_model(llama, tmp_path):
    by_data = survey(Site(llama, tmp_path / "a", 4), collated(examples()))
    drawn = [
        survey(Site(llama, tmp_path / f"{seed}{again}", 4), collated(examples()), fisher="sampled", seed=seed)
        for seed, again in ((1, 0), (1, 1), (2, 0))
    ]
    name = next(iter(by_data.layers))
    first, same, other = (result.layers[name].importance for result in drawn)
    assert first == same
    assert len({first, other, by_data.layers[name].importance}) == 3


def test_drawn_labels_do_not_depend_on_the_batches(llama, tmp_path):
    one = survey(Site(llama, tmp_path / "one", 4), collated(examples(), 1), fisher="sampled")
    two = survey(Site(llama, tmp_path / "two", 4), collated(examples(), 4), fisher="sampled")
    for name in one.layers:
        assert one.layers[name].importance == pytest.approx(two.layers[name].importance, rel=1e-9)


def test_fast_is_exact_where_blocks_may_become_shallow(tmp_path):
    model = small("llama", num_hidden_layers=8)
    exact = survey(Site(model, tmp_path / "exact", 4), collated(examples()))
    fast = survey(Site(model, tmp_path / "fast", 4), collated(examples()), svd="fast")
    assert "overlap" not in exact.meta
    assert fast.meta["overlap"]["most"] >= 0.9
    for name, layer in fast.layers.items():
        one, other = exact.directions(name), fast.directions(name)
        assert layer.importance == pytest.approx(exact.layers[name].importance, rel=1e-9)
        if layer.block < shallow_end(8):
            assert torch.equal(one.sigma, other.sigma)
            assert torch.equal(one.scores, other.scores)
        else:
            torch.testing.assert_close(one.sigma, other.sigma, rtol=1e-3, atol=1e-4)


def test_encoder_with_a_classification_head(tmp_path):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        num_labels=3,
    )
    model = transformers.RobertaForSequenceClassification(config).double().eval()
    rows, labels = examples(4), torch.tensor([0, 2, 1, 0])
    parts = [{**collate(rows[i : i + 2], 1), "labels": labels[i : i + 2]} for i in (0, 2)]
    for part in parts:
        part.pop("position_ids")
    found = survey(Site(model, tmp_path, 4), parts)
    asked = iter(labels)

    def loss(model, row):
        return torch.nn.functional.cross_entropy(model(torch.tensor([row["input_ids"]])).logits, next(asked)[None])

    assert_equals(found, model, brute_force(model, rows, loss))
    assert "roberta.encoder.layer.0.attention.self.query" in found.layers


def test_padding_counts_only_when_it_is_asked_for(tmp_path):
    """Gradients are nought on padding behind the text, so counting it thins them out by the share of real tokens."""
    model, rows = small("llama"), examples()
    shapes = {"examples": 6, "batch_size": 3}
    ignored, padded = (
        survey(Site(model, tmp_path / padding, 8), calibration_batches(rows, CalibrationConfig(padding=padding, **shapes), 0, 0, 16))
        for padding in ("ignore", "count")
    )
    assert padded.tokens == 6 * 16
    assert ignored.tokens == sum(len(row["input_ids"]) for row in rows)
    for name in ignored.layers:
        thin = ignored.directions(name).gam * ignored.tokens / padded.tokens
        torch.testing.assert_close(padded.directions(name).gam, thin, rtol=1e-4, atol=1e-12)
