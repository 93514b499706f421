"""Several methods side by side: what they share, who is ahead, and what a killed comparison goes on from."""

import shutil
from pathlib import Path

import pytest
import yaml
from comparisons import read
from transformers import Trainer

from farss import surveys
from farss.artifacts import Survey
from farss.cli import app
from farss.compare import compare, comparison, run_within, write_so_far
from farss.compare.comparison import _possible
from farss.configfile import from_dict, load, override
from farss.errors import ConfigError, FolderError, NumericalError, UsageError
from farss.files import write_json
from farss.folder import resolve
from farss.inputs import Loaded
from farss.jobs import do_all, silent
from farss.methods import METHODS
from farss.pipeline import Run
from farss.report import write_report
from farss.survey import own_text
from farss.world.demo import demo_config

pytestmark = pytest.mark.usefixtures("no_figures")


def test_methods_and_seeds_have_intervals_and_differences(values):
    values["compare"] = {"methods": ["full", "lora", "farss"], "seeds": [0, 1]}
    values["evaluate"]["learned_by"] = "likelihood"  # as two steps teach no model to solve anything
    folder = compare(from_dict(values), silent)
    comparison = read(folder)
    assert set(comparison["methods"]) == {"full", "lora", "farss"}
    for method, estimates in comparison["methods"].items():
        rows = [row for row in comparison["rows"] if row["method"] == method]
        assert all(row["T"]["value"] == 1 for row in rows if method == "full")  # of each seed its own
        for metric, estimate in estimates.items():
            named = [row["benchmarks"] if metric.startswith("benchmarks.") else row for row in rows]
            values = [each[metric.removeprefix("benchmarks.")] for each in named]
            found = [value.get("value", value.get("score")) if isinstance(value, dict) else value for value in values]
            mean = sum(found) / 2
            if metric != "KT":
                assert estimate["value"] == pytest.approx(mean)
            assert estimate["low"] <= estimate["value"] + 1e-12
            assert estimate["high"] >= estimate["value"] - 1e-12
    pairs = {(row["method"], row["against"], row["metric"]) for row in comparison["differences"]}
    known = [metric for metric in ("K", "T", "KT", "retained", "kept", "learned") if metric in comparison["methods"]["lora"]]
    assert pairs == {(one, other, metric) for one, other in (("lora", "farss"), ("farss", "lora")) for metric in known}
    assert {"kept", "learned"} <= set(known)
    assert comparison["frontier"] is None
    assert "Questions asked: 16 of facts (knowledge); 16 of seals (task)." in comparison["notes"]


def has_no_reference(row):
    """Whether there was no full fine-tuning that T of a run is relative to."""
    return any("of which there is no run yet" in note for note in row["notes"])


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
    assert table["notes"][0] == "So far: 5 of 6 runs are complete."
    assert set(table["methods"]) == {f"{method} {rate}" for method in ("full", "lora") for rate in ("0.0005", "0.002")}
    for method, curve in finished["frontier"]["curves"].items():
        for point in curve:
            name = f"{method} {point['learning_rate']:g}"
            runs = [row for row in table["rows"] if row["method"] == name]
            if [row["seed"] for row in runs] == [0]:  # the same questions
                assert [runs[0][name] for name in ("kept", "learned")] == [point[name]["value"] for name in ("kept", "learned")]
    assert not any(has_no_reference(row) for row in table["rows"])
    assert table["differences"] == []
    assert not table["ranked"]
    assert finished["ranked"]
    assert "2 methods fine-tuned" in (page := write_report(folder).read_text())
    assert "in 5 runs; 1 more is to come" in page

    for run in folder.glob("full-*"):
        shutil.rmtree(run)
    assert write_so_far(config)
    assert {row["method"] for row in read(folder)["rows"]} == {"lora 0.0005", "lora 0.002"}
    assert all(has_no_reference(row) for row in read(folder)["rows"])


def test_where_a_run_fails_there_is_a_table_of_the_others(values, monkeypatch):
    whole = Run.all_but_report

    def failing(self):
        if self.path.name == "lora-seed0":  # of the first seed: the others are run all the same
            raise NumericalError("the loss is nan")
        whole(self)

    monkeypatch.setattr(Run, "all_but_report", failing)
    values["compare"] = {"methods": ["lora", "full"], "seeds": [0, 1]}
    with pytest.raises(NumericalError, match=r"lora-seed0: the loss is nan"):
        compare(from_dict(values), silent)
    table = read(folder := Path(values["out"]))
    assert (table["missing"], table["notes"][0]) == (1, "So far: 3 of 4 runs are complete.")
    assert "in 3 runs; 1 more is to come" in (folder / "report.html").read_text()


