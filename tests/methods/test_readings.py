"""The law of each method that starts from activations or from the weights' QR decomposition."""

import dataclasses
import gc
import re
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from small_models import collated, examples, logits, prompts, shapes, small
from trainings import Killed, killed_at

from farss.adapter import START, TRAINED, adapter_change, attach, lora_layers, start_of
from farss.config import PlanConfig
from farss.errors import ConfigError, ModelError
from farss.maths.moments import ExampleMoment, Moment
from farss.methods import METHODS
from farss.plan import make_plan, survey_cap
from farss.portable import export
from farss.prepared import write_prepared
from farss.structure import target_layers, weight_of
from farss.survey import Site, look, read_layers

CONFIG = PlanConfig(rank=6)
READINGS = ["olora", "corda-ipm", "corda-kpm", "lora-null", "lora-null-v2", "eva", "farss-plus"]


def planned(method, model, folder, batches=None, **options):
    config = dataclasses.replace(CONFIG, method=method, **options)
    needs = METHODS[method].needs
    known = look(Site(model, folder, survey_cap(config, *shapes(model))), needs, [batches] * len(needs.texts))
    return known, make_plan(config, known)


def inputs_of(model, name, batches, answers=False):
    """Every real token's input of a layer, or of the answers alone, [t, n] float64."""
    rows = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0].detach()))
    found = []
    for batch in batches:
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found.append(rows.pop()[batch["labels"] != -100 if answers else batch["attention_mask"].bool()])
    hook.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2"])
