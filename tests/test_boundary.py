"""Probes of a small model: held-out questions, one survey, no probe twice, the same choice after a kill."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from small_models import examples, save_small, small

import farss
from farss import boundary as room
from farss import world
from farss.artifacts import Plan
from farss.batches import choose
from farss.boundary import Boundary, hold_out, knowledge_rows, prepare, probe_config
from farss.configfile import from_dict, override
from farss.data import Tokenized
from farss.errors import ConfigError, FolderError, NumericalError
from farss.models import load_tokenizer
from farss.options import PLAN_KEYS, TRAIN_KEYS, options_of
from farss.pipeline import Run
from farss.rows import question_rows
from farss.search import Round, candidates
from farss.tasks.likelihood import question_tokens, token_loglikelihoods
from farss.tasks.questions import draw
from farss.train import train

SCHEMA = ["candidates", "chosen", "margin", "steps_full", "cost_share", "knowledge", "task", "notes"]
OF_A_CANDIDATE = ["boundary", "steps", "T", "K", "KT", "low", "high", "parameters", "dropped"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Six blocks: boundaries 1 to 3, in two rounds."""
    return save_small("llama-gqa", tmp_path_factory.mktemp("model"), num_hidden_layers=6)


def settings(model_folder, out):
    return {
        "model": {"path": str(model_folder)},
        "data": {"train": str(world.TASK_TRAIN), "max_length": 96, "limit": 64},
        "calibration": {"examples": 8, "batch_size": 4},
        "plan": {"boundary": "auto", "rank": 8, "r_avg": 4, "r_max": 6},
        "train": {"learning_rate": 1e-2, "max_steps": 120, "batch_size": 4, "save_steps": 2, "logging_steps": 1, "precision": "fp32"},
        "evaluate": {
            "knowledge": [{"name": "facts", "data": str(world.KNOWLEDGE), "fewshot": 3}],
            "text": str(world.TEXT),
            "resamples": 100,
        },
        "out": str(out),
    }


@pytest.fixture
def config(model_folder, tmp_path):
    return from_dict(settings(model_folder, tmp_path / "run"))


@pytest.fixture(scope="module")
def searched(model_folder, tmp_path_factory):
    """A run whose boundary was searched and planned."""
    run = Run(from_dict(settings(model_folder, tmp_path_factory.mktemp("searched") / "run")))
    run.claim()
    run.plan()
    return run


def told(path):
    """What a search found, without the time it took."""
    values = json.loads((path / "boundary.json").read_text())
    assert values.pop("seconds") > 0
    return values


# --- the whole search ------------------------------------------------------------------------------------------------


def test_the_promised_content_of_boundary_json(searched):
    values = told(searched.path)
    assert set(SCHEMA) <= set(values)
    assert [each["boundary"] for each in values["candidates"]] == candidates(6) == [1, 2, 3]
    for each in values["candidates"]:
        assert list(each) == OF_A_CANDIDATE
        assert 0 <= each["low"] <= each["KT"] <= each["high"]
        assert (
            each["parameters"]
            == room.make_plan(dataclasses.replace(searched.config.plan, boundary=each["boundary"]), searched.survey()).parameters
        )
    steps = [each["steps"] for each in values["candidates"]]
    assert sorted(steps) == [5, 10, 10]
    assert [each["dropped"] for each in values["candidates"]] == [each == 5 for each in steps]
    assert values["steps_full"] == 120
    assert values["cost_share"] <= 0.3
    assert "questions of facts" in values["knowledge"]
    assert "no probe trains on" in values["task"]


def test_the_plan_is_that_of_the_chosen_boundary(searched):
    values, plan = told(searched.path), Plan.load(searched.path / "plan.json")
    last = max(each["steps"] for each in values["candidates"])
    best = max((each for each in values["candidates"] if each["steps"] == last), key=lambda each: each["KT"])
    assert plan.boundary == values["chosen"] == best["boundary"]
    assert any(f"boundary {plan.boundary}" in note for note in plan.notes)
    assert dataclasses.replace(plan, notes=[]) == dataclasses.replace(
        room.make_plan(dataclasses.replace(searched.config.plan, boundary=plan.boundary), searched.survey()), notes=[]
    )


def test_nothing_large_is_left_behind(searched):
    assert not list(searched.path.rglob("checkpoint-*"))
    assert len(list((searched.path / "boundary" / "farss").glob("boundary-*.json"))) == 5


