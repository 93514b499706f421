"""The boundary search as a curve, a table and a few sentences."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from folders import CONFIG, rewrite, write_boundary, write_survey
from pages import draw

from farss.artifacts import Plan
from farss.boundary import Boundary
from farss.files import write_json, write_text
from farss.report import candidates
from farss.search import Candidate
from farss.terminal import boundary_departure

CANDIDATE = Candidate(3, 20, T=0.9, K=0.9, KT=0.9, low=0.8, high=1.0, parameters=1000, dropped=False)


def test_config_survey_and_search_alone_make_a_page(tmp_path: Path) -> None:
    write_survey(tmp_path / "survey", 8)
    write_text(tmp_path / "config.yaml", CONFIG.format(boundary="null"))
    write_boundary(tmp_path)
    page = draw(tmp_path)
    assert page.ids == {"steps", "boundary", "survey", "cost", "reproduce"}
    assert "surveyed and its boundary searched, not yet trained" in page.words
    importance = json.loads(page.scripts[0])["importance"][0]["layout"]
    assert [shape["x0"] for shape in importance["shapes"]] == [2.5], "the chosen boundary is marked where there is no plan"


def test_the_search_alone_makes_a_page(tmp_path: Path) -> None:
    write_boundary(tmp_path)
    assert draw(tmp_path).ids == {"boundary", "cost"}


def test_the_curve_equals_the_artifact(tmp_path: Path) -> None:
    found = write_boundary(tmp_path)
    figure = candidates.boundary_figure(found)
    assert figure is not None
    curves = {trace["name"]: trace for trace in figure.choices[0].data}
    assert list(curves) == ["KT after 5 steps", "KT after 20 steps", "knowledge K after 20 steps", "task T after 20 steps", "dropped"]
    kept = [entry for entry in found["candidates"] if not entry["dropped"]]
    assert curves["KT after 20 steps"]["x"] == [2, 3, 4]
    for title, name in {"KT": "KT", "knowledge K": "K", "task T": "T"}.items():
        shown = curves[f"{title} after 20 steps"]["y"]
        assert [round(y, 1) for y in shown] == [round(100 * entry[name], 1) for entry in kept]
    assert curves["KT after 20 steps"]["error_y"]["array"] == [3.0] * 3
    assert curves["dropped"]["x"] == [1, 5]
    assert figure.choices[0].layout["shapes"][0]["x0"] == found["chosen"]


def test_every_round_is_a_curve_of_its_own(tmp_path: Path) -> None:
    found = write_boundary(tmp_path)
    first = [{**entry, "steps": 5} for entry in found["candidates"]]
    found["rounds"] = [first, [entry for entry in found["candidates"] if not entry["dropped"]]]
    figure = candidates.boundary_figure(found)
    assert figure is not None
    curves = {trace["name"]: trace["x"] for trace in figure.choices[0].data}
    assert curves["KT after 5 steps"] == curves["task T after 5 steps"] == [1, 2, 3, 4, 5]
    assert curves["KT after 20 steps"] == [2, 3, 4]


def test_a_narrow_choice_is_called_narrow(tmp_path: Path) -> None:
    found = write_boundary(tmp_path)
    wide, narrow = (candidates.boundary_sentences(found | {"margin_low": low, "margin_high": 0.03}) for low in (0.004, -0.002))
    told = "with other questions; another seed may choose otherwise"
    assert f"That is 1.0 points above the next best (95\u00a0% interval 0.4 to 3.0, {told})." in wide
    assert f"That is 1.0 points above the next best (95\u00a0% interval -0.2 to 3.0, {told}): too little to tell them apart." in narrow


def test_the_words_equal_the_artifact(tmp_path: Path) -> None:
    write_boundary(tmp_path)
    words = draw(tmp_path).words
    assert "5 boundaries were tried with short trainings; 2 of them were dropped early." in words
    assert "Chosen: 3 shallow blocks, with KT 90.3 % (95 % interval 86.3 to 93.3 %)." in words
    assert "The search cost 17.5 % of a full training of 400 steps." in words
    assert "K: the loss on general text. T: the loss on held-out examples." in words
    assert "2 and 4 are inside the margin." in words


def test_the_page_and_the_terminal_say_where_a_plan_does_not_follow_the_search(run_folder: Path) -> None:
    write_boundary(run_folder)  # it chose 3, and the plan was made with 2
    sentence = "The plan does not follow the search: it was made with 2 shallow blocks."
    assert sentence in draw(run_folder).words
    found, plan = Boundary([CANDIDATE], 3, 0.0, 0.0, 0.0, 400, 0.1, "facts", "sums"), Plan.load(run_folder / "plan.json")
    assert boundary_departure(found, plan) == sentence
    assert boundary_departure(found, dataclasses.replace(plan, boundary=3)) == boundary_departure(found, None) == ""
    assert boundary_departure(dataclasses.replace(found, candidates=[]), plan) == "", "nothing was chosen"
    lora = dataclasses.replace(plan, method="lora", boundary=None)
    assert boundary_departure(found, lora) == "The plan does not follow the search: lora has no shallow blocks."
    rewrite(run_folder / "boundary.json", lambda values: values.update(chosen=2))
    assert "does not follow" not in draw(run_folder).words


def test_what_the_search_says_is_not_said_again_among_the_notes(run_folder: Path) -> None:
    found = write_boundary(run_folder)
    said = ["The search chose boundary 3.", *found["notes"]]
    rewrite(run_folder / "boundary.json", lambda values: values.update(sentence=said[0]))
    rewrite(run_folder / "plan.json", lambda values: values["notes"].extend(said))
    words = draw(run_folder).words
    assert words.count(found["notes"][0]) == 1
    assert said[0] not in words
    assert "The budget lost 3 ranks to rounding." in words


def test_searches_with_holes(tmp_path: Path) -> None:
    assert candidates.boundary_figure({}) is None
    bare: dict[str, Any] = {"candidates": [{"boundary": 2, "K": None, "T": None, "KT": None, "dropped": True}], "chosen": None}
    write_json(tmp_path / "boundary.json", bare | {"rounds": [bare["candidates"]]})
    assert "1 boundary was tried with short trainings; 1 of them was dropped early." in draw(tmp_path).words
