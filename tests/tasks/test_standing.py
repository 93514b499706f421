"""How methods stand to each other, against plain means of made-up records."""

import json

import numpy as np
import pytest

from farss.artifacts import Scores, TaskScore
from farss.config import Config, EvaluateConfig
from farss.maths.metrics import balance, bootstrap
from farss.tasks.outcomes import Outcomes
from farss.tasks.standing import Entry, _standing, differences, mean_scores, standings
from farss.tasks.summary import summarise

QUESTIONS = {"facts": ("knowledge", 40), "places": ("knowledge", 30), "intents": ("task", 50), "puzzles": ("other", 20)}


def records(name, count, skill, seed):
    generator = np.random.default_rng([seed, len(name)])
    return [
        {
            "id": place,
            "prompt": "?",
            "gold": ["a"],
            "answer": "",
            "score": float(generator.random() < skill),
            "gold_loglikelihood": float(generator.normal(skill * 3 - 5)),
        }
        for place in range(count)
    ]


@pytest.fixture
def asked(tmp_path):
    """Writes a run's answers; `skills` by benchmark."""

    def write(run, seed, **skills):
        found = {"knowledge": {}, "task": {}, "other": {}}
        for name, (kind, count) in QUESTIONS.items():
            rows = records(name, count, skills.get(name, 0.5), seed)
            path = tmp_path / run / "scores" / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(map(json.dumps, rows)))
            found[kind][name] = TaskScore(name, "exact_match", np.mean([row["score"] for row in rows]), count, 0, None, 0.0, "1")
        Scores(**found).save(tmp_path / run / "scores.json")
        return tmp_path / run

    return write


def drawing(resamples, **options):
    return Config(evaluate=EvaluateConfig(resamples=resamples, **options))


def both_right(base, after, name):
    """The share of the questions that both answer right."""
    pair = [[json.loads(line)["score"] for line in (each / "scores" / f"{name}.jsonl").read_text().splitlines()] for each in (base, after)]
    return np.mean(np.prod(pair, axis=0))


def mean(folder, name, key):
    return np.mean([json.loads(line)[key] for line in (folder / "scores" / f"{name}.jsonl").read_text().splitlines()])


@pytest.fixture
def runs(asked):
    base = asked("base", 0, facts=0.6, places=0.4, intents=0.1)
    full = asked("full", 1, facts=0.3, places=0.2, intents=0.9)
    groups = {
        name: [Entry(asked(f"{name}{seed}", 10 * place + seed, facts=kept, places=kept, intents=0.8), full, seed) for seed in range(2)]
        for place, (name, kept) in enumerate({"lora": 0.3, "farss": 0.6}.items(), 1)
    }
    return base, full, groups


def test_values_are_means_over_benchmarks_and_seeds(runs):
    base, full, groups = runs
    found = standings(base, groups, drawing(200))
    for name, group in groups.items():
        folders = [entry.folder for entry in group]
        ratios = [mean(each, task, "score") / mean(base, task, "score") for each in folders for task in ("facts", "places")]
        learned = [mean(each, "intents", "score") / mean(full, "intents", "score") for each in folders]
        nats = [
            mean(each, task, "gold_loglikelihood") - mean(base, task, "gold_loglikelihood")
            for each in folders
            for task in ("facts", "places")
        ]
        gained = [mean(each, "intents", "gold_loglikelihood") - mean(base, "intents", "gold_loglikelihood") for each in folders]
        still = [both_right(base, each, task) / mean(base, task, "score") for each in folders for task in ("facts", "places")]
        k, t = np.mean(ratios), np.mean(learned)
        expected = {
            "K": k,
            "T": t,
            "KT": 2 * k * t / (k + t),
            "retained": np.mean(still),
            "kept": np.mean(nats),
            "learned": np.mean(gained),
        }
        assert {metric: estimate.value for metric, estimate in found[name].estimates.items()} == pytest.approx(expected)
        for estimate in found[name].estimates.values():
            assert estimate.low < estimate.value < estimate.high
        alone = summarise(base, group[0].folder, full, drawing(200)).retained
        assert alone.value == pytest.approx(found[name].of_seed["retained"][0])
        assert alone.low < alone.value < alone.high


def test_an_interval_holds_the_chance_of_few_seeds():
    """Where only the seeds differ, 95 % of the intervals over two or three of them hold the truth."""
    generator = np.random.default_rng(0)
    for seeds in (2, 3, 5):
        held, tries = 0, 400
        for _ in range(tries):
            estimate = by_seed({"one": generator.normal(size=seeds)})["one"].estimates["kept"]
            held += estimate.low <= 0 <= estimate.high
        assert 0.91 < held / tries < 0.99