def test_without_questions_there_is_still_a_table_of_costs(unasked):
    unasked["compare"] = {"methods": ["lora", "farss"]}
    comparison = read(compare(from_dict(unasked), silent))
    assert [row["K"] for row in comparison["rows"]] == [None, None]
    assert all(row["seconds_train"] > 0 for row in comparison["rows"])
    assert comparison["rows"][1]["peak_memory_init_gib"] > 0
    assert comparison["differences"] == []


def test_all_see_the_same_rows_in_the_same_order(unasked, monkeypatch):
    seen, own = {}, Trainer.training_step

    def step(self, model, inputs, *rest):
        seen.setdefault(Path(self.args.output_dir).parent.name, []).append(inputs["input_ids"].tolist())
        return own(self, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", step)
    unasked["compare"] = {"methods": ["full", "lora", "pissa"], "seeds": [0, 1]}
    compare(from_dict(unasked), silent)
    for seed in (0, 1):
        full, *others = (seen[f"{method}-seed{seed}"] for method in ("full", "lora", "pissa"))
        assert len(full) > 1
        assert others == [full, full]
    assert seen["full-seed0"] != seen["full-seed1"]


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
    assert len(looked_at) == 9  # one for each thing that is looked at


def test_several_jobs_give_the_table_of_one(values, tmp_path):
    values["compare"] = {"methods": ["corda-kpm", "farss-plus"]}  # they share the text that the base writes
    alone = read(compare(from_dict(values), silent))
    beside = read(compare(from_dict(values | {"out": str(tmp_path / "jobs"), "compare": values["compare"] | {"jobs": 2}}), silent))
    timed = ("seconds_init", "seconds_train", "peak_memory_gib", "peak_memory_init_gib")
    for first, second in zip(alone["rows"], beside["rows"], strict=True):
        assert {key: first[key] for key in first if key not in timed} == {key: second[key] for key in second if key not in timed}


def test_what_cannot_be_shared_stops_no_run_without_it(values, monkeypatch):
    """In its own process, where several jobs run, and before all of them."""
    real = comparison._share_one

    def work(items, tell):
        if items[0] is Run.statistics:
            raise NumericalError("no statistics of knowledge")
        real(items, tell)

    def one_by_one(work, items, jobs, tell):
        return do_all(work, items, 1, tell)

    monkeypatch.setattr(comparison, "_share_one", work)
    monkeypatch.setattr(comparison, "do_all", one_by_one)
    values["compare"] = {"methods": ["corda-kpm", "lora"], "jobs": 2}
    with pytest.raises(NumericalError, match="no statistics of knowledge"):
        compare(from_dict(values), silent)
    folder = Path(values["out"])
    assert [row["method"] for row in read(folder)["rows"]] == ["lora"]
    assert not (folder / "corda-kpm-seed0" / "train.json").exists()


def test_a_table_of_other_options_goes_when_they_change(values, monkeypatch):
    values["compare"] = {"methods": ["lora"]}
    folder = compare(config := from_dict(values), silent)
    compare(config, silent)
    assert (folder / "comparison.md").is_file()
    monkeypatch.setattr(comparison, "_run_all", lambda entrants: (_ for _ in ()).throw(FolderError("stopped")))
    (entry,) = values["evaluate"]["knowledge"]
    table = (folder / "comparison.json").read_bytes()
    for section, other in (("export", {"rank": 1}), ("evaluate", values["evaluate"] | {"knowledge": [entry | {"limit": 5}]})):
        (folder / "comparison.json").write_bytes(table)
        with pytest.raises(FolderError, match="stopped"):
            compare(from_dict(values | {section: other}), silent)
        assert not [*folder.glob("comparison.*")]


def test_a_table_stays_where_an_option_changes_nothing_in_it(values, monkeypatch):
    values["compare"] = {"methods": ["lora"]}
    folder = compare(config := from_dict(values), silent)
    monkeypatch.setattr(comparison, "_run_all", lambda entrants: (_ for _ in ()).throw(FolderError("stopped")))
    with pytest.raises(FolderError, match="stopped"):
        compare(override(config, ["evaluate.batch_size=3", "evaluate.looks=1", "train.save_steps=7", "compare.jobs=2"]), silent)
    assert (folder / "comparison.json").is_file()


def test_a_run_of_a_comparison_is_exported_with_what_it_shares(values):
    values["compare"] = {"methods": ["farss", "lora"], "seeds": [3]}
    folder = compare(from_dict(values), silent)
    own = folder / "farss-seed3"
    run = run_within(load(own / "config.yaml", ["export.rank=1"]), silent)
    assert run.path == own
    run.claim()
    run.export()
    assert run.folder.record("export")["rank"] == 1
    for change in ([], ["model.device=cuda"]):  # in whatever form, and where there is no GPU
        known = _possible(resolve(override(from_dict(values), change)), silent, Loaded())
        assert all(one.run.complete for one in known)
    compare(from_dict(values), silent)
    assert run.folder.record("export")["rank"] == 1  # it stays as it was handed over last
    assert not (own / "survey").exists()
    with pytest.raises(ConfigError, match=r"made with other options: only export's may differ"):
        run_within(load(own / "config.yaml", ["evaluate.resamples=101"]), silent)
    assert run_within(from_dict(values), silent) is None  # the folder above it is no comparison's
    unknown = yaml.safe_load((folder / "config.yaml").read_text()) | {"compare": {"methods": ["lorra"]}}
    (folder.parent / "config.yaml").write_text(yaml.safe_dump(unknown))
    assert run_within(from_dict(values), silent) is None  # nor is one that names no method
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
    with pytest.raises(FolderError, match=r"the weights in .*full-seed0/model are deleted"):
        compare(from_dict(values), silent)
    assert read(folder)["rows"] == second["rows"]  # nothing is replaced before it is known that it can be


def test_weights_that_were_not_scored_are_kept(unasked):
    unasked["compare"] = {"methods": ["lora"], "keep": "scores"}
    assert [*compare(from_dict(unasked), silent).rglob("adapter_model.safetensors")]


def test_runs_of_another_training_are_no_part_of_a_table(unasked):
    """Of a later seed too: it is refused at the start, and not counted before."""
    unasked["compare"] = {"methods": ["lora"], "seeds": [1]}
    folder = compare(from_dict(unasked), silent)
    unasked["compare"]["seeds"] = [0, 1]
    changed = override(from_dict(unasked), ["train.max_steps=3"])
    with pytest.raises(FolderError, match=r"lora-seed1.* holds the step 'train', made with train.max_steps=2, and now train.max_steps=3"):
        compare(changed, silent)
    assert not (folder / "lora-seed0").exists()
    assert not write_so_far(changed)


def test_a_table_of_other_options_is_not_the_finished_one(values):
    values["compare"] = {"methods": ["lora", "full"], "seeds": [0]}
    config = from_dict(values)
    folder = compare(config, silent)
    assert not write_so_far(override(config, ["compare.jobs=2", "compare.keep=scores"]))
    assert write_so_far(override(config, ["evaluate.learned_by=likelihood"]))
    assert read(folder)["learned_by"] == "likelihood"
    assert write_so_far(config)  # and that one is not the one that was finished
    assert read(folder)["learned_by"] == "score"


def test_runs_that_a_smaller_comparison_leaves_out_are_told(unasked, caplog):
    unasked["compare"] = {"methods": ["lora", "dora"], "seeds": [0]}
    compare(from_dict(unasked), silent)
    assert "the table will be without" not in caplog.text
    unasked["compare"]["methods"] = ["lora"]
    folder = compare(from_dict(unasked), silent)
    assert f"compare.methods was ['lora', 'dora'] in {folder}, and is ['lora']: the table will be without dora." in caplog.text
    assert (folder / "dora-seed0" / "train.json").is_file()


def test_with_one_seed_a_row_has_the_interval_of_its_method(values):
    values["compare"] = {"methods": ["lora", "full"], "seeds": [5]}
    table = read(compare(from_dict(values), silent))
    for row in table["rows"]:
        for metric in ("K", "T", "KT", "retained"):
            known = table["methods"][row["method"]].get(metric)
            assert (row[metric] and pytest.approx(row[metric])) == known


def test_a_folder_is_a_comparisons_or_a_runs(unasked):
    """A single run would lose the comparison's configuration, and a comparison's page would hide a single run."""
    compared = from_dict(unasked | {"compare": {"methods": ["lora"]}})
    folder = compare(compared, silent)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(FolderError, match=r"holds a comparison, and this is a single run: choose another out, or go on with it by"):
        Run(from_dict(unasked)).claim()
    assert (folder / "config.yaml").read_text() == before
    alone = Run(override(from_dict(unasked), ["plan.method=lora", f"out={folder}-alone"]))
    alone.claim()
    compare(override(compared, [f"out={folder}-alone"]), silent)  # a survey alone would be shared
    single = Run(override(from_dict(unasked), ["plan.method=lora", f"out={folder}-single"]))
    single.claim()
    single.train()
    with pytest.raises(FolderError, match=r"holds a single run, and this is a comparison: choose another out"):
        compare(override(compared, [f"out={folder}-single"]), silent)
