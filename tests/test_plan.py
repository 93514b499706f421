"""Plans from one survey: sides by the block, ranks by importance, any later choice without a new pass."""

import dataclasses

import pytest
import torch
from small_models import examples, shapes, small

from farss.artifacts import Layer, Plan
from farss.batches import batches, collate
from farss.config import PlanConfig
from farss.errors import ConfigError
from farss.maths.directions import select
from farss.maths.ranks import paper_ranks
from farss.methods.farss import shallow_ranks
from farss.methods.uniform import uniform_parameters
from farss.plan import check_exact, check_plan, make_plan, make_plan_without_survey, survey_cap
from farss.structure import find_blocks, target_layers
from farss.survey import Site, survey

BASE = PlanConfig(boundary=2, rank=8, r_min=1, r_avg=4, r_max=6)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    parts = [collate(part, 0) for part in batches(examples(), 3)]
    return survey(Site(small("llama-gqa"), tmp_path_factory.mktemp("survey"), 16), parts)


def test_side_is_decided_by_the_block_never_by_the_rank(found):
    for rank in (2, 8):
        plan = make_plan(dataclasses.replace(BASE, rank=rank), found)
        for layer in plan.layers.values():
            assert layer.side == ("least" if layer.block < 2 else "most")


def test_directions_are_the_ends_of_the_score_order(found):
    plan = make_plan(BASE, found)
    for name, layer in plan.layers.items():
        scores = found.directions(name).scores
        assert layer.directions == select(scores, layer.rank, layer.side).tolist()
        assert len(layer.directions) == layer.rank <= min(layer.shape)
        chosen, rest = scores[layer.directions], scores[[i for i in range(len(scores)) if i not in layer.directions]]
        if len(rest):
            assert (chosen.max() <= rest.min()) if layer.side == "least" else (chosen.min() >= rest.max())


def test_too_few_tokens_are_told(found):
    assert not any("fewer than" in note for note in make_plan(BASE, found).notes)
    note = make_plan(BASE, dataclasses.replace(found, tokens=20)).notes[-1]
    assert note == (
        "The survey saw 20 tokens, fewer than the 32 directions of its widest layers: raise calibration.examples for steadier statistics."
    )
    note = make_plan(PlanConfig(method="corda-kpm", rank=4), dataclasses.replace(found, tokens=40)).notes[-1]  # of inputs
    assert "than the 80 directions of its widest layers: raise calibration.examples or give calibration.knowledge longer texts" in note
    assert make_plan(BASE, dataclasses.replace(found, tokens=40)).notes == make_plan(BASE, found).notes
    both = dataclasses.replace(found, meta=found.meta | {"knowledge_tokens": 40})  # the task has enough, and knowledge has not
    assert make_plan(PlanConfig(method="farss-plus", rank=4), both).notes[-1].startswith("The survey saw 40 tokens, fewer than the 80 ")


@pytest.mark.parametrize(
    "changes",
    [
        {"boundary": 1},
        {"boundary": 4},
        {"rank": 16},
        {"r_avg": 2, "r_max": 3},
        {"budget": "exact"},
        {"shallow_directions": "most"},
        {"deep_directions": "least"},
        {"alpha": 32.0},
        {"match_params": "lora"},
    ],
)
def test_one_survey_answers_every_plan(found, tmp_path, changes):
    config = dataclasses.replace(BASE, **changes)
    parts = [collate(part, 0) for part in batches(examples(), 3)]
    fresh = survey(Site(small("llama-gqa"), tmp_path, survey_cap(config, *shapes(small("llama-gqa")))), parts)
    assert make_plan(config, found) == make_plan(config, fresh)
    for name, layer in make_plan(config, found).layers.items():
        for one, two in zip(found.vectors(name, layer.directions), fresh.vectors(name, layer.directions), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(("alpha", "scaling"), [("uniform", 1.0), (16.0, 2.0), (4, 0.5)])
def test_one_scale_in_every_layer(found, alpha, scaling):
    plan = make_plan(dataclasses.replace(BASE, alpha=alpha), found)
    assert {layer.scaling for layer in plan.layers.values()} == {scaling}
    assert len({layer.rank for layer in plan.layers.values()}) > 1


def test_constant_alpha_reproduces_the_released_code(found):
    plan = make_plan(dataclasses.replace(BASE, alpha="constant"), found)
    assert {layer.alpha for layer in plan.layers.values()} == {8.0}
    assert plan.unscaled
    matched = make_plan(dataclasses.replace(BASE, alpha="constant", match_params="lora"), found)
    assert {layer.alpha for layer in matched.layers.values()} == {float(matched.rank)}  # R as it was solved for
    assert matched.rank > BASE.rank


def test_matched_parameters_are_within_one_rank_step(found):
    plan = make_plan(dataclasses.replace(BASE, match_params="lora"), found)
    target = uniform_parameters(found.layers, BASE.rank)
    step = sum(sum(layer.shape) for layer in plan.layers.values() if layer.block >= 2)
    assert abs(plan.parameters - target) <= step
    assert plan.rank > BASE.rank
    assert f"{plan.parameters:,}" in plan.notes[-1]


def test_the_budget_that_clipping_loses_is_told(found):
    paper, exact = (make_plan(dataclasses.replace(BASE, budget=budget), found) for budget in ("paper", "exact"))
    handed_out = sum(layer.rank for layer in exact.layers.values() if layer.block < 2)
    assert handed_out == BASE.r_avg * 14
    assert not exact.notes
    lost = sum(layer.rank for layer in paper.layers.values() if layer.block < 2)
    assert (lost == handed_out) == (not paper.notes)


def test_saved_and_loaded(found, tmp_path):
    plan = make_plan(BASE, found)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_fifth_of_the_blocks_are_shallow_unless_it_is_said():
    from farss.methods.farss import choose_boundary

    assert [choose_boundary(PlanConfig(), blocks) for blocks in (1, 12, 18, 32, 40, 80)] == [1, 2, 4, 6, 8, 16]


def test_lora_needs_no_survey_and_has_no_directions():
    model = small("llama")
    plan = make_plan_without_survey(PlanConfig(method="lora", rank=8), target_layers(model), len(find_blocks(model)[1]))
    assert {layer.rank for layer in plan.layers.values()} == {8}
    assert not any(layer.directions for layer in plan.layers.values())
    assert plan.parameters == uniform_parameters(target_layers(model), 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundary": 5}, r"plan.boundary=5, but the model has 4 blocks: choose 1..4"),
        ({"rank": 200}, r"plan.rank=200, but no target layer has a rank above 32"),
        ({"method": "lorra"}, r"plan.method='lorra' is not a method: did you mean 'lora'"),
        ({"boundary": 4, "match_params": "lora"}, r"every block is shallow: lower plan.boundary"),
    ],
)
def test_what_the_model_does_not_allow(found, changes, message):
    config = dataclasses.replace(BASE, **changes)
    with pytest.raises(ConfigError, match=message):
        check_and_plan(config, found)


