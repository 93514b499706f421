"""For people who already have a training script: a `PeftModel` in, a portable adapter out."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from farss import processes
from farss.adapter import START, TRAINED, activate, attach, check_residual, load_trained
from farss.artifacts import Plan, Survey
from farss.batches import Row, choose, plain_rows, unlearnt
from farss.config import Base, CalibrationConfig, DataConfig, PlanConfig, QuestionSet
from farss.configfile import checked
from farss.data import Tokenized, check_readable_by, load_examples, tokenize_rows
from farss.errors import ConfigError, FarssError, nearest
from farss.files import read_json, write_json
from farss.folder import alone
from farss.jobs import Progress, unseen
from farss.methods import Reading, check_elsewhere
from farss.models import base_fingerprint, check_causal, is_quantised, weights_fingerprint
from farss.places import fits_beside, placed, tensors_of
from farss.plan import check_plan, make_plan, make_plan_without_survey, method_of, survey_cap
from farss.portable import Exported, check_batch
from farss.portable import export as export_adapter
from farss.prompts import prompt_facts
from farss.rows import cell, knowledge_texts
from farss.structure import (
    check_loaded,
    check_readable,
    find_blocks,
    has_adapter,
    holds_packed,
    is_sharded,
    keep_gradients,
    target_layers,
    uncompiled,
)
from farss.survey import LENGTH, Site, batches_for, look, own_text

OURS = re.compile(rf"\.(?:{TRAINED}|{START})\b")
"""In the names of weights that an export reads; a start that a trainer has moved is taken as it is."""
PLENTY = 16
"""Rows are drawn for so many times the examples that are looked at: some are left out, as no answer of them fits."""


class Prepared(NamedTuple):
    """What `export` needs to know of a prepared model; lies on it as `model.farss`."""

    plan: Plan
    survey: Survey | None
    batch: dict[str, Tensor]
    """A few real prompts for the check of the exported adapter."""
    tokenizer: Any
    prompt: dict[str, Any]
    """How it is trained to be asked."""
    base: str
    """Fingerprint of the base model."""
    rank: int
    """Which of several processes this is: whoever exports may have left their group before."""


def prepare(
    model: Any,
    tokenizer: Any,
    dataset: Iterable[dict[str, Any]] | Path | str,
    *,
    method: str | None = None,
    data: DataConfig | None = None,
    calibration: CalibrationConfig | None = None,
    plan: PlanConfig | None = None,
    targets: list[str] | None = None,
    dropout: float = 0.05,
    base: Base = "untouched",
    knowledge: Iterable[str] | QuestionSet | None = None,
    folder: Path | str | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Any:
    """Survey a model on your data, plan ranks and directions, and return a `PeftModel` ready to train.

    In several processes (`accelerate launch`, `torchrun`) call it in each of them: they share the work.

    At step 0 it computes what `model` computes. Train it with TRL's `SFTTrainer`, transformers' `Trainer` or any loop
    over `model.parameters()` that require a gradient, then call `farss.export(model, folder)`.

    Args:
        model: a causal language model from transformers; its own weights are never changed, but with `base="residual"`.
        tokenizer: its tokenizer.
        dataset: your training examples: rows (dictionaries, a `datasets.Dataset`, a table of pandas) or a file's path.
        method: any of `farss.METHODS` that trains like a LoRA and becomes a plain one; None: `plan.method`.
        data: columns, template and `max_length`; the defaults find the usual columns by themselves.
        calibration: how many examples to estimate the statistics on.
        plan: method, boundary, ranks, alpha.
        targets: names of the linear layers to adapt; None: every one in every block.
        dropout: on the adapter's input, see `train.dropout`.
        base: how the start is taken out of the base, see `farss.adapter.attach`.
        knowledge: texts or questions: CorDA-KPM and LoRA-Null start away from their activations, FARSS-plus weighs the task against them;
            None: those of `calibration.knowledge` or, where it names none, texts that the model writes by itself.
        folder: where the survey is kept, so that it can be resumed and used again; None: a temporary folder, deleted with the model.
        seed: of the calibration draw and of random starts.
        on_progress: called with (blocks done, blocks, a line to show).

    Returns:
        A `PeftModel` with `model.farss` on it. Save it only through `farss.export`: its two adapters belong together.

    Raises:
        FarssError: something in the arguments, the data or the model cannot be used; the message says what and the cure.
    """
    model = uncompiled(model)
    check_loaded(model)
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):  # a processor has its tokenizer within
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}: load the model's, with AutoTokenizer.from_pretrained")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token, with which every answer ends: set tokenizer.eos_token")
    plan, data = _checked("plan", plan, PlanConfig), _checked("data", data, DataConfig)
    calibration = _checked("calibration", calibration, CalibrationConfig)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout!r}: give 0 or more, below 1")
    if base not in get_args(Base):
        raise ConfigError(f"base={base!r}: {nearest(base, get_args(Base))}")
    if has_adapter(model):
        raise FarssError(
            "this model has adapters already: merge them first (model = model.merge_and_unload()), then prepare it; "
            "the new adapter is then for the merged model"
        )
    wanted = dataclasses.replace(plan, method=method or plan.method)
    check_elsewhere(method_of(wanted))
    layers, blocks = target_layers(model, targets), len(find_blocks(model)[1])
    check_plan(wanted, layers, blocks, calibration.svd)
    if base == "residual" and method_of(wanted).takes_out:
        dtypes = {model.get_submodule(name).weight.dtype for name in layers}
        check_residual(model, layers, holds_packed(model), dtypes, "base")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    examples = _examples(dataset, data, tokenizer, seed, PLENTY * calibration.examples)
    texts_too = knowledge is not None or calibration.knowledge is not None or calibration.padding == "count"
    check_readable_by(model, examples, data, texts_too)
    keep_gradients(model)
    check_readable(model, layers)
    check_causal(model)
    processes.join()
    untouched = base_fingerprint(model)
    place = _place(wanted, folder, model)
    if isinstance(knowledge, QuestionSet):
        calibration, knowledge = dataclasses.replace(calibration, knowledge=knowledge), None
    texts = None if knowledge is None else _texts(knowledge)
    if texts is None and calibration.knowledge:
        texts = knowledge_texts(calibration.knowledge)
    texts = texts and choose(texts, calibration.examples, seed)
    site = Site(model, place, survey_cap(wanted, layers, blocks), targets, tell=on_progress or unseen, device=_device(model))
    at = _Looked(site, tokenizer, examples, texts, data.max_length, calibration, seed)
    needs, found = method_of(wanted).needs, None
    if needs:
        with alone(place, wait=True):  # of several scripts that share a folder the first looks, and the others find it
            found = at.look(needs)
    made = make_plan(wanted, found) if found is not None else make_plan_without_survey(wanted, layers, blocks)
    adapted = attach(model, made, found, dropout, seed, base)
    batch = check_batch(examples.rows, tokenizer.pad_token_id)
    adapted.farss = Prepared(made, found, batch, tokenizer, prompt_facts(examples.as_asked(data), tokenizer), untouched, processes.rank())
    return adapted


def _checked(name: str, given: Any, kind: Any) -> Any:
    """A configuration, or its defaults, whose values are of their kinds: Python asks nobody.

    Raises:
        ConfigError: one is not.
    """
    if given is not None and not isinstance(given, kind):
        raise ConfigError(f"{name} is a {type(given).__name__}: give a farss.{kind.__name__}, such as farss.{kind.__name__}()")
    return checked(given or kind(), name)


def _examples(dataset: Any, data: DataConfig, tokenizer: Any, seed: int, most: int) -> Tokenized:
    """The user's rows, or those of a file: `most` of them, drawn with the seed, as a few hundred are looked at. Of a stream, which may
    have no end, the first ones.

    Raises:
        ConfigError: it is something else.
        DataError: see `load_examples`.
    """
    wanted = min(most, data.limit or most)
    if isinstance(dataset, (str, Path)):
        return load_examples(dataclasses.replace(data, train=str(dataset), limit=wanted), tokenizer, seed)
    if isinstance(dataset, Mapping):
        raise ConfigError(f"dataset is a {type(dataset).__name__} of {', '.join(map(str, dataset))}: give the rows of one of them")
    if hasattr(dataset, "to_dict") and hasattr(dataset, "iloc"):  # pandas'
        table = dataset.iloc[choose(range(len(dataset)), wanted, seed)]
        dataset = [{name: _python(value) for name, value in row.items()} for row in table.to_dict("records")]
    rows = dataset if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") else list(itertools.islice(dataset, wanted))
    drawn = [rows[place] for place in choose(range(len(rows)), wanted, seed)]
    return tokenize_rows(drawn, dataclasses.replace(data, limit=None), tokenizer, seed)


def _python(value: Any) -> Any:
    """A cell of pandas' without NumPy, in which Parquet files' lists are arrays."""
    return value.tolist() if hasattr(value, "tolist") else value


def _texts(knowledge: Iterable[str]) -> list[str]:
    """The user's knowledge texts.

    Raises:
        ConfigError: it is a text or a file's name, or empty.
        DataError: one of them is no text, or has nothing in it.
    """
    if isinstance(knowledge, (str, Path)):
        raise ConfigError(
            f"knowledge={str(knowledge)[:60]!r} is one text: give a list of texts, or name a file with "
            "calibration=CalibrationConfig(knowledge=...)"
        )
    texts = [cell({"knowledge": text}, "knowledge", number) for number, text in enumerate(knowledge, 1)]
    if not texts:
        raise ConfigError("knowledge holds no text: give a list of texts, or None for texts that the model writes by itself")
    return texts


def _place(wanted: PlanConfig, folder: Path | str | None, model: Any) -> Path:
    """Where the survey is kept: the user's folder, or a temporary one that all processes share, deleted when the model is."""
    if folder or method_of(wanted).needs is None:
        return Path(folder or "")
    place = Path(processes.shared(tempfile.mkdtemp(prefix="farss-survey-") if processes.rank() == 0 else None))
    if processes.rank() == 0:
        weakref.finalize(model, shutil.rmtree, place, ignore_errors=True)
    if not processes.shared(all(processes.gathered(place.is_dir()))):
        raise FarssError(
            "processes on several machines share no temporary folder: give farss.prepare a folder= on a disk that all of them see"
        )
    return place


