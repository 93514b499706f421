"""The comparison as Markdown, CSV and a table for the terminal."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from pathlib import Path
from typing import Any

import pytest
from folders import write_standings
from rich.console import Console

from farss.artifacts import Plan, Survey
from farss.files import read_json
from farss.report import comparison_csv, comparison_markdown, write_report
from farss.report.figures import AGAINST
from farss.report.tables import gaps
from farss.terminal import RankMap, comparison_table, importance_table, summary_table


@pytest.fixture
def comparison(comparison_folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(comparison_folder / "comparison.json")
    return values


def printed(renderable: Any, width: int) -> str:
    """What a terminal without colours shows."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_csv_holds_every_number_with_all_its_digits(comparison: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert len(rows) == len(comparison["rows"])
    for read, row in zip(rows, comparison["rows"], strict=True):
        assert read["method"] == row["method"]
        assert int(read["seed"]) == row["seed"]
        assert int(read["parameters"]) == row["parameters"]
        for name in ("K", "T", "KT"):
            parts = (float(read[name]), float(read[f"{name}_low"]), float(read[f"{name}_high"]))
            assert parts == tuple(row[name].values())
        assert {name: float(read[f"benchmarks.{name}"]) for name in row["benchmarks"]} == {
            name: b["score"] for name, b in row["benchmarks"].items()
        }