def check_and_plan(config, found):
    """As a run does: what can be known before the survey is checked first."""
    check_plan(config, found.layers, found.blocks)
    make_plan(config, found)


@pytest.mark.parametrize("method", ["farss", "farss-fixed", "farss-init"])
def test_a_survey_is_wide_enough_for_a_matched_rank(tmp_path, method):
    model = small("llama-gqa")
    target = uniform_parameters(shapes(model)[0], 11)
    config = dataclasses.replace(BASE, method=method, rank=2, r_min=1, r_avg=1, r_max=2, match_params=target)
    cap = survey_cap(config, *shapes(model))
    assert cap > 2 * max(config.rank, config.r_max)
    parts = [collate(part, 0) for part in batches(examples(), 3)]
    plan = make_plan(config, survey(Site(model, tmp_path, cap), parts))
    assert 10 < max(layer.rank for layer in plan.layers.values()) <= cap


def test_a_rank_of_no_layer_is_not_solved_for():
    layers, blocks = shapes(small("llama-gqa"))
    with pytest.raises(ConfigError, match=r"every block is shallow: lower plan.boundary"):
        check_plan(dataclasses.replace(BASE, match_params="lora", boundary=blocks), layers, blocks)


def test_directions_that_float32_does_not_order_are_refused():
    blocks = 12
    for changes in ({"boundary": 6}, {"method": "farss-init"}, {"boundary": 3, "deep_directions": "least"}):
        with pytest.raises(ConfigError, match=r"svd=fast decomposes the blocks from 4 on .*: set calibration.svd=exact"):
            check_exact(dataclasses.replace(BASE, **changes), blocks)
    most = {"boundary": 6, "shallow_directions": "most"}
    for changes in ({"boundary": 4}, most, {"boundary": "auto"}, {"method": "farss-all-high"}, {"method": "lora"}):
        check_exact(dataclasses.replace(BASE, **changes), blocks)


def test_a_plan_of_directions_that_are_not_exact_is_refused(found):
    deep = dataclasses.replace(BASE, boundary=3)  # of four blocks, of which two are decomposed exactly
    for refused in (
        lambda: make_plan(deep, dataclasses.replace(found, meta=found.meta | {"svd": "fast"})),
        lambda: check_plan(deep, found.layers, found.blocks, "fast"),
    ):
        with pytest.raises(ConfigError, match=r"set calibration.svd=exact"):
            refused()


def test_a_weight_of_zeros_takes_no_ranks_from_others():
    layers = {str(place): Layer(str(place), 0, (32, 32), importance=float(place)) for place in range(4)}
    ranks = shallow_ranks(dataclasses.replace(BASE, r_avg=6, r_min=1, r_max=12), layers, 1, [])
    assert ranks["0"] == 1
    assert list(ranks.values())[1:] == paper_ranks([1.0, 2.0, 3.0], 6, 1, [12] * 3)


def test_a_budget_that_the_smallest_rank_exceeds_is_told():
    layers = {str(place): Layer(str(place), 0, (32, 32), importance=1.0 if place else 1e-3) for place in range(14)}
    notes = []
    ranks = shallow_ranks(dataclasses.replace(BASE, r_avg=1, r_min=1, r_max=32), layers, 1, notes)
    assert sum(ranks.values()) > 14
    assert notes == [
        f"The shallow layers got {sum(ranks.values())} ranks, more than the budget of 14: ranks are rounded, and none is below r_min."
    ]