def _device(model: Any) -> torch.device | None:
    """The GPU, for a model that its trainer is still to move there, and that may be moved; None: where the model is."""
    waits = torch.cuda.is_available() and model.device.type == "cpu" and not is_quantised(model)
    return torch.device("cuda", torch.cuda.current_device()) if waits else None


@dataclass(frozen=True)
class _Looked:
    """What a model is looked at with, before it is planned."""

    site: Site
    tokenizer: Any
    examples: Tokenized
    knowledge: list[str] | None
    """None: what the model writes by itself."""
    max_length: int
    calibration: CalibrationConfig
    seed: int

    @cached_property
    def fingerprint(self) -> str:
        """Of the model, all of which is read for it."""
        return weights_fingerprint(self.site.model)

    def look(self, needs: Reading) -> Survey:
        """What a method looks at; the first process does it for all where they cannot share it."""
        texts = processes.shared([self._batches(text, needs) for text in needs.texts] if processes.rank() == 0 else None)
        if processes.rank() == 0 or needs.in_parts:
            meta = {"model": self.fingerprint}
            look(dataclasses.replace(self.site, meta=meta), needs, texts, self.calibration, self.seed)
        processes.wait()
        return Survey.load(self.site.folder)

    def _batches(self, text: str, needs: Reading) -> list[dict[str, Tensor]]:
        rows = self.examples.rows if text == "task" else self._knowledge()
        return batches_for(needs, rows, self.calibration, self.tokenizer.pad_token_id, self.seed, self.max_length)

    def _knowledge(self) -> list[Row]:
        if self.knowledge is not None:
            return plain_rows(self.knowledge, self.tokenizer, self.max_length)
        asked = self.calibration.examples, min(LENGTH, self.max_length), self.seed
        path = self.site.folder / f"own-text-{'-'.join(map(str, (*asked, self.fingerprint)))}.json"
        if not path.is_file():  # kept, for another device or another kernel would write another one when it is prepared again
            model, gpu = self.site.model, self.site.device
            whole = tensors_of(model)
            with placed(whole, gpu) if gpu and fits_beside(whole, gpu) else nullcontext():
                write_json(path, own_text(model, self.tokenizer, *asked))
        return unlearnt(read_json(path))


