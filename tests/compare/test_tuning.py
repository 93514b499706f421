"""Learning rates: chosen on questions that the table leaves out."""

import dataclasses
import json
import math

import pytest
from comparisons import read

from farss.artifacts import read_records
from farss.compare import compare
from farss.compare.entrants import Entrant
from farss.compare.tuning import choose, held_out, measured, the_rest
from farss.configfile import from_dict, override
from farss.errors import ConfigError, FarssError, NumericalError
from farss.folder import resolve
from farss.inputs import Loaded
from farss.jobs import silent
from farss.pipeline import Run
from farss.report import comparison_markdown
from farss.tasks.outcomes import Estimate
from farss.tasks.questions import draw_from_files

pytestmark = pytest.mark.usefixtures("no_figures")


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
    ids = [str(record["id"]) for record in read_records(folder / "base" / "scores", "facts")]
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


def test_held_out_questions_alone_choose(values):
    """One rate is right on these and on nothing else; the other on all others, of which there are more."""
    values["compare"] = {"methods": ["full", "lora"], "tune": [0.5, 2], "held_out": 0.3}
    config = resolve(from_dict(values))
    folder, chooses = compare(config, silent), held_out(0.3)
    tried = {label: [Entrant(label, factor, 0, config, Loaded(), silent) for factor in (0.5, 2)] for label in ("full", "lora")}
    for wanted in (0.5, 2):
        for place in (folder / "base", *(one.run.path for group in tried.values() for one in group)):
            for file in (place / "scores").glob("*.jsonl"):
                records = [json.loads(line) for line in file.read_text().splitlines()]
                held = [chooses(str(record["id"])) for record in records]
                assert 0 < sum(held) < len(held) / 2
                best = place.name in {one.run.path.name for group in tried.values() for one in group if one.factor == wanted}
                for record, one_of_them in zip(records, held, strict=True):
                    record["score"] = float(one_of_them == best or place.name == "base")
                file.write_text("".join(json.dumps(record) + "\n" for record in records))
        chosen, measure = choose(config, tried)
        assert measure == "KT"
        assert {label: one.factor for label, one in chosen.items()} == {"full": wanted, "lora": wanted}


def test_learning_rates_are_chosen_by_kt_where_it_has_a_value(values, tmp_path):
    """On questions whose right answers are what the untouched model says: whoever changes it least is best."""
    run = Run(from_dict(values | {"out": str(tmp_path / "before")}))
    run.claim()
    run.evaluate_base()
    for kind in ("knowledge", "task"):
        (entry,) = values["evaluate"][kind]
        asked = read_records(run.path / "base" / "scores", entry["name"])
        rows = [{"question": row["prompt"], "answers": row["answer"]} for row in asked if row["answer"].strip()]
        told = tmp_path / f"{entry['name']}.jsonl"
        told.write_text("\n".join(map(json.dumps, rows)))
        values["evaluate"][kind] = [
            {"name": entry["name"], "data": str(told), "prompt": "{question}", "metric": "contains", "max_tokens": 2}
        ]
    values["compare"] = {"methods": ["full", "lora"], "tune": [1e-4, 100], "held_out": 0.5}
    found = read(compare(from_dict(values), silent))
    assert found["base"] == {"facts": 1.0, "seals": 1.0}
    curves = found["frontier"]["curves"].values()
    assert all([point["chosen"] for point in curve] == [True, False] for curve in curves)
    assert all([point["KT"]["value"] for point in curve] == [pytest.approx(1.0), pytest.approx(0.0, abs=0.5)] for curve in curves)
    assert {row["method"]: row["KT"]["value"] for row in found["rows"]} == {"full": 1.0, "lora": 1.0}
    notes = "\n".join(found["notes"])
    assert "each chosen by KT on 50% of the questions" in notes
    assert "The smallest rate that was tried is the best of full, lora: a smaller one might be better still." in notes


def test_the_untouched_model_is_scored_on_the_same_questions(values):
    values["compare"] = {"methods": ["full", "lora"], "tune": [0.5, 2], "held_out": 0.5}
    config = from_dict(values)
    folder = compare(config, silent)
    asked = {str(row["id"]): row["score"] for row in read_records(folder / "base" / "scores", "facts")}
    counted = [score for key, score in asked.items() if the_rest(config)(key)]
    assert 0 < len(counted) < len(asked)
    assert read(folder)["base"]["facts"] == pytest.approx(sum(counted) / len(counted))


def test_held_out_questions_are_a_share_and_the_same_every_time():
    keys = [str(place) for place in range(4000)]
    chosen = [key for key in keys if held_out(0.2)(key)]
    assert 700 < len(chosen) < 900
    assert chosen == [key for key in keys if held_out(0.2)(key)]
    assert set(chosen) < {key for key in keys if held_out(0.4)(key)}


