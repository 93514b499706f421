"""Several methods side by side: what they share, variants, learning rates, and who is ahead."""

import dataclasses
import json
import math
import pathlib
import random
import shutil

import pytest
from test_pipeline import model_folder, settings

from farss import pipeline, surveys
from farss.artifacts import Survey, questions, write_json
from farss.boundary import Boundary
from farss.cli import app
from farss.compare import Entrant, _levels, _measured, _notes, compare, held_out, run_within, the_rest, write_so_far
from farss.config import from_dict, load, override
from farss.errors import ConfigError, FarssError, FolderError, UsageError
from farss.evaluate import Estimate
from farss.folder import resolve
from farss.inputs import Loaded
from farss.maths.frontier import kept_at
from farss.methods import METHODS
from farss.report import comparison_markdown, write_report
from farss.survey import own_text
from farss.world.demo import demo_config

__all__ = ["model_folder"]  # a fixture


pytestmark = pytest.mark.usefixtures("no_figures")


def silent(*_):
    """No progress."""


def read(folder):
    return json.loads((folder / "comparison.json").read_text())


@pytest.fixture
def values(model_folder, tmp_path):
    found = settings(model_folder, tmp_path / "all")
    found["evaluate"]["knowledge"][0]["limit"] = found["evaluate"]["task"][0]["limit"] = 16
    found["train"]["max_steps"] = 2
    return found


def test_methods_and_seeds_have_intervals_and_differences(values):
    values["compare"] = {"methods": ["full", "lora", "farss"], "seeds": [0, 1]}
    folder = compare(from_dict(values), silent)
    comparison = read(folder)
    assert set(comparison["methods"]) == {"full", "lora", "farss"}
    for method, estimates in comparison["methods"].items():
        rows = [row for row in comparison["rows"] if row["method"] == method]
        for metric, estimate in estimates.items():
            found = [row[metric]["value"] if isinstance(row[metric], dict) else row[metric] for row in rows]
            mean = sum(found) / 2
            if metric != "KT":
                assert estimate["value"] == pytest.approx(mean)
            assert estimate["low"] <= estimate["value"] + 1e-12
            assert estimate["high"] >= estimate["value"] - 1e-12
    pairs = {(row["method"], row["against"], row["metric"]) for row in comparison["differences"]}
    assert all("full" not in pair for pair in pairs)
    assert comparison["frontier"] is None


def test_a_variant_has_its_own_options_and_its_own_statistics(values):
    values["compare"] = {
        "methods": ["farss", "farss@few", "farss@wide"],
        "settings": {"farss@few": {"calibration.examples": 4}, "farss@wide": {"plan.r_max": 8}},
    }
    folder = compare(from_dict(values), silent)
    assert [row["method"] for row in read(folder)["rows"]] == ["farss", "farss@few", "farss@wide"]
    assert Survey.load(folder / "survey").examples == 8
    assert Survey.load(folder / "farss@few" / "survey").examples == 4
    assert not (folder / "farss@wide").exists()  # another plan of the same survey
    assert {note for note in read(folder)["notes"] if "@" in note} == {"farss@few: calibration.examples=4", "farss@wide: plan.r_max=8"}


