"""The laws of FoRA."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from small_models import collated, examples, logits, prompts, shapes, small
from trainings import Kill, Killed, difference, killed_at, options, tokenizer, weights, whole_model
from trainings import examples as rows_to_learn

from farss.adapter import TRAINED, adapter_change, attach, lora_layers
from farss.artifacts import Layer, Survey
from farss.config import PlanConfig
from farss.errors import ConfigError, NumericalError
from farss.methods import METHODS
from farss.methods.base import Context, check_elsewhere
from farss.methods.fora import BETAS, RATE, CayleyAdamW, largest_half
from farss.plan import make_plan, survey_cap
from farss.portable import export
from farss.structure import find_blocks
from farss.survey import Site, look
from farss.survey.gradients import gradients
from farss.survey.passage import output_gradient
from farss.train import train

CONFIG = PlanConfig(method="fora", rank=4, alpha=8)


def planned(model, folder, rows=None, **changes):
    known = look(Site(model, folder, 1), METHODS["fora"].needs, [rows or collated(examples())])
    return make_plan(dataclasses.replace(CONFIG, **changes), known)


def attached(model, folder, rows=None, **changes):
    plan = planned(model, folder, rows, **changes)
    regime = METHODS["fora"].regime(dataclasses.replace(CONFIG, **changes), plan)
    return attach(model, plan, seed=3, regime=regime), plan, regime


def trainable(folder, **changes):
    """A model for `train`, with the rows that it will see."""
    model = whole_model()
    ids = torch.arange(3, 15).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return attached(model, folder, [batch], **changes)


def brute_force(model, batches):
    """One backward pass an example, and every gradient of a block, squared."""
    blocks = find_blocks(model)[1]
    sums = [0.0] * len(blocks)
    count = 0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row].bool()
            ids, labels = batch["input_ids"][row, real][None], batch["labels"][row, real]
            found = model(input_ids=ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(found, labels[1:], ignore_index=-100, reduction="sum")
            each = torch.autograd.grad(loss, [p for block in blocks for p in block.parameters()], allow_unused=True)
            place = iter(each)
            for index, block in enumerate(blocks):
                sums[index] += sum(float(g.square().sum()) for g in (next(place) for _ in block.parameters()) if g is not None)
            count += 1
    return [total / count for total in sums]


# --- which blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3", "gpt2", "granite-moe"])
def test_scores_are_those_of_brute_force(kind, tmp_path):
    model, batches = small(kind).requires_grad_(True), collated(examples())
    expected = brute_force(model, batches)
    frozen = next(model.parameters()).requires_grad_(False)
    found = gradients(Site(model, tmp_path), batches)
    for layer in found.layers.values():
        assert layer.importance == pytest.approx(expected[layer.block], rel=1e-6)
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_batches_and_padding_do_not_matter(tmp_path):
    model, rows = small("gpt2"), examples()
    found = [
        gradients(Site(model, tmp_path / str(size)), collated(rows, size, side)).layers
        for size, side in ((1, "right"), (3, "right"), (6, "left"))
    ]
    for other in found[1:]:
        for name, layer in found[0].items():
            assert other[name].importance == pytest.approx(layer.importance, rel=1e-9)


def test_they_scale_with_the_square_of_the_loss(tmp_path, monkeypatch):
    model, batches = small("llama"), collated(examples())
    one = gradients(Site(model, tmp_path / "one"), batches).layers
    monkeypatch.setattr("farss.survey.sweep.output_gradient", lambda *args: 3 * output_gradient(*args))
    three = gradients(Site(model, tmp_path / "three"), batches).layers
    for name, layer in one.items():
        assert three[name].importance == pytest.approx(9 * layer.importance, rel=1e-6)  # its norms compute in float32


def test_a_killed_reading_goes_on_to_the_same_file(tmp_path):
    model, batches = small("llama"), collated(examples())
    with pytest.raises(Killed):
        gradients(Site(model, tmp_path / "one", tell=killed_at(2)), batches)
    one, two = (gradients(Site(model, tmp_path / name), batches) for name in ("one", "two"))
    assert one.layers == two.layers
    assert gradients(Site(model, tmp_path / "one"), batches).layers == one.layers  # a complete one is read


def test_a_gradient_that_is_no_number_is_refused(tmp_path):
    model = small("llama")
    model.model.layers[1].input_layernorm.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("nan"),))
    with pytest.raises(NumericalError, match=r"block [01]"):
        gradients(Site(model, tmp_path), collated(examples()))


@given(st.lists(st.floats(0, 9), min_size=1, max_size=12))
def test_half_of_the_blocks_are_chosen_and_no_other_has_a_larger_gradient(values):
    scores = dict(enumerate(values))
    chosen = largest_half(scores)
    assert len(chosen) == max(1, len(values) // 2)
    assert chosen == sorted(chosen)
    left = [block for block in scores if block not in chosen]
    assert all((scores[block], -block) < (scores[kept], -kept) for block in left for kept in chosen)
    assert largest_half({block: 4 * score for block, score in scores.items()}) == chosen


def layers_of(blocks, hidden, mlp, kv):
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "u": (mlp, hidden), "d": (hidden, mlp)}
    return {f"{block}.{name}": Layer(name, block, shape, float(block)) for block in range(blocks) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shape", "whole", "halved"),
    [
        ((16, 2048, 8192, 512), 15.2, 7.6),
        ((28, 3072, 8192, 1024), 33.0, 16.5),
        ((32, 4096, 11008, 4096), 56.1, 28.0),
        ((32, 4096, 14336, 1024), 56.6, 28.3),
        ((40, 5120, 13824, 5120), 87.8, 43.9),
    ],
    ids=["LLaMA-3.2-1B", "LLaMA-3.2-3B", "LLaMA-2-7B", "LLaMA-3.1-8B", "LLaMA-2-13B"],
)
def test_parameter_counts_of_the_paper(shape, whole, halved, tmp_path):
    """Rank 32 on q, k, v, up and down, in millions."""
    layers = layers_of(*shape)
    survey = Survey(tmp_path, layers, shape[0], 1, 0, 0)
    for choice, expected in (("all", whole), ("fisher", halved)):
        plan = METHODS["fora"].plan(PlanConfig(method="fora", rank=32, fora_blocks=choice), Context(layers, shape[0], survey))
        assert round((plan.parameters - len(plan.layers)) / 1e6, 1) == expected  # the gates are not in its counts
    assert {layer.block for layer in plan.layers.values()} == set(range(shape[0] // 2, shape[0]))


def test_the_blocks_of_its_ablations(tmp_path):
    model = small("llama")
    chosen = {}
    for choice in ("fisher", 0, "all"):
        plan = planned(model, tmp_path, fora_blocks=choice)
        chosen[choice] = {layer.block for layer in plan.layers.values()}
        assert plan.notes[-1] == f"FoRA adapts {len(chosen[choice])} of 4 blocks: {', '.join(map(str, sorted(chosen[choice])))}."
    assert [len(blocks) for blocks in chosen.values()] == [2, 2, 4]
    draws = [{layer.block for layer in planned(model, tmp_path, fora_blocks=seed).layers.values()} for seed in range(8)]
    assert all(len(blocks) == 2 for blocks in draws)
    assert len(set(map(frozenset, draws))) > 1
    plain = planned(model, tmp_path, fora_orthonormal=False)
    assert plain.parameters == planned(model, tmp_path).parameters - len(plain.layers)


# --- how it trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2"])
def test_step_zero_is_the_base_bit_for_bit(kind, tmp_path):
    model = small(kind).float()
    before = logits(model)
    adapted, plan, _ = attached(model, tmp_path)
    assert torch.equal(logits(adapted.eval()), before)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.parameters
    for module in lora_layers(adapted, plan).values():
        b = module.lora_B[TRAINED].weight
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-6)


def test_a_starts_with_variance_one_over_r_and_b_has_rates_of_its_own(tmp_path):
    """The authors' settings: 1e-3 for B beside 2e-4, and betas of 0.9 and 0.99."""
    adapted, plan, _ = attached(small("llama").float(), tmp_path)
    entries = torch.cat([module.lora_A[TRAINED].weight.detach().flatten() for module in lora_layers(adapted, plan).values()])
    assert len(entries) > 2_000
    assert entries.std().item() == pytest.approx(4**-0.5, rel=0.05)
    assert pytest.approx(1e-3) == 2e-4 * RATE
    assert BETAS == (0.9, 0.99)