def test_a_rate_that_diverges_is_left_out(values):
    """And the others are chosen from, instead of a night's work lost to one rate of one method."""
    gentle = {"full": {"train.learning_rate": 2e-33}}
    values["compare"] = {"methods": ["lora", "full"], "tune": [1, 1e30], "held_out": 0.5, "settings": gentle}
    table = read(compare(from_dict(values), silent))
    assert {row["method"]: row["learning_rate"] for row in table["rows"]} == pytest.approx({"lora": 1e-3, "full": 2e-3})
    assert [len(curve) for curve in table["frontier"]["curves"].values()] == [1, 2]
    assert any("Left out, as no training came to its end: lora-lr1e+27-seed0: " in note for note in table["notes"])
    values["compare"] |= {"methods": ["lora", "full"], "tune": [1e30], "settings": {}}
    with pytest.raises(NumericalError, match=r"full-lr1e\+27-seed0: "):  # none is left
        compare(from_dict(values | {"out": f"{values['out']}-other"}), silent)


def ids_of(config):
    """Of the questions that are asked beside knowledge and task."""
    return [str(row["id"]) for row in draw_from_files(config.evaluate.other[0], config.seed).asked]


def test_tuning_needs_a_measure(values):
    config = from_dict({**values, "compare": {"methods": ["lora"], "tune": [1, 2]}})
    with pytest.raises(ConfigError, match=r"needs full fine-tuning: add full to compare.methods"):
        compare(config, silent)
    config = dataclasses.replace(override(config, ["compare.methods=[lora, full]"]), evaluate=dataclasses.replace(config.evaluate, task=[]))
    with pytest.raises(ConfigError, match=r"name questions in evaluate.knowledge and evaluate.task"):
        compare(config, silent)
    config = from_dict({**values, "compare": {"methods": ["lora", "full"], "tune": [1, 2]}})
    for share, taken in ((0.001, 0), (0.999, 16)):
        with pytest.raises(ConfigError, match=rf"compare.held_out={share} takes {taken} of the 16 questions of 'facts'"):
            compare(override(config, [f"compare.held_out={share}"]), silent)
    other = values["evaluate"]["knowledge"][0] | {"name": "other", "limit": 1}
    beside = from_dict(
        {**values, "evaluate": values["evaluate"] | {"other": [other]}, "compare": {"methods": ["lora", "full"], "tune": [1]}}
    )
    everything = next(share / 100 for share in range(40, 100) if all(map(held_out(share / 100), ids_of(beside))))
    with pytest.raises(ConfigError, match=r"takes 1 of the 1 questions of 'other'"):
        compare(override(beside, [f"compare.held_out={everything}"]), silent)
    few = override(config, ["evaluate.knowledge=[gsm8k]", "evaluate.limit=20"])
    with pytest.raises(ConfigError, match=r"takes about 4 of the 20 questions of 'gsm8k' .*: set evaluate.limit=50"):
        compare(few, silent)
    with pytest.raises(ConfigError, match=r"set evaluate.limit=34"):  # 33 would be refused again
        compare(override(few, ["compare.held_out=0.3"]), silent)
    for bad, message in (("tune=[0]", "tune holds 0"), ("tune=[1, 1]", "tune holds 1.0 twice"), ("seeds=[2, 2]", "seeds holds 2 twice")):
        with pytest.raises(ConfigError, match=f"compare.{message}"):
            override(config, [f"compare.{bad}"])
    with pytest.raises(ConfigError, match=r"compare.held_out=1.0: give a share above 0 and below 1"):
        override(config, ["compare.held_out=1"])


def test_where_nothing_is_solved_the_likelihoods_choose():
    def one(**values):
        return {name: Estimate(value, value, value) for name, value in values.items()}

    assert measured({"a": one(KT=0.9), "b": one(KT=0.5)}, 0.0) == ("KT", {"a": 0.9, "b": 0.5})
    half = math.log(0.5)
    for kept in ({"K": 0.5, "kept": -9.0}, {"kept": half}):  # a score where there is one
        measure, values = measured({"f": one(**kept, learned=8.0), "a": one(**kept, learned=4.0), "b": one(**kept, learned=-1.0)}, 8.0)
        assert measure.startswith("log-likelihoods")
        assert values == pytest.approx({"f": 2 / 3, "a": 0.5, "b": 0.0})
    for nothing, reach in ((one(K=0.5), 1.0), (one(kept=0.0, learned=0.1), -0.1)):
        with pytest.raises(FarssError, match=r"compare.tune cannot choose"):
            measured({"a": nothing}, reach)


def test_of_reference_runs_that_solve_nothing_the_likelier_is_taken(values, monkeypatch):
    monkeypatch.setattr("farss.compare.tuning.task_score", lambda *_: 0.0)
    values["compare"] = {"methods": ["full"], "tune": [0.01, 10], "held_out": 0.5}
    curve = read(compare(from_dict(values), silent))["frontier"]["curves"]["full"]
    assert [point["chosen"] for point in curve] == [False, True]
