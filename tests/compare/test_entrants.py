"""Variants: their options, and what they have of their own."""

import pathlib

import pytest
from comparisons import read

from farss import pipeline
from farss.artifacts import Survey
from farss.boundary import Boundary
from farss.compare import compare
from farss.compare.entrants import Entrant, check_labels, configured, plans_of
from farss.compare.table import notes_of
from farss.configfile import from_dict
from farss.errors import ConfigError, FolderError
from farss.folder import resolve
from farss.inputs import Loaded
from farss.jobs import silent

pytestmark = pytest.mark.usefixtures("no_figures")


def test_a_variant_has_its_own_options_and_its_own_statistics(values):
    values["compare"] = {
        "methods": ["farss", "farss@few", "farss@wide", "farss-init@few", "pissa@few"],
        "settings": {
            "farss@few": {"calibration.examples": 4},
            "farss@wide": {"plan.r_max": 8},
            "farss-init@few": {"calibration.examples": 4},
            "pissa@few": {"calibration.examples": 4},
        },
    }
    folder = compare(from_dict(values), silent)
    assert [row["method"] for row in read(folder)["rows"]] == values["compare"]["methods"]
    assert Survey.load(folder / "survey").examples == 8
    (own,) = folder.glob("statistics-*")  # one for those that look at the same; another plan of a survey, and weights alone, need none
    assert Survey.load(own / "survey").examples == 4
    assert [path.name for path in own.iterdir() if path.name != "steps"] == ["survey"]
    assert Survey.load(folder / "weights").layers
    notes = read(folder)["notes"]
    assert {"farss@few: calibration.examples=4", "farss@wide: plan.r_max=8"} <= set(notes)
    assert any(note.startswith("farss@wide: The shallow layers got ") for note in notes)  # of one row, behind its name


def test_a_variant_has_the_options_of_its_method_unless_it_has_its_own(values):
    values["compare"] = {
        "methods": ["farss@low", "farss@wide", "lora"],
        "settings": {
            "farss": {"train.learning_rate": 3e-4, "plan.r_max": 5},
            "farss@low": {"train.learning_rate": 1e-5},
            "farss@wide": {"plan.r_max": 8},
        },
    }
    config = resolve(from_dict(values))
    found = [configured(config, label) for label in config.compare.methods]
    rate = config.train.learning_rate
    assert [each.train.learning_rate for each in found] == [1e-5, 3e-4, rate]
    assert [each.plan.r_max for each in found] == [5, 8, config.plan.r_max]
    assert [plan.r_max for plan in plans_of(config)] == [5, 8, config.plan.r_max]


def test_each_variant_searches_for_its_boundary_once(values, monkeypatch):
    searched = []

    def found(prober, _):
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
    assert "farss@wide: Boundary 1 is the only candidate." in notes_of(config, chosen, "")


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        (
            ["farss@unmached"],
            {"farss@unmatched": {"plan.r_max": 8}},
            r"'farss@unmached', .* no options for it: did you mean 'farss@unmatched'",
        ),
        (["farss@wide"], {}, r"'farss@wide', .* no options for it: add them"),
        (["farss@wide"], {"farss@wide": {}}, r"'farss@wide', .* no options for it: add them"),
        (["full", "loraa"], {}, r"compare.methods names 'loraa', which is no method: did you mean 'lora'"),
        (["farss_plus@x"], {"farss_plus@x": {"plan.rank": 2}}, r"'farss_plus@x', which is no method: did you mean 'farss-plus'"),
        (["farss"], {"farss": {"plan": {"r_max": 8}}}, r"compare.settings.farss=.*: write its options as train.learning_rate: 1e-4"),
        (["farss"], {"farss": None}, r"compare.settings.farss=None: write its options as"),
        (["farss@wide"], {"farss@wide": {"plan.r_max": 8}, "farss": None}, r"compare.settings.farss=None: write its options as"),
        (["farss"], {"farss": {"model.dtype": "float32"}}, r"'farss' its own model.dtype, but all are compared with one untouched model"),
        (["farss"], {"farss": {"seed": 3}}, r"gives 'farss' its own seed, which is the comparison's: see compare.seeds"),
        (["farss"], {"farss": {"compare.jobs": 4}}, r"gives 'farss' its own compare.jobs, which is the comparison's"),
        (["lora"], {"lora": {"plan.method": "full"}}, r"gives 'lora' another method: name 'full' in compare.methods"),
        (["lora"], {1: {"plan.rank": 2}}, r"options for 1, which is no method"),
        (["lora"], {"lora": {1: 1}}, r"compare.settings.lora=\{1: 1\}: write its options as"),
        (["farss"], {"frass": {"plan.r_max": 8}}, r"options for 'frass', which is no method: did you mean 'farss'"),
    ],
)
def test_a_variant_is_never_the_plain_method(values, methods, settings, message):
    values["compare"] = {"methods": methods, "settings": settings}
    with pytest.raises(ConfigError, match=message):
        compare(from_dict(values), silent)
    assert not (pathlib.Path(values["out"])).exists()