def test_b_stays_orthonormal_and_the_change_has_the_singular_values_of_a(tmp_path):
    adapted, plan, regime = trainable(tmp_path / "reading")
    start = weights(adapted)
    train(adapted, tokenizer(), rows_to_learn(), options(epochs=4), tmp_path / "run", regime=regime)
    moved = 0.0
    for name, module in lora_layers(adapted, plan).items():
        b, a, g = (side[TRAINED].weight.detach().double() for side in (module.lora_B, module.lora_A, module.lora_E))
        assert (b.T @ b - torch.eye(4)).abs().max() <= 1e-5
        left, right = adapter_change(adapted, name)
        expected = module.scaling[TRAINED] * g.abs() * torch.linalg.svdvals(a)
        torch.testing.assert_close(torch.linalg.svdvals(left @ right)[:4], expected[0], rtol=1e-4, atol=0)
        moved = max(moved, (b - start[f"base_model.model.{name}.lora_B.{TRAINED}.weight"]).abs().max().item())
    assert moved > 1e-2


def test_it_learns_what_lora_on_its_blocks_learns_too(tmp_path):
    rows, last = rows_to_learn(), {}
    for orthonormal in (True, False):
        adapted, _, regime = trainable(tmp_path / "reading", fora_orthonormal=orthonormal)
        result = train(adapted, tokenizer(), rows, options(epochs=12, dropout=0.0), tmp_path / str(orthonormal), regime=regime)
        last[orthonormal] = (result.log[0]["loss"], result.loss)
    for first, loss in last.values():
        assert loss < first - 0.1


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path):
    found = []
    for name, kill in (("straight", []), ("killed", [Kill(5)])):
        config = options(epochs=2, max_steps=10)
        adapted, _, regime = trainable(tmp_path / "reading")
        try:
            train(adapted, tokenizer(), rows_to_learn(), config, tmp_path / name, kill, regime=regime)
        except Killed:
            adapted, _, regime = trainable(tmp_path / "reading")
            train(adapted, tokenizer(), rows_to_learn(), config, tmp_path / name, regime=regime)
        found.append(weights(adapted))
    assert difference(*found) == 0


