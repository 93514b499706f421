"""A start on disk for another trainer, and the way back to the original base."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_models import logits, surveyed
from transformers import AutoModelForCausalLM, AutoTokenizer

from farss import prepared, world
from farss.adapter import attach
from farss.config import ModelConfig, PlanConfig
from farss.errors import FarssError, FolderError, NumericalError
from farss.files import read_json, write_json, write_tensors
from farss.models import base_fingerprint, load_model
from farss.plan import make_plan_without_survey
from farss.portable import load_adapter
from farss.prepared import convert, write_prepared
from farss.structure import find_blocks, target_layers


@pytest.fixture(params=["llama", "gpt2"])  # the second stores its layers transposed
def written(request, tmp_path):
    """A base on disk and a prepared start of it."""
    tokenizer = AutoTokenizer.from_pretrained(world.MODEL)
    model, found, plan = surveyed(request.param, tmp_path / "survey", torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    adapted = attach(model, plan, found)
    folder = write_prepared(adapted, plan, tokenizer, tmp_path / "prepared", tmp_path / "original")
    # other trainers load it with the adapter, and go by nothing else
    assert read_json(folder / "adapter" / "adapter_config.json")["lora_dropout"] == 0
    return tmp_path, folder, plan


def train(folder, out):
    """What another trainer does: load both folders, train, save."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter"), is_trainable=True)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(3, 33).reshape(2, 15)
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(str(out))
    return model.eval()


def test_the_start_on_its_base_is_the_original(written):
    place, folder, _ = written
    original = AutoModelForCausalLM.from_pretrained(place / "original").eval()
    start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter")).eval()
    scale = logits(original).abs().max()
    assert (logits(start) - logits(original)).abs().max() <= 1e-5 * scale
    residual = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    assert (logits(residual) - logits(original)).abs().max() > 0.01 * scale


def test_there_and_back(written):
    place, folder, _ = written
    trained = logits(train(folder, place / "trained"))
    done = convert(folder, place / "trained", place / "adapter")
    original = AutoModelForCausalLM.from_pretrained(place / "original")
    before = logits(original.eval())
    found = logits(load_adapter(original, place / "adapter").eval())
    assert (found - trained).abs().max() <= 1e-5 * trained.abs().max()
    assert done.logit_difference <= 1e-4
    assert (found - before).abs().max() > 0.01
    assert "licence" in (place / "adapter" / "README.md").read_text()


def test_a_start_that_was_not_trained_changes_nothing_and_that_is_told(written, caplog):
    place, folder, _ = written
    convert(folder, folder / "adapter", place / "adapter")
    assert "holds the start as it was prepared: nothing was trained" in caplog.text
    caplog.clear()
    train(folder, place / "trained")
    convert(folder, place / "trained", place / "other")
    assert "nothing was trained" not in caplog.text


