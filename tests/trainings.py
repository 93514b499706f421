"""Small models and examples that the trainings of these tests share."""

from __future__ import annotations

import random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from farss.config import Config, ModelConfig, TrainConfig
from farss.data import Tokenized

VOCABULARY = 64


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def whole_model(kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted_model(dropout: float = 0.05) -> Any:
    """A trainable adapter `default` beside a frozen one, both active."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(whole_model(), lora)
    model.add_adapter("frozen", LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "frozen"])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.requires_grad_(".default." in name)
    return model.eval()


def examples(count: int = 22, seed: int = 0) -> Tokenized:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, answer = draw.randint(2, 6), draw.randint(1, 9)
        ids = [1] + [draw.randint(3, VOCABULARY - 1) for _ in range(prompt + answer)] + [2]
        rows.append({"input_ids": ids, "completion_mask": [0] * (prompt + 1) + [1] * (answer + 1)})
    return Tokenized(rows)


def options(**train_options: Any) -> Config:
    given = {"learning_rate": 1e-2, "batch_size": 4, "precision": "fp32", "gradient_checkpointing": False, "save_steps": 2}
    return Config(model=ModelConfig(path="tiny"), train=TrainConfig(**{**given, "logging_steps": 3, **train_options}), seed=5)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


class Killed(Exception):
    pass


def killed_at(place: int) -> Any:
    """Something to tell progress to, which raises when so much is done."""

    def tell(done: int, total: int, what: Any) -> None:
        if done == place:
            raise Killed

    return tell


class Kill(TrainerCallback):
    """Raise before a step, as late as a kill can come after the checkpoint of the step before."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise Killed