def test_learning_rates_are_chosen_on_questions_that_the_table_leaves_out(values):
    values["compare"] = {"methods": ["full", "lora"], "tune": [0.5, 2], "seeds": [0, 1], "held_out": 0.5}
    config = from_dict(values)
    folder = compare(config, silent)
    comparison = read(folder)
    names = {path.name for path in folder.glob("*-seed*")}
    assert {f"{method}-lr{rate}-seed0" for method in ("full", "lora") for rate in ("0.0005", "0.002")} <= names
    assert len(names) == 6  # the second seed only at the chosen rates
    for method, curve in comparison["frontier"]["curves"].items():
        assert [point["learning_rate"] for point in curve] == pytest.approx([0.0005, 0.002])
        (chosen,) = [point["learning_rate"] for point in curve if point["chosen"]]
        assert {row["learning_rate"] for row in comparison["rows"] if row["method"] == method} == {chosen}
    ids = [str(record["id"]) for record in questions(folder / "base" / "scores", "facts")]
    rest = [key for key in ids if the_rest(config)(key)]
    assert 0 < len(rest) < len(ids)
    run = folder / comparison["rows"][0]["folder"] / "summary.json"
    assert {entry["questions"] for entry in json.loads(run.read_text())["benchmarks"] if entry["name"] == "facts"} == {len(rest)}
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*-seed*/train.json")}
    compare(config, silent)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*-seed*/train.json")} == before
    text = comparison_markdown(comparison)
    assert "Learning rate | KT %" in text
    assert "(chosen)" in text


def has_no_reference(row):
    """Whether there was no full fine-tuning that T of a run is relative to."""
    return any("name its scores in evaluate.full_scores" in note for note in row["notes"])


def test_a_comparison_that_is_not_finished_has_a_table_of_what_is(values):
    values["compare"] = {"methods": ["full", "lora"], "tune": [0.5, 2], "seeds": [0, 1], "held_out": 0.5}
    config = from_dict(values)
    assert not write_so_far(config)
    finished = read(folder := compare(config, silent))
    assert not write_so_far(config)
    assert read(folder) == finished
    unused = next(folder.glob("lora-*-seed0"))
    shutil.move(unused, folder.parent / "elsewhere")
    assert not write_so_far(config)  # a finished table stays
    shutil.move(folder.parent / "elsewhere", unused)

    (folder / "comparison.json").unlink()
    killed = next(folder.glob("lora-*-seed1"))
    write_json(killed / "steps" / "evaluate.json", {"options": {}, "done": False})
    assert write_so_far(config)
    table = read(folder)
    assert table["missing"] == 1
    assert table["notes"] == ["So far: 5 of 6 runs are complete."]
    assert set(table["methods"]) == {f"{method} {rate}" for method in ("full", "lora") for rate in ("0.0005", "0.002")}
    for method, curve in finished["frontier"]["curves"].items():
        for point in curve:
            name = f"{method} {point['learning_rate']:g}"
            runs = [row for row in table["rows"] if row["method"] == name]
            if [row["seed"] for row in runs] == [0]:  # the same questions
                assert [runs[0][name] for name in ("kept", "learned")] == [point[name]["value"] for name in ("kept", "learned")]
    assert not any(has_no_reference(row) for row in table["rows"])
    assert table["differences"] == []
    assert "2 methods fine-tuned" in (page := write_report(folder).read_text())
    assert "in 5 runs; 1 more is to come" in page

    for run in folder.glob("full-*"):
        shutil.rmtree(run)
    assert write_so_far(config)
    assert {row["method"] for row in read(folder)["rows"]} == {"lora 0.0005", "lora 0.002"}
    assert all(has_no_reference(row) for row in read(folder)["rows"])


def test_the_untouched_model_is_scored_on_the_same_questions(values):
    values["compare"] = {"methods": ["full", "lora"], "tune": [0.5, 2], "held_out": 0.5}
    config = from_dict(values)
    folder = compare(config, silent)
    asked = {str(row["id"]): row["score"] for row in questions(folder / "base" / "scores", "facts")}
    counted = [score for key, score in asked.items() if the_rest(config)(key)]
    assert 0 < len(counted) < len(asked)
    assert read(folder)["base"]["facts"] == pytest.approx(sum(counted) / len(counted))


def test_held_out_questions_are_a_share_and_the_same_every_time():
    keys = [str(place) for place in range(4000)]
    chosen = [key for key in keys if held_out(0.2)(key)]
    assert 700 < len(chosen) < 900
    assert chosen == [key for key in keys if held_out(0.2)(key)]
    assert set(chosen) < {key for key in keys if held_out(0.4)(key)}


