"""TRL's trainer, told to do what we say and nothing else."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from farss.config import Config, TrainConfig
from farss.data import Tokenized
from farss.errors import ConfigError, nearest
from farss.files import write_tensors
from farss.forward import modes_kept, unwrapped, without_cache
from farss.memory import give_back_if_scarce
from farss.models import device_of
from farss.precision import multiplies_in
from farss.train.checkpoints import REGIME, read_weights, remove_older, write_weights
from farss.train.record import Record

SHORT = 64
"""Tokens on which two ways to the same loss are compared."""
WRAPPED = ("forward", "_original_forward", "_require_grads_hook", "_require_grads_hooks")
"""Attributes that accelerate and TRL hang on a model."""
ROUTERS = ("output_router_logits", "router_aux_loss_coef")
"""Settings of a mixture of experts that TRL writes into its configuration."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Settings that transformers and TRL align with the tokenizer."""


def products(options: TrainConfig, device: torch.device) -> Literal["bf16", "fp32"]:
    """The precision of matrix products that `train.precision` means on a device."""
    if options.precision != "auto":
        return options.precision
    return "bf16" if multiplies_in(torch.bfloat16, device) else "fp32"


def with_products(options: dict[str, Any], config: Config, over: bool) -> dict[str, Any]:
    """The options on which a step depends, with what `train.precision: auto` means on this machine; without it if the step is over, which
    may have been done on another."""
    if config.train.precision != "auto" or "train.precision" not in options:
        return options
    if over:
        return {key: value for key, value in options.items() if key != "train.precision"}
    return options | {"train.precision": products(config.train, device_of(config.model))}


def training_steps(options: TrainConfig, rows: int) -> int:
    """Optimiser steps of a training on so many examples."""
    return options.max_steps or math.ceil(options.epochs * math.ceil(rows / options.batch_size))


