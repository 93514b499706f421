"""Every figure as PNG and SVG, from the descriptions that the page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from folders import write_boundary

from farss.report import drawing, read_comparison, read_run
from farss.report.figures import Choice, Figure, line
from farss.report.page import comparison_content, run_content, write_report

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "$\\frac{a}$ </text><script>alert(1)</script> --> %{x} \u202e\x00\ud800 & \"'"


def test_every_figure_is_written_as_png_and_svg(run_folder: Path) -> None:
    write_boundary(run_folder)
    write_report(run_folder)
    names = {path.name for path in (run_folder / "figures").iterdir()}
    single = {"balance", "boundary", "plan", "importance", "energy", "loss", "course"}
    spectra = {"spectrum-1-model-layers-0-self-attn-q-proj", "spectrum-42-model-layers-5-mlp-down-proj"}
    assert names == {f"{name}.{kind}" for name in single | spectra for kind in ("png", "svg")}
    for path in (run_folder / "figures").glob("*.png"):
        assert path.read_bytes().startswith(PNG)
    for path in (run_folder / "figures").glob("*.svg"):
        assert ElementTree.fromstring(path.read_bytes()).tag.endswith("svg")


def test_a_comparison_has_a_plan_for_each_run(comparison_folder: Path) -> None:
    content = comparison_content(read_comparison(comparison_folder))
    names = {name for figure in content["figures"].values() for name, _ in drawing._files(figure)}
    assert {"balance", "benchmarks", "loss", "plan-1-farss-seed0", "plan-2-farss-seed1", "plan-3-lora-seed0"} <= names


def test_every_plan_is_written_however_many_there_are() -> None:
    choices = [Choice(f"run {place}", [], {}) for place in range(9)]
    names = [[name for name, _ in drawing._files(Figure("plan", "", choices, every=every))] for every in (True, False)]
    assert names == [[f"plan-{place + 1}-run-{place}" for place in range(9)], ["plan-1-run-0", "plan-9-run-8"]]


def test_only_our_files_of_figures_that_are_gone_are_deleted(tmp_path: Path) -> None:
    gone = ["loss.png", "plan-3-old-run.svg", "spectrum-2-.png"]
    foreign = ["my-plot.png", "loss-of-mine.svg", "plan.pdf", "planned.png"]
    for name in gone + foreign:
        (tmp_path / name).write_text("")
    drawing.save_figures([Figure("course", "", [hostile_figure().choices[0]])], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "course.png", "course.svg"}


def test_drawing_twice_gives_the_same_files(run_folder: Path, tmp_path: Path) -> None:
    content = run_content(read_run(run_folder))

    def drawn(folder: Path) -> dict[str, bytes]:
        drawing.save_figures([content["figures"][name] for name in ("plan", "loss")], folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert drawn(tmp_path / "once") == drawn(tmp_path / "twice")


def test_the_files_hold_the_numbers_of_the_page(run_folder: Path) -> None:
    content = run_content(read_run(run_folder))
    colours = drawing.light_colours()
    for figure in content["figures"].values():
        choice = figure.choices[0]
        plots = drawing.draw(drawing.themed({"data": choice.data, "layout": choice.layout}, colours)).axes
        ours = [list(trace["x"]) for trace in choice.data if trace["type"] == "scatter"]
        theirs = [list(drawn.get_xdata()) for plot in plots for drawn in plot.get_lines()]
        assert all(values in theirs for values in ours)
        if "contour" in {trace["type"] for trace in choice.data}:  # whose lines have numbers, too
            continue
        cells = [text.get_text() for plot in plots for text in plot.texts]
        ranks = [str(z) for trace in choice.data if trace["type"] == "heatmap" for row in trace["z"] for z in row if z is not None]
        assert sorted(ranks) == sorted(text for text in cells if text.isdigit())


def test_every_figure_uses_only_what_can_be_drawn(run_folder: Path, comparison_folder: Path) -> None:
    contents = [run_content(read_run(run_folder)), comparison_content(read_comparison(comparison_folder))]
    for trace in (trace for content in contents for f in content["figures"].values() for c in f.choices for trace in c.data):
        assert trace["type"] in drawing.TRACES
        assert trace.get("marker", {}).get("symbol", "circle") in drawing.SYMBOLS


def hostile_figure() -> Figure:
    """A line whose every text is hostile."""
    axis: dict[str, Any] = {"tickvals": [1], "ticktext": [HOSTILE]}
    layout = {"height": 300, "showlegend": True, "xaxis": axis, "yaxis": {}}
    choice = Choice(f"../../{HOSTILE}", [line(HOSTILE, [(1, 2.0), (2, None)], 0, "")], layout)
    return Figure("loss", HOSTILE, [choice, choice])


def test_hostile_names_do_no_harm(tmp_path: Path) -> None:
    drawing.save_figures([hostile_figure()], tmp_path / "figures")
    written = sorted(path.name for path in tmp_path.rglob("*.*"))
    assert len(written) == 4
    assert all(re.fullmatch(r"loss-\d-[a-z0-9-]+\.(png|svg)", name) for name in written)
    for path in (tmp_path / "figures").glob("*.svg"):
        tree = ElementTree.fromstring(path.read_bytes())
        assert not [tag for tag in tree.iter() if tag.tag.endswith("script")]


@pytest.mark.parametrize(("label", "text"), [("a &amp; b", "a & b"), ("100 % {x}", "100 %{x}"), ("5 $", r"5 \$"), ("a\u202eb", "a b")])
def test_labels_become_text(label: str, text: str) -> None:
    assert drawing.plain_text(label) == text


def test_the_colours_are_those_of_the_page() -> None:
    colours = drawing.light_colours()
    assert colours["paper"] == "#fdfdfb"
    assert drawing.themed({"a": ["theme:paper", 1, "plain"]}, colours) == {"a": ["#fdfdfb", 1, "plain"]}
