"""The table of a pruning."""

from farss.pruning.table import columns

LINE = {"name": "facts", "before": 0.4, "before_low": 0.3, "before_high": 0.5, "after": 0.2, "low": 0.1, "high": 0.3}
SPEED = {"dense": {"prompt": 100.0, "generation": 10.0}, "sleb": {"prompt": 130.0, "generation": 15.0}}


def test_the_whole_model_is_what_the_others_are_compared_with():
    dense = {"method": "dense", "deleted": [], "parameters": 4_000_000}
    pruned = {"method": "sleb", "deleted": [1, 2], "parameters": 2_000_000, "tokens_per_second": SPEED, "summary": {"benchmarks": [LINE]}}
    found = dict(columns([dense, pruned]))
    assert found["Deleted blocks"] == ["", "1, 2"]
    assert (found["Tokens/s, reading"], found["Tokens/s, writing"]) == (["", "130 (1.30x)"], ["", "15 (1.50x)"])
    assert [cell.split(" ")[0] for cell in found["facts %"]] == ["40.0", "20.0"]
