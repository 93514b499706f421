"""What is handed over is what was trained, and what was asked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import asked
from small_models import save_small

from farss import llamacpp
from farss.configfile import override
from farss.errors import ConfigError, FarssError, ModelError
from farss.evaluate import _identity
from farss.files import read_json, write_json, write_tensors
from farss.handover import weights_are_there
from farss.models import load_model
from farss.pipeline import Run


def test_a_card_has_the_scores_of_its_own_adapter_alone(config):
    run = Run(config)
    run.all()
    card = run.path / "adapter" / "README.md"
    assert "| facts |" in card.read_text()
    card.unlink()
    (run.path / "adapter" / "adapter_model.safetensors").unlink()
    Run(config).export()  # made again, and it is what was asked
    assert "| facts |" in card.read_text()
    Run(override(config, ["export.rank=2"])).export()
    Run(config).evaluate()  # of the exact one, which was asked before
    assert "| facts |" not in card.read_text()
    Run(override(config, ["export.rank=2"])).evaluate()
    assert "| facts |" in card.read_text()
    merged = Run(override(config, ["export.to=merged"]))
    merged.export()
    merged.evaluate()
    assert "| facts |" in (run.path / "model" / "README.md").read_text()
    before = (run.path / "model" / "README.md").read_text()
    Run(config).evaluate()  # of the adapter, whose scores are not the model's
    assert (run.path / "model" / "README.md").read_text() == before


def test_a_residual_base_of_quantised_weights_is_found_before_anything_is_done(config):
    with pytest.raises(ConfigError, match=r"adapter.base='residual' takes the start out of weights that are quantised"):
        Run(override(config, ["adapter.base=residual", "model.quantization=nf4"])).all()
    assert not Path(config.out).exists()


@pytest.mark.parametrize("changes", [["export.to=merged"], ["plan.method=dora"], ["adapter.base=residual", "model.dtype=float32"]])
def test_a_change_of_weights_that_lie_quantised_is_found_before_anything_is_done(config, tmp_path, changes):
    folder = save_small("llama-gqa", tmp_path / "quantised")
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="quantised"):
        Run(override(config, [f"model.path={folder}", *changes])).all()
    assert not Path(config.out).exists()


@pytest.mark.parametrize("changes", [["export.to=merged"], ["plan.method=dora"], ["plan.method=pissa", "adapter.base=residual"]])
def test_weights_that_layers_share_take_no_change(config, tmp_path, changes):
    """Every second block of Zamba 2 is the same one."""
    options = [f"model.path={save_small('zamba2', tmp_path / 'zamba')}", "model.targets=[q_proj,o_proj]", "plan.method=lora"]
    Run(override(config, options)).check_inputs()
    with pytest.raises(ModelError, match=r"layers.1.shared_transformer.self_attn.q_proj shares its weight with model.layers.3."):
        Run(override(config, [*options, *changes])).all()
    assert not Path(config.out).exists()


@pytest.mark.usefixtures("no_figures")
def test_answers_are_those_of_the_form_that_is_handed_over(config):
    """A compressed adapter's answers are not those of the whole model that is merged afterwards."""
    config = override(config, ["plan.method=lora", "train.learning_rate=0.02", "export.rank=1"])
    Run(config).all()
    compressed = asked(config)
    merged = override(config, ["export.to=merged", "export.rank=null"])
    assert not Run(merged).complete
    Run(merged).all()
    assert Run(merged).complete
    assert asked(config) != compressed
    exact = override(merged, ["export.to=peft"])
    assert not Run(exact).complete  # those of the merged model are rounded
    Run(exact).all()
    assert Run(exact).complete
    assert not Run(merged).complete


@pytest.mark.usefixtures("no_figures")
def test_a_compressed_adapter_is_what_is_asked(config):
    def scored(*changes):
        run = Run(override(config, ["plan.method=lora", "train.learning_rate=0.02", *changes]))
        run.all()
        return json.loads((run.path / "scores.json").read_text())["meta"]["weights"], Run(run.config)

    whole, _ = scored()
    compressed, run = scored("export.rank=1")
    assert compressed != whole
    assert compressed == _identity(run._read_back())


def test_full_fine_tuning_is_scored_as_it_is_handed_over(config):
    """In the precision of the base's files, and with the exact rotary frequencies that whoever loads it has."""
    run = Run(override(config, ["plan.method=full", "model.dtype=float32"]))
    run.claim()
    run.export()
    scored, loaded = run._scored().state_dict(), run._read_back()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(dict(run._scored().named_buffers())[name], buffer), name
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.float(), scored[name].float()), name


def test_a_merged_model_is_asked_as_it_is_written(config):
    """In bfloat16 its weights are rounded, and it answers otherwise than the adapter that was trained."""
    config = override(config, ["plan.method=lora", "train.learning_rate=0.02", "model.dtype=bfloat16"])
    merged = override(config, ["export.to=merged"])
    Run(config).all()
    adapter = asked(config)
    Run(merged).all()
    model = load_model(replace(merged.model, path=str(Path(config.out) / "model")))
    assert read_json(Path(config.out) / "scores.json")["meta"]["weights"] == _identity(model)
    assert asked(config) != adapter


def test_what_llama_cpp_does_not_know_is_refused_before_anything_is_written(config, tmp_path):
    folder = save_small("gpt2", tmp_path / "gpt2")
    with pytest.raises(FarssError, match="no GGUF adapter for gpt2"):
        Run(override(config, ["export.to=gguf", f"model.path={folder}"])).all()
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_refused_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    with pytest.raises(FarssError, match=r"a GGUF file needs the package gguf: pip install"):
        Run(override(config, ["export.to=gguf"])).all()
    assert not (tmp_path / "run").exists()


def test_quantised_weights_are_not_trained(config, tmp_path):
    """The refusal comes before the untouched model is asked."""
    folder = save_small("llama-gqa", tmp_path / "quantised")
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(stored))
    full = override(config, ["plan.method=full"])
    with pytest.raises(ConfigError, match=r"plan.method=full trains every weight, and those in .*quantised' are stored quantised"):
        Run(override(full, [f"model.path={folder}"])).all()
    assert not Path(config.out).exists()
    warnings = Run(override(full, ["model.quantization=nf4"])).inputs.warnings()
    assert any("model.quantization=nf4 does not hold for full, which trains and answers with" in each for each in warnings)


def test_a_model_is_whole_when_all_of_its_files_are_there(tmp_path):
    for number in (1, 2):
        write_tensors(tmp_path / f"model-0000{number}-of-00002.safetensors", {f"w{number}": torch.ones(2)})
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}})
    assert weights_are_there(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert not weights_are_there(tmp_path)


def test_a_gguf_that_was_deleted_is_made_again(config):
    pytest.importorskip("gguf")
    config = override(config, ["export.to=gguf", "train.max_steps=2", "evaluate.knowledge=[]", "evaluate.task=[]", "evaluate.text=null"])
    target = Run(config).export()
    (target / llamacpp.FILE).unlink()
    Run(config).export()
    assert (target / llamacpp.FILE).is_file()
