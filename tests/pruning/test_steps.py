"""`farss prune`, from a model folder to smaller ones."""

import json
import math
import shutil
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
from farss.data import text_windows
from farss.errors import ConfigError, DataError, FolderError, ModelError, NumericalError
from farss.folder import Folder, resolve
from farss.models import load_model
from farss.pipeline import Run
from farss.pruning import RECIPES, prune
from farss.pruning.choose import greedy
from farss.pruning.measure import perplexity
from farss.pruning.stages import choose_by_scalars
from farss.pruning.steps import Pruning
from farss.structure import find_blocks


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


def test_only_scalars_on_whole_outputs_are_not_asked_about_the_ends(config):
    def may(blocks, rule="scalars", **options):
        work = Pruning(replace(config, prune=PruneConfig(**options)), silent)
        work.__dict__["blocks"] = blocks
        return work.may(rule)

    assert may(32, gate="output") == list(range(3, 28))
    assert may(18, gate="output") == list(range(2, 16))
    assert may(4, gate="output") == [1, 2]  # one at each end at least
    assert may(32) == may(32, gate="branch") == may(32, "shortgpt") == may(32, "sleb") == may(32, "random") == list(range(32))
    assert may(32, gate="output", keep_first=1, keep_last=0) == may(32, "shortgpt", keep_first=1, keep_last=0) == list(range(1, 32))


@pytest.fixture
def useless(model_folder, tmp_path):
    """A model of six blocks, of which 1 and 4 add next to nothing: 4 is 3 when 1 is gone."""
    folder = save_small("llama", tmp_path / "useless", num_hidden_layers=6)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for index in (1, 4):
        for linear in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
            linear.weight.data *= 1e-3
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["shortgpt", "trsp-stage-1"])
def test_blocks_that_do_nothing_are_the_ones_that_go(useless, pruning, method):
    """With a gate on the branch their scalars fall as the sparsity wants it, and the loss moves the others."""
    options = [
        f"model.path={useless}",
        "prune.keep_first=0",
        "prune.keep_last=0",
        "prune.ratio=0.34",
        "prune.gate=branch",
        "prune.gate_steps=12",
    ]
    folder = prune(override(pruning, [*options, f"prune.methods=[{method}]"]), silent)
    assert read(folder)["rows"][1]["deleted"] == [1, 4]
    base = AutoModelForCausalLM.from_pretrained(useless)
    found = AutoModelForCausalLM.from_pretrained(folder / method / "model")
    for place, index in enumerate((0, 2, 3, 5)):
        assert torch.equal(found.model.layers[place].mlp.up_proj.weight, base.model.layers[index].mlp.up_proj.weight)


def test_each_round_learns_the_scalars_of_the_blocks_that_are_left(useless, pruning, tmp_path, monkeypatch):
    work = Pruning(resolve(override(pruning, [f"model.path={useless}", "prune.gate=branch"])), silent)
    base = AutoModelForCausalLM.from_pretrained(useless)
    known = {float(block.mlp.up_proj.weight.double().sum()): index for index, block in enumerate(base.model.layers)}
    seen = []

    def learn(model, *_, regime, **__):
        seen.append([known[float(block.mlp.up_proj.weight.double().sum())] for block in find_blocks(model)[1]])
        (tmp_path / "place" / str(len(seen) - 1)).mkdir(parents=True)
        regime.values[1].data.fill_(0.5)  # of the second of those that are left

    monkeypatch.setattr("farss.pruning.stages.train", learn)
    found = choose_by_scalars(work.config, work.tokenizer, work.rows, range(6), 3, tmp_path / "place", silent)
    assert found["blocks"] == [1, 2, 3]
    assert seen == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 3, 4, 5]]


