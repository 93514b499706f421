"""The law of FARSS-plus: its directions are those that the task pulls most of all that cost knowledge the same."""

import dataclasses

import pytest
import torch
from small_models import collated, examples, language_loss, logits, shapes, small

from farss.adapter import TRAINED, activate, attach, lora_layers, start_of
from farss.config import PlanConfig
from farss.errors import FarssError
from farss.methods.corda import damped
from farss.methods.farss_plus import read
from farss.plan import make_plan, survey_cap
from farss.portable import export
from farss.prepared import write_prepared
from farss.structure import target_layers
from farss.survey import Site, read_layers
from farss.survey.against import against

CONFIG = PlanConfig(method="farss-plus", rank=6)
TASK, KNOWLEDGE = examples(12), examples(9, seed=1)


def looked_at(model, folder, task=None, knowledge=None, **options):
    texts = task or collated(TASK), knowledge or collated(KNOWLEDGE)
    return against(Site(model, folder, survey_cap(CONFIG, *shapes(model)), **options), *texts, read)


def brute_force(model, layers):
    """T and K of every layer, one example at a time, from ordinary autograd over the whole model."""
    seen = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    model.requires_grad_(True)
    task, knowledge = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    for row in TASK:
        language_loss(model, row).backward()
        for name, (x, y) in seen.items():
            for token, gradient in zip(x[0], y.grad[0], strict=True):
                task[name] = task[name] + gradient.square().sum() * torch.outer(token, token)
    for row in KNOWLEDGE:
        model(input_ids=torch.tensor([row["input_ids"]]))
        for name, (x, _) in seen.items():
            knowledge[name] = knowledge[name] + x[0].T @ x[0]
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    counts = [sum(len(row["input_ids"]) for row in rows) for rows in (TASK, KNOWLEDGE)]
    return {name: (task[name].detach() / counts[0], knowledge[name] / counts[1]) for name in layers}


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "gemma3"])
def test_directions_are_the_generalised_eigenvectors_of_brute_force(kind, tmp_path):
    model = small(kind)
    known, expected = looked_at(model, tmp_path), brute_force(model, target_layers(model))
    plan = make_plan(CONFIG, known)
    for name, (task, knowledge) in expected.items():
        knowledge, _ = damped(knowledge)
        b, a = start_of(plan, known, name).trained
        rank, pulls = len(a), known.directions(name).lam[: len(a)].double()
        assert not b.any()
        a = a.double()
        torch.testing.assert_close(a @ knowledge @ a.T, torch.eye(rank).double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(a @ task @ a.T, pulls.diag(), rtol=1e-4, atol=1e-4 * pulls[0].item())
        values = torch.linalg.eigvals(torch.linalg.solve(knowledge, task)).real.sort(descending=True).values
        torch.testing.assert_close(pulls, values[:rank], rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [20, 200], ids=["all directions", "a few of many"])
def test_no_other_directions_at_the_price_pull_more(size):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3 * size, size, generator=generator, dtype=torch.float64)
    task, knowledge = rows[0].T @ rows[0], rows[1].T @ rows[1]
    a = read(torch.zeros(size + 10, size), 6, task, knowledge)["v"].T.double()
    priced, factor = damped(knowledge)
    best = (a @ task @ a.T).trace()
    assert best == pytest.approx(torch.linalg.eigvals(torch.linalg.solve(priced, task)).real.topk(6).values.sum().item(), rel=1e-6)
    for other in torch.randn(100, size, 6, generator=generator, dtype=torch.float64):
        same_price = torch.linalg.solve_triangular(factor.T, torch.linalg.qr(other).Q, upper=True).T
        torch.testing.assert_close(same_price @ priced @ same_price.T, torch.eye(6).double(), rtol=0, atol=1e-9)
        assert (same_price @ task @ same_price.T).trace() < best


@pytest.mark.parametrize("pulls", [0, 2])
def test_any_rank_can_be_had_though_the_task_pulls_few_directions(tmp_path, pulls):
    """A few examples, or a layer behind one of zeros, have fewer directions than the adapter."""

    def few(weight, cap):
        inputs = torch.randn(pulls, weight.shape[1], generator=torch.Generator().manual_seed(0))
        return read(weight, cap, inputs.T @ inputs, torch.eye(weight.shape[1]))

    model = small("llama-gqa").float()
    known = read_layers(Site(model, tmp_path, survey_cap(CONFIG, *shapes(model))), few)
    adapted = attach(model, plan := make_plan(CONFIG, known), known)
    for module in lora_layers(adapted, plan).values():
        assert torch.linalg.matrix_rank(module.lora_A[TRAINED].weight) == 6


