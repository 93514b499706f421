"""FARSS inside a training script of your own: prepare, train with TRL, export. Runs on the embedded model in a minute."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import farss
from farss import world

out = Path(sys.argv[1] if len(sys.argv) > 1 else "own-trainer")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 60

model = AutoModelForCausalLM.from_pretrained(world.MODEL)
tokenizer = AutoTokenizer.from_pretrained(world.MODEL)
rows = [json.loads(line) for line in world.TASK_TRAIN.read_text().splitlines()]

model = farss.prepare(
    model,
    tokenizer,
    rows,
    plan=farss.PlanConfig(boundary=2, rank=16),
    data=farss.DataConfig(max_length=96),
    calibration=farss.CalibrationConfig(examples=64),
)

prompt = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
dataset = Dataset.from_list(
    [{"prompt": f"{prompt}### Instruction:\n{row['instruction']}\n\n### Response:", "completion": f" {row['output']}"} for row in rows]
)
arguments = SFTConfig(
    output_dir=str(out / "checkpoints"),
    max_steps=steps,
    per_device_train_batch_size=16,
    learning_rate=2e-3,
    gradient_checkpointing=False,
    bf16=False,
    report_to=[],
    save_strategy="no",
)
SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer).train()

exported = farss.export(model, out / "adapter")
if exported is not None:  # it is, in every process but the first
    print(f"rank {exported.rank}, largest logit difference on the untouched base {exported.logit_difference:.1e}")
