"""Inside other people's trainers: transformers' Trainer, TRL, and several processes."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_library import PLAN, base, logits
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import farss
from farss import world
from farss.adapter import TRAINED


class Stop(TrainerCallback):
    """Ends a training early, after its checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 3
        return control


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(world.MODEL)


def read_rows():
    return [json.loads(line) for line in world.TASK_TRAIN.read_text().splitlines()[:24]]


@pytest.fixture
def rows():
    return read_rows()


def prepared(tokenizer, rows, folder, **options):
    calibration = farss.CalibrationConfig(examples=8)
    return farss.prepare(base(tokenizer), tokenizer, rows, plan=PLAN, calibration=calibration, folder=folder, dropout=0.0, **options)


def features(tokenizer, rows):
    texts = [f"{row['instruction']} {row['output']}" for row in rows]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=48)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)]}
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]


def trainer(model, data, folder, arguments=None, **options):
    usual = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    wanted = TrainingArguments(output_dir=str(folder), report_to=[], disable_tqdm=True, **(usual | (arguments or {})))
    return Trainer(model=model, args=wanted, train_dataset=data, callbacks=[farss.trainer_callback(model)], **options)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("method", "how"), [("farss", "untouched"), ("farss", "residual"), ("farss-plus", "untouched")])
def test_transformers_trainer_resumes_exactly(tokenizer, rows, tmp_path, method, how):
    data, how = features(tokenizer, rows), {"base": how, "method": method}
    if method == "farss-plus":
        how["knowledge"] = [row["output"] for row in rows]
    whole = prepared(tokenizer, rows, tmp_path / "survey", **how)
    trainer(whole, data, tmp_path / "whole").train()
    killed = trainer(prepared(tokenizer, rows, tmp_path / "survey", **how), data, tmp_path / "killed")
    killed.add_callback(Stop())
    killed.train()
    resumed = prepared(tokenizer, rows, tmp_path / "survey", **how)
    trainer(resumed, data, tmp_path / "killed").train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-3"))
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    batch = tokenizer("Name the seal for this letter: Good day.", return_tensors="pt")
    assert torch.equal(logits(whole, batch), logits(resumed, batch))
    done = farss.export(resumed, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(base(tokenizer), str(done.folder))
    assert (logits(stock, batch) - logits(whole, batch)).abs().max() <= 1e-5 * max(1.0, logits(whole, batch).abs().max().item())


def test_the_best_checkpoint_is_taken_up(tokenizer, rows, tmp_path):
    data, model = features(tokenizer, rows), prepared(tokenizer, rows, tmp_path / "survey")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # so that it is not the last
    chooses = trainer(model, data, tmp_path / "run", {"eval_strategy": "steps", "eval_steps": 3, **best}, eval_dataset=data)
    saved = {}

    class Remember(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved[state.global_step] = weights(model)

    chooses.add_callback(Remember())
    chooses.train()
    assert chooses.state.best_model_checkpoint.endswith("checkpoint-3")
    found = weights(model)
    assert all(torch.equal(found[name], saved[3][name]) for name in saved[3])
    assert not all(torch.equal(found[name], saved[6][name]) for name in saved[6])


def test_a_checkpoint_of_a_trainer_is_not_taken_for_an_adapter(tokenizer, rows, tmp_path):
    model = prepared(tokenizer, rows, tmp_path / "survey")
    trainer(model, features(tokenizer, rows), tmp_path / "run").train()
    with pytest.raises(Exception, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(base(tokenizer), str(tmp_path / "run" / "checkpoint-3"))


@pytest.mark.parametrize("kind", ["completion", "packed", "chat"])
def test_trl_packing_and_chat(tokenizer, rows, tmp_path, kind):
    from datasets import Dataset

    if kind == "chat":
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        )
        rows = [
            {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]} for row in rows
        ]
        model = prepared(tokenizer, rows, tmp_path / "survey", data=farss.DataConfig(template="chat"))
        data = Dataset.from_list(rows)
    else:
        model = prepared(tokenizer, rows, tmp_path / "survey")
        data = Dataset.from_list([{"text": f"{row['instruction']} {row['output']}"} for row in rows])
    before = weights(model)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        max_length=64,
        packing=kind == "packed",
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=False,
    )
    SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[farss.trainer_callback(model)]).train()
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    batch = tokenizer("Name the seal for this letter: Good day.", return_tensors="pt")
    done = farss.export(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(base(tokenizer), str(done.folder))
    assert (logits(stock, batch) - logits(model, batch)).abs().max() <= 1e-5 * max(1.0, logits(model, batch).abs().max().item())


def test_what_is_compared_with_the_base_leaves_the_training_as_it_was(tokenizer, rows, tmp_path):
    """PEFT makes every active adapter train when they are switched on again, and transformers activates one when it resumes."""
    model = prepared(tokenizer, rows, tmp_path / "survey")
    batch = tokenizer("Name the seal for this letter: Good day.", return_tensors="pt")
    before, names = logits(model, batch), set(weights(model))
    with model.disable_adapter():
        assert (logits(model, batch) - logits(base(tokenizer), batch)).abs().max() < 1e-5
    model.set_adapter(TRAINED)
    assert set(weights(model)) == names
    assert torch.equal(logits(model, batch), before)
    trainer(model, features(tokenizer, rows), tmp_path / "run").train()
    twin = copy.deepcopy(model)
    assert twin.set_adapter.args[0] is twin
    assert farss.export(twin, tmp_path / "adapter").logit_difference < 1e-3
    torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    assert read.set_adapter.args[0] is read


def test_a_resume_without_the_callback_is_the_same_training(tokenizer, rows, tmp_path):
    data = features(tokenizer, rows)
    whole = prepared(tokenizer, rows, tmp_path / "survey")
    trainer(whole, data, tmp_path / "whole").train()
    killed = trainer(prepared(tokenizer, rows, tmp_path / "survey"), data, tmp_path / "killed")
    killed.add_callback(Stop())
    killed.train()
    resumed = prepared(tokenizer, rows, tmp_path / "survey")
    plain = trainer(resumed, data, tmp_path / "killed")
    plain.callback_handler.callbacks = [each for each in plain.callback_handler.callbacks if type(each).__name__ != "KeepActive"]
    plain.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-3"))
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_of_many_rows_a_few_times_as_many_are_read_as_are_looked_at(tokenizer, rows, tmp_path):
    class Counted:
        """A data set of which the rows are read one at a time."""

        read = 0

        def __len__(self):
            return 5000

        def __getitem__(self, place):
            self.read += 1
            return rows[place % len(rows)]

    many = Counted()
    model = prepared(tokenizer, many, tmp_path / "survey")
    assert model.farss.survey.examples == 8
    assert many.read == 16 * 8


def test_a_trainer_in_bfloat16_leaves_an_adapter_that_is_kept(tokenizer, rows, tmp_path):
    """TRL's default where there are units for it: accelerate leaves a `forward` on the model that computes in bfloat16 for good."""
    from datasets import Dataset

    model = prepared(tokenizer, rows, tmp_path / "survey", method="farss-plus", knowledge=[row["output"] for row in rows])
    data = Dataset.from_list([{"prompt": row["instruction"], "completion": f" {row['output']}"} for row in rows])
    options = {"max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "bf16": True, "report_to": [], "save_strategy": "no"}
    arguments = SFTConfig(output_dir=str(tmp_path / "run"), gradient_checkpointing=False, disable_tqdm=True, **options)
    SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    wrapped = model.forward
    done = farss.export(model, tmp_path / "adapter")
    assert done.logit_difference < 1e-3
    assert model.forward is wrapped, "a trainer's own"
    batch = tokenizer("Name the seal for this letter: Good day.", return_tensors="pt")
    assert (logits(model, batch) - logits(PeftModel.from_pretrained(base(tokenizer), str(done.folder)), batch)).abs().max() > 1e-3


SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from safetensors.torch import save_file
    from test_trainers import features, prepared, read_rows, trainer, weights
    from transformers import AutoTokenizer
    import farss
    from farss import processes, world
    folder = Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(world.MODEL)
    rows = read_rows()
    model = prepared(tokenizer, rows, None)
    save_file(weights(model), folder / f"start-{processes.rank()}.safetensors")
    trainer(model, features(tokenizer, rows), folder / "run").train()
    save_file(weights(model), folder / f"end-{processes.rank()}.safetensors")
    farss.export(model, folder / "adapter")
""")


def test_accelerate_with_two_processes(tokenizer, rows, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    # On GPUs `accelerate launch` starts torchrun; on CPUs it wants MPI, so torchrun is started here, with accelerate's variable.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(script), os.path.dirname(__file__), str(tmp_path)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    start, end = ([load_file(tmp_path / f"{when}-{rank}.safetensors") for rank in (0, 1)] for when in ("start", "end"))
    single = weights(prepared(tokenizer, rows, tmp_path / "survey"))
    for name, expected in single.items():
        assert torch.equal(start[0][name], start[1][name])
        assert torch.equal(end[0][name], end[1][name])
        torch.testing.assert_close(start[0][name], expected, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(start[0][name], end[0][name]) for name in single)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