def test_csv_of_names_that_clash_and_of_nothing(comparison: dict[str, Any]) -> None:
    comparison["rows"][0]["benchmarks"] |= {"K": {"score": 0.25}, "race": {"score": 0.5, "high": 0.6}, "race_high": {"score": 0.3}}
    comparison["rows"][0]["method"] = 'a,"b"\nc'
    first = next(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert (first["K"], first["benchmarks.K"], first["method"]) == ("0.951", "0.25", 'a,"b"\nc')
    assert [first[f"benchmarks.{name}"] for name in ("race", "race:high", "race_high")] == ["0.5", "0.6", "0.3"]
    assert comparison_csv({"rows": []}).strip() == ""


@pytest.mark.parametrize(
    ("p", "shown"), [(0.04998, "0.04998"), (0.0496, "0.0496"), (0.05, "0.050"), (0.0312, "0.031"), (0.0002, "<0.001"), (None, "–")]
)
def test_a_probability_stands_on_its_side_of_the_threshold(p: float | None, shown: str) -> None:
    row = {"metric": "KT", "method": "farss", "against": "lora", "value": 0.1, "low": 0.0, "high": 0.2, "p_value": p}
    assert gaps({"differences": [row]})["KT"][0].p == shown


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of the first Markdown table."""
    table, *_ = text.partition("\n\n")
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]


def test_markdown_has_the_means_over_the_seeds(comparison: dict[str, Any]) -> None:
    heads, _, before, *rows = markdown_rows(comparison_markdown(comparison))
    assert [row[0] for row in rows] == ["farss", "lora", "full"]
    assert before[heads.index("people %")] == "65.0"
    kept = [row["K"]["value"] for row in comparison["rows"] if row["method"] == "farss"]
    expected = f"**{100 * statistics.fmean(kept):.1f}** (± {100 * statistics.stdev(kept):.1f})"
    assert rows[0][heads.index("K %")] == expected
    assert all(len(row) == len(heads) for row in rows)


def test_best_is_bold_and_second_best_underlined(comparison: dict[str, Any]) -> None:
    heads, _, _, *rows = markdown_rows(comparison_markdown(comparison))
    marks = {head: ["**" in row[place], "<u>" in row[place]] for place, head in enumerate(heads) for row in rows if row[0] == "full"}
    assert not any(mark for both in marks.values() for mark in both), "full is what the others are measured against"
    assert [row[heads.index("T %")].partition(" ")[0] for row in rows] == ["**96.0**", "<u>94.8</u>", "100.0"]
    assert "**" in rows[0][heads.index("Forgetting")], "less forgetting is better"
    assert not any(mark in rows[0][heads.index("Parameters")] for mark in ("**", "<u>"))


def test_equal_numbers_share_a_place(comparison: dict[str, Any]) -> None:
    comparison["rows"] = [row for row in comparison["rows"] if row["seed"] == 0]
    for row in comparison["rows"][:2]:
        row["K"] = {"value": 0.9, "low": 0.8, "high": 1.0}
    heads, _, _, *rows = markdown_rows(comparison_markdown(comparison))
    assert [row[heads.index("K %")] for row in rows] == ["**90.0** (80.0 to 100.0)"] * 2 + ["70.2 (67.2 to 73.2)"]
    comparison["rows"][2]["K"] = {"value": 0.9, "low": 0.8, "high": 1.0}
    *_, last = markdown_rows(comparison_markdown(comparison))
    assert last[heads.index("K %")] == "90.0 (80.0 to 100.0)", "full gets no place, not even a shared one"


def test_a_seed_without_a_number_leaves_no_mean(comparison: dict[str, Any]) -> None:
    comparison["rows"][1]["K"] = None
    heads, _, _, *rows = markdown_rows(comparison_markdown(comparison))
    assert rows[0][heads.index("K %")] == "–"


def test_markdown_names_cannot_break_the_table(comparison: dict[str, Any]) -> None:
    comparison["rows"][2]["method"] = "a|b\n<script>"
    text = comparison_markdown(comparison)
    assert "a\\|b &lt;script>" in text
    assert len(markdown_rows(text)) == 6


def test_markdown_says_what_a_reader_must_know(comparison: dict[str, Any]) -> None:
    comparison["notes"].append("a\n| b | <script>")
    lines = comparison_markdown(comparison).splitlines()
    assert lines[-2:] == ["- full ran at half the rate.", "- a \\| b \\| &lt;script>"]


def test_learning_rates_and_start_memory_have_columns_where_they_are_known(comparison: dict[str, Any]) -> None:
    comparison["rows"][2]["learning_rate"] = 2e-4
    heads, _, _, *rows = markdown_rows(comparison_markdown(comparison))
    assert [row[heads.index("Learning rate")] for row in rows] == ["2e-05", "0.0002", "2e-05"]
    assert "Start memory" not in heads
    comparison["rows"][2]["peak_memory_init_gib"] = 3.25
    heads, _, _, *rows = markdown_rows(comparison_markdown(comparison))
    assert heads[heads.index("Start") + 1] == "Start memory"
    assert [row[heads.index("Start memory")] for row in rows] == ["–", "3.2\u00a0GiB", "–"]
    for row in comparison["rows"]:
        del row["learning_rate"]
    assert "Learning rate" not in comparison_markdown(comparison)
    assert "Start memory" not in printed(comparison_table(comparison), 160)


@pytest.fixture
def differences(comparison_folder: Path) -> dict[str, Any]:
    """A comparison with paired differences."""
    gaps = [(metric, "farss", "[red]lora|x", 0.012, -0.02, 0.0415) for metric in ("K", "T", "KT", "kept")]
    write_standings(comparison_folder, {"farss": (0.95, 0.93, 0.97)}, gaps)
    values: dict[str, Any] = read_json(comparison_folder / "comparison.json")
    return values


def test_markdown_has_the_differences_of_kt_k_and_t(differences: dict[str, Any]) -> None:
    text = comparison_markdown(differences)
    heads = [line for line in text.splitlines() if line.startswith("| Method | against")]
    assert heads == [f"| Method | against | {metric} difference | 95 % interval | p |" for metric in ("KT", "K", "T")]
    assert text.count("| farss | [red]lora\\|x | +1.2 | −2.0 to +4.2 | 0.031 |") == 3


def test_the_terminal_shows_the_differences_of_kt(differences: dict[str, Any]) -> None:
    text = printed(comparison_table(differences), 80)
    assert text.splitlines()[-1].split() == ["farss", "[red]lora|x", "+1.2", "−2.0", "to", "+4.2", "0.031"]
    assert "KT difference" in text
    assert "K difference" not in text.replace("KT difference", "")
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_page_shows_the_same_table(comparison_folder: Path, comparison: dict[str, Any]) -> None:
    html = write_report(comparison_folder, figures=False).read_text(encoding="utf-8")
    for row in markdown_rows(comparison_markdown(comparison))[3:]:
        for cell in row[1:]:
            number, _, detail = cell.partition(" (")
            shown = number.replace("**", "<b>", 1).replace("**", "</b>")
            assert f"<td>{shown}{f'<small>{detail[:-1]}</small>' if detail else ''}</td>" in html


# --- terminal --------------------------------------------------------------------------------------------------------


def test_the_rank_map_shows_every_rank(run_folder: Path) -> None:
    plan = Plan.load(run_folder / "plan.json")
    lines = printed(RankMap(plan), 100).splitlines()
    assert lines[0].split() == [str(block) for block in range(plan.blocks)]
    for line, kind in zip(lines[1:], ("q_proj", "k_proj", "v_proj"), strict=False):
        ranks = [layer.rank for name, layer in plan.layers.items() if name.endswith(kind)]
        assert line.split() == [kind, *map(str, ranks)]
    assert "least important" in lines[-1]
    assert "most important" in lines[-1]


@pytest.mark.parametrize("width", [1, 20, 24, 40, 200])
def test_the_rank_map_fits_every_terminal(run_folder: Path, width: int) -> None:
    text = printed(RankMap(Plan.load(run_folder / "plan.json")), width)
    assert text
    assert all(len(line) <= width for line in text.splitlines())


def test_the_rank_map_says_where_farss_plus_starts(run_folder: Path) -> None:
    plan = Plan.load(run_folder / "plan.json")
    layers = {name: dataclasses.replace(layer, side="most", fixed_a=True) for name, layer in plan.layers.items()}
    assert printed(RankMap(dataclasses.replace(plan, layers=layers)), 100).splitlines()[-1].strip() == f"■ {AGAINST}"


def test_a_small_p_value_is_no_zero() -> None:
    row = {"method": "farss", "against": "lora", "metric": "KT", "value": 0.1, "low": 0.05, "high": 0.15}
    shown = [gaps({"differences": [row | {"p_value": p}]})["KT"][0].p for p in (0.00049, 0.0005001, 0.031)]
    assert shown == ["<0.001", "0.001", "0.031"]


def test_full_fine_tuning_has_no_rank_map(comparison_folder: Path) -> None:
    text = printed(RankMap(Plan.load(comparison_folder / "full-seed0" / "plan.json")), 80)
    assert text.strip() == "full trains every weight: there are no ranks"


def test_the_terminal_table_prints_names_as_they_are(comparison: dict[str, Any]) -> None:
    comparison["rows"][2]["method"] = "[red]lora[/red]"
    text = printed(comparison_table(comparison), 160)
    assert "[red]lora[/red]" in text
    assert "90.8" in text
    assert "87.8–93.8" in text


def test_the_importance_table_has_a_row_for_each_layer_type(run_folder: Path) -> None:
    survey = Survey.load(run_folder / "survey")
    lines = printed(importance_table(survey), 100).splitlines()
    values = [layer.importance for name, layer in survey.layers.items() if name.endswith("q_proj")]
    words = next(line for line in lines if line.startswith("q_proj")).split()
    assert words[2:] == [f"{number:.3g}" for number in (min(values), statistics.fmean(values), max(values))]
    assert len(words[1]) == survey.blocks
    assert len(lines) == 8


def test_the_summary_table_equals_the_summary(run_folder: Path) -> None:
    text = printed(summary_table(read_json(run_folder / "summary.json")), 120)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "65.0" in rows["people"]
    assert "60.0" in rows["people"]
    assert "−5.0" in rows["people"]
    assert "94.9" in rows["KT:"]
    assert "91.9 to 97.9" in rows["KT:"]
    assert "+0.031" in rows["Forgetting"]
    assert printed(summary_table({}), 80)
