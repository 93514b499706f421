"""What of a configuration a step depends on."""

from farss import options
from farss.config import Config
from farss.configfile import override
from farss.options import DATA_KEYS, OF_NO_STEP, difference, options_of


def test_every_option_is_of_a_step_or_of_none():
    """An option that nobody thought of would change a result, and its folder would not notice."""
    parts = ("DATA_KEYS", "SURVEY_KEYS", "_LAYER_KEYS", "_TASK_KEYS", "TABLE_KEYS")  # of others
    known = [value for name, value in vars(options).items() if name.endswith("_KEYS") and name not in parts]
    tuples = [keys for value in known for keys in (value.values() if isinstance(value, dict) else [value])]
    of_steps = {key for keys in tuples for key in options_of(Config(), keys)}
    sections = tuple(vars(Config()))
    assert of_steps.isdisjoint(OF_NO_STEP)
    assert of_steps | set(OF_NO_STEP) == set(options_of(Config(), sections))


def test_shallow_ranks_are_the_same_plan_whether_they_are_named_or_not(config):
    named, unnamed = (
        options_of(override(config, ["plan.rank=16", f"plan.r_avg={average}", f"plan.r_max={largest}"]), ("plan",))
        for average, largest in ((6, 8), ("null", "null"))
    )
    assert named == unnamed
    assert (named["plan.r_avg"], named["plan.r_max"]) == (6, 8)


def test_a_difference_is_named_with_both_values_and_what_is_gone_differs_in_nothing():
    recorded = {"seed": 0, "data.train": "a.jsonl", "content of data.train": "1234", "long.gone": 3}
    assert difference(recorded, {"seed": 0, "data.train": "a.jsonl", "content of data.train": "1234"}) is None
    assert difference(recorded, {"seed": 1, "data.train": "b.jsonl"}) == ("seed", 0, 1)
    assert difference(recorded, {"data.train": "a.jsonl", "content of data.train": "5678"}) == ("content of data.train", "1234", "5678")
    assert difference(recorded, {"data.train": "a.jsonl", "content of data.train": None}) is None  # the file is gone
    two = {"content of evaluate.knowledge": [None, "1234"]}  # the first is on a hub
    assert difference(two, {"content of evaluate.knowledge": [None, "1234"]}) is None
    assert difference(two, {"content of evaluate.knowledge": [None, None]}) is None
    assert difference(two, {"content of evaluate.knowledge": [None, "5678"]}) is not None
    assert difference(recorded, {"seed": 0, "train.epochs": 1.0}) is None  # younger than the record, and the default
    assert difference(recorded, {"seed": 0, "train.epochs": 2.0}) == ("train.epochs", 1.0, 2.0)


def test_a_chat_template_that_was_changed_is_another_option(config, tmp_path):
    """It decides what an example's tokens are, and no option names it."""
    chats = override(config, [f"model.path={tmp_path}", "data.template=chat"])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    before = options_of(chats, DATA_KEYS)
    assert difference(before, options_of(chats, DATA_KEYS)) is None
    assert difference({key: value for key, value in before.items() if key != "content of data.template"}, before) is None  # an older folder
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    key, then, now = difference(before, options_of(chats, DATA_KEYS))
    assert (key, then[0]) == ("content of data.template", None)
    assert now[0] != then[0]
    assert "content of data.template" not in options_of(override(chats, ["data.template=alpaca"]), DATA_KEYS)