def test_what_changes_no_answer_may_differ(values):
    values["compare"] = {"methods": ["full"], "settings": {"full": {"evaluate.batch_size": 2, "train.micro_batch_size": 1}}}
    check_labels(from_dict(values))


def test_the_steps_of_recovery_are_the_same_for_all(values):
    values["evaluate"]["recovery"] = 1
    values["compare"] = {"methods": ["lora"], "settings": {"lora": {"train.precision": "fp32"}}}
    with pytest.raises(ConfigError, match=r"'lora' its own train.precision, but the steps of evaluate.recovery are the same for all"):
        compare(from_dict(values), silent)


def test_files_of_a_variant_are_found_from_anywhere(values, tmp_path, monkeypatch):
    rows = pathlib.Path(values["data"]["train"]).read_text()
    (tmp_path / "more.jsonl").write_text(rows)
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = {"lora@more": {"data.train": "more.jsonl"}, "lora@most": {"data.train": "${PLACE}/more.jsonl"}}
    config = resolve(from_dict(values | {"compare": {"methods": list(settings), "settings": settings}}))
    monkeypatch.chdir("/")
    assert {configured(config, label).data.train for label in settings} == {str(tmp_path / "more.jsonl")}


@pytest.mark.parametrize("value", [5, [1], {"name": "own", "data": 5}])
@pytest.mark.parametrize("key", ["data.train", "calibration.knowledge"])
def test_what_is_no_path_in_settings_is_named(values, key, value):
    values["compare"] = {"methods": ["farss-plus"], "settings": {"farss-plus": {key: value}}}
    with pytest.raises(ConfigError, match=key):
        compare(from_dict(values), silent)


def test_a_comparisons_own_full_fine_tuning_is_the_reference(values):
    values["evaluate"]["full_scores"] = "elsewhere"
    for methods, reference in ((["lora", "full@slow"], None), (["lora"], "elsewhere")):
        config = from_dict(values | {"compare": {"methods": methods}})
        assert configured(config, "lora").evaluate.full_scores == reference


@pytest.mark.parametrize("then", [{}, {"farss": {"calibration.examples": 4}}])
def test_a_result_is_not_taken_for_one_of_other_statistics(values, then):
    """A run's folder is the same, and its statistics lie elsewhere."""
    values["compare"] = {"methods": ["farss"], "settings": {} if then else {"farss": {"calibration.examples": 4}}}
    compare(from_dict(values), silent)
    values["compare"]["settings"] = then
    with pytest.raises(FolderError, match=r"holds the step 'survey', made with calibration.examples="):
        compare(from_dict(values), silent)


def test_a_plan_of_other_statistics_is_made_again(values):
    for settings in ({}, {"farss": {"calibration.examples": 4}}):
        values["compare"] = {"methods": ["farss"], "settings": settings}
        entrant = Entrant("farss", None, 0, resolve(from_dict(values)), Loaded(), silent)
        entrant.run.claim()
        made = entrant.run.plan()
        assert made == entrant.run.plan()
        assert entrant.run.statistics().examples == (4 if settings else 8)
        assert (entrant.run.path / (entrant.run.folder.record("plan")["statistics"]) / "survey").is_dir()
        assert entrant.run.folder.record("plan")["statistics"] == (".." if not settings else f"../{entrant.run.place.path.name}")
