"""The page is whole, safe, and says what the artifacts say."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from folders import HOSTILE, RTL, poison, rewrite, write_boundary, write_standings, write_survey, write_variant
from pages import Page, draw

from farss.artifacts import LayerPlan, Plan
from farss.errors import FolderError
from farss.files import read_json, write_json
from farss.report import read_run, write_report
from farss.report.examples import groups
from farss.report.page import plotly_script, run_content, script_json
from farss.report.story import plan_sentence
from farss.report.words import percent, points

# --- self-contained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run_folder", "comparison_folder"])
def test_a_page_loads_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    page = draw(request.getfixturevalue(kind))
    for tag, attrs in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "audio", "video"}
        assert not {"src", "srcset", "data", "action", "background"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs), "no inline handlers"
        assert not (attrs.get("href") or "").startswith(("http", "//", "javascript"))
    ours = page.html.replace(plotly_script(), "")
    assert "http://" not in ours
    assert "https://" not in ours
    assert "url(" not in ours
    assert [len(page.scripts), page.scripts[1]] == [3, plotly_script()]


def test_only_our_own_scripts_may_run(run_folder: Path) -> None:
    import base64
    import hashlib

    page = draw(run_folder)
    policy = next(attrs["content"] or "" for tag, attrs in page.tags if attrs.get("http-equiv"))
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert policy.startswith("default-src 'none'")
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]


def test_the_page_is_a_page_of_reasonable_size(run_folder: Path) -> None:
    path = write_report(run_folder, figures=False)
    assert path == run_folder / "report.html"
    assert path.stat().st_size - len(plotly_script()) < 150_000


def test_drawing_twice_gives_the_same_page(run_folder: Path) -> None:
    first = write_report(run_folder, figures=False).read_bytes()
    assert write_report(run_folder, figures=False).read_bytes() == first


# --- hostile content -------------------------------------------------------------------------------------------------


def test_hostile_texts_are_shown_and_not_run(run_folder: Path) -> None:
    clean = draw(run_folder)
    poison(run_folder)
    page = draw(run_folder)
    assert len(page.scripts) == len(clean.scripts) == 3
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "alert(1)" not in "".join(page.scripts[1:])
    assert "alert(1)" in page.words
    assert "{{7*7}}" in page.words
    assert f"{100_000 + len(HOSTILE):,} characters" in page.words, "the full length is stated"
    assert len(page.html) - len(clean.html) < 100_000


def test_hostile_layer_names_stay_inside_the_data(run_folder: Path) -> None:
    def rename(values: dict[str, Any]) -> None:
        values["layers"] = {f"{HOSTILE}.0.{name}": layer for name, layer in values["layers"].items()}

    rewrite(run_folder / "plan.json", rename)
    page = draw(run_folder)
    data = json.loads(page.scripts[0])
    assert "<" not in page.scripts[0]
    assert "\u2028" not in page.scripts[0]
    hover = [cell for trace in data["plan"][0]["data"] for row in trace["customdata"] for cell in row if cell]
    assert hover
    assert all("<" not in cell[0] for cell in hover), "plotly reads labels as HTML"


def test_right_to_left_text_is_isolated(run_folder: Path) -> None:
    poison(run_folder)
    html = draw(run_folder).html
    assert html.count(RTL) > 0
    assert html.count(RTL) == html.count(f'<bdi class="text">{RTL}')


def test_script_json_survives_everything() -> None:
    value = {"a": HOSTILE, "b": [float("nan"), float("inf"), 1.5], "c": RTL}
    text = script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": HOSTILE, "b": [None, None, 1.5], "c": RTL}


# --- missing parts ---------------------------------------------------------------------------------------------------

PARTS = {
    "config.yaml": "reproduce",
    "survey": "survey",
    "plan.json": "plan",
    "train.json": "training",
    "summary.json": "scores",
    "scores": "examples",
    "base": "examples",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_left_out(run_folder: Path, part: str) -> None:
    everything = draw(run_folder).ids
    path = run_folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if part == "config.yaml":
        (run_folder / "versions.json").unlink()
    assert everything - draw(run_folder).ids == {PARTS[part], *(["balance", "examples"] if part == "summary.json" else [])}


@pytest.mark.parametrize("part", ["config.yaml", "survey", "plan.json", "train.json", "summary.json"])
def test_any_part_alone_makes_a_page(run_folder: Path, tmp_path: Path, part: str) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (shutil.copytree if (run_folder / part).is_dir() else shutil.copy)(run_folder / part, alone / part)
    assert PARTS[part] in draw(alone).ids


def test_summaries_with_holes(run_folder: Path) -> None:
    values = {
        "K": None,
        "KT": {"value": None},
        "forgetting": None,
        "benchmarks": [{"name": "people", "kind": "knowledge"}],
    }
    write_json(run_folder / "summary.json", values)
    page = draw(run_folder)
    assert "scores" in page.ids
    assert "Gold answer" not in page.words
    assert "It kept" not in page.words


def test_a_loss_that_is_not_a_number(run_folder: Path) -> None:
    rewrite(run_folder / "train.json", lambda values: values["log"][3].update(loss=float("nan")))
    assert "training" in draw(run_folder).ids


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="there is no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FolderError, match="farss run"):
        write_report(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(FolderError, match="not valid JSON"):
        write_report(tmp_path)


def test_a_comparison_without_its_runs(comparison_folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(comparison_folder / "comparison.json", alone)
    assert draw(alone).ids == {"methods", "balance", "benchmarks", "notes"}
    write_json(alone / "comparison.json", {"rows": []})
    draw(alone)


def test_a_run_of_a_comparison_uses_the_shared_parts(comparison_folder: Path) -> None:
    page = draw(comparison_folder / "farss-seed0")
    assert {"survey", "plan", "examples", "scores"} <= page.ids
    assert any((attrs.get("href") or "") == "./farss-seed0/report.html" for _, attrs in draw(comparison_folder).tags)


@pytest.mark.parametrize("name", ["farss@few-seed0", "farss@few-lr1e-05-seed3", "farss@few-lr0.0002-seed0"])
def test_a_variant_is_shown_with_the_survey_that_it_was_planned_from(comparison_folder: Path, name: str) -> None:
    variant = write_variant(comparison_folder, name)
    words = draw(variant).words
    assert "64 examples" in words
    assert "256 examples" not in words
    assert "256 examples" in draw(comparison_folder / "farss-seed0").words
    assert "256 examples" in draw(comparison_folder).words
    rewrite(comparison_folder / "comparison.json", lambda values: values["rows"].reverse())  # now the variant comes first
    assert "64 examples" in draw(comparison_folder).words


def test_a_survey_is_shown_only_where_the_plan_was_made_from_it(comparison_folder: Path) -> None:
    for method in ("lora", "full", "corda-kpm"):
        run = comparison_folder / f"{'lora' if method == 'corda-kpm' else method}-seed0"
        rewrite(run / "plan.json", lambda values, method=method: values.update(method=method))
        page = draw(run)
        assert "survey" not in page.ids
        assert "Survey" not in page.words
        assert "spectrum" not in page.scripts[0]
        assert "importance 0" not in page.html, "nor in the plan's hover texts"


def test_what_another_method_looked_at_is_among_the_costs(comparison_folder: Path) -> None:
    rewrite(comparison_folder / "lora-seed0" / "plan.json", lambda values: values.update(method="corda-kpm"))
    write_json(comparison_folder / "steps" / "corda-knowledge.json", {"done": True, "seconds": 33.0, "peak_memory_gib": 2.5})
    words = draw(comparison_folder / "lora-seed0").words
    assert "Statistics 33.0 s" in words
    assert "Peak memory before training 2.5 GiB" in words
    assert "Statistics" not in draw(comparison_folder / "full-seed0").words
    write_json(comparison_folder / "steps" / "own_text.json", {"done": True, "seconds": 20.0, "peak_memory_gib": 9.5})
    words = draw(comparison_folder / "lora-seed0").words
    assert "Statistics 53.0 s" in words  # with the text that the model wrote for them
    assert "Peak memory before training 9.5 GiB" in words


def test_a_comparison_shows_the_search_of_the_run_that_it_is_about(comparison_folder: Path) -> None:
    write_boundary(comparison_folder)  # nobody's
    assert "boundary" not in draw(comparison_folder).ids
    assert "boundary" not in draw(comparison_folder / "lora-seed0").ids
    for folder, chosen in (("farss-seed0", 4), ("farss-seed1", 4), ("lora-seed0", 2)):
        write_boundary(comparison_folder / folder)
        rewrite(comparison_folder / folder / "boundary.json", lambda values, chosen=chosen: values.update(chosen=chosen))
    words = draw(comparison_folder).words
    assert "This is the search of farss; lora searched too." in words
    assert "Chosen: 4 shallow blocks" in words
    (comparison_folder / "lora-seed0" / "boundary.json").unlink()
    page = draw(comparison_folder)
    assert "boundary" in page.ids
    assert "This is the search of" not in page.words
    assert "it was made with 1 shallow block." in page.words, "farss was planned with one"


def test_full_fine_tuning_has_no_plan_section(comparison_folder: Path) -> None:
    page = draw(comparison_folder / "full-seed0")
    assert "plan" not in page.ids
    assert "Every weight is trained" in page.words


# --- the numbers -----------------------------------------------------------------------------------------------------


def cell_rows(page: Page) -> list[list[str]]:
    """The texts of all table rows."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page.html, flags=re.DOTALL)
    return [
        [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)] for row in rows
    ]