def test_every_number_of_b_costs_knowledge_the_same():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 20, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 20).double()
    task = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    a = read(torch.zeros(30, 20), 6, task @ task.T, x.T @ x / len(x))["v"].T.double()
    b = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    energy = (x @ a.T @ b.T).square().sum(1).mean()
    assert energy == pytest.approx(b.square().sum().item(), rel=0.2)  # the damping is the difference
    assert energy <= b.square().sum()


def test_a_stays_as_it_starts_and_only_b_counts(tmp_path):
    model = small("llama-gqa").float()
    known = looked_at(model, tmp_path / "looked-at")
    plan = make_plan(CONFIG, known)
    adapted = attach(model, plan, known)
    activate(adapted)  # as a trainer's callback does once more
    modules = lora_layers(adapted, plan)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.parameters
    assert plan.parameters == sum(layer.rank * layer.shape[0] for layer in plan.layers.values())
    before = {name: module.lora_A[TRAINED].weight.clone() for name, module in modules.items()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    language_loss(adapted, TASK[0]).backward()
    optimizer.step()
    assert all(torch.equal(before[name], module.lora_A[TRAINED].weight) for name, module in modules.items())
    assert all(module.lora_B[TRAINED].weight.any() for module in modules.values())
    batch = {key: collated(TASK[:2])[0][key] for key in ("input_ids", "attention_mask")}
    assert export(adapted, plan, tmp_path / "adapter", batch).rank == 8  # the next that is served; nothing was taken out of the base


def test_there_is_no_other_base_to_prepare(tmp_path):
    model = small("llama-gqa").float()
    plan = make_plan(CONFIG, known := looked_at(model, tmp_path / "looked-at"))
    with pytest.raises(FarssError, match="'farss-plus' takes nothing out of the base, so there is no other base"):
        write_prepared(attach(model, plan, known), plan, None, tmp_path / "prepared", "base")
    assert not (tmp_path / "prepared").exists()


def test_a_matched_adapter_has_the_size_of_a_lora(tmp_path):
    model = small("llama-gqa").float()
    plan = make_plan(dataclasses.replace(CONFIG, match_params="lora"), looked_at(model, tmp_path))
    assert {layer.rank for layer in plan.layers.values()} == {6}
    size = sum(6 * sum(layer.shape) for layer in plan.layers.values())
    assert plan.notes == [f"Rank 6 gives {size:,} parameters, with those of A, which do not train, nearest to the {size:,} asked for."]


@pytest.mark.parametrize(("size", "side"), [(1, "right"), (5, "left")])
def test_batches_and_padding_do_not_matter(size, side, tmp_path):
    one = looked_at(small("llama-gqa"), tmp_path / "one")
    two = looked_at(small("llama-gqa"), tmp_path / "two", collated(TASK, size, side), collated(KNOWLEDGE, size, side))
    for name in one.layers:
        torch.testing.assert_close(one.directions(name).lam, two.directions(name).lam, rtol=1e-4, atol=0)
        assert one.layers[name].importance == pytest.approx(two.layers[name].importance, rel=1e-9)


@pytest.mark.parametrize("moment", ["forward pass, block 1", "block 2", "block 1"])
def test_a_killed_sweep_goes_on_to_the_same_bytes(moment, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total, line):
        if line.startswith(moment):
            raise Stop

    with pytest.raises(Stop):
        looked_at(small("llama"), tmp_path / "one", tell=stop)
    one, _ = looked_at(small("llama"), tmp_path / "one"), looked_at(small("llama"), tmp_path / "two")
    for file in (tmp_path / "two").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    assert {file.name for file in (tmp_path / "one").iterdir()} == {file.name for file in (tmp_path / "two").iterdir()}
    assert (one.examples, one.tokens) == (len(TASK), sum(len(row["input_ids"]) for row in TASK))


def test_other_knowledge_gives_other_directions(tmp_path):
    one = looked_at(small("llama-gqa"), tmp_path / "one")
    two = looked_at(small("llama-gqa"), tmp_path / "two", knowledge=collated(examples(9, seed=2)))
    assert any(not torch.allclose(one.directions(name).lam, two.directions(name).lam, rtol=1e-2) for name in one.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_as_the_base_in_any_precision(tmp_path, dtype):
    model = small("llama-gqa").to(dtype)
    known = looked_at(model, tmp_path)
    before = logits(model)
    assert torch.equal(logits(attach(model, make_plan(CONFIG, known), known).eval()), before)
