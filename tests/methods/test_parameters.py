"""What `plan.match_params` says is what trains."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import collated, examples, shapes, small

from farss.adapter import attach
from farss.config import PlanConfig
from farss.methods import METHODS
from farss.methods.adalora import EXTRA
from farss.methods.eva import share_out
from farss.methods.uniform import uniform_parameters
from farss.plan import make_plan, make_plan_without_survey, survey_cap
from farss.structure import find_blocks, target_layers
from farss.survey import Site, look

CONFIG = PlanConfig(boundary=2, rank=6, r_min=1, r_avg=4, r_max=5, match_params="lora")


def planner(config, model, folder):
    """What a method looks at (None: nothing), and how any configuration of it is planned."""
    needs = METHODS[config.method].needs
    if needs is None:
        layers, blocks = target_layers(model), len(find_blocks(model)[1])
        return None, lambda wanted: make_plan_without_survey(wanted, layers, blocks)
    known = look(Site(model, folder, survey_cap(config, *shapes(model))), needs, [collated(examples())] * len(needs.texts))
    return known, lambda wanted: make_plan(wanted, known)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("full", "adalora", "farss-plus", "lora-null-v2")])
def test_a_matched_plan_trains_what_its_note_says_and_no_rank_is_nearer(method, tmp_path):
    model, config = small("llama-gqa").float(), dataclasses.replace(CONFIG, method=method)
    target = uniform_parameters(target_layers(model), 6)
    known, plan_of = planner(config, model, tmp_path)
    plan = plan_of(config)
    regime = METHODS[method].regime(config, plan) if METHODS[method].regime else None
    adapted = attach(model, plan, known, regime=regime)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == plan.parameters
    note = next(note for note in plan.notes if "asked for" in note)
    assert f"ank {plan.rank} gives {trained:,} trainable parameters, nearest to the {target:,} asked for." in note
    for other in (plan.rank - 1, plan.rank + 1):
        near = plan_of(dataclasses.replace(config, rank=other, match_params=None)).parameters
        assert abs(near - target) >= abs(trained - target)


def test_adalora_is_matched_at_its_end_and_says_where_it_begins():
    model, config = small("llama-gqa").float(), dataclasses.replace(CONFIG, method="adalora", rank=8)
    layers = target_layers(model)
    _, plan_of = planner(config, model, None)
    plan = plan_of(config)
    end = uniform_parameters(layers, plan.rank, lambda rank, rows: rank)
    assert plan.parameters == uniform_parameters(layers, round(EXTRA * plan.rank + 0.1), lambda rank, rows: rank)
    assert plan.notes == [
        f"Rank {plan.rank} gives {end:,} trainable parameters at the end of training, if it is pruned evenly, "
        f"nearest to the {uniform_parameters(layers, 8):,} asked for.",
        f"AdaLoRA begins with 1.5 times the final rank, {plan.parameters:,} trainable parameters, and keeps the best {plan.rank} per "
        "layer on average.",
    ]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6))
def test_no_layer_of_eva_loses_when_the_average_rank_rises(values):
    """So that parameters never fall with the rank, which finding a matched rank relies on."""
    shares = {str(place): sorted(map(float, layer), reverse=True) for place, layer in enumerate(values)}
    found = [share_out(shares, rank) for rank in range(1, 13)]
    for lower, higher in itertools.pairwise(found):
        assert all(lower[name] <= higher[name] for name in shares)
    assert found[-1] == {name: len(layer) for name, layer in shares.items()}
