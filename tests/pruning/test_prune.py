"""`farss prune`, from a model folder to smaller ones."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import settings
from small_models import save_small
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from farss import world
from farss.cli import app
from farss.config import PruneConfig
from farss.configfile import from_dict, override
from farss.errors import ConfigError, DataError, FolderError, ModelError
from farss.folder import resolve
from farss.pruning import RECIPES, prune
from farss.pruning.measure import perplexity, windows
from farss.pruning.prune import Pruning


def silent(*_):
    pass


@pytest.fixture
def pruning(config):
    """A small model of four blocks, two of which may go."""
    options = [
        "prune.ratio=0.5",
        "prune.sequences=8",
        "prune.length=24",
        "prune.gate_steps=3",
        "prune.shift=0.1",
        "prune.keep_first=1",
        "prune.keep_last=1",
    ]
    return override(config, [f"prune.text={world.TEXT}", "train.max_steps=4", *options])


def read(folder):
    return json.loads((folder / "pruning.json").read_text())


def test_every_method_gives_a_model_and_a_row(pruning):
    config = override(pruning, [f"prune.methods=[{', '.join(RECIPES)}]"])
    folder = prune(config, silent)
    dense, *rows = read(folder)["rows"]
    assert [row["method"] for row in rows] == list(RECIPES)
    assert dense["deleted"] == []
    for row in rows:
        assert row["deleted"] == [1, 2]
        model = AutoModelForCausalLM.from_pretrained(folder / row["method"] / "model")
        assert model.config.num_hidden_layers == 2
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters()) < dense["parameters"]
        assert row["perplexity"] > 1
        assert set(row["tokens_per_second"]) == {"dense", row["method"]}
        assert [each["name"] for each in row["summary"]["benchmarks"]] == ["facts", "seals"]
        assert not (folder / row["method"] / "checkpoints").exists()
        assert "of its base's 4 blocks these are deleted: 1, 2" in (folder / row["method"] / "model" / "README.md").read_text()
    known = {row["method"]: row for row in rows}
    change = known["trsp"]["relative_change"]
    assert all(change["after"][index] < change["before"][index] for index in ("1", "2"))
    assert known["trsp"]["perplexity"] != known["trsp-no-penalty"]["perplexity"] != known["delete-first"]["perplexity"]
    assert len({known[name]["perplexity"] for name in ("random", "shortgpt", "sleb", "trsp-stage-1")}) == 1  # the same two blocks
    rounds = json.loads((folder / "chosen" / "scalars.json").read_text())["rounds"]
    assert [len(each["scalars"]) for each in rounds] == [4, 3]
    table = (folder / "pruning.md").read_text()
    assert all(f"| {name} |" in table for name in ("dense", *RECIPES))


def test_nothing_is_done_twice_and_a_killed_pruning_goes_on_to_the_same_model(pruning, tmp_path):
    class Stop(Exception):
        pass

    def stop_at(step, place):
        def tell(name, done, total, line):
            if name == step and done == place:
                raise Stop

        return tell

    for step, place in (("stage 1, block 2 of 2", 2), ("trsp, stage 2", 3), ("speed of trsp", 1)):
        with pytest.raises(Stop):
            prune(pruning, stop_at(step, place))
    folder = prune(pruning, silent)
    other = prune(replace(pruning, out=str(tmp_path / "other")), silent)
    one, two = (AutoModelForCausalLM.from_pretrained(each / "trsp" / "model").state_dict() for each in (folder, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    told = []
    prune(pruning, lambda *line: told.append(line))
    assert not told


def test_what_the_table_will_lack_is_told_first(pruning, caplog):
    for text, message in (
        (world.TEXT, "perplexity will be that of text by which the blocks were chosen"),
        ("", "Perplexity will be missing"),
    ):
        Pruning(resolve(override(pruning, [f"evaluate.text={text}"])), silent).check()
        assert message in caplog.messages[-1]


def test_the_same_choice_serves_every_method_and_another_one_is_refused(pruning):
    folder = prune(override(pruning, ["prune.methods=[trsp-stage-1]"]), silent)
    chosen = (folder / "chosen" / "scalars.json").stat().st_mtime_ns
    prune(override(pruning, ["prune.methods=[delete-first]"]), silent)
    assert (folder / "chosen" / "scalars.json").stat().st_mtime_ns == chosen
    with pytest.raises(FolderError, match=r"made with prune.gate_rate=0.01, and now prune.gate_rate=0.02"):
        prune(override(pruning, ["prune.methods=[trsp-stage-1]", "prune.gate_rate=0.02"]), silent)


def test_scalars_on_whole_outputs_are_not_asked_about_the_ends(config):
    def may(blocks, **options):
        work = Pruning(replace(config, prune=PruneConfig(**options)), silent)
        work.__dict__["inputs"] = type("Inputs", (), {"architecture": None})
        type(work).blocks = property(lambda self: blocks)
        return work.may

    before = Pruning.blocks
    try:
        assert may(32) == list(range(3, 28))
        assert may(32, gate="branch") == list(range(32))
        assert may(32, keep_first=1, keep_last=0) == list(range(1, 32))
        assert may(18) == list(range(2, 16))
    finally:
        Pruning.blocks = before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["prune.text="], ConfigError, "prune.text is not given"),
        (["prune.methods=[trps]"], ConfigError, "did you mean 'trsp'"),
        (["prune.ratio=0.9"], ConfigError, r"of 4 blocks are 4, and 2 may be deleted: choose a ratio between 0.25 and 0.5"),
        (["prune.ratio=0.1"], ConfigError, "of 4 blocks are 0"),
        (["model.quantization=nf4"], ConfigError, "set model.quantization=none"),
        (["prune.length=100000"], DataError, r"fewer than a window of prune.length=100000"),
        (["prune.text=none.jsonl"], DataError, "none.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is(pruning, options, error, message):
    with pytest.raises(error, match=message):
        prune(override(pruning, options), silent)
    assert not Path(pruning.out).exists()


def test_an_architecture_that_goes_by_places_is_refused_before_anything_is_done(pruning, tmp_path):
    folder = save_small("jamba", tmp_path / "jamba")
    with pytest.raises(ModelError, match="cannot be deleted"):
        prune(override(pruning, [f"model.path={folder}"]), silent)
    assert not Path(pruning.out).exists()


def test_a_pruned_model_is_a_model_to_prune_and_to_fine_tune(pruning, tmp_path):
    folder = prune(override(pruning, ["prune.methods=[shortgpt]", "prune.ratio=0.25"]), silent)
    again = [f"model.path={folder / 'shortgpt' / 'model'}", f"out={tmp_path / 'again'}", "prune.ratio=0.34"]
    smaller = prune(override(pruning, ["prune.methods=[random]", *again]), silent)
    assert read(smaller)["rows"][1]["deleted"] == [1]
    assert AutoModelForCausalLM.from_pretrained(smaller / "random" / "model").config.num_hidden_layers == 2


def test_windows_are_equally_long_and_begin_as_texts_do(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    texts = [json.loads(line)["text"] for line in Path(world.TEXT).read_text().splitlines()[:40]]
    rows = windows(texts, tokenizer, 16, 10**6, 0, "texts")
    assert {len(row["input_ids"]) for row in rows} == {16}
    assert {sum(row["completion_mask"]) for row in rows} == {15}
    begin = tokenizer("a").input_ids[: len(tokenizer("a").input_ids) - len(tokenizer("a", add_special_tokens=False).input_ids)]
    whole = tokenizer("\n\n".join(texts), add_special_tokens=False).input_ids
    size = 16 - len(begin)
    assert len(rows) == len(whole) // size
    assert [token for row in rows for token in row["input_ids"][len(begin) :]] == whole[: len(rows) * size]
    assert len(windows(texts, tokenizer, 16, 3, 0, "texts")) == 3


def test_perplexity_is_that_of_plain_transformers(model_folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    texts = [json.loads(line)["text"] for line in Path(world.TEXT).read_text().splitlines()[:20]]
    rows = windows(texts, tokenizer, 16, 10**6, 0, "texts")
    ids = torch.tensor([row["input_ids"] for row in rows])
    expected = math.exp(model(input_ids=ids, labels=ids).loss.item())
    assert perplexity(model, rows, 4, 0, silent) == pytest.approx(expected, rel=1e-4)


def test_the_command(model_folder, tmp_path):
    values = settings(model_folder, tmp_path / "run")
    values["prune"] = {"text": str(world.TEXT), "sequences": 4, "length": 16, "keep_first": 0, "keep_last": 0}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["prune", str(tmp_path / "run.yaml"), "--methods", "random", "--ratio", "0.25"])
    assert result.exit_code == 0, result.output
    assert "Deleted blocks" in result.output
    assert from_dict(values).out in result.output.replace("\n", "")
    assert (tmp_path / "run" / "pruned" / "random" / "model" / "config.json").is_file()