def by_seed(values):
    """Methods of which the seeds' values are known, [seeds] each, and to which the questions add nothing."""
    return {name: _standing(name, {"kept": np.tile(each, (401, 1))}, range(len(each))) for name, each in values.items()}


def test_methods_that_share_their_seeds_are_told_apart_by_pairs():
    """What a seed does to all methods is no difference between them. Equal ones differ in 5 % of all cases, and a difference that is
    larger than its own chance is found where either method's own spread would hide it."""
    generator = np.random.default_rng(0)
    for gap, least, most in ((0.0, 0.02, 0.08), (1.5, 0.6, 1.0)):
        differ, tries = 0, 400
        for _ in range(tries):
            of_seed = generator.normal(size=3)
            values = {"one": of_seed + 0.3 * generator.normal(size=3), "other": of_seed + gap + 0.3 * generator.normal(size=3)}
            differ += differences(by_seed(values))[0]["p_value"] < 0.05
        assert least <= differ / tries <= most


def test_of_many_equal_methods_none_is_ahead():
    """With sixteen methods that are alike, no p-value is below 0.05 in 95 % of all tables, though the best other is chosen by the data:
    neither by the chance of the questions, nor by that of two or three seeds."""
    generator = np.random.default_rng(0)
    names, tries = [f"method{place}" for place in range(16)], 100
    for seeds in (1, 2, 3):
        found = 0
        for _ in range(tries):
            if seeds > 1:
                alike = by_seed({name: generator.normal(size=seeds) for name in names})
            else:
                outcomes = generator.normal(size=(16, 200))
                drawn = np.concatenate([outcomes.mean(axis=1)[None], bootstrap([outcomes], 400, int(generator.integers(1 << 30)))[0]])
                alike = {name: _standing(name, {"kept": drawn[:, place, None]}, [0]) for place, name in enumerate(names)}
            found += any(row["p_value"] < 0.05 for row in differences(alike, reference="method0"))
        assert found / tries <= 0.15, seeds  # two families: against the reference, and all pairs


def test_of_many_methods_a_clear_lead_is_found():
    """Two or three seeds of one pair alone could not show it: the scatter is that of all methods."""
    generator = np.random.default_rng(0)
    names, tries = [f"method{place}" for place in range(8)], 60
    found = 0
    for _ in range(tries):
        values = {name: generator.normal(size=3) + 6 * (name == "method3") for name in names}
        rows = {(row["method"], row["against"]): row for row in differences(by_seed(values), reference="method0")}
        found += all(row["p_value"] < 0.05 for (method, _), row in rows.items() if method == "method3")
    assert found / tries >= 0.8


def test_the_chance_of_a_difference_is_that_of_an_analysis_of_variance():
    """Methods by seeds: the residual mean square, with its degrees of freedom."""
    values = {"one": np.array([0.1, 0.5, 0.3]), "two": np.array([0.2, 0.7, 0.3]), "three": np.array([0.9, 1.1, 1.3])}
    table = np.stack([*values.values()])
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    half = 2.776 * np.sqrt((rest**2).sum() / 4) * np.sqrt(2 / 3)  # Student's t of four degrees
    for row in differences(by_seed(values), reference="one"):
        assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.02)
    shifted = {name: each + np.array([7.0, 0.0, -3.0]) for name, each in values.items()}  # by what a seed does to all
    for row, other in zip(*(differences(by_seed(each), reference="one") for each in (values, shifted)), strict=True):
        assert row["p_value"] == pytest.approx(other["p_value"], abs=0.01)


def test_a_single_seed_has_the_scatter_of_the_others():
    """Of another method with more, where there is one: its own mean is no surer for having one run."""
    found = by_seed({"one": np.array([0.0, 1.0, 2.0]), "other": np.array([1.5])})
    row = differences(found)[0]
    assert row["high"] - row["low"] == pytest.approx(2 * 4.303 * np.sqrt(1 / 3 + 1), rel=0.03)


def test_what_is_right_in_part_is_still_right_in_part():
    halves = Outcomes(None, "knowledge", np.array([[0.4, 1.0, 0.0], [0.5, 0.5, 1.0]]), np.empty((2, 3)))
    assert halves.still.tolist() == [[0.4, 1.0, 0.0], [0.4, 0.5, 0.0]]


