"""The configuration survives a round trip, documents itself, and refuses what it does not know by name."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from farss.compare.entrants import Entrant, check_labels
from farss.config import Config, PlanConfig, QuestionSet
from farss.configfile import CALLED, all_keys, commented, dump, field_help, from_dict, load, override
from farss.errors import ConfigError
from farss.inputs import Loaded
from farss.methods import METHODS

ROOT = Path(__file__).parent.parent
FIXED = [
    "model.path",
    "data.train",
    "data.max_length",
    "calibration.examples",
    "plan.method",
    "plan.boundary",
    "plan.rank",
    "plan.r_min",
    "plan.r_avg",
    "plan.r_max",
    "plan.alpha",
    "plan.budget",
    "train.learning_rate",
    "seed",
    "out",
]


def test_the_promised_option_names_exist():
    assert set(FIXED) <= set(all_keys())


def test_printed_configuration_is_the_default_and_documents_every_option(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(commented(), encoding="utf-8")
    assert load(path) == Config()
    text = commented()
    for entry in dataclasses.fields(Config):
        section = getattr(Config(), entry.name)
        for help_text in field_help(type(section)).values() if dataclasses.is_dataclass(section) else ():
            assert f"# {help_text}" in text


def test_round_trip_with_question_sets():
    config = override(
        Config(), ["evaluate.knowledge=[triviaqa, {name: ours, data: q.jsonl, fewshot: 5}]", "compare.settings={full: {seed: 3}}"]
    )
    assert from_dict(yaml.safe_load(dump(config))) == config


def test_a_text_that_looks_like_a_number_is_written_in_quotes(tmp_path):
    for name in ("1e5", "0888", "0512", "1:30", "10"):
        config = from_dict({"data": {"response": name}})
        (tmp_path / "run.yaml").write_text(dump(config))
        assert load(tmp_path / "run.yaml").data.response == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out=runs/try #2", "runs/try #2"),
        ("out='runs/try' # my second", "runs/try"),
        (r'out="\ud83d\ude00"', "😀"),
        ("out=#2", None),
    ],
)
def test_a_name_may_hold_any_character(text, expected):
    if expected is None:
        with pytest.raises(ConfigError, match="out=None: give a text, in quotes"):
            override(Config(), [text])
    else:
        assert override(Config(), [text]).out == expected


def test_half_a_character_is_told():
    with pytest.raises(ConfigError, match=r"data.template=.* holds half a character: write it anew"):
        override(Config(), [r'data.template="\ud83d {instruction}"'])


def test_numbers_as_people_write_them():
    assert override(Config(), ["train.learning_rate=1e-4"]).train.learning_rate == 1e-4
    assert override(Config(), ["train.epochs=3"]).train.epochs == 3.0
    assert override(Config(), ["plan.alpha=64"]).plan.alpha == 64
    assert override(Config(), ["plan.alpha=constant"]).plan.alpha == "constant"
    assert override(Config(), ["data.limit=0512"]).data.limit == 512
    assert override(Config(), ["data.limit=10_000"]).data.limit == 10_000


@pytest.mark.parametrize(
    ("rank", "given", "expected"),
    [
        (128, {}, (50, 64)),  # the paper's
        (64, {}, (25, 32)),
        (16, {}, (6, 8)),
        (1, {}, (1, 1)),
        (128, {"r_max": 20}, (20, 20)),
        (128, {"r_min": 60}, (60, 64)),
        (16, {"r_avg": 3}, (3, 8)),
    ],
)
def test_shallow_ranks_follow_the_rank_unless_they_are_given(rank, given, expected):
    assert PlanConfig(rank=rank, **given).shallow_budget == expected


def test_every_key_of_a_question_set_is_printed():
    printed = commented()
    assert all(f"  #   {each.name}: " in printed for each in dataclasses.fields(QuestionSet))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lerning_rate=1", "unknown key 'train.lerning_rate': did you mean 'train.learning_rate'?"),
        ("tran.seed=1", "unknown key 'tran.seed': did you mean 'seed'"),
        ("train.seed=1", "unknown key 'train.seed': did you mean 'seed'"),
        ("train.device=cpu", "did you mean 'model.device'"),
        ("train.warmup_steps=100", "did you mean 'train.warmup_ratio'"),
        ("train.gradient_clipping=1", "did you mean 'train.max_grad_norm'"),
        ("data.path=x", "did you mean 'data.train'"),
        ("data.output=x", "did you mean 'data.response'"),
        ("prune.blocks=4", "did you mean 'prune.ratio'"),
        ("plan.init=x", "unknown key 'plan.init': choose one of plan.alpha, plan.boundary,"),
        ("modl.path=x", "unknown key 'modl.path': did you mean 'model.path'"),
        ("evaluate.knowledge=[{name: a, file: b}]", "choose one of evaluate.knowledge[0].answers,"),
        ("train.learning_rate=.inf", "train.learning_rate=inf: give a finite number"),
        ("train.epochs=.nan", "train.epochs=nan: give a finite number"),
        ("train.max_grad_norm=" + "9" * 400, "train.max_grad_norm is a number of 400 digits: give a smaller one"),
        ("evaluate.resamples=99999999999999999999", "evaluate.resamples is a number of 20 digits"),
        ("seed=1:30", "seed='1:30': give a whole number"),
        ("compare.seeds=&a [*a]", "the value is not valid YAML: Circular reference detected"),
        ("compare.seeds=" + "[" * 5000, "the value is not valid YAML"),
        ("data.system=Be nice: always", r"data.system={'Be nice': 'always'}: give a text, in quotes"),
        ("plan.rank=1.5", "plan.rank=1.5: give a whole number"),
        ("plan.rank=0", "plan.rank=0: a rank is 1 or more"),
        ("plan.r_avg=90", "plan.r_avg=90 is larger than plan.r_max=64"),
        ("plan.alpha=-1", "plan.alpha=-1.0: give a number above 0"),
        ("plan.alpha=big", "plan.alpha='big'"),
        ("plan.budget=papr", "plan.budget='papr': did you mean 'paper'?"),
        ("plan.boundary=0", "plan.boundary=0: give 1 or more"),
        ("train.micro_batch_size=5", "does not divide train.batch_size=16"),
        ("data.template=nothing", "choose alpaca, chat or plain"),
        ("evaluate.knowledge=[{name: a, data: b, questoin: c}]", "did you mean 'evaluate.knowledge[0].question'?"),
        ("evaluate.task=[a, a]", "asks 'a' twice"),
        ("seed", "'seed' is not of the form key=value"),
        ("train=3", "train is 3: give `key: value` pairs"),
        ("train={epochs: {a: 1}}", "train.epochs={'a': 1}: give a number"),
        ("train={epochs: 3, epochs: 4}", "'epochs' stands twice: keep one"),
        ("seed.x=1", "unknown key 'seed.x'"),
        ("compare.settings=", "compare.settings=None: give {method: {option: value}}, or leave it out"),
    ],
)
def test_mistakes_are_named_with_their_cure(text, message):
    with pytest.raises(ConfigError) as caught:
        override(Config(), [text])
    assert message in str(caught.value)


def test_names_of_questions_that_differ_by_case_alone_are_one_file_on_some_systems():
    with pytest.raises(ConfigError, match=r"evaluate asks 'NQ' twice"):
        from_dict({"evaluate": {"knowledge": [{"name": "nq", "data": "a"}, {"name": "NQ", "data": "b"}]}})


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no configuration file .*`farss config >"):
        load(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML: expected ',' or '\]', .*, in line 1$"):
        load(broken)
    broken.write_text("seed: 1\ntrain: {epochs: 1}\nplan: {rank: 4}\ntrain: {max_steps: 2}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML: 'train' stands twice: keep one, in line 4$"):
        load(broken)
    broken.write_text("- 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a list"):
        load(broken)


def test_plain_dictionaries_only():
    assert from_dict(dataclasses.asdict(Config())) == Config()


@pytest.mark.parametrize(("key", "reason"), [("adapter.use_dora", "set plan.method=dora"), ("plan.rslora", "set plan.alpha")])
def test_options_of_peft_that_do_not_go_with_farss_say_why(key, reason):
    with pytest.raises(ConfigError, match=reason):
        override(Config(), [f"{key}=true"])


def test_further_files_change_options_in_their_order(tmp_path):
    (tmp_path / "more.yaml").write_text("plan: {rank: 32}\nseed: 7\ncompare: {methods: [lora]}\n")
    found = override(Config(), ["plan.rank=8", "plan.boundary=3", str(tmp_path / "more.yaml"), "seed=9"])
    assert (found.plan.rank, found.seed, found.compare.methods) == (32, 9, ["lora"])
    assert found.plan.boundary == 3  # the rest of a section stays
    with pytest.raises(ConfigError, match="there is no configuration file"):
        override(Config(), [str(tmp_path / "none.yaml")])
    (tmp_path / "empty.yaml").write_text("plan:\n  # rank: 16\ntrain: {epochs: 3}\n")
    found = override(Config(), ["plan.rank=8", "train.max_steps=7", str(tmp_path / "empty.yaml"), "train={batch_size: 4}", "compare="])
    assert (found.plan.rank, found.train.max_steps, found.train.epochs, found.train.batch_size) == (8, 7, 3, 4)
    (tmp_path / "bad.yaml").write_text("plan: {rnk: 32}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'plan.rnk': did you mean 'plan.rank'"):
        override(Config(), [str(tmp_path / "bad.yaml")])


def test_settings_of_further_files_are_added(tmp_path):
    before = override(Config(), ["compare.settings={full: {seed: 3}, lora: {seed: 4}}"])
    (tmp_path / "more.yaml").write_text("compare: {settings: {lora: {seed: 5}, farss@wide: {plan.r_max: 8}}}\n")
    found = override(before, [str(tmp_path / "more.yaml")])
    assert found.compare.settings == {"full": {"seed": 3}, "lora": {"seed": 5}, "farss@wide": {"plan.r_max": 8}}
    assert override(found, ["compare.settings={full: {}}"]).compare.settings["full"] == {}
    assert override(Config(), ["compare.settings=", "compare.settings={full: {}}"]).compare.settings == {"full": {}}


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "overlays").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_overlays_fit_their_run_files(file, monkeypatch, tmp_path):
    monkeypatch.setenv("FARSS_DATA", str(tmp_path))
    on_top_of = re.findall(r"configs/[\w-]+\.yaml", file.read_text().splitlines()[0])
    assert on_top_of
    for name in on_top_of:
        check_labels(load(ROOT / name, [str(file)]))


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_ablations_are_runs_of_known_methods(file):
    config = load(ROOT / "configs" / "laptop.yaml", [str(file)])
    assert len(config.compare.methods) >= 3
    assert set(config.compare.settings) <= set(config.compare.methods)
    check_labels(config)
    full = load(ROOT / "configs" / "gemma-gsm8k.yaml", [str(file)]).compare.settings["full"]
    assert full == load(ROOT / "configs" / "gemma-gsm8k.yaml").compare.settings["full"]
    for label in config.compare.methods:
        assert Entrant(label, None, 0, config, Loaded(), lambda *_: None).method in METHODS


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        ("train.lr=1", "did you mean 'train.learning_rate'"),
        ("model.load_in_4bit=true", "did you mean 'model.quantization: nf4'"),
        ("plan.target_modules=[q_proj]", "did you mean 'model.targets'"),
        ("output_dir=here", "did you mean 'out'"),
        ("train.gradient_accumulation_steps=4", "set train.micro_batch_size"),
        ("plan.use_dora=true", "set plan.method=dora"),
        ("evaluate.knowledge=know.jsonl", r"such as \[{name: mine, data: know.jsonl, question: question, answers: answers}\]"),
        ("evaluate.knowledge={name: a, data: b}", r"such as \[{name: a, data: b}\]"),
        ("model.targets=all-linear", "is every linear layer"),
        ("model.targets=q_proj", r"such as \[q_proj\]"),
        ("train.learning_rate='2e-4'", "give a number without quotes"),
        ("train.learning_rate=fast", "give a number$"),
        ("evaluate.task=[{name: x, data: f, dataset: g}]", "did you mean 'evaluate.task.*data'"),
        ("train.max_grad_norm=-1", r"give 0 \(no clipping\) or more"),
    ],
)
def test_the_cure_is_what_was_meant(given, cure):
    with pytest.raises(ConfigError, match=cure):
        override(Config(), [given])


def test_every_key_that_is_meant_is_one():
    assert {meant.partition(":")[0] for meant in CALLED.values()} <= set(all_keys())


def test_a_folder_and_tabs_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder: give a configuration file, such as .*config.yaml"):
        load(tmp_path)
    (tmp_path / "run.yaml").write_text("train:\n\tepochs: 1\n")
    with pytest.raises(ConfigError, match="indent with spaces"):
        load(tmp_path / "run.yaml")
