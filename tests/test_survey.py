"""The sweep equals brute-force autograd, whatever the architecture, the batches and the padding."""

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_models import collated, examples, language_loss, quadratic_form, small

from farss.artifacts import Survey
from farss.batches import calibration_batches, collate
from farss.config import CalibrationConfig
from farss.errors import ConfigError, FarssError, FolderError, ModelError, NumericalError
from farss.maths.directions import decompose, direction_scores, select
from farss.methods import METHODS
from farss.structure import left_out, target_layers, weight_of
from farss.survey import Site, read_layers, survey
from farss.survey.against import against
from farss.survey.passage import enter, sampled, through
from farss.survey.sweep import shallow_end


def brute_force(model, rows, loss=language_loss):
    """A and G of every linear layer, one example at a time, from ordinary autograd over the whole model."""
    names, seen, tokens = list(target_layers(model)), {}, 0

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            seen[name] = (args[0].detach().flatten(0, -2), output)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    model.requires_grad_(True)
    moments = {}
    for row in rows:
        loss(model, row).backward()
        tokens += len(row["input_ids"])
        for name, (h, y) in seen.items():
            a, g = moments.get(name, (0, 0))
            gradient = y.grad.flatten(0, -2)
            moments[name] = (a + h.T @ h, g + gradient.T @ gradient)
    for hook in hooks:
        hook.remove()
    return {name: (a / tokens, g / tokens) for name, (a, g) in moments.items()}


FLOAT32 = ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h")
"""Models whose scan (Mamba 2) computes in float32, whatever they are in: it rounds the same example otherwise in another batch."""


def assert_equals(found, model, expected):
    """Importance, statistics and chosen directions are those of full covariances and LAPACK's decomposition."""
    near = 1e-6 if model.config.model_type in FLOAT32 else 1e-9
    assert set(found.layers) == set(expected)
    for name, (a, g) in expected.items():
        weight = weight_of(model.get_submodule(name)).detach()
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        v, known = vh.T, found.directions(name)
        assert found.layers[name].importance == pytest.approx((quadratic_form(weight, a, g) / weight.numel()).item(), rel=near)
        scores = direction_scores(sigma, ((v.T @ a) * v.T).sum(1), ((u.T @ g) * u.T).sum(1))
        for side in ("least", "most"):
            chosen = select(scores, 4, side)
            assert select(known.scores, 4, side).tolist() == chosen.tolist()
            kept_u, kept_v = found.vectors(name, chosen.tolist())
            start = (kept_u * known.sigma[chosen]) @ kept_v.T
            torch.testing.assert_close(start.double(), (u[:, chosen] * sigma[chosen]) @ v[:, chosen].T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(known.sigma, sigma.float())
        torch.testing.assert_close(known.lam, ((v.T @ a) * v.T).sum(1).float(), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(known.gam, ((u.T @ g) * u.T).sum(1).float(), rtol=1e-5, atol=1e-12)


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


def test_blocks_that_hand_on_more_than_one_state_a_token_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"the blocks of Gemma3nForCausalLM hand on states of shape \(2, 1, 11, 32\), not \[batch, tokens"):
        survey(Site(small("gemma3n"), tmp_path, 4), collated(examples()))


def test_a_model_that_cannot_be_kept_from_caching_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("farss.forward.accepts_or_hands_on", lambda model, argument: False)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM caches keys and values whatever it is told"):
        survey(Site(small("llama"), tmp_path, 4), collated(examples()))


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

    passages = [enter(model, blocks, batch, 0) for batch in collated(rows)]
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


def test_same_seed_same_bytes(llama, tmp_path):
    for place in ("one", "two"):
        survey(Site(llama, tmp_path / place, 4), collated(examples()))
    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_model_is_left_as_it_was(llama, tmp_path):
    llama.train()
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    survey(Site(llama, tmp_path, 4), collated(examples()))
    assert llama.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in llama.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_survey_is_read_back_and_leaves_no_working_files(llama, tmp_path):
    (tmp_path / ".input-0001.safetensors.123.part").touch()  # of a process that was killed
    written = survey(Site(llama, tmp_path, 4), collated(examples()))
    assert Survey.load(tmp_path) == written
    assert {file.name for file in tmp_path.iterdir()} == {"survey.json", *(f"block-{index:04d}.safetensors" for index in range(4))}


@pytest.mark.parametrize("moment", ["forward pass, block 2", "block 2, "])
def test_a_killed_survey_goes_on_to_the_same_bytes(tmp_path, moment):
    script = textwrap.dedent("""
        import sys, os, signal
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from small_models import collated, examples, small
        from farss.survey import Site, survey
        def tell(done, total, line):
            if line.startswith(sys.argv[4]) and sys.argv[3] == "kill": os.kill(os.getpid(), signal.SIGKILL)
        survey(Site(small("llama-gqa"), Path(sys.argv[2]), 4, tell=tell), collated(examples()))
    """)
    here = os.path.dirname(__file__)

    def start(folder, how):
        return subprocess.run([sys.executable, "-c", script, here, str(tmp_path / folder), how, moment], check=False).returncode

    assert start("whole", "run") == 0
    assert start("killed", "kill") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "survey.json").exists()
    pattern = "input-000[012].safetensors" if moment.startswith("forward") else "block-000[23].safetensors"
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob(pattern)}
    assert len(done) == (3 if moment.startswith("forward") else 2)
    assert start("killed", "run") == 0
    if not moment.startswith("forward"):
        assert all(file.stat().st_mtime_ns == time for file, time in done.items())
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def test_a_folder_of_another_survey_is_refused_and_the_same_one_read(llama, tmp_path):
    first = survey(Site(llama, tmp_path, 4), collated(examples()))
    stamp = (tmp_path / "survey.json").stat().st_mtime_ns
    assert survey(Site(llama, tmp_path, 3), collated(examples())) == first
    assert (tmp_path / "survey.json").stat().st_mtime_ns == stamp
    with pytest.raises(FolderError, match="other data"):
        survey(Site(llama, tmp_path, 4), collated(examples(seed=1)))
    with pytest.raises(FolderError, match="kept 4 directions at each end, and 5 may be needed"):
        survey(Site(llama, tmp_path, 5), collated(examples()))