def test_benchmarks_have_the_chance_of_questions_and_seeds(runs):
    base, _, groups = runs
    found = standings(base, groups, drawing(400))
    for name, group in groups.items():
        assert set(found[name].benchmarks) == set(QUESTIONS)
        for task, estimate in found[name].benchmarks.items():
            alone = [standings(base, {name: [entry]}, drawing(400))[name].benchmarks[task] for entry in group]
            assert estimate.value == pytest.approx(np.mean([mean(entry.folder, task, "score") for entry in group]))
            spread = abs(alone[0].value - alone[1].value) / 2
            assert estimate.high - estimate.low >= 0.9 * min(2, spread + np.mean([each.high - each.low for each in alone]) / np.sqrt(2))


def test_no_interval_depends_on_what_stands_beside_it(runs):
    base, _, groups = runs
    alone, both = (standings(base, chosen, drawing(200)) for chosen in ({"farss": groups["farss"]}, groups))
    assert alone["farss"].estimates == both["farss"].estimates


def test_equal_seeds_have_equal_intervals():
    """The chance of the seeds is known, and not drawn: names and places in a table change no interval."""
    values = {name: np.array([0.4, 0.6]) for name in ("farss", "lora", "dora")}
    found = {name: standing.estimates["kept"] for name, standing in by_seed(values).items()}
    assert found["farss"] == found["lora"] == found["dora"]
    assert found["farss"].high == pytest.approx(0.5 + 12.706 * 0.1, rel=0.05)


def test_a_share_is_no_more_than_all():
    found = _standing("farss", {"retained": np.array([[0.9, 0.7], *[[0.9, 0.7]] * 200])}, [0, 1])
    assert found.estimates["retained"].high == 1.0
    assert found.estimates["retained"].low < 0.7


def test_methods_with_other_seeds_are_compared_all_the_same():
    found = by_seed({"one": np.array([0.0, 0.1, 0.2]), "other": np.array([5.0, 5.1])})
    row = differences(found)[0]
    assert (row["method"], row["value"]) == ("one", pytest.approx(-4.95))
    assert row["low"] < -4.95 < row["high"] < 0


def test_what_is_drawn_of_knowledge_says_nothing_of_what_is_drawn_of_the_task(asked, monkeypatch):
    """As many riddles as intents, with the same outcomes: drawn alike, K and T would rise and fall together, and KT would seem less sure
    than it is."""
    monkeypatch.setitem(QUESTIONS, "riddles", ("knowledge", QUESTIONS["intents"][1]))
    for name in ("facts", "places"):
        monkeypatch.delitem(QUESTIONS, name)
    base, full = (asked(name, 0, riddles=1.0, intents=1.0) for name in ("base", "full"))
    found = standings(base, {"run": [Entry(asked("run", 5), full)]}, drawing(2000))["run"]
    assert found.estimates["K"].value == found.estimates["T"].value
    assert abs(np.corrcoef(found.draws["K"], found.draws["T"])[0, 1]) < 0.1


def test_one_seed_has_the_chance_of_the_questions_alone(runs):
    base, _, groups = runs
    one = {"lora": groups["lora"][:1]}
    estimate = standings(base, one, drawing(400))["lora"].estimates["kept"]
    summary = [line for line in summarise(base, groups["lora"][0].folder, None, Config()).benchmarks if line.kind == "knowledge"]
    spread = np.mean([line.gold_change.high - line.gold_change.low for line in summary]) / np.sqrt(2)
    assert estimate.high - estimate.low == pytest.approx(spread, rel=0.3)


def test_t_may_be_made_of_likelihoods(runs):
    """The share of what full fine-tuning gained in nats, with K as it is; the same as a run's own summary says."""
    base, full, groups = runs
    config, scored = drawing(200, learned_by="likelihood"), standings(base, groups, drawing(200))
    gain = mean(full, "intents", "gold_loglikelihood") - mean(base, "intents", "gold_loglikelihood")
    for name, standing in standings(base, groups, config).items():
        found = standing.estimates
        assert found["T"].value == pytest.approx(found["learned"].value / gain)
        assert found["K"] == scored[name].estimates["K"]
        assert found["KT"].value == pytest.approx(balance(found["K"].value, found["T"].value))
        for entry in groups[name]:
            summary = summarise(base, entry.folder, entry.full, config)
            assert summary.T.value == pytest.approx(standing.of_seed["T"][entry.seed])
            assert summary.T.low < summary.T.value < summary.T.high
            assert summary.learned_by == "likelihood"
            assert "evaluate.learned_by" in summary.notes[0]