@pytest.mark.parametrize(("files", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_there_and_back_in_another_precision_than_that_of_the_files(files, loaded, tmp_path):
    """A base that is written in 16 bits is rounded, whatever it was loaded in."""
    tokenizer = AutoTokenizer.from_pretrained(world.MODEL)
    model, found, plan = surveyed("llama", tmp_path / "survey", torch.float32, vocab_size=len(tokenizer))
    model.to(files).save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    model = load_model(ModelConfig(path=str(tmp_path / "original")), loaded)
    folder = write_prepared(attach(model, plan, found), plan, tokenizer, tmp_path / "prepared", tmp_path / "original")
    train(folder, tmp_path / "trained")
    assert convert(folder, tmp_path / "trained", tmp_path / "adapter").logit_difference < 0.1


def test_the_way_back_runs_a_models_own_code_where_the_way_there_did(written, monkeypatch):
    place, folder, _ = written
    train(folder, place / "trained")
    asked = []
    monkeypatch.setattr(prepared, "load_model", lambda options, **how: asked.append(options) or load_model(options, **how))
    for trusted in (False, True):
        write_json(folder / "prepared.json", read_json(folder / "prepared.json") | {"trusted": trusted})
        convert(folder, place / "trained", place / f"adapter-{trusted}")
    assert [(options.path, options.trust_remote_code) for options in asked] == [
        (str(path), trusted) for trusted in (False, True) for path in (folder / "base", place / "original")
    ]


def test_the_residual_base_is_not_taken_for_the_original(written):
    place, folder, _ = written
    train(folder, place / "trained")
    convert(folder, place / "trained", place / "adapter")
    residual = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert base_fingerprint(residual) != base_fingerprint(AutoModelForCausalLM.from_pretrained(place / "original"))
    with pytest.raises(FarssError, match="made for a base with fingerprint"):
        load_adapter(residual, place / "adapter")
    for adapter in (folder / "adapter", place / "trained"):  # as it was prepared, and as another trainer wrote it
        with pytest.raises(FarssError, match=r"belongs to the base in .*: turn it into one of the original base by `farss convert"):
            load_adapter(residual, adapter)


def test_what_cannot_be_converted_is_refused(written):
    place, folder, plan = written
    with pytest.raises(FolderError, match="holds no adapter_model"):
        convert(folder, place / "original", place / "adapter")
    other = make_plan_without_survey(PlanConfig(method="lora", rank=3), *shapes(place))
    model = attach(AutoModelForCausalLM.from_pretrained(place / "original"), other)
    model.save_pretrained(str(place / "foreign"), selected_adapters=["trained"])
    with pytest.raises(FarssError, match=r"is not an adapter that began as this start: .* is missing or has another rank"):
        convert(folder, place / "foreign" / "trained", place / "adapter")
    assert not (place / "adapter").exists()
    train(folder, place / "trained")
    state, config = (place / "trained" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    began = read_json(config)
    write_json(config, began | {"lora_alpha": 2 * began["lora_alpha"]})
    with pytest.raises(FarssError, match="was trained with another lora_alpha than was prepared"):
        convert(folder, place / "trained", place / "adapter")
    patterns = {"alpha_pattern": {"x": 1}, "rank_pattern": {"x": 1}}
    for option, value in {"use_rslora": True, "use_dora": True, "r": began["r"] + 1, **patterns}.items():
        write_json(config, began | {option: value})
        with pytest.raises(FarssError, match=f"was trained with another {option} than was prepared"):
            convert(folder, place / "trained", place / "adapter")
    write_json(config, began)
    write_tensors(state, load_file(state) | {"base_model.model.lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(FarssError, match=r"holds base_model.model.lm_head.weight, 1 tensors in all that were not prepared"):
        convert(folder, place / "trained", place / "adapter")
    assert not (place / "adapter").exists()
    with pytest.raises(FarssError, match="'lora' starts at zero: its adapter goes on the base as it is"):
        write_prepared(model, other, None, place / "again", place / "original")
    with pytest.raises(FolderError, match="exists: give a new folder"):
        write_prepared(model, plan, None, folder, place / "original")


def test_another_base_than_was_prepared_is_refused(written):
    place, folder, _ = written
    train(folder, place / "trained")
    state = load_file(place / "original" / "model.safetensors")
    write_tensors(place / "original" / "model.safetensors", {name: 1.1 * weight for name, weight in state.items()})
    with pytest.raises(FolderError, match=r"original is not the base that was prepared: put it back"):
        convert(folder, place / "trained", place / "adapter")
    assert not (place / "adapter").exists()


def test_damaged_and_swapped_folders_are_named(written):
    place, folder, _ = written
    train(folder, place / "trained")
    with pytest.raises(FolderError, match=r"trained is not what `farss prepare` wrote: name that folder first"):
        convert(place / "trained", folder, place / "adapter")
    state, config, facts = (
        place / "trained" / "adapter_model.safetensors",
        place / "trained" / "adapter_config.json",
        folder / "prepared.json",
    )
    whole, known, name = load_file(state), read_json(facts), next(iter(load_file(state)))
    write_tensors(state, whole | {name: torch.full_like(whole[name], torch.nan)})
    with pytest.raises(NumericalError, match=r"trained holds NaN or infinite numbers, in .*lora_.*: its training diverged"):
        convert(folder, place / "trained", place / "adapter")
    write_tensors(state, whole)
    for file, damage, message in ((config, [], "holds no adapter's options"), (facts, {}, "holds no facts about a prepared start")):
        before = read_json(file)
        write_json(file, damage)
        with pytest.raises(FolderError, match=message):
            convert(folder, place / "trained", place / "adapter")
        write_json(file, before)
    write_json(facts, known | {"fingerprint": "another"})
    with pytest.raises(FolderError, match=r"base is not the base that was prepared: put it back"):
        convert(folder, place / "trained", place / "adapter")
    assert not (place / "adapter").exists()


def test_what_would_score_otherwise_is_not_kept(written, monkeypatch):
    place, folder, _ = written
    train(folder, place / "trained")
    change = prepared._change
    monkeypatch.setattr(prepared, "_change", lambda name, scaling, *states: change(name, 2 * scaling, *states))
    with pytest.raises(
        FarssError, match=r"the converted adapter's logits differ by .* on the prepared base \(allowed: .*: it was not kept"
    ):
        convert(folder, place / "trained", place / "adapter")
    assert not (place / "adapter").exists()


def shapes(place):
    model = AutoModelForCausalLM.from_pretrained(place / "original")
    return target_layers(model), len(find_blocks(model)[1])