def test_tuning_needs_a_measure(values):
    config = from_dict({**values, "compare": {"methods": ["lora"], "tune": [1, 2]}})
    with pytest.raises(ConfigError, match=r"needs full fine-tuning: add full to compare.methods"):
        compare(config, silent)
    config = dataclasses.replace(override(config, ["compare.methods=[lora, full]"]), evaluate=dataclasses.replace(config.evaluate, task=[]))
    with pytest.raises(ConfigError, match=r"name questions in evaluate.knowledge and evaluate.task"):
        compare(config, silent)
    for bad, message in (("tune=[0]", "tune holds 0"), ("tune=[1, 1]", "tune holds 1.0 twice"), ("seeds=[2, 2]", "seeds holds 2 twice")):
        with pytest.raises(ConfigError, match=f"compare.{message}"):
            override(config, [f"compare.{bad}"])
    with pytest.raises(ConfigError, match=r"compare.held_out=1.0: give a share above 0 and below 1"):
        override(config, ["compare.held_out=1"])


def test_each_variant_searches_for_its_boundary_once(values, monkeypatch):
    searched = []

    def found(prober):
        searched.append(prober.config)
        return Boundary([], 1, 0.0, 0.0, 0.0, 60, 0.1, "facts", "loss", seconds=1.0)

    monkeypatch.setattr(pipeline, "find", found)
    values["train"]["max_steps"] = 60
    values["plan"]["boundary"] = "auto"
    values["compare"] = {"methods": ["farss", "farss@wide"], "settings": {"farss@wide": {"plan.r_max": 8}}}
    config = resolve(from_dict(values))
    tried = [(label, factor, seed) for label in config.compare.methods for factor in (0.5, 1) for seed in (0, 1)]
    everyone = [Entrant(*one, config, Loaded(), silent) for one in tried]
    for one in everyone:
        one.run.claim()
        assert one.run.plan().boundary == 1
    assert [(each.plan.r_max, each.seed, each.train.learning_rate) for each in searched] == [(6, 0, 1e-3), (8, 0, 1e-3)]
    assert {path.name for path in (one.run.shared / "boundary").iterdir()} == {"farss", "farss@wide"}
    chosen = {one.label: one for one in everyone}
    assert "farss@wide: Boundary 1 is the only candidate." in _notes(config, chosen, "")


@pytest.fixture
def unasked(values):
    """The same without questions, where only the costs count."""
    return values | {"evaluate": {"knowledge": [], "task": []}}


def test_without_questions_there_is_still_a_table_of_costs(unasked):
    unasked["compare"] = {"methods": ["lora", "farss"]}
    comparison = read(compare(from_dict(unasked), silent))
    assert [row["K"] for row in comparison["rows"]] == [None, None]
    assert all(row["seconds_train"] > 0 for row in comparison["rows"])
    assert comparison["rows"][1]["peak_memory_init_gib"] > 0
    assert comparison["differences"] == []


def test_one_survey_is_wide_enough_for_all(unasked):
    unasked["plan"] |= {"rank": 2, "r_avg": 1, "r_max": 2}
    unasked["compare"] = {"methods": ["farss", "farss@wide"], "settings": {"farss@wide": {"plan.rank": 6}}}
    folder = compare(from_dict(unasked), silent)
    assert Survey.load(folder / "survey").cap == 6
    assert [row["rank"] for row in read(folder)["rows"]] == [2, 6]
    shutil.rmtree(folder / "survey")
    shutil.rmtree(folder / "farss-seed0")
    compare(from_dict(unasked), silent)  # what was deleted is made again
    assert Survey.load(folder / "survey").cap == 6