def test_no_t_where_full_fine_tuning_gained_nothing(runs):
    base, _, groups = runs
    config = drawing(200, learned_by="likelihood")
    alike = {"lora": [Entry(groups["lora"][0].folder, base)]}
    assert set(standings(base, alike, config)["lora"].estimates) == {"K", "retained", "kept", "learned"}
    summary = summarise(base, groups["lora"][0].folder, base, config)
    assert summary.T is summary.KT is None
    assert "full fine-tuning made the right answers of 'intents' no likelier" in summary.notes[0]


def test_who_lost_likelihood_learned_nothing(asked):
    base, full = asked("base", 0, intents=0.4), asked("full", 1, intents=0.9)
    worse = {"lora": [Entry(asked("worse", 2, intents=0.0), full)]}
    found = standings(base, worse, drawing(200, learned_by="likelihood"))["lora"].estimates
    assert found["learned"].value < 0
    assert (found["T"].value, found["KT"].value) == (0.0, 0.0)


def test_nats_need_no_full_fine_tuning(runs):
    base, _, groups = runs
    alone = {name: [Entry(entry.folder, None) for entry in group] for name, group in groups.items()}
    assert {name: set(standing.estimates) for name, standing in standings(base, alone, drawing(200)).items()} == {
        name: {"K", "retained", "kept", "learned"} for name in groups
    }


def test_k_is_there_where_full_fine_tuning_was_asked_the_task_alone(runs):
    base, full, groups = runs
    expected = standings(base, groups, drawing(200))
    Scores({}, Scores.load(full / "scores.json").task).save(full / "scores.json")
    assert standings(base, groups, drawing(200))["lora"].estimates == expected["lora"].estimates


def test_there_is_no_t_of_fewer_questions_than_were_asked(runs):
    """A reference that was not asked every task is none, and takes no benchmark away from the others."""
    base, full, groups = runs
    Scores(Scores.load(full / "scores.json").knowledge, {}).save(full / "scores.json")
    alone = {name: [Entry(entry.folder, None, entry.seed) for entry in group] for name, group in groups.items()}
    found, expected = (standings(base, each, drawing(200)) for each in (groups, alone))
    assert {name: each.estimates for name, each in found.items()} == {name: each.estimates for name, each in expected.items()}
    assert set(found["lora"].benchmarks) == set(expected["lora"].benchmarks) >= {"intents"}


def test_some_questions_alone_may_count(runs):
    base, _, groups = runs
    few = standings(base, groups, drawing(200), lambda key: int(key) < 10)["lora"].estimates["kept"].value
    rows = {}
    for folder in (base, *(entry.folder for entry in groups["lora"])):
        for task in ("facts", "places"):
            lines = (folder / "scores" / f"{task}.jsonl").read_text().splitlines()[:10]
            rows[folder, task] = np.mean([json.loads(line)["gold_loglikelihood"] for line in lines])
    changes = [rows[entry.folder, task] - rows[base, task] for entry in groups["lora"] for task in ("facts", "places")]
    assert few == pytest.approx(np.mean(changes))


def test_scores_are_those_of_the_questions_that_count(runs):
    base, _, _ = runs
    assert mean_scores(base)["facts"] == pytest.approx(mean(base, "facts", "score"))
    few = mean_scores(base, lambda key: int(key) < 10)
    lines = [json.loads(line) for line in (base / "scores" / "facts.jsonl").read_text().splitlines()[:10]]
    assert few["facts"] == pytest.approx(np.mean([line["score"] for line in lines]))
    assert set(few) == set(QUESTIONS)


def test_differences_are_paired(runs):
    base, _, groups = runs
    found = standings(base, groups, drawing(400))
    rows = {(row["method"], row["metric"]): row for row in differences(found)}
    assert set(rows) == {(name, metric) for name in groups for metric in ("K", "T", "KT", "retained", "kept", "learned")}
    row = rows["farss", "kept"]
    assert row["value"] == pytest.approx(found["farss"].estimates["kept"].value - found["lora"].estimates["kept"].value)
    assert row["low"] < row["value"] < row["high"]
    assert rows["lora", "kept"]["value"] == pytest.approx(-row["value"])
    same = {"one": groups["lora"], "two": groups["lora"]}
    equal = {row["metric"]: row for row in differences(standings(base, same, drawing(400)), reference="one") if row["method"] == "two"}
    assert all(row["value"] == pytest.approx(0) and row["low"] <= 0 <= row["high"] for row in equal.values())