def test_the_table_of_scores_equals_the_summary(run_folder: Path) -> None:
    rows = {row[0]: row[1:] for row in cell_rows(draw(run_folder))}
    for bench in read_json(run_folder / "summary.json")["benchmarks"]:
        shown = rows[bench["name"]]
        assert shown[0] == f"{bench['questions']:,}"
        assert shown[1:3] == [f"{100 * bench['before']:.1f}", f"{100 * bench['after']:.1f}"]
        assert shown[3] == f"{100 * bench['low']:.1f} to {100 * bench['high']:.1f}"
        assert float(shown[4].split()[0].replace("−", "-")) == pytest.approx(100 * (bench["after"] - bench["before"]), abs=0.051)
        assert shown[5] == points(bench["full"])


def test_blocks_that_are_left_as_they_are_count_for_nothing() -> None:
    def told(blocks: range) -> str:
        return plan_sentence(Plan("fora", {str(block): LayerPlan(4, 4.0, block, (8, 8)) for block in blocks}, 6))

    assert told(range(6)).startswith("All 6 blocks start from random directions, rank 4; ")
    assert told(range(2, 4)).startswith("2 of 6 blocks start from random directions, rank 4; ")


def test_the_headline_equals_plan_and_summary(run_folder: Path) -> None:
    words = draw(run_folder).words
    plan = Plan.load(run_folder / "plan.json")
    assert "2 shallow blocks start from the least important directions, ranks 2 to 8 (mean 5.0)" in words
    assert "4 deep blocks start from the most important directions, rank 12" in words
    assert f"{plan.parameters / 1e3:.1f} k trainable parameters in {len(plan.layers)} layers" in words
    summary = read_json(run_folder / "summary.json")
    assert all(percent(summary[name]["value"]).replace("\u00a0", " ") in words for name in ("K", "T", "KT"))