def test_the_model_writes_its_own_text_once(unasked, monkeypatch):
    written = []
    monkeypatch.setattr(surveys, "own_text", lambda *arguments: written.append(1) or own_text(*arguments))
    unasked["compare"] = {"methods": ["corda-kpm", "lora-null"]}
    compare(from_dict(unasked), silent)
    assert written == [1]


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        (
            ["farss@unmached"],
            {"farss@unmatched": {"plan.r_max": 8}},
            r"'farss@unmached', .* no options for it: did you mean 'farss@unmatched'",
        ),
        (["farss@wide"], {}, r"'farss@wide', .* no options for it: add them"),
        (["farss"], {"farss": {"plan": {"r_max": 8}}}, r"compare.settings.farss=.*: write its options as train.learning_rate: 1e-4"),
        (["farss"], {"farss": None}, r"compare.settings.farss=None: write its options as"),
        (["farss"], {"farss": {"model.dtype": "float32"}}, r"'farss' its own model.dtype, but all are compared with one untouched model"),
        (["farss"], {"farss": {"seed": 3}}, r"gives 'farss' its own seed, which is the comparison's: see compare.seeds"),
        (["farss"], {"frass": {"plan.r_max": 8}}, r"options for 'frass', which is no method: did you mean 'farss'"),
    ],
)
def test_a_variant_is_never_the_plain_method(values, methods, settings, message):
    values["compare"] = {"methods": methods, "settings": settings}
    with pytest.raises(ConfigError, match=message):
        compare(from_dict(values), silent)
    assert not (pathlib.Path(values["out"])).exists()


def test_a_method_that_stays_behind_takes_no_level_from_the_others():
    assert _levels([[0.5, 0.9], [0.4, 0.8]]) == pytest.approx([0.5, 0.65, 0.8])
    assert _levels([[0.5, 0.9], [0.4, 0.8], [0.0, 0.1]]) == pytest.approx([0.5, 0.65, 0.8])
    assert _levels([[0.5, 0.9], [0.0, 0.1]]) == []
    assert _levels([]) == []


def test_the_highest_level_is_the_end_of_a_curve():
    generator = random.Random(0)
    for _ in range(200):
        curves = [[(generator.uniform(-9, 1), generator.uniform(-9, 1)) for _ in range(4)] for _ in range(2)]
        levels = _levels([[t for t, _ in curve] for curve in curves])
        if levels:
            assert any(kept_at(curve, levels[-1]) is not None for curve in curves)


def test_where_nothing_is_solved_the_likelihoods_choose():
    def one(**values):
        return {name: Estimate(value, value, value) for name, value in values.items()}

    assert _measured({"": one(KT=0.9), "a": one(KT=0.5)}) == ("KT", {"": 0.9, "a": 0.5})
    half = math.log(0.5)
    for kept in ({"K": 0.5, "kept": -9.0}, {"kept": half}):  # a score where there is one
        measure, values = _measured({"": one(**kept, learned=8.0), "a": one(**kept, learned=4.0), "b": one(**kept, learned=-1.0)})
        assert measure.startswith("log-likelihoods")
        assert values == pytest.approx({"": 2 / 3, "a": 0.5, "b": 0.0})
    for nothing in ({"": one(K=0.5), "a": one(K=0.5)}, {"": one(kept=0.0, learned=-0.1), "a": one(kept=0.0, learned=0.1)}):
        with pytest.raises(FarssError, match=r"compare.tune cannot choose"):
            _measured(nothing)


def test_of_reference_runs_that_solve_nothing_the_likelier_is_taken(values, monkeypatch):
    monkeypatch.setattr("farss.compare.task_score", lambda *_: 0.0)
    values["compare"] = {"methods": ["full"], "tune": [0.01, 10], "held_out": 0.5}
    curve = read(compare(from_dict(values), silent))["frontier"]["curves"]["full"]
    assert [point["chosen"] for point in curve] == [False, True]