def build(
    model: Any,
    tokenizer: Any,
    examples: Tokenized,
    config: Config,
    checkpoints: Path,
    run: Record,
    callbacks: Sequence[Any],
    cycles: int | None,
) -> Any:
    """The trainer of one training; `run` is told what happens, and `train.train` explains the rest."""
    from transformers import PrinterCallback

    trainer_class, callback_class = _classes()
    weights = next(model.parameters())
    check_options(config.train, weights.device, weights.dtype, getattr(model, "supports_gradient_checkpointing", True))
    trainer = trainer_class(
        run=run,
        model=model,
        args=_arguments(config.train, config.seed, checkpoints, weights.device, cycles, training_steps(config.train, len(examples.rows))),
        train_dataset=examples.dataset(),
        processing_class=tokenizer,
        callbacks=[callback_class(run), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # it stands in for the progress bar, and prints to stdout
    return trainer


def _arguments(options: TrainConfig, seed: int, checkpoints: Path, device: torch.device, cycles: int | None, steps: int) -> Any:
    """The options in TRL's words. `steps`: of the whole training."""
    from trl import SFTConfig  # type: ignore[attr-defined]

    micro = options.micro_batch_size or options.batch_size
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        # data: tokenised already, so nothing is cut, packed or added
        max_length=None,
        packing=False,
        padding_free=False,
        completion_only_loss=True,
        # optimisation
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch_size // micro,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",  # the other copies second moments at every step
        lr_scheduler_type=options.scheduler,
        lr_scheduler_kwargs={"num_cycles": cycles} if cycles else None,
        warmup_steps=min(math.ceil(options.warmup_ratio * steps), steps - 1),  # the first has a rate of zero, so of one step none
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        router_aux_loss_coef=0.0,  # unset, a mixture's own is added to the loss
        seed=seed,
        data_seed=seed,
        # precision and memory
        bf16=products(options, device) == "bf16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        # records
        save_strategy="steps",
        save_steps=options.save_steps,
        logging_steps=options.logging_steps,
        report_to=list(options.report_to),
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device, however many are visible: TRL refuses DataParallel
    return arguments


def check_options(options: TrainConfig, device: torch.device, dtype: torch.dtype, recomputes: bool) -> None:
    """Refuse what transformers will not do, or not well.

    Args:
        dtype: of the frozen weights.
        recomputes: the model can compute activations anew in the backward pass.

    Raises:
        ConfigError: it does not know the schedule, a tracker is not installed, the device is not the first visible GPU, or the model
            or its precision does not fit the options.
    """
    from transformers import SchedulerType, get_scheduler
    from transformers.integrations import get_available_reporting_integrations  # type: ignore[attr-defined]

    schedulers = [entry.value for entry in SchedulerType if entry.value not in ("reduce_lr_on_plateau", "greedy")]  # look at evaluations
    if options.scheduler not in schedulers:
        raise ConfigError(f"train.scheduler={options.scheduler!r}: {nearest(options.scheduler, schedulers)}")
    try:
        get_scheduler(options.scheduler, torch.optim.SGD([torch.zeros(1)]), num_warmup_steps=1, num_training_steps=10)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"train.scheduler={options.scheduler!r} needs options of its own ({error}): choose another, such as linear or cosine"
        ) from error
    if device.type == "cuda" and device.index not in (None, 0):
        raise ConfigError(f"training runs on the first visible GPU, but the model is on {device}: set CUDA_VISIBLE_DEVICES={device.index}")
    if device.type == "cuda" and options.precision == "bf16" and not multiplies_in(torch.bfloat16, device):
        raise ConfigError("train.precision=bf16, but this GPU has no units for bfloat16: set train.precision=fp32")
    if options.gradient_checkpointing and not recomputes:
        raise ConfigError("this kind of model cannot compute its activations anew: set train.gradient_checkpointing=false")
    if dtype == torch.float16 and products(options, device) == "fp32":
        # a mean over thousands of answer tokens gives gradients of 1e-7, where float16 ends
        raise ConfigError(
            "the weights are float16, in which small gradients vanish unless products are bfloat16 (which this machine does not have, or "
            "train.precision=fp32 turns off): set model.dtype=float32, or bfloat16"
        )
    installed = get_available_reporting_integrations()
    for name in options.report_to:
        if name not in installed:
            cure = f", or choose of {', '.join(installed)}" if installed else " (none is installed yet)"
            cure = "`pip install` it" + cure if name not in ("none", "all") else f"give {'[]' if name == 'none' else 'their names'}"
            raise ConfigError(f"train.report_to: {name!r} is not installed or not known: {cure}")


@functools.cache
def _classes() -> tuple[Any, Any]:
    """The trainer and the callback; made here because importing TRL takes seconds."""
    from transformers import TrainerCallback
    from trl import SFTTrainer  # type: ignore[attr-defined]

    class Trainer(SFTTrainer):
        """SFTTrainer that checks every step and keeps the trainable parameters only."""

        def __init__(self, run: Record, **options: Any) -> None:
            self.run, self.whole = run, options["model"]
            before = [(parameter, parameter.data) for parameter in self.whole.parameters() if parameter.requires_grad]
            super().__init__(**options)
            for parameter, data in before:
                if parameter.dtype != data.dtype:  # TRL rounds adapters of 4-bit models to bfloat16: see `training._check_model`
                    parameter.data = data
            # TRL divides by the number of answer tokens in the whole batch, if it is counted; models whose forward
            # takes no **kwargs would get a mean over micro-batches
            self.model_accepts_loss_kwargs = True
            self.fused = scored_alike(self.whole, options["train_dataset"][0]["input_ids"])

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.added = torch.zeros(())
            loss: Tensor = super().training_step(*args, **kwargs)
            self.run.micro.append(loss - self.added.to(loss))  # the loss alone, which is comparable between methods
            return loss

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            if self.fused:
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            else:
                result = own_loss(model, inputs, num_items_in_batch)
            penalty = self.run.regime.penalty()
            if penalty is None:
                return result
            share = penalty / self.current_gradient_accumulation_steps  # once a step, whatever the micro-batch
            self.added = share.detach()
            return (result[0] + share, *result[1:]) if return_outputs else result + share

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None:
                self.optimizer = self.run.regime.optimizer(super().create_optimizer(*args, **kwargs))
            return self.optimizer

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            norm = super()._get_grad_norm(model, grad_norm)  # the last thing before the optimiser's step
            self.run.check(self.state.global_step + 1, float(norm))
            return norm

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            folder = Path(output_dir or str(self.args.output_dir))
            write_weights(self.whole, folder)
            if state := self.run.regime.state():
                write_tensors(folder / REGIME, state)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            read_weights(self.whole, Path(resume_from_checkpoint))

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """A checkpoint is no model to publish."""

        def _send_telemetry(self) -> None:
            """Nothing is sent anywhere."""

    class Callback(TrainerCallback):
        """Tells the run what happens."""

        def __init__(self, run: Record) -> None:
            self.run = run

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.save_steps = args.save_steps  # not the checkpoint's: it may change between a kill and going on
            self.run.begin(state.max_steps)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.run.learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
            self.run.regime.after_step(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.run.end_step(state.global_step, state.epoch)
            give_back_if_scarce(self.run.device)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.run.mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            remove_older(Path(args.output_dir))  # not by transformers, which goes by the clock and does not wait for our mark

    return Trainer, Callback


def scored_alike(model: Any, ids: list[int]) -> bool:
    """Whether TRL's output layer, which goes over the logits in tiles, gives the model's own log-likelihoods: it rebuilds the logits from
    the last hidden states, and does not know what some architectures do to either (RecurrentGemma's cap, BERT's transform)."""
    rows = torch.tensor([ids[:SHORT]], device=next(model.parameters()).device)
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    with modes_kept(model), torch.no_grad():
        model.eval()
        logits = model(**inputs).logits[:, :-1]
        own = logits.float().log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
        try:
            tiled = model(**inputs, labels=rows, fused_lm_head=True).log_probs
        except (AttributeError, TypeError):  # the parts have other names than it looks for
            return False
    rounding = max(1e-4, 4 * torch.finfo(logits.dtype).eps) * max(1.0, logits.abs().max().item())
    return bool((tiled.float() - own).abs().max() <= rounding)


def own_loss(model: Any, inputs: dict[str, Any], count: Any) -> Tensor:
    """The mean loss (nats) of the answer tokens, from the logits of the model itself.

    Args:
        count: of the answer tokens in the whole batch, where the gradients of several forward passes are added up.
    """
    cache = without_cache(model)
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"} | cache).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    scored = labels != -100
    total = nn.functional.cross_entropy(logits[scored].float(), labels[scored], reduction="sum")
    mean: Tensor = total / (scored.sum().clamp(min=1) if count is None else count)
    return mean


def stop(step: int | None) -> list[Any]:
    """A callback that writes a checkpoint after this step and ends the training; none for None."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                control.should_save = control.should_training_stop = True

    return [] if step is None else [Stop()]


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Take back what the trainer does to a model besides its weights: wrapped forwards, hooks and flags."""
    base = unwrapped(model)
    cache, checkpointing = getattr(base.config, "use_cache", None), base.is_activation_checkpointing
    attributes = [(part, {name: vars(part)[name] for name in WRAPPED if name in vars(part)}) for part in (model, base)]
    # not of other modules: transformers installs hooks of its own when they are first needed, and once
    embeddings = [(module, list(module._forward_hooks)) for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    text = base.config.get_text_config()
    routers = {name: getattr(text, name) for name in ROUTERS if hasattr(text, name)}
    settings = [each for each in (base.config, text, getattr(base, "generation_config", None)) if each is not None]
    tokens = [(each, {name: vars(each)[name] for name in TOKENS if name in vars(each)}) for each in settings]
    try:
        with modes_kept(model):
            yield
    finally:
        if not checkpointing:
            base.activation_checkpointing_disable()
        base.config.use_cache = cache
        for name, value in routers.items():
            setattr(text, name, value)
        for names, kept in ((WRAPPED, attributes), (TOKENS, tokens)):
            for part, before in kept:
                for name in names:
                    vars(part).pop(name, None)
                vars(part).update(before)
        for module, hooks in embeddings:
            # TRL and transformers each hook the embeddings, and the handle of the first hook is lost
            for key in set(module._forward_hooks) - set(hooks):
                del module._forward_hooks[key]
