"""The pictures say what the artifacts say, and plotly accepts them."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from folders import write_boundary
from pages import draw

from farss.artifacts import Plan, Survey
from farss.report import figures, read_comparison, read_run, results
from farss.report.page import comparison_content, run_content


def test_the_pictures_equal_the_artifacts(run_folder: Path) -> None:
    data = json.loads(draw(run_folder).scripts[0])
    plan, survey = Plan.load(run_folder / "plan.json"), Survey.load(run_folder / "survey")
    maps = [trace for trace in data["plan"][0]["data"] if trace["type"] == "heatmap"]
    ranks = [rank for trace in maps for row in trace["z"] for rank in row if rank is not None]
    assert sorted(ranks) == sorted(layer.rank for layer in plan.layers.values())
    bars = [trace for trace in data["plan"][0]["data"] if trace["type"] == "bar"]
    assert sum(sum(trace["y"]) for trace in bars) == plan.parameters
    assert [trace["name"] for trace in bars] == [figures.SIDES["least"], figures.SIDES["most"]]
    marked = {choice["data"][1]["name"]: choice["data"][1]["x"] for choice in data["spectrum"]}
    assert len(data["spectrum"]) == len(survey.layers)
    assert set(marked) == {
        figures.SIDES["least"],
        figures.SIDES["most"],
    }
    for choice, name in zip(data["spectrum"], survey.layers, strict=True):
        assert choice["data"][1]["x"] == sorted(plan.layers[name].directions)
    ratios = figures.energy_ratios(survey)
    means = [statistics.fmean(ratios[name] for name, layer in survey.layers.items() if layer.block == block) for block in range(6)]
    assert data["energy"][0]["data"][0]["y"] == pytest.approx([100 * mean for mean in means], rel=1e-3)
    assert len(data["energy"][0]["data"]) == 8, "the mean and seven layer types"
    assert all(0 < ratio <= 1 for ratio in ratios.values())


def test_figures_are_valid_plotly(run_folder: Path, comparison_folder: Path) -> None:
    from plotly import graph_objects

    drawn = [run_content(read_run(run_folder)), comparison_content(read_comparison(comparison_folder))]
    found = [figure for content in drawn for figure in content["figures"].values()]
    assert len(found) == 15
    for figure in found:
        for choice in figure.choices[:3]:
            graph_objects.Figure(json.loads(re.sub(r'"theme:[a-z0-9-]+"', '"#123456"', json.dumps(choice[1:])))[0])
            layout = json.loads(re.sub(r'"theme:[a-z0-9-]+"', '"#123456"', json.dumps(choice.layout)))
            graph_objects.Figure(layout=layout)


def test_every_figure_is_known_by_its_name(run_folder: Path, comparison_folder: Path) -> None:
    write_boundary(run_folder)
    drawn = run_content(read_run(run_folder))["figures"] | comparison_content(read_comparison(comparison_folder))["figures"]
    assert {*drawn, "frontier"} == set(figures.NAMES)
    assert all(name == figure.name for name, figure in drawn.items())


def test_every_colour_has_a_light_and_a_dark_value(run_folder: Path) -> None:
    page = draw(run_folder)
    styles = re.search(r"<style>(.*?)</style>", page.html, re.DOTALL)
    assert styles is not None
    for name in set(re.findall(r"theme:([a-z0-9-]+)", page.html)):
        assert len(re.findall(rf"--{name}:", styles.group(1))) == 2, name


def test_layer_types_are_short_where_that_is_clear() -> None:
    names = {
        "model.layers.10.mlp.up_proj": 10,
        "model.layers.1.mlp.up_proj": 1,
        "model.layers.1.attn.q_proj": 1,
    }
    assert list(figures.layer_types(names).values()) == ["up_proj", "up_proj", "q_proj"]
    experts = {f"h.0.experts.{i}.w1": 0 for i in range(2)}
    assert list(figures.layer_types(experts).values()) == ["experts.0.w1", "experts.1.w1"]


@pytest.mark.parametrize(("length", "most"), [(3, 10), (10, 10), (1000, 10), (11, 10)])
def test_thinning_keeps_the_ends_and_the_order(length: int, most: int) -> None:
    values = list(range(length))
    kept = figures.thinned(values, most)
    assert len(kept) == min(length, most)
    assert kept[0] == 0
    assert kept[-1] == length - 1
    assert kept == sorted(set(kept))


def test_the_balance_picture_needs_both_k_and_t() -> None:
    assert results.balance_figure([{"method": "lora", "K": {"value": 0.9}, "T": None}], "it") is None
    assert results.balance(0.5, 1.0) == pytest.approx(2 / 3)


def test_a_single_run_is_one_mark_between_k_and_t(run_folder: Path) -> None:
    _, mark = run_content(read_run(run_folder))["figures"]["balance"].choices[0].data
    assert (mark["name"], mark["x"], mark["y"]) == ("farss", [94.1], [95.8])
    assert mark["error_x"]["array"] == [3.0]
    assert mark["customdata"] == ["seed 0, KT 94.9\u00a0%"]


@pytest.mark.parametrize(("x", "y"), [([0, 100], [0, 120]), ([65, 99], [96, 101]), ([90, 90.5], [99, 100]), ([0, 0], [0, 0])])
def test_lines_of_equal_kt_have_round_values_inside_the_picture(x: list[float], y: list[float]) -> None:
    levels = results._levels(x, y)
    low, high = results.balance(x[0], y[0]), results.balance(x[1], y[1])
    assert low <= levels["start"]
    assert levels["end"] <= high
    assert (levels["end"] - levels["start"]) / levels["size"] <= 12


def test_every_benchmark_shows_every_method(comparison_folder: Path) -> None:
    figure = results.benchmarks_figure(read_comparison(comparison_folder).table)
    assert figure is not None
    before, farss, *others = figure.choices[0].data
    assert [trace["name"] for trace in (before, farss, *others)] == ["before", "farss", "lora", "full"]
    assert before["x"] == [65.0, 4.0]
    assert farss["x"] == pytest.approx([65 * (0.951 + 0.939) / 2, 43 * (0.962 + 0.958) / 2], rel=1e-3)
    assert all(0 < y - row < 0.5 or 0 < row - y < 0.5 for y, row in zip(before["y"], (0, 1), strict=True)), "each in its row"
    assert results.benchmarks_figure({"rows": []}) is None


def test_the_frontier_has_a_line_for_each_method_and_a_mark_on_the_chosen_rate() -> None:
    def point(rate: float, kept: float, learned: float, chosen: bool) -> dict[str, Any]:
        marks = {name: {"value": value, "low": value, "high": value} for name, value in (("K", kept), ("T", learned))}
        return {"learning_rate": rate, "chosen": chosen, **marks}

    one = [point(2e-4, 0.5, 1.0, False), point(1e-4, 0.8, 0.9, True)]
    figure = results.frontier_figure({"curves": {"farss": one, "lora": [{"learning_rate": 1e-4, "chosen": True}]}}, "it")
    assert figure is not None
    _, curve, mark = figure.choices[0].data
    assert (curve["x"], curve["y"], curve["customdata"]) == ([80, 50], [90, 100], ["0.0001", "0.0002"])
    assert (mark["x"], mark["y"], mark["mode"]) == ([80], [90], "markers")
    assert results.frontier_figure(None, "it") is None
    many = results.frontier_figure({"curves": {str(place): one for place in range(18)}}, "it")
    assert many is not None
    looks = {(trace["marker"]["color"], trace["marker"]["symbol"]) for trace in many.choices[0].data[1:]}
    assert len(looks) == 18, "a colour and a mark of its own for each"


def test_many_methods_are_told_apart():
    assert len({(place % 8, results.symbol(place)) for place in range(64)}) == 64