def test_a_finished_search_is_not_made_again(searched, monkeypatch):
    monkeypatch.setattr(room, "train", None)
    monkeypatch.setattr(room, "token_loglikelihoods", None)
    before = told(searched.path)
    (searched.path / "boundary.json").unlink()
    again = Run(searched.config)
    again.claim()
    assert again.boundary().chosen == before["chosen"]
    assert told(searched.path) == before
    assert again.plan().boundary == before["chosen"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("moments", [[3, 13, 24]])  # in the first probe, in the third, and in the last round
def test_killed_it_goes_on_and_makes_the_same_choice(searched, config, moments, monkeypatch):
    trained = []
    original = room.train

    def counted(model, tokenizer, rows, options, folder, **more):
        trained.append((folder.name, more["stop_at"]))
        assert more["cycles"] == 2, "the rate has fallen at the end of every round"
        return original(model, tokenizer, rows, options, folder, **more)

    def until(moment):
        def tell(step, done, total, line):
            if step == "boundary" and done == moment:
                raise Killed

        return tell

    monkeypatch.setattr(room, "train", counted)
    for moment in moments:
        run = Run(config, tell=until(moment))
        run.claim()
        with pytest.raises(Killed):
            run.boundary()
    run = Run(config)
    run.claim()
    run.boundary()
    assert told(run.path) == told(searched.path)
    assert len(trained) == 5 + len(moments)
    assert len(set(trained)) == 5


@pytest.mark.parametrize(("text", "key"), [("train.learning_rate=2e-2", "train.learning_rate"), ("boundary.probe=0.1", "boundary.probe")])
def test_a_search_with_other_options_is_refused(searched, text, key):
    with pytest.raises(FolderError, match=f"holds the step 'boundary-farss', made with {key}="):
        Run(override(searched.config, [text])).claim()


def test_a_trained_run_holds_to_how_it_was_searched_and_not_to_the_questions(searched, tmp_path):
    shutil.copytree(searched.path, tmp_path / "run")
    config = override(searched.config, [f"out={tmp_path / 'run'}"])
    with Run(config).folder.step("train", options_of(config, (*PLAN_KEYS, *TRAIN_KEYS))):
        (tmp_path / "run" / "train.json").write_text("{}")
    Run(override(config, ["evaluate.resamples=200"])).claim()
    with pytest.raises(FolderError, match=r"holds the step 'boundary-farss', made with boundary\.rate=4"):
        Run(override(config, ["boundary.rate=8"])).claim()


def test_a_changed_question_file_is_noticed(config, tmp_path, monkeypatch, caplog):
    file = tmp_path / "facts.jsonl"
    file.write_text(world.KNOWLEDGE.read_text())
    config = override(config, [f"evaluate.knowledge=[{{name: facts, data: {file}}}]"])
    monkeypatch.setattr(room, "train", None)
    run = Run(config)
    run.claim()
    with pytest.raises(TypeError):  # the search has begun, and there is nothing to train with
        run.boundary()
    key = (run.path / "boundary" / "farss" / "key.json").read_text()
    with pytest.raises(TypeError):
        Run(override(config, ["evaluate.resamples=300"])).boundary()  # no matter of the probes
    assert (run.path / "boundary" / "farss" / "key.json").read_text() == key
    assert not caplog.records
    file.write_text("\n".join(world.KNOWLEDGE.read_text().splitlines()[:-1]))
    with pytest.raises(TypeError):
        Run(config).boundary()
    assert "are of other options or questions: the search begins again" in caplog.text
    assert (run.path / "boundary" / "farss" / "key.json").read_text() != key  # it was begun anew
    with run.place.step("boundary-farss", run._boundary_options):
        pass
    file.write_text("\n".join(world.KNOWLEDGE.read_text().splitlines()[:-2]))
    with pytest.raises(FolderError, match=r"holds the step 'boundary-farss', made with content of evaluate\.knowledge="):
        Run(config).boundary()


def test_outcomes_of_other_questions_are_forgotten(config, monkeypatch):
    run = Run(config)
    run.claim()
    place = run.path / "boundary" / "farss"
    place.mkdir(parents=True)
    (place / "base.json").write_text("{}")  # a search that was killed before it kept what it asked
    monkeypatch.setattr(room, "train", None)
    with pytest.raises(TypeError):
        run.boundary()
    assert len(json.loads((place / "base.json").read_text())["task"]) == len(run.search_setting.task)


def test_a_failed_probe_names_the_rate_of_the_probes(config, monkeypatch):
    def fails(*_, **__):
        raise NumericalError("the loss is nan at training step 3")

    monkeypatch.setattr(room, "train", fails)
    run = Run(config)
    run.claim()
    with pytest.raises(NumericalError, match=r"boundary.rate=4 may be what is too high: the loss is nan"):
        run.boundary()
    again = Run(override(config, ["boundary.rate=2"]))
    again.claim()  # as the message recommends, in the same folder
    with pytest.raises(NumericalError, match=r"boundary.rate=2 may be what is too high"):
        again.boundary()


def test_a_number_or_another_schedule_needs_no_new_search(searched, monkeypatch):
    monkeypatch.setattr(room, "train", None)
    stamp = (searched.path / "plan.json").read_bytes()
    Run(override(searched.config, ["train.scheduler=cosine", "evaluate.task=[]"])).claim()
    fixed = Run(override(searched.config, ["plan.boundary=3"]))
    fixed.claim()
    assert fixed.plan().boundary == 3
    assert not any("search" in note for note in fixed.plan().notes)
    back = Run(searched.config)
    back.claim()
    back.plan()
    assert (searched.path / "plan.json").read_bytes() == stamp


def test_the_seeds_of_a_comparison_share_one_search(searched, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "train", None)
    other = override(searched.config, ["seed=1", f"out={tmp_path / 'farss-seed1'}"])
    run = Run(other, shared=searched.path, shared_config=searched.config)
    run.claim()
    assert run.plan().boundary == told(searched.path)["chosen"]
    assert told(run.path) == told(searched.path)


def test_a_method_without_a_boundary_searches_nothing(config, monkeypatch):
    monkeypatch.setattr(room, "train", None)
    run = Run(override(config, ["plan.method=lora"]))
    run.claim()
    assert run.plan().boundary is None
    with pytest.raises(ConfigError, match=r"plan\.method='lora' treats all blocks alike"):
        run.boundary()


def test_one_candidate_is_chosen_without_a_probe(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "train", None)
    folder = save_small("llama-gqa", tmp_path / "model", num_hidden_layers=2)
    run = Run(from_dict(settings(folder, tmp_path / "run")))
    run.claim()
    assert run.plan().boundary == 1
    assert Boundary.load(run.path / "boundary.json").candidates == []


# --- what is measured ------------------------------------------------------------------------------------------------


def test_no_probe_trains_on_what_it_is_scored_on(config):
    run = Run(config)
    setting = run.search_setting
    assert len(setting.task) + len(setting.train.rows) == 64
    assert not [row for row in setting.task if row in setting.train.rows]
    assert hold_out(run.inputs.examples.rows, 100, 1e9, 0)[0] != hold_out(run.inputs.examples.rows, 100, 1e9, 1)[0]
    assert len(hold_out(run.inputs.examples.rows, 100, 1e9, 0)[0]) == 64 // 5


def test_what_is_held_out_is_not_what_the_statistics_look_at():
    """Drawn with one seed they would be the same examples."""
    rows = examples(count=200)
    held, _ = hold_out(rows, 10**9, 1e9, 0)
    looked = choose(rows, len(held), 0)
    assert sum(row in looked for row in held) < 0.6 * len(held)


def test_questions_are_put_as_the_evaluation_puts_them_and_only_the_answer_counts(config):
    tokenizer = load_tokenizer(config.model)
    entry = config.evaluate.knowledge[0]
    for row in question_tokens(entry, "knowledge", config, tokenizer, 10):
        marked = [token for token, mark in zip(row["input_ids"], row["completion_mask"], strict=True) if mark]
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert text.startswith("Question: ")
        assert text.endswith(f"\nAnswer: {tokenizer.decode(marked).strip()}")
        assert tokenizer.eos_token_id not in row["input_ids"]
        assert row["input_ids"][0] == tokenizer.bos_token_id
    assert len(question_tokens(entry, "knowledge", config, tokenizer, 10)) == 10


def test_no_boundary_is_chosen_by_the_questions_that_judge_it(config):
    tokenizer = load_tokenizer(config.model)

    def asked(limit):
        notes = []
        wanted = override(config, [f"evaluate.knowledge=[{{name: facts, data: {world.KNOWLEDGE}, fewshot: 3, limit: {limit}}}]"])
        rows, _ = knowledge_rows(wanted, tokenizer, 1e9, notes)
        drawn = draw(wanted.evaluate.knowledge[0], question_rows(wanted.evaluate.knowledge[0]), wanted.seed)
        texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows["facts"]]
        return [text for text in texts if any(f"Question: {row['question']}\n" in text for row in (*drawn.asked, *drawn.shown))], notes

    both, notes = asked(100)
    assert (both, notes) == ([], [])
    few = override(config, ["boundary.questions=800"])
    assert len(knowledge_rows(few, tokenizer, 1e9, notes)[0]["facts"]) == 675
    assert notes.pop().startswith("K is measured on 675 questions of facts, of which 675 are asked")
    both, notes = asked(600)  # of 675: too few are left
    assert 0 < len(both) < config.boundary.questions
    assert notes[0].startswith(f"K is measured on {config.boundary.questions} questions of facts, of which {len(both)} are asked")