def test_other_batches_of_the_same_examples_are_the_same_survey(llama, tmp_path):
    first = survey(Site(llama, tmp_path, 4), collated(examples(), 2))
    assert survey(Site(llama, tmp_path, 4), collated(examples(), 3, "left")) == first


def test_an_unfinished_survey_of_other_data_is_refused(llama, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total, line):
        if done == 1:
            raise Stop

    with pytest.raises(Stop):
        survey(Site(llama, tmp_path, 4, tell=stop), collated(examples()))
    with pytest.raises(FolderError, match="unfinished survey"):
        survey(Site(llama, tmp_path, 4), collated(examples(seed=1)))
    with pytest.raises(FolderError, match=r"begun with another calibration.batch_size: go on with that, or delete it"):
        survey(Site(llama, tmp_path, 4), collated(examples(), 1))  # what was kept on the way are states of other batches
    assert survey(Site(llama, tmp_path, 4), collated(examples())).examples == 6


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


def test_labels_are_drawn_with_the_models_probabilities():
    logits = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64).log().expand(20_000, 3)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = sampled(logits, uniforms).bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.6, 0.3]), rtol=0, atol=0.015)


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


def test_a_disk_without_room_is_refused_before_anything_is_computed(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("farss.survey.kept.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(FarssError, match=r"keeps 0\.0 GB in .* while it runs, and 0\.0 GB are free"):
        survey(Site(llama, tmp_path, 4), collated(examples()))
    assert {file.name for file in tmp_path.iterdir()} == {"progress.json"}


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


def test_a_single_target_layer(llama, tmp_path):
    found = survey(Site(llama, tmp_path, 4, targets=["model.layers.2.mlp.down_proj"]), collated(examples()))
    assert list(found.layers) == ["model.layers.2.mlp.down_proj"]


def test_unknown_target_names_the_nearest(llama):
    with pytest.raises(ConfigError, match=r"no linear layer is called 'q_prj': did you mean 'q_proj'"):
        target_layers(llama, ["q_prj"])


def read_activations(model, folder):
    return read_layers(Site(model, folder, 4), METHODS["corda-kpm"].needs.read, collated(examples()))


def read_against(model, folder):
    return against(Site(model, folder, 4), collated(examples()), collated(examples(seed=1)), METHODS["farss-plus"].needs.read)


MAPS = Path("/proc/self/maps")
LOOKS = [lambda model, folder: survey(Site(model, folder, 4), collated(examples())), read_activations, read_against]


@pytest.mark.skipif(not MAPS.exists(), reason="reads what Linux says of the files in use")
@pytest.mark.parametrize("look", LOOKS, ids=["survey", "activations", "against"])
def test_no_file_is_in_use_when_it_is_deleted(llama, tmp_path, monkeypatch, look):
    """Windows does not delete one that is."""
    deleted, unlink = {}, Path.unlink

    def noted(path, missing_ok=False):
        deleted[path.name] = str(path) in MAPS.read_text()
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    look(llama, tmp_path)
    assert not any(deleted.values())
    assert {f"input-{block:04d}.safetensors" for block in range(4)} <= deleted.keys()


def test_nan_weights_are_named(llama, tmp_path):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"weights of model.layers.1.mlp.up_proj hold NaN"):
        survey(Site(llama, tmp_path, 4), collated(examples()))
    assert not (tmp_path / "survey.json").exists()


@pytest.mark.parametrize("look", LOOKS[:2])
def test_what_overflows_is_not_taken_up_in_a_higher_precision(llama, tmp_path, look, monkeypatch):
    monkeypatch.setattr("farss.places.computing_dtype", lambda dtype, device: dtype)  # as on a CPU that has units for float16
    llama.model.layers[1].mlp.up_proj.weight.data *= 1e5
    half = llama.half()
    with pytest.raises(NumericalError, match=r"what leaves block 1 holds NaN or infinite values, .*: set model.dtype=float32"):
        look(half, tmp_path)
    assert torch.isfinite(torch.tensor([layer.importance for layer in look(half.float(), tmp_path).layers.values()])).all()


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


@pytest.mark.parametrize("texts", [1, 2])
def test_a_layer_that_runs_without_gradients_is_named(llama, tmp_path, texts):
    layer = llama.model.layers[3].self_attn.k_proj
    layer.forward = torch.no_grad()(layer.forward)
    with pytest.raises(ModelError, match=r"no gradient reaches model.layers.3.self_attn.k_proj: leave it out of model.targets"):
        survey(Site(llama, tmp_path, 4), collated(examples())) if texts == 1 else read_against(llama, tmp_path)


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


def test_a_classifier_is_not_asked_for_tokens(tmp_path):
    model = transformers.LlamaForSequenceClassification(small("llama").config).double().eval()
    model.config.pad_token_id = 0
    with pytest.raises(ModelError, match="says 1 things of"):
        survey(Site(model, tmp_path, 4), collated(examples(2), 2))