@pytest.mark.slow
def test_every_method_on_the_embedded_world(tmp_path):
    """All methods through one command, on a model that knows something; who wins is for the table to say."""
    few = ["train.max_steps=40", "calibration.examples=64", "evaluate.resamples=200", f"compare.methods=[{', '.join(METHODS)}]"]
    folder = compare(override(demo_config(str(tmp_path / "all")), few), silent)
    comparison = read(folder)
    rows = {row["method"]: row for row in comparison["rows"]}
    assert list(rows) == list(METHODS)
    for method, row in rows.items():
        assert 0 < row["K"]["value"] <= 1.1, method
        assert row["seconds_train"] > 0
        assert (folder / row["folder"] / ("adapter" if METHODS[method].plain_lora else "model")).is_dir()
    assert {row["method"] for row in comparison["differences"]} == set(METHODS) - {"full"}
    looked_at = {path.parent.name for path in folder.glob("*/survey.json")} - {"steps"}
    assert len(looked_at) == 8  # one for each thing that is looked at


def test_several_jobs_give_the_table_of_one(values, tmp_path):
    values["compare"] = {"methods": ["corda-kpm", "farss-plus"]}  # they share the text that the base writes
    alone = read(compare(from_dict(values), silent))
    beside = read(compare(from_dict(values | {"out": str(tmp_path / "jobs"), "compare": values["compare"] | {"jobs": 2}}), silent))
    timed = ("seconds_init", "seconds_train", "peak_memory_gib", "peak_memory_init_gib")
    for first, second in zip(alone["rows"], beside["rows"], strict=True):
        assert {key: first[key] for key in first if key not in timed} == {key: second[key] for key in second if key not in timed}


def test_a_run_of_a_comparison_is_exported_with_what_it_shares(values):
    values["compare"] = {"methods": ["farss", "lora"], "seeds": [3]}
    folder = compare(from_dict(values), silent)
    own = folder / "farss-seed3"
    run = run_within(load(own / "config.yaml", ["export.rank=1"]), silent)
    assert run.path == own
    run.claim()
    run.export()
    assert run.folder.record("export")["rank"] == 1
    assert not (own / "survey").exists()
    with pytest.raises(ConfigError, match=r"made with other options: only export's may differ"):
        run_within(load(own / "config.yaml", ["evaluate.resamples=101"]), silent)
    assert run_within(from_dict(values), silent) is None  # the folder above it is no comparison's
    before = (own / "summary.json").read_bytes()
    for command in ("run", "evaluate"):  # they would score it without the comparison's full fine-tuning
        with pytest.raises(UsageError, match=f"`farss compare {folder / 'config.yaml'}` goes on with it"):
            app([command, str(own / "config.yaml")], standalone_mode=False)
    assert (own / "summary.json").read_bytes() == before


def test_scores_alone_are_enough_to_go_on(values):
    values["compare"] = {"methods": ["full", "lora", "dora"], "keep": "scores"}
    first = read(folder := compare(from_dict(values), silent))
    runs = [folder / row["folder"] for row in first["rows"]]
    assert not [path for run in runs for path in run.rglob("*.safetensors")]
    before = [(run / "steps" / "train.json").stat().st_mtime_ns for run in runs]
    shutil.rmtree(folder / "survey", ignore_errors=True)  # a folder that came from another machine, without its large files
    values["compare"]["seeds"] = [0, 1]
    second = read(compare(from_dict(values), silent))
    assert [row for row in second["rows"] if row["seed"] == 0] == first["rows"]
    assert [(run / "steps" / "train.json").stat().st_mtime_ns for run in runs] == before
    run = run_within(load(runs[1] / "config.yaml", ["export.rank=1"]), silent)
    for _ in range(2):
        with pytest.raises(FolderError, match=r"the weights that were trained there are deleted"):
            run.export()
        assert read(compare(from_dict(values), silent))["rows"] == second["rows"]  # which goes on all the same
    values["evaluate"]["task"][0]["limit"] = 8
    with pytest.raises(FolderError, match=r"the weights that were trained there are deleted"):
        compare(from_dict(values), silent)