def test_what_is_no_longer_asked_is_not_shown(run_folder: Path) -> None:
    for place in ("base/scores", "scores"):
        (name,) = read_run(run_folder).answers()
        shutil.copy(run_folder / place / f"{name}.jsonl", run_folder / place / "earlier.jsonl")
    assert [*read_run(run_folder).answers()] == [name]


def test_the_page_names_what_t_is_relative_to(run_folder: Path) -> None:
    assert "Full fine-tuning %" in draw(run_folder).words
    rewrite(run_folder / "summary.json", lambda values: values.update(reference="the run of lora"))
    content = run_content(read_run(run_folder))
    assert content["figures"]["balance"].choices[0].layout["yaxis"]["title"]["text"] == "T: learned, % of the run of lora"
    assert "The run of lora %" in draw(run_folder).words
    assert "Full fine-tuning %" not in draw(run_folder).words


def test_examples_are_counted_and_bounded(run_folder: Path) -> None:
    ((before, after),) = read_run(run_folder).answers().values()
    found = {group.name: group for group in groups(before, {"after": after})}
    assert {name: group.total for name, group in found.items()} == {
        "lost": 6,
        "won": 4,
        "kept": 20,
        "never": 10,
    }
    assert [len(found[name].examples) for name in ("lost", "won", "kept", "never")] == [6, 4, 8, 0]
    assert {tuple(example.answers) for example in found["lost"].examples} == {
        (("before", f"person {i}", True), ("after", "a number: 42", False)) for i in range(6)
    }
    assert groups(before, {"after": copy.deepcopy(list(reversed(after)))})[0].total == 6, "paired by id, not by line"


def test_the_first_model_decides_what_was_lost_and_all_answer(run_folder: Path) -> None:
    ((before, after),) = read_run(run_folder).answers().values()
    found = groups(before, {"farss": before, "lora": after[:30]})
    assert [group.total for group in found] == [0, 0, 26, 4], "only what all were asked"
    assert [answer.who for answer in found[2].examples[0].answers] == ["before", "farss", "lora"]
    assert [answer.right for answer in found[2].examples[0].answers] == [True, True, False]


