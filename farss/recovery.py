"""How much of what seems forgotten was only masked? A few steps of question answering on other questions, then the same
questions once more.

A model that was fine-tuned on one format of answers may fail a question because it lost the fact, or because it lost the habit
of answering such questions. The second comes back at once. Every model gets the same fresh, small LoRA on top of what it was
handed over as, trained on the same questions in the same order: the untouched base too, which is what K is then relative to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from farss.batches import Row, choose
from farss.config import Config, QuestionSet, TrainConfig
from farss.data import Tokenized
from farss.errors import ConfigError
from farss.forward import seeded
from farss.models import layer_shapes
from farss.tasks.likelihood import answered, asked_or_shown, unasked
from farss.tasks.questions import prompt_of
from farss.train import train

NAME = "recovery"
"""Of the fresh adapter."""
RANK = 8
RATE = 2e-4
"""Peak learning rate, which falls linearly to zero."""
BATCH = 16
"""Examples a step; that many in a forward pass too, unless the training takes fewer."""


def recovery_rows(config: Config, tokenizer: Any) -> Tokenized:
    """Questions of the knowledge files that are neither asked nor shown, with their answers to be learnt, from every file alike
    as far as it has them.

    Raises:
        ConfigError: the files hold too few.
    """
    sets = [entry for entry in config.evaluate.knowledge if isinstance(entry, QuestionSet)]
    wanted = config.evaluate.recovery * BATCH
    taken = asked_or_shown(config)
    held = sorted((_rows(unasked(entry, taken), entry, config, tokenizer) for entry in sets), key=len)
    rows: list[Row] = []
    for place, each in enumerate(held):  # the smallest first: what it lacks of its share the others make up for
        rows += choose(each, -(-(wanted - len(rows)) // (len(held) - place)), config.seed)
    if len(rows) < wanted // 2:
        raise ConfigError(
            f"evaluate.recovery={config.evaluate.recovery} trains on {wanted} knowledge questions that are not asked, and the files "
            f"hold {len(rows)}: lower the limit of a question set in evaluate.knowledge, or evaluate.recovery"
        )
    return Tokenized(choose(rows, wanted, config.seed + 1))


def _rows(questions: list[dict[str, Any]], entry: QuestionSet, config: Config, tokenizer: Any) -> list[Row]:
    prompt = prompt_of(entry, "knowledge", config.data, tokenizer)
    rows = answered(questions, prompt, tokenizer)
    return [row for row in rows if len(row["input_ids"]) <= config.data.max_length]


def recover(
    model: Any,
    tokenizer: Any,
    rows: Tokenized,
    config: Config,
    folder: Path,
    on_progress: Callable[[int, int, float | None], None] | None = None,
) -> Any:
    """Train a fresh adapter on these rows, on top of whatever the model is.

    Args:
        model: a base model, a whole fine-tuned one, or a `PeftModel` with an exported adapter.
        folder: for checkpoints.

    Returns:
        A `PeftModel` in evaluation mode.
    """
    at_once = config.train.micro_batch_size or config.train.batch_size
    options = TrainConfig(
        learning_rate=RATE,
        max_steps=config.evaluate.recovery,
        batch_size=BATCH,
        micro_batch_size=max(size for size in range(1, BATCH + 1) if BATCH % size == 0 and size <= at_once),
        dropout=0.0,
        precision=config.train.precision,
        gradient_checkpointing=config.train.gradient_checkpointing,
    )
    everywhere = layer_shapes(replace(config.model, targets=[]))[0]  # whatever the method adapts
    adapted = _with_fresh_adapter(model, list(everywhere), config.seed)
    train(adapted, tokenizer, rows, replace(config, train=options), folder, on_progress=on_progress)
    return adapted.eval()


def _with_fresh_adapter(model: Any, layers: list[str], seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers, task_type="CAUSAL_LM")
    with seeded(seed):
        if hasattr(model, "peft_config"):
            before = list(model.peft_config)
            model.add_adapter(NAME, options)
            model.base_model.set_adapter([*before, NAME])
        else:
            model = get_peft_model(model.requires_grad_(False), options, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{NAME}." in name)
    return model


def knowledge_alone(config: Config) -> Config:
    """The same questions of knowledge, and what is neither knowledge nor task."""
    return replace(config, evaluate=replace(config.evaluate, task=[], text=None))