def test_random_blocks_are_drawn_with_the_seed(useless, pruning):
    options = [f"model.path={useless}", "prune.keep_first=0", "prune.keep_last=0", "prune.ratio=0.5"]
    drawn = [
        Pruning(resolve(override(pruning, [*options, f"seed={seed}", f"out={pruning.out}-{place}"])), silent).chosen("random")
        for place, seed in enumerate((0, 0, 1, 2))
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(sorted(each)) for each in drawn}) > 1


def test_what_only_deletes_is_made_where_nothing_is_computed(pruning, monkeypatch):
    """A GPU has room for one model, and what was written is read back beside it."""
    loaded = []

    def load(config, dtype=None, device=None, **options):
        loaded.append(device)
        return load_model(config, dtype, device, **options)

    monkeypatch.setattr("farss.pruning.steps.load_model", load)
    monkeypatch.setattr("farss.pruning.surgery.load_model", load)
    prune(override(pruning, ["prune.methods=[random]"]), silent)
    assert [device.type for device in loaded if device] == ["cpu", "cpu"]  # to be shortened, and read back


def test_without_room_for_both_each_model_is_timed_alone(pruning, monkeypatch):
    import weakref

    held, timed = [], []

    def load(*arguments, **options):
        model = load_model(*arguments, **options)
        held.append(weakref.ref(model))
        return model

    def measure(models, tell):
        timed.append([*models])
        return {name: {"prompt": 1.0, "generation": 1.0} for name in models}

    class OnGpu:
        device = torch.device("cuda")

        def to(self, device):
            assert device == "cpu"

    monkeypatch.setattr("farss.pruning.steps.load_model", load)
    monkeypatch.setattr("farss.pruning.steps.speeds", measure)
    monkeypatch.setattr("farss.pruning.steps.tensors_of", lambda model: [])
    for room, expected in ((True, [["dense", "random"]]), (False, [["random"], ["dense"]])):
        monkeypatch.setattr("farss.pruning.steps.fits_beside", lambda tensors, gpu, room=room: room)
        timed.clear()
        assert set(Pruning(resolve(pruning), silent)._speeds("random", OnGpu())) == {"dense", "random"}
        assert timed == expected