def test_the_template_around_every_question_is_left_out() -> None:
    def asked(names: list[str]) -> list[dict[str, Any]]:
        return [{"id": i, "prompt": f"Do this.\n\nQuestion: who is {name}?\nAnswer:", "score": 1.0} for i, name in enumerate(names)]

    prompts = [example.prompt for example in groups(asked(["Ann", "Bea"]), {"after": asked(["Ann", "Bea"])})[2].examples]
    assert prompts == ["Question: who is Ann?", "Question: who is Bea?"]
    (alone,) = groups(asked(["Ann"]), {"after": asked(["Ann"])})[2].examples
    assert alone.prompt.startswith("Do this.")


def test_a_newcomer_reads_what_was_done(run_folder: Path) -> None:
    words = draw(run_folder).words
    assert "256 examples (40,000 tokens) went through the untouched model once. Of 42 layers" in words
    assert "400 steps, 91 min, at most 17.3 GiB of memory" in words
    assert "1,240 knowledge questions and 500 task questions were asked before and after" in words


def test_the_command_that_repeats_a_run_holds_only_names_and_versions(run_folder: Path) -> None:
    rewrite(run_folder / "versions.json", lambda values: values.update({"torch": "2.8.0+cpu", "peft": "1; rm -rf ~", "$(id)": "1"}))
    html = draw(run_folder).html
    assert "<code>pip install torch==2.8.0\nfarss run config.yaml out=again</code>" in html


def test_what_a_search_and_a_survey_cost(run_folder: Path) -> None:
    assert "Boundary search" not in draw(run_folder).words
    write_boundary(run_folder)
    write_json(run_folder / "steps" / "survey.json", {"done": True, "seconds": 83.2, "peak_memory_gib": 3.25})
    words = draw(run_folder).words
    assert "Survey 83.2 s Boundary search 11 min Peak memory before training 3.2 GiB Training 91 min" in words


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({}, ""),
        ({"examples": 1200, "truncated": 0, "dropped": 0}, ""),
        ({"examples": 1200, "truncated": 30, "dropped": 0}, "1,200 examples (the end of 30 is cut off), "),
        ({"examples": 1200, "truncated": 0, "dropped": 1}, "1,200 examples (1 is left out because no answer fits), "),
        (
            {"examples": 1200, "truncated": 30, "dropped": 2},
            "1,200 examples (the end of 30 is cut off, 2 are left out because no answer fits), ",
        ),
    ],
)
def test_examples_that_do_not_fit_are_told(run_folder: Path, facts: dict[str, int], told: str) -> None:
    rewrite(run_folder / "train.json", lambda values: values.update(facts))
    assert f"400 steps, {told}91 min" in draw(run_folder).words


def test_a_run_of_a_comparison_is_repeated_with_all_of_it(comparison_folder: Path) -> None:
    page = draw(comparison_folder / "farss-seed0")
    assert "<code>farss compare config.yaml out=again</code>" in page.html
    assert "methods: [farss, lora, full]" in page.html
    assert "the whole is done again" in page.words
    assert "<code>farss compare config.yaml out=again</code>" in draw(comparison_folder).html


def test_a_run_beside_a_survey_of_no_comparison_is_repeated_alone(run_folder: Path) -> None:
    write_survey(run_folder.parent / "survey", 6)
    for part in ("survey", "base"):
        shutil.rmtree(run_folder / part)
    shutil.copy(run_folder / "config.yaml", run_folder.parent)
    assert "farss run config.yaml out=again" in draw(run_folder).html


def test_the_release_stands_beside_the_command(run_folder: Path) -> None:
    rewrite(run_folder / "versions.json", lambda values: values.update(farss="0.1.0 (abc1234)"))
    assert "as config.yaml ; then, with farss 0.1.0 (abc1234) ," in draw(run_folder).words


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_a_comparison_is_about_farss(comparison_folder: Path) -> None:
    rewrite(comparison_folder / "comparison.json", lambda values: values["rows"].reverse())  # full and lora come first
    page = draw(comparison_folder)
    choices = re.findall(r"<option value=\"(\d)\">([^<]+)</option>", page.html.partition('data-for="spectrum"')[0])
    assert choices[0] == ("0", "farss-seed1")
    assert "Lost and won as farss-seed1 answered" in page.words
    assert re.findall(r"<dt><bdi>(\w+)</bdi></dt><dd dir", page.html)[:4] == ["before", "farss", "full", "lora"]