def test_micro_batches_do_not_matter(tmp_path):
    found = []
    for micro in (4, 1):
        adapted, _, regime = trainable(tmp_path / "reading")
        config = options(max_steps=3, micro_batch_size=micro, dropout=0.0)
        train(adapted, tokenizer(), rows_to_learn(), config, tmp_path / str(micro), regime=regime)
        found.append(weights(adapted))
    assert difference(*found) <= 1e-5


def test_b_takes_the_steps_of_cayley_adam():
    """Against the dense steps in float64, `X+ = (I + a/2 W)^-1 (I - a/2 W) X`, and through a state that is stored half-way."""
    torch.manual_seed(0)
    start, rate, first, second = torch.linalg.qr(torch.randn(9, 3))[0], 0.05, *BETAS
    gradients_of = [torch.randn(9, 3) * scale for scale in (1.0, 0.0, 5.0, 0.1) * 5]
    x, m, v, identity = start.double(), torch.zeros(9, 3).double(), 0.0, torch.eye(9).double()
    for step, gradient in enumerate(gradients_of, 1):
        m, v = first * m + (1 - first) * gradient.double(), second * v + (1 - second) * float(gradient.double().square().sum())
        hat, size = m / (1 - first**step), (v / (1 - second**step)) ** 0.5 + 1e-8
        u = (hat - x @ (x.T @ hat) / 2) / size
        skew = u @ x.T - x @ u.T
        rotation = torch.linalg.solve(identity + rate / 2 * skew, identity - rate / 2 * skew)
        x, m = rotation @ x, rotation @ m

    def optimizer(weight):
        return CayleyAdamW([{"params": [weight], "lr": rate, "betas": BETAS, "orthonormal": True}], lr=0.1)

    weight = torch.nn.Parameter(start.clone())
    ours = optimizer(weight)
    for step, gradient in enumerate(gradients_of):
        if step == 10:
            state, weight = copy.deepcopy(ours.state_dict()), torch.nn.Parameter(weight.detach().clone())
            ours = optimizer(weight)
            ours.load_state_dict(state)
        weight.grad = gradient
        ours.step()
    torch.testing.assert_close(weight.detach().double(), x, rtol=0, atol=1e-5)


def test_a_rank_beyond_every_direction_is_planned_from_the_same_reading(tmp_path):
    config = dataclasses.replace(CONFIG, rank=20, match_params="lora")
    known = look(Site(small("llama"), tmp_path, survey_cap(config, *shapes(small("llama")))), METHODS["fora"].needs, [collated(examples())])
    make_plan(config, known)
    known.check_cap(survey_cap(config, *shapes(small("llama"))))


def test_one_schedule_moves_both_learning_rates():
    one, two = torch.nn.Parameter(torch.eye(4, 2)), torch.nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([one, two], lr=0.2)
    regime = METHODS["fora"].regime(CONFIG, None)
    regime.turned = [one]
    made = regime.optimizer(plain)
    assert isinstance(made, CayleyAdamW)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
    one.grad, two.grad = torch.ones(4, 2), torch.ones(3)
    made.step()
    schedule.step()
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.1, 0.1 * RATE])
    assert two.detach().tolist() == pytest.approx([0.8 - 0.2 * 0.01] * 3, abs=1e-6)  # AdamW's own step, with its decay
    torch.testing.assert_close(one.T @ one, torch.eye(2), rtol=0, atol=1e-6)


def test_folded_is_reloaded_is_merged(tmp_path):
    model = small("llama").float()
    base = small("llama").float()
    adapted, plan, _ = attached(model, tmp_path / "reading")
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    trained = logits(adapted.eval())
    assert (trained - logits(base)).abs().max() > 0.01 * trained.abs().max()
    done = export(adapted, plan, tmp_path / "adapter", prompts())
    assert done.logit_difference <= 1e-5 * trained.abs().max()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded), trained, rtol=0, atol=1e-5 * float(trained.abs().max()))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5 * float(trained.abs().max()))


def test_no_other_trainer_can_turn_b():
    with pytest.raises(ConfigError, match="'fora' trains by rules of its own"):
        check_elsewhere(METHODS["fora"])
