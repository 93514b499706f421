"""The README's first command, whole."""

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from farss import world
from farss.cli import app


@pytest.mark.slow
def test_demo(tmp_path):
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "--out", str(out)])
    assert result.exit_code == 0, result.output[-2000:]
    comparison = json.loads((out / "comparison.json").read_text())
    rows = {row["method"]: row for row in comparison["rows"]}
    assert set(rows) == {"farss", "farss-plus", "lora", "full"}
    assert comparison["base"]["world_facts"] >= 0.95
    assert comparison["base"]["letter_seals"] <= 0.05
    for row in rows.values():
        assert row["T"]["low"] <= row["T"]["value"] <= row["T"]["high"]
        assert row["benchmarks"]["letter_seals"]["score"] > 0.5  # each learned; who kept most is for the table to say
        assert row["seconds_train"] > 0
    assert rows["farss"]["parameters"] == pytest.approx(rows["lora"]["parameters"], rel=0.05)
    assert "KT %" in result.output
    assert (out / "report.html").is_file()
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.MODEL), str(out / "farss-seed0" / "adapter"))
    assert adapter.peft_config["default"].r == adapter.peft_config["default"].lora_alpha