def test_without_questions_it_is_general_text_and_it_says_so(config):
    tokenizer = load_tokenizer(config.model)
    notes = []
    rows, words = knowledge_rows(override(config, ["evaluate.knowledge=[]"]), tokenizer, 500, notes)
    assert list(rows) == ["text"]
    assert words.endswith(f"rows of general text ({world.TEXT.name})")
    assert notes == ["No knowledge questions are given (evaluate.knowledge), so K is measured on general text."]
    assert all(row["completion_mask"] == [0] + [1] * (len(row["input_ids"]) - 1) for row in rows["text"])
    notes.clear()
    knowledge_rows(override(config, ["evaluate.knowledge=[triviaqa]"]), tokenizer, 500, notes)
    assert notes[0].startswith("K leaves out triviaqa: ")


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "gemma3"])
def test_likelihoods_are_those_of_each_row_by_itself(kind):
    model, rows = small(kind), examples(count=7)
    together = token_loglikelihoods(model, rows, 3, 0)
    for row, found in zip(rows, together, strict=True):
        logits = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        values = [logits[place - 1, row["input_ids"][place]].item() for place, mark in enumerate(row["completion_mask"]) if mark]
        assert found == pytest.approx(np.mean(values), abs=1e-9)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["evaluate.knowledge=[]", "evaluate.text=null"], "needs something to measure forgetting on: give a file of questions"),
        (["evaluate.knowledge=[triviaqa]", "evaluate.text=null"], "needs something to measure forgetting on"),
        (["data.limit=39"], "39 are too few for that: give 40 or more"),
        (["train.max_steps=10"], "30% of 10 training steps are too few"),
        (["plan.boundary=automatic"], "plan.boundary='automatic'"),
        (["boundary.probe=0"], "boundary.probe=0.0: give a share above 0"),
        (["boundary.budget=-1"], "boundary.budget=-1.0: give a share above 0"),
        (["boundary.questions=3"], "boundary.questions=3: give 8 or more"),
        (["plan.rank=99"], "plan.rank=99"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(config, tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        Run(override(config, changes)).all()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_library_asks_for_a_number():
    tokenizer = load_tokenizer(farss.config.ModelConfig(path=str(world.MODEL)))
    with pytest.raises(ConfigError, match="give the number that `farss boundary` chooses"):
        farss.prepare(
            small("llama"),
            tokenizer,
            [{"prompt": "a", "completion": "b"}],
            plan=farss.PlanConfig(boundary="auto", rank=8, r_avg=4, r_max=6),
        )


def test_the_budget_holds_on_every_size_of_run(config):
    run = Run(config)
    for steps in (60, 120, 1000, 6250):
        setting = prepare(override(config, [f"train.max_steps={steps}"]), run.inputs.examples, run.inputs.tokenizer, 32)
        assert setting.schedule.cost_share <= 0.3
        assert f"{setting.schedule.cost_share:.0%} of the training's {steps} steps" in setting.sentence


@pytest.mark.parametrize(("first", "last_rate"), [(12, 0.02), (3, 0.25), (2, 0.5)])
def test_every_round_ends_where_the_learning_rate_has_fallen(tmp_path, first, last_rate):
    rounds = [Round(5, first), Round(3, 2 * first), Round(2, 4 * first)]
    config = from_dict({"train": {"learning_rate": 1e-3, "batch_size": 2, "precision": "fp32", "logging_steps": 1}})
    model = small("llama-gqa").float().requires_grad_(True)
    tokenizer = load_tokenizer(farss.config.ModelConfig(path=str(world.MODEL)))
    done = train(model, tokenizer, Tokenized(examples(count=6)), probe_config(config, rounds), tmp_path, cycles=4)
    rates = [entry["learning_rate"] for entry in done.log]
    assert len(rates) == 4 * first
    assert rates[0] == max(rates) == pytest.approx(1e-3 * config.boundary.rate)
    assert [rates[each.steps - 1] / rates[0] for each in rounds] == pytest.approx([last_rate] * 3, rel=0.2)