def export(
    model: Any, folder: Path | str, rank: int | None = None, energy: float | None = None, checkpoint: Path | str | None = None
) -> Exported | None:
    """Write the portable adapter of a model from `prepare`, checked on its untouched base.

    Args:
        model: the trained `PeftModel` (or what your trainer wrapped around it, unwrapped).
        folder: where the adapter goes.
        rank: compress to this rank; None: exact.
        energy: compress each layer to this share of its change's squared Frobenius norm; None: exact.
        checkpoint: a folder in which a trainer saved the model's adapters, whose weights are taken up first: of a training whose
            weights were spread over processes. The model is then one that was prepared with the same arguments and `folder`.

    Returns:
        What was written; None in any process but the first, which writes.

    Raises:
        FarssError: the model was not prepared by farss, its base was trained too, or the check failed (nothing is written then).
    """
    prepared = getattr(model, "farss", None)
    if not isinstance(prepared, Prepared):
        raise FarssError("this model was not made by farss.prepare: export the object that it returned, unwrapped from any trainer")
    if spread := [name for name, parameter in model.named_parameters() if f".{TRAINED}" in name and is_sharded(parameter)]:
        raise FarssError(
            f"{spread[0]} is spread over the processes (FSDP or ZeRO-3): save the model with its trainer (trainer.save_model), prepare it "
            "once more in a single process with the same arguments and folder, and give its place to farss.export(..., checkpoint=...)"
        )
    if checkpoint is not None:
        load_trained(model, Path(checkpoint))
    base = getattr(model.get_base_model().config, "_name_or_path", "")
    if processes.rank() or prepared.rank:
        return None
    if others := [name for name, parameter in model.named_parameters() if parameter.requires_grad and not OURS.search(name)]:
        raise FarssError(
            f"{others[0]} was trained beside the adapter ({len(others)} such weights in all), and an adapter for the original base does "
            "not hold that: train what requires a gradient in the prepared model and nothing else"
        )
    if base_fingerprint(model) != prepared.base:
        raise FarssError(
            "weights of the base model changed since farss.prepare (its head, norms or embeddings were trained too, it was cast, or an "
            "adapter was merged into it and taken out again?), and an adapter for the original base does not hold that: train what "
            "requires a gradient in the prepared model and nothing else; if that was done, save the model, prepare it once more and give "
            "the saved folder to farss.export(..., checkpoint=...)"
        )
    return export_adapter(model, prepared.plan, folder, prepared.batch, base, rank, energy, prepared.tokenizer, prepared.prompt)


def trainer_callback(model: Any) -> Any:
    """A callback for transformers' `Trainer` (and TRL's), which forgets on resume that a model has two active adapters, and does not find
    the best checkpoint (`load_best_model_at_end`), as its adapters lie in subfolders.

    Args:
        model: from `prepare`.
    """
    from transformers import TrainerCallback

    class KeepActive(TrainerCallback):
        """Activates both adapters before training begins or goes on, and takes up the best weights at its end."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            activate(model)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.load_best_model_at_end and state.best_model_checkpoint:
                load_trained(model, Path(state.best_model_checkpoint))

    return KeepActive()