def test_olora_is_pefts(kind, tmp_path):
    model = small(kind).float()
    known, plan = planned("olora", model, tmp_path)
    theirs = get_peft_model(
        small(kind).float(),
        LoraConfig(r=6, lora_alpha=6, target_modules=list(plan.layers), init_lora_weights="olora", fan_in_fan_out=kind == "gpt2"),
    )
    for name in plan.layers:
        if kind == "gpt2":  # PEFT decomposes the transpose that Conv1D stores; ours must rebuild the layer's own weight
            weight = weight_of(model.get_submodule(name)).double()
            q, r = torch.linalg.qr(weight)
            their_b, their_a = q[:, :6], r[:6]
        else:
            module = theirs.base_model.model.get_submodule(name)
            their_b, their_a = (side["default"].weight.detach() for side in (module.lora_B, module.lora_A))
        b, a = start_of(plan, known, name).trained
        signs = (b * their_b).sum(0).sign()
        torch.testing.assert_close((b * signs).float(), their_b.float(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close((a * signs[:, None]).float(), their_a.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["corda-ipm", "corda-kpm"])
def test_corda_is_pefts(method, tmp_path):
    model, batches = small("llama-gqa").float(), collated(examples())
    known, plan = planned(method, model, tmp_path, batches)
    theirs = get_peft_model(model, corda_of_peft(method.removeprefix("corda-"), model, batches, [*plan.layers]))
    for name in plan.layers:
        b, a = (x.double() for x in start_of(plan, known, name).trained)
        module = theirs.base_model.model.get_submodule(name)
        their_b, their_a = (side["default"].weight.detach().double() for side in (module.lora_B, module.lora_A))
        expected = their_b @ their_a
        assert torch.dist(b @ a, expected) <= 2e-3 * expected.norm()
        torch.testing.assert_close(b.norm(dim=0), their_b.norm(dim=0), rtol=2e-3, atol=1e-6)  # the product is the same for any balance
        torch.testing.assert_close(a.norm(dim=1), their_a.norm(dim=1), rtol=2e-3, atol=1e-6)


def corda_of_peft(kind, model, batches, layers):
    """PEFT's CorDA, whose covariances are those of the same examples, one at a time and without padding."""

    @torch.no_grad()
    def run():
        for batch in batches:
            for tokens, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                model(tokens[mask][None])

    chosen = CordaConfig(corda_method=kind)
    config = LoraConfig(r=6, lora_alpha=6, target_modules=layers, init_lora_weights="corda", corda_config=chosen)
    preprocess_corda(model, config, run)
    return config


@pytest.mark.parametrize("method", ["pissa", "milora", "kasa", "olora", "corda-ipm", "corda-kpm", "lora-null"])
def test_a_start_is_the_same_part_of_the_weight_however_it_is_scaled(method, tmp_path):
    model, found = small("llama-gqa").float(), []
    for alpha in (6, 24):
        known, plan = planned(method, model, tmp_path, collated(examples()), alpha=alpha)
        start = {name: start_of(plan, known, name) for name in plan.layers}
        scales = {name: 1.0 if method == "olora" else layer.scaling for name, layer in plan.layers.items()}  # whose Q and R are as they are
        found.append({name: scales[name] * torch.matmul(*(each.removed or each.trained)) for name, each in start.items()})
    for name, part in found[0].items():
        assert part.norm() > 0
        torch.testing.assert_close(found[1][name], part, rtol=1e-5, atol=1e-7)


def test_corda_factors_rebuild_the_weight(tmp_path):
    model, batches = small("llama"), collated(examples())
    config = dataclasses.replace(CONFIG, method="corda-ipm", rank=32)
    known = read_layers(Site(model, tmp_path, survey_cap(config, *shapes(model))), METHODS["corda-ipm"].needs.read, batches)
    plan = make_plan(config, known)
    for name, layer in plan.layers.items():
        b, a = start_of(plan, known, name).trained
        weight = weight_of(model.get_submodule(name))
        assert torch.dist(layer.scaling * b @ a, weight) <= 1e-5 * weight.norm()


def test_lora_null_annihilates_the_knowledge(tmp_path):
    """With fewer tokens than inputs there is a true null space, and the start is nought on every token it was given."""
    model, batches = small("llama"), collated(examples(2))
    known, plan = planned("lora-null", model, tmp_path, batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for name, layer in plan.layers.items():
        rows = inputs_of(model, name, batches)
        weight = weight_of(model.get_submodule(name))
        b, a = start_of(plan, known, name).trained
        on_knowledge = (rows @ a.T @ b.T).norm() / (rows @ weight.T).norm()
        assert rows.shape[1] - tokens >= layer.rank
        assert on_knowledge <= 1e-6
        assert (rows @ a.double().T).norm() / rows.norm() <= 1e-6


def test_what_lora_null_v2_learns_is_nought_on_the_knowledge(tmp_path):
    """For good, as A stays in the null space of the tokens that it was given; and other trainers would not leave it there."""
    model, batches = small("llama"), collated(examples(2))
    known, plan = planned("lora-null-v2", model, tmp_path / "reading", batches)
    rows = {name: inputs_of(model, name, batches) for name in plan.layers}
    adapted = attach(model, plan, known)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all(f".lora_B.{TRAINED}." in name for name in trained)
    assert len(trained) == len(plan.layers)
    assert plan.parameters == sum(layer.rank * layer.shape[0] for layer in plan.layers.values())
    for name, module in lora_layers(adapted, plan).items():
        module.lora_B[TRAINED].weight.data += torch.randn_like(module.lora_B[TRAINED].weight)
        left, right = adapter_change(adapted, name)
        assert (rows[name] @ right.T @ left.T).norm() <= 1e-6 * rows[name].norm() * (left @ right).norm()
    with pytest.raises(ConfigError, match="'lora-null-v2' keeps A as it begins, and other trainers would train it"):
        write_prepared(adapted, plan, None, tmp_path / "prepared", "base")


def test_lora_null_is_the_projection_of_the_weight(tmp_path):
    model, batches = small("gemma3"), collated(examples(20))  # more tokens than inputs: the weakest directions are unique
    known, plan = planned("lora-null", model, tmp_path, batches)
    for name, layer in plan.layers.items():
        rows = inputs_of(model, name, batches)
        null = torch.linalg.eigh(rows.T @ rows)[1][:, : layer.rank]
        b, a = start_of(plan, known, name).trained
        expected = weight_of(model.get_submodule(name)) @ null @ null.T
        assert torch.dist(layer.scaling * b @ a, expected) <= 1e-4 * expected.norm()
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-4, atol=1e-8)  # balanced, as its SVD makes it


def test_eva_starts_from_the_main_directions_and_gives_ranks_where_they_explain_most(tmp_path):
    model, batches = small("llama-gqa"), collated(examples())
    known, plan = planned("eva", model, tmp_path, batches)
    layers = target_layers(model)
    assert sum(layer.rank for layer in plan.layers.values()) == 6 * len(layers)
    assert max(layer.rank for layer in plan.layers.values()) <= 12
    chosen, left = [], []
    for name, shape in layers.items():
        rows = inputs_of(model, name, batches, answers=True)
        values, vectors = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[1:]
        share = values.square() / values.square().sum()
        rank = plan.layers[name].rank if name in plan.layers else 0
        cap = min(12, *shape.shape)
        chosen += share[:rank].tolist()
        left += share[rank:cap].tolist()
        if rank:
            start = start_of(plan, known, name)
            assert start.removed is None
            assert not start.trained[0].any()
            torch.testing.assert_close((start.trained[1].double() @ vectors[:rank].T).abs(), torch.eye(rank).double(), rtol=0, atol=1e-4)
    assert min(chosen) >= max(left) - 1e-9


def test_eva_is_pefts(tmp_path):
    """Principal components of the answers' activations, and the ranks. Layers with one input have the same components, so
    that PEFT gives the last of their ranks to whichever comes first: those are compared in sum."""
    model, batches = small("llama-gqa").float(), collated(examples(12), 12)
    known, plan = planned("eva", model, tmp_path, batches)
    settings = LoraConfig(r=6, target_modules=list(known.layers), init_lora_weights="eva")
    keys = ("input_ids", "attention_mask", "labels")
    theirs = get_eva_state_dict(model, [{key: batches[0][key] for key in keys}], settings, show_progress_bar=False)
    ranks = Counter()
    for name in known.layers:
        rank = plan.layers[name].rank if name in plan.layers else 0
        both = min(rank, len(theirs[name]))
        ranks[re.sub("[kv]_proj", "q_proj", name).replace("gate", "up")] += rank - len(theirs[name])
        if both:
            ours = start_of(plan, known, name).trained[1][:both]
            torch.testing.assert_close((ours @ theirs[name][:both].T.float()).abs(), torch.eye(both), rtol=0, atol=2e-3)
    assert not any(ranks.values())
    assert len({layer.rank for layer in plan.layers.values()}) > 1


@pytest.mark.parametrize("method", READINGS)
def test_step_zero_training_and_export(method, tmp_path):
    model, batches = small("llama").float(), collated(examples())
    before = logits(model)
    known, plan = planned(method, model, tmp_path / "reading", batches)
    adapted = attach(model, plan, known, dropout=0.5, seed=3)
    scale = before.abs().max()
    assert all((logits(adapted.train(mode)) - before).abs().max() <= 1e-5 * scale for mode in (True, False))
    assert (START in adapted.peft_config) == METHODS[method].takes_out == (method not in ("eva", "farss-plus"))
    for module in lora_layers(adapted, plan).values():
        module.lora_B[TRAINED].weight.data += 0.05
    trained = logits(adapted)
    done = export(adapted, plan, tmp_path / "adapter", prompts())
    assert done.logit_difference <= 1e-5 * trained.abs().max()
    assert (trained - before).abs().max() > 0.01 * scale


@pytest.mark.parametrize("method", ["olora", "lora-null", "eva", "corda-ipm"])
def test_a_killed_reading_goes_on_to_the_same_bytes(method, tmp_path):
    needs = METHODS[method].needs
    texts = [collated(examples())] * len(needs.texts)
    with pytest.raises(Killed):
        look(Site(small("llama"), tmp_path / "one", 6, tell=killed_at(2)), needs, texts)
    first = (tmp_path / "one" / "block-0000.safetensors").stat().st_mtime_ns
    look(Site(small("llama"), tmp_path / "one", 6), needs, texts)
    look(Site(small("llama"), tmp_path / "two", 6), needs, texts)
    assert (tmp_path / "one" / "block-0000.safetensors").stat().st_mtime_ns == first
    for file in (tmp_path / "two").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    assert {file.name for file in (tmp_path / "one").iterdir()} == {file.name for file in (tmp_path / "two").iterdir()}


def test_an_example_without_tokens_is_none():
    rows = torch.randn(3, 4)
    one, two = ExampleMoment(torch.float64), ExampleMoment(torch.float64)
    one.add(rows, [3])
    two.add(rows, [0, 3, 0])
    torch.testing.assert_close(one.mean, two.mean)


def test_one_blocks_moments_exist_at_a_time(tmp_path):
    model, most = small("llama"), []

    def note(module, args):
        most.append(sum(isinstance(thing, Moment) and thing.total is not None for thing in gc.get_objects()))

    for block in model.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(note)
    planned("lora-null", model, tmp_path, collated(examples(), 2))
    assert max(most) == 4  # of q, k and v; of o; of gate and up; of down


@pytest.mark.parametrize("over", ["tokens", "answers", "examples"])
@pytest.mark.parametrize(("calls", "message"), [(0, "no token reaches"), (2, r"\d+ tokens of \d+ went through")])
def test_a_layer_that_not_every_token_goes_through_once_is_refused(over, calls, message, tmp_path):
    model = small("llama")
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: sum(forward(x) for _ in range(calls)) + x
    with pytest.raises(ModelError, match=rf"{message}.*: leave it out of model.targets"):
        read_layers(Site(model, tmp_path, 6), METHODS["eva"].needs.read, collated(examples(), 2), over=over)


@pytest.mark.parametrize("over", ["tokens", "answers", "examples"])
def test_batches_do_not_matter(over, tmp_path):
    rows = examples()
    one = read_layers(Site(small("qwen3"), tmp_path / "one", 6), METHODS["eva"].needs.read, collated(rows, 1), over=over)
    two = read_layers(Site(small("qwen3"), tmp_path / "two", 6), METHODS["eva"].needs.read, collated(rows, 6, "left"), over=over)
    for name in one.layers:
        torch.testing.assert_close(one.directions(name).lam, two.directions(name).lam, rtol=1e-5, atol=1e-8)
        assert one.layers[name].importance == pytest.approx(two.layers[name].importance, rel=1e-6)


@pytest.mark.parametrize("method", ["corda-kpm", "farss-plus", "eva", "lora-null"])
def test_a_layer_whose_inputs_are_all_zero_is_read(method):
    weight, nothing = torch.randn(6, 4, dtype=torch.float64, generator=torch.manual_seed(0)), torch.zeros(4, 4, dtype=torch.float64)
    needs = METHODS[method].needs
    found = needs.read(weight, 4, *[nothing] * len(needs.texts))
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