def test_only_a_method_that_looks_at_the_data_is_said_to_have_looked(comparison_folder: Path) -> None:
    assert "went through the untouched model" in draw(comparison_folder / "farss-seed0").words
    assert "went through the untouched model" not in draw(comparison_folder / "lora-seed0").words


def test_a_difference_inside_the_interval_is_called_none(comparison_folder: Path) -> None:
    def close(values: dict[str, Any]) -> None:
        values["rows"] = [row for row in values["rows"] if row["seed"] == 0]

    rewrite(comparison_folder / "comparison.json", close)
    words = draw(comparison_folder).words
    assert "farss has the highest balance of kept and learned, KT 95.6 % (95 % interval 92.6 to 98.6 %)." in words
    assert "this small" not in words
    rewrite(comparison_folder / "comparison.json", lambda values: values["rows"][1]["KT"].update(value=0.95))
    assert "Inside that range lies lora: a difference this small is no result." in draw(comparison_folder).words


def test_the_headline_takes_the_interval_of_the_table_and_the_paired_difference(comparison_folder: Path) -> None:
    kt = {"farss": (0.95, 0.93, 0.97), "lora": (0.94, 0.92, 0.96), "full": (0.99, 0.98, 1.0)}
    write_standings(comparison_folder, kt, [("KT", "lora", "farss", -0.01, -0.02, -0.001), ("K", "lora", "farss", -0.01, -0.02, 0.1)])
    words = draw(comparison_folder).words
    assert "farss has the highest balance of kept and learned, KT 95.0 % (95 % interval 93.0 to 97.0 %)." in words, "full is no rival"
    assert "no result:" not in words, "the intervals overlap, but the difference is clear"
    write_standings(comparison_folder, kt, [("KT", "lora", "farss", -0.01, -0.02, -0.001)], p=0.06)
    doubt = "of 2 methods that are alike, one would lead as far in 5 % of all comparisons or more."
    assert f"Its lead over lora is no result: {doubt}" in draw(comparison_folder).words
    equal = {"farss": (0.95, 0.93, 0.97), "lora": (0.94, 0.92, 0.96), "farss@x": (0.95, 0.93, 0.97), "full": (0.99, 0.98, 1.0)}
    gaps = [("KT", "lora", "farss", -0.01, -0.02, -0.001), ("KT", "farss@x", "farss", 0.0, 0.0, 0.0)]
    write_standings(comparison_folder, equal, gaps, p=0.01)
    words = draw(comparison_folder).words
    assert "farss has the highest balance" in words, "the first of equal ones, with which the differences are"
    assert "lies lora" not in words
    write_standings(comparison_folder, kt, [])
    assert "Inside that range lies lora: a difference this small is no result." in draw(comparison_folder).words


def test_while_runs_are_missing_nobody_is_ahead(comparison_folder: Path) -> None:
    assert "has the highest balance" in draw(comparison_folder).words
    rewrite(comparison_folder / "comparison.json", lambda values: values.update(ranked=False, missing=2))
    page = draw(comparison_folder)
    assert "has the highest balance" not in page.words
    assert not [tag for tag, _ in page.tags if tag == "u"]


def test_differences_stand_on_the_page_with_their_p_values(comparison_folder: Path) -> None:
    assert "Who is ahead" not in draw(comparison_folder).words
    gaps = [("K", "farss", "lora", 0.02, 0.01, 0.03), ("KT", "farss", HOSTILE, 0.012, -0.02, 0.0415)]
    write_standings(comparison_folder, {"farss": (0.95, 0.93, 0.97)}, gaps)
    page = draw(comparison_folder)
    rows = [row[-3:] for row in cell_rows(page) if row[0] == "farss" and len(row) == 5]
    assert rows == [["+1.2", "−2.0 to +4.2", "0.031"], ["+2.0", "+1.0 to +3.0", "0.031"]], "KT first"
    assert len(page.scripts) == 3
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_a_folder_without_the_statistics_tensors_has_a_page(run_folder: Path) -> None:
    assert "Energy concentration" in write_report(run_folder).read_text(encoding="utf-8")
    for file in (run_folder / "survey").glob("block-*.safetensors"):
        file.unlink()
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert "Fisher importance by depth" in page
    assert "Energy concentration" not in page


def test_a_comparison_without_a_complete_run_says_so(tmp_path: Path) -> None:
    options = {"model": {"path": "a/b"}, "plan": {"method": "farss"}, "compare": {"methods": ["lora", "full"]}}
    (tmp_path / "config.yaml").write_text(json.dumps(options), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "lora, full: the comparison of these on" in page
    assert "has no complete run yet" in page