def test_sleb_chooses_by_the_windows_of_the_text(pruning, tmp_path):
    work = Pruning(resolve(override(pruning, ["prune.keep_first=0", "prune.keep_last=0"])), silent)
    model = AutoModelForCausalLM.from_pretrained(work.config.model.path)
    rounds = greedy(model, work.rows, range(4), 2, 4, 0, tmp_path / "rounds.json", silent)
    assert work.chosen("sleb") == [each["block"] for each in rounds]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["prune.text="], ConfigError, "prune.text is not given"),
        (["prune.methods=[trps]"], ConfigError, "did you mean 'trsp'"),
        (["prune.ratio=0.9"], ConfigError, r"of 4 blocks are 4, and 2 may be deleted: choose a ratio between 0.25 and 0.5"),
        (["prune.ratio=0.1"], ConfigError, "of 4 blocks are 0"),
        (["model.quantization=nf4"], ConfigError, "set model.quantization=none"),
        (["prune.length=100000"], DataError, r"does not fill a window of prune.length=100000 tokens"),
        (["evaluate.other=[no_such_task]"], ConfigError, "no_such_task"),
        (["prune.text=none.jsonl"], DataError, "none.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is(pruning, options, error, message):
    with pytest.raises(error, match=message):
        prune(override(pruning, options), silent)
    assert not list(Path(pruning.out).rglob("model"))


def test_a_window_that_a_model_has_no_positions_for_is_refused(pruning, tmp_path):
    folder = save_small("gpt2", tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"prune.length=300, and the model knows 256 positions: set prune.length=256"):
        prune(override(pruning, [f"model.path={folder}", "prune.length=300"]), silent)


def test_a_run_and_a_pruning_do_not_share_a_folder(pruning, tmp_path):
    Run(pruning).claim(trains=False)
    Run(pruning).plan()
    with pytest.raises(FolderError, match="holds a run or a comparison, and this is a pruning: choose another out"):
        prune(pruning, silent)
    other = replace(pruning, out=str(tmp_path / "other"), prune=replace(pruning.prune, methods=["random"]))
    before = (prune(other, silent) / "config.yaml").read_text()
    with pytest.raises(FolderError, match="holds a pruning, and this is a run or a comparison: choose another out"):
        Run(override(other, ["train.learning_rate=1"])).claim()
    assert (tmp_path / "other" / "config.yaml").read_text() == before


def test_the_table_keeps_what_was_made_before(pruning):
    for method in ("random", "shortgpt"):
        folder = prune(override(pruning, [f"prune.methods=[{method}]"]), silent)
    assert [row["method"] for row in read(folder)["rows"]] == ["dense", "random", "shortgpt"]
    shutil.rmtree(folder / "random" / "model")
    prune(override(pruning, ["prune.methods=[random]"]), silent)
    assert (folder / "random" / "model" / "config.json").is_file()


def test_the_options_of_a_stage_stand_in_its_messages(pruning):
    with pytest.raises(NumericalError, match=r"lower prune.gate_rate"):
        prune(override(pruning, ["prune.gate=output", "prune.gate_rate=1e30", "prune.gate_steps=8"]), silent)


def test_an_architecture_that_goes_by_places_is_refused_before_anything_is_done(pruning, tmp_path):
    folder = save_small("jamba", tmp_path / "jamba")
    with pytest.raises(ModelError, match="cannot be deleted"):
        prune(override(pruning, [f"model.path={folder}"]), silent)
    assert not Path(pruning.out).exists()


def test_blocks_that_may_not_go_together_are_refused_before_the_training(pruning, monkeypatch):
    """Which ones go is not known before they are chosen."""
    checked = []
    monkeypatch.setattr("farss.pruning.steps.check_deletable", lambda model, gone, trusted: checked.append(gone))
    monkeypatch.setattr(Pruning, "_make", lambda *_: (_ for _ in ()).throw(NumericalError("stopped")))
    with pytest.raises(NumericalError, match="stopped"):
        prune(override(pruning, ["prune.methods=[random]"]), silent)
    assert [len(gone) for gone in checked] == [1, 2]


def test_a_pruned_model_is_a_model_to_prune_and_to_fine_tune(pruning, tmp_path):
    folder = prune(override(pruning, ["prune.methods=[shortgpt]", "prune.ratio=0.25"]), silent)
    again = [f"model.path={folder / 'shortgpt' / 'model'}", f"out={tmp_path / 'again'}", "prune.ratio=0.34"]
    smaller = prune(override(pruning, ["prune.methods=[random]", *again]), silent)
    assert read(smaller)["rows"][1]["deleted"] == [1]
    assert AutoModelForCausalLM.from_pretrained(smaller / "random" / "model").config.num_hidden_layers == 2


def test_perplexity_is_that_of_plain_transformers(model_folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    texts = [json.loads(line)["text"] for line in Path(world.TEXT).read_text().splitlines()[:20]]
    rows, _ = text_windows(texts, tokenizer, 16, 10**6, 0)
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
    again = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert again.exit_code == 0, again.output
    assert "Deleted blocks" in again.output
    assert (tmp_path / "run" / "random" / "model" / "config.json").is_file()


@pytest.mark.parametrize("change", ["prune.shift=0.2", "prune.norm=l1", "train.learning_rate=0.5"])
def test_a_model_of_other_options_is_refused(pruning, change):
    work = Pruning(resolve(pruning), silent)
    with Folder(work.folder.path / "trsp").step("prune", work._made_options("trsp")):
        pass
    changed = Pruning(resolve(override(pruning, [change, "prune.methods=[trsp]"])), silent)
    with pytest.raises(FolderError, match=f"made with {change.partition('=')[0]}="):
        changed.check()
