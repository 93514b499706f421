"""The order of the steps, and what each one reads and writes in the run folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from farss.adapter import attach
from farss.artifacts import Layer, Plan, Scores, Survey, write_json, write_text
from farss.boundary import Boundary, Prober, Setting, find
from farss.boundary import prepare as prepare_search
from farss.card import write_card
from farss.config import Config, DataConfig, EvaluateConfig, ModelConfig, PlanConfig, QuestionSet
from farss.data import Row, Tokenized, calibration_batches, choose, collate, load_examples, plain_rows, unlearnt
from farss.errors import ConfigError, FolderError
from farss.evaluate import Summary, evaluate, read_scores, summarise
from farss.folder import (
    BASE_KEYS,
    BOUNDARY_KEYS,
    COMPRESSED_KEYS,
    EVALUATE_KEYS,
    EXPORT_KEYS,
    PLAN_KEYS,
    READING_KEYS,
    SURVEY_KEYS,
    TRAIN_KEYS,
    Folder,
    options_of,
    resolve,
)
from farss.llamacpp import write_gguf
from farss.memory import peak_gib, reset_peak
from farss.merging import merge, merged_difference
from farss.methods import Reading, Regime
from farss.models import (
    computing_dtype,
    device_of,
    empty_model,
    fingerprint,
    layer_shapes,
    left_out,
    load_model,
    load_tokenizer,
    loaded_dtype,
    multiplies_in,
    quiet,
    stored_dtype,
    tokenizer_fingerprint,
)
from farss.plan import check_plan, make_plan, make_plan_without_survey, method_of, require_boundary, survey_cap
from farss.portable import export, load_adapter, step_zero
from farss.prepared import write_prepared
from farss.recovery import knowledge_alone, recover, recovery_rows
from farss.report import write_report
from farss.rows import example_rows, knowledge_texts, question_rows, text_rows
from farss.survey import LENGTH, own_text, read_layers, survey
from farss.tasks.course import Course, prepare_course
from farss.train import TrainResult, products, restore, train, training_steps

Result = TypeVar("Result")
Tell = Callable[[str, int, int, str], None]
"""Called with (step, done, total, a line to show)."""

STEPS = ("survey", "plan", "train", "export", "evaluate", "report")
CHECK_PROMPTS = 4
"""Real examples on which an exported adapter is compared with the trained model."""


def silent(step: str, done: int, total: int, line: str) -> None:
    """Tell nobody."""


class Loaded(dict[tuple[str, str], Any]):
    """What this process has read already. Sent to another process it is empty: a tokenizer of a model's own code cannot be sent."""

    def __reduce__(self) -> tuple[type[Loaded], tuple[()]]:
        return Loaded, ()


@dataclass
class Run:
    """One method, one seed, one folder. Each step can be called alone; it calls the steps it needs first."""

    config: Config
    shared: Path | None = None
    """Folder whose `base/` and `survey/` (or other statistics) are used instead of this run's own, in a comparison."""
    statistics_folder: Path | None = None
    """Folder whose statistics are used instead, where they differ from the shared ones."""
    shared_config: Config | None = None
    """Configuration of what is shared (statistics, questions, the search for a boundary); None: the run's own."""
    label: str = ""
    """Its name in a comparison."""
    beside: list[PlanConfig] = field(default_factory=list)
    """Plans of other runs, for which the shared statistics shall be wide enough."""
    tell: Tell = silent
    loaded: Loaded = field(default_factory=Loaded, repr=False)
    """What was read already; the runs of a comparison read nothing twice."""
    _live: Any = field(default=None, repr=False)
    """The trained model, while it is in memory."""
    _regime: Regime | None = field(default=None, repr=False)
    """What its method does beside the loss."""

    def __post_init__(self) -> None:
        quiet()
        self.config = resolve(self.config)
        self.folder = Folder(self.config.out)
        method_of(self.config.plan)

    # --- places -----------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def common(self) -> Folder:
        """The folder that holds `base/`."""
        return Folder(self.shared) if self.shared else self.folder

    @property
    def place(self) -> Folder:
        """The folder that holds `survey/` and other statistics."""
        return Folder(self.statistics_folder) if self.statistics_folder else self.common

    @property
    def common_config(self) -> Config:
        """The configuration of what is shared, so that every run of a comparison is asked the same."""
        return self.shared_config or self.config

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self._once(load_tokenizer, self.config.model)

    @cached_property
    def examples(self) -> Tokenized:
        """The tokenised training examples."""
        if not self.config.data.train:
            raise ConfigError("data.train is empty: give a file of training examples, or a data set's name on a hub")
        return self._examples(self.config)

    @cached_property
    def common_examples(self) -> Tokenized:
        """The examples that the shared statistics are estimated on."""
        return self._examples(self.common_config)

    def _examples(self, config: Config) -> Tokenized:
        def read(model: ModelConfig, data: DataConfig, seed: int) -> Tokenized:
            return load_examples(data, self.tokenizer, seed)

        return self._once(read, config.model, config.data, config.seed)

    @cached_property
    def shapes(self) -> tuple[dict[str, Layer], int]:
        """Target layers and number of blocks."""
        return self._once(layer_shapes, self.config.model)

    def _once(self, read: Callable[..., Result], *options: Any) -> Result:
        key = read.__qualname__, repr(options)
        if key not in self.loaded:
            self.loaded[key] = read(*options)
        known: Result = self.loaded[key]
        return known

    @cached_property
    def method(self) -> Any:
        """The fine-tuning method."""
        return method_of(self.config.plan)

    @property
    def searches(self) -> bool:
        """Whether the boundary is to be found."""
        return self.config.plan.boundary == "auto" and self.method.boundary

    @cached_property
    def search_setting(self) -> Setting:
        """What a search for the boundary compares, on what, and what it costs."""
        return prepare_search(self.common_config, self.common_examples, self.tokenizer, self.shapes[1])

    def claim(self) -> None:
        """Check the inputs and make the folder ours. Nothing is written before all of it is known to be usable."""
        self.check_inputs()
        self.check_unchanged()
        self.folder.claim(self.config, versions())

    def check_inputs(self) -> None:
        """Read the tokenizer, the data and every question file, and plan what can be planned without a survey."""
        if any(self.folder.record(step) for step in STEPS):
            return  # they were usable when the run began
        self._check_handover()
        _ = self.tokenizer, self.examples
        if self.config.calibration.knowledge:
            self._once(knowledge_texts, self.config.calibration.knowledge)
        self._once(check_questions, self.config.evaluate)
        if self.config.evaluate.recovery:
            recovery_rows(self.common_config, self.tokenizer)
        layers, blocks = self.shapes
        for boundary in self.search_setting.schedule.candidates if self.searches else [self.config.plan.boundary]:
            check_plan(replace(self.config.plan, boundary=boundary), layers, blocks, self.config.calibration.svd)

    def _check_handover(self) -> None:
        """Find out before hours of training what cannot be handed over after it.

        Raises:
            ConfigError: a whole model is wanted of quantised weights, or weights would be rounded where their start is taken out.
        """
        config = self.config
        residual = config.adapter.base == "residual" and self.method.takes_out and config.export.to != "merged"
        if residual and config.model.quantization == "none" and (dtype := loaded_dtype(config.model)) != torch.float32:
            raise ConfigError(
                f"adapter.base='residual' rounds the weights without their start to {str(dtype).removeprefix('torch.')}, and no adapter "
                "for the original ones is exact: set adapter.base=untouched, or model.dtype=float32"
            )
        if config.model.quantization == "none" or config.plan.method == "full":
            return
        if not self.method.plain_lora:
            raise ConfigError(
                f"plan.method={config.plan.method!r} is handed over as a whole model, and nothing can be merged into quantised weights: "
                "set model.quantization=none"
            )
        if config.export.to == "merged":
            raise ConfigError("export.to='merged', but nothing can be merged into quantised weights: set export.to=peft")

    def check_unchanged(self) -> None:
        """Refuse a folder that holds results of other options.

        Raises:
            FolderError: the first option that differs is named.
        """
        self.place.is_done("survey", self._survey_options, redo=self.method.needs != "survey")
        if self.searches and self._may_replan:
            self.place.is_done(self._boundary_step, self._boundary_options)
        self.folder.is_done("plan", self._plan_options, redo=self._may_replan)
        self.folder.is_done("train", self._train_options)

    @property
    def _survey_options(self) -> dict[str, Any]:
        return options_of(self.common_config, SURVEY_KEYS)

    @property
    def steps_before(self) -> list[str]:
        """The shared steps that come before the plan."""
        needs = self.method.needs
        return [needs if isinstance(needs, str) else needs.name, *([self._boundary_step] if self.searches else [])]

    @property
    def _boundary_step(self) -> str:
        return f"boundary-{self._searched_for}"

    @property
    def _searched_for(self) -> str:
        """Methods and variants of one comparison search apart; the seeds and learning rates of one of them use one search."""
        return self.label or self.config.plan.method

    @property
    def _boundary_options(self) -> dict[str, Any]:
        options = options_of(self.common_config, BOUNDARY_KEYS) | self._products
        del options["plan.boundary"]  # a search is the same, whatever was chosen before it
        return options

    @property
    def _plan_options(self) -> dict[str, Any]:
        return options_of(self.config, PLAN_KEYS)

    @property
    def _train_options(self) -> dict[str, Any]:
        return options_of(self.config, (*PLAN_KEYS, *TRAIN_KEYS)) | self._products

    @property
    def _products(self) -> dict[str, str]:
        """What `train.precision: auto` means on this machine: a result depends on it."""
        return {"train.precision": products(self.config.train, device_of(self.config.model))}

    @property
    def _may_replan(self) -> bool:
        """A plan costs seconds: it is made again as long as nothing was trained from it."""
        return self.folder.record("train") is None

    # --- steps ------------------------------------------------------------------------------------------------------

    def survey(self) -> Survey:
        """`survey/`: the statistics and decompositions."""
        config = self.common_config
        options, place = self._survey_options, self.place.path / "survey"
        if self.place.is_done("survey", options) and place.is_dir():
            return _check_cap(Survey.load(place), self._cap(config.plan))
        cap = self._cap(config.plan, *self.beside)
        parts = calibration_batches(
            self.common_examples.rows, config.calibration, self.tokenizer.pad_token_id, config.seed, config.data.max_length
        )
        reset_peak(device_of(config.model))
        model = self._to_look_at()
        meta = {"model": fingerprint(model), "tokenizer": tokenizer_fingerprint(self.tokenizer), "path": config.model.path}
        with self.place.step("survey", options) as facts:
            result = survey(
                *(model, parts, place, cap, config.model.targets, config.calibration.fisher, config.seed, meta),
                lambda done, total, line: self.tell("survey", done, total, line),
                *(config.calibration.svd, device_of(config.model)),
            )
            facts |= {name: result.meta[name] for name in ("seconds", "peak_memory_gib")}
        return result

    def _cap(self, *plans: PlanConfig) -> int:
        """How many directions at each end the statistics hold that all of these plans can be made of."""
        return max(survey_cap(plan, *self.shapes) for plan in plans)

    def reading(self, wanted: Reading) -> Survey:
        """`<its name>/`: what a method other than FARSS looks at before it is planned."""
        config = self.common_config
        options, place = options_of(config, READING_KEYS[wanted.of]), self.place.path / wanted.name
        device = device_of(config.model)
        if self.place.is_done(wanted.name, options) and place.is_dir():
            return _check_cap(Survey.load(place), self._cap(config.plan))
        cap = self._cap(config.plan, *self.beside)
        reset_peak(device)
        model = self._to_look_at()
        begun = time.monotonic()
        with self.place.step(wanted.name, options) as facts:
            meta = {"model": fingerprint(model), "tokenizer": tokenizer_fingerprint(self.tokenizer), "path": config.model.path}
            texts = [self._batches(text) for text in wanted.texts]
            result = read_layers(
                *(model, place, wanted.read, cap, texts, config.model.targets, meta),
                lambda done, total, line: self.tell(wanted.name, done, total, line),
                *(device, wanted.answers),
            )
            facts |= {"seconds": round(time.monotonic() - begun, 1), "peak_memory_gib": round(peak_gib(device), 2)}
        return result

    def _batches(self, text: str) -> list[dict[str, torch.Tensor]]:
        """The examples of the task, or of knowledge, that a reading looks at."""
        config = self.common_config
        rows = self.common_examples.rows if text == "task" else self._knowledge()
        real = replace(config.calibration, padding="ignore")
        return calibration_batches(rows, real, self.tokenizer.pad_token_id, config.seed)

    def _knowledge(self) -> list[Row]:
        """The knowledge text: the user's, or what the model writes by itself, which is kept in `own_text.jsonl`."""
        config = self.common_config
        source, count = config.calibration.knowledge, config.calibration.examples
        if source:
            return plain_rows(choose(knowledge_texts(source), count, config.seed), self.tokenizer, config.data.max_length)
        path, options = self.place.path / "own_text.jsonl", options_of(config, READING_KEYS["knowledge"])
        if not (self.place.is_done("own_text", options) and path.is_file()):
            length = min(LENGTH, config.data.max_length)
            writer = load_model(config.model)  # on the GPU, where there is one: the reading's own model stays on the CPU
            with self.place.step("own_text", options):
                ids = own_text(
                    writer, self.tokenizer, count, length, config.seed, lambda done, total: self.tell("own text", done, total, "")
                )
                texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                rows = [json.dumps({"text": text, "tokens": row}, ensure_ascii=False) for text, row in zip(texts, ids, strict=True)]
                write_text(path, "\n".join(rows) + "\n")
        return unlearnt([json.loads(line)["tokens"] for line in path.read_text(encoding="utf-8").strip().split("\n")])

    def statistics(self) -> Survey | None:
        """What the method looks at before it is planned."""
        if isinstance(self.method.needs, Reading):
            return self.reading(self.method.needs)
        return self.survey() if self.method.needs == "survey" else None

    def boundary(self) -> Boundary:
        """`boundary.json`: the first deep block, found by short probes; shared by the seeds of a comparison.

        Raises:
            ConfigError: the method has no boundary.
        """
        require_boundary(self.config.plan)
        step, options = self._boundary_step, self._boundary_options
        place = self.place.path / "boundary" / self._searched_for
        if not self.place.is_done(step, options):
            known, config = self.survey(), self.common_config

            def tell(done: int, total: int, line: str) -> None:
                self.tell("boundary", done, total, line)

            with self.place.step(step, options) as facts:
                load, adapted = (lambda: load_model(config.model)), (lambda plan: self._adapted(plan, config))
                found = find(Prober(self.search_setting, config, self.tokenizer, known, load, adapted, place, tell))
                found.save(place / "boundary.json")
                facts |= {"seconds": found.seconds}
        result = Boundary.load(place / "boundary.json")
        result.save(self.path / "boundary.json")
        return result

    def plan(self) -> Plan:
        """`plan.json`: ranks and directions. Made again when its options change and nothing was trained from it."""
        options = self._plan_options
        if self.folder.is_done("plan", options, redo=self._may_replan):
            return Plan.load(self.path / "plan.json")
        config, known, notes = self.config.plan, self.statistics(), []
        if self.searches:
            found = self.boundary()
            config, notes = replace(config, boundary=found.chosen), [found.sentence]
        made = make_plan(config, known) if known else make_plan_without_survey(config, *self.shapes)
        notes += [*made.notes, *(left_out(empty_model(self.config.model)) if made.layers else [])]
        result = replace(made, notes=notes)
        handed_over = "" if self.method.plain_lora else ", handed over as a whole model: no plain LoRA computes it"
        self.tell("plan", 1, 1, f"{result.parameters:,} parameters{handed_over}" if result.layers else "every weight trains")
        with self.folder.step("plan", options):
            result.save(self.path / "plan.json")
        return result

    def train(self) -> TrainResult:
        """`checkpoints/` and `train.json`."""
        plan, options = self.plan(), self._train_options
        if self.folder.is_done("train", options):
            return TrainResult.load(self.path / "train.json")
        model = self._adapted(plan)
        before = step_zero(model, self._prompts(model)) if plan.layers else {}
        with self.folder.step("train", options) as facts:
            result = train(
                *(model, self.tokenizer, self.examples, self.config, self.path),
                on_progress=lambda done, total, loss: self.tell("train", done, total, f"loss {loss:.3f}" if loss is not None else ""),
                regime=self._regime,
                course=self._course,
            )
            data = self.examples
            result = replace(result, examples=len(data.rows), truncated=data.truncated, dropped=data.dropped)
            result.save(self.path / "train.json")
            facts |= {"seconds": result.seconds, **({"step_zero": before} if before else {})}
        self._live = model
        return result

    @property
    def _course(self) -> Course | None:
        """What is looked at on the way; the same for every run of a comparison."""
        rows, options = self.examples.rows, self.config.train
        tokens = training_steps(options, len(rows)) * options.batch_size * self.examples.tokens / len(rows)
        return prepare_course(self.common_config, self.tokenizer, tokens)

    def prepared(self) -> Path:
        """`prepared/`: a start for another trainer."""
        target, plan = self.path / "prepared", self.plan()
        if target.is_dir() and Plan.load(target / "plan.json") != plan:
            raise FolderError(f"{target} was prepared for another plan: delete it, or choose another out")
        if not target.is_dir():
            write_prepared(self._adapted(plan), plan, self.tokenizer, target, self.config.model.path)
        return target

    def export(self) -> Path:
        """`adapter/` (or `model/`): what is handed over."""
        self.train()
        plan, options = self.plan(), options_of(self.config, EXPORT_KEYS)
        target = self.path / ("model" if self._whole else "adapter")
        if self.folder.is_done("export", options, redo=True) and target.is_dir():
            return target
        self.tell("export", 0, 1, "")
        self.trained()  # first: where its weights are deleted, the record of what was exported stays
        with self.folder.step("export", options) as facts:
            if self._whole:
                merge(self.trained(), plan, self.tokenizer, target, stored_dtype(self.config.model), self.config.model.path)
                facts_of_it = {"method": plan.method, "boundary": plan.boundary, "blocks": plan.blocks, "base": self.config.model.path}
                # Where a GPU has room for one model only, the one that was written stays in its files and the CPU's memory.
                written = replace(self.config.model, path=str(target), dtype="auto", quantization="none")
                stored = load_model(written, device=torch.device("cpu"), as_stored=True)
                facts |= {"logit_difference": merged_difference(self.trained(), stored, self._prompts(self.trained()))}
                write_json(target / "farss.json", {**facts_of_it, "parameters": plan.parameters, **facts})
                write_card(target, command=self._command)
            else:
                batch = self._prompts(self.trained())
                choice = self.config.export
                done = export(self.trained(), plan, target, batch, self.config.model.path, choice.rank, choice.energy, self.tokenizer)
                facts |= {"logit_difference": done.logit_difference, "rank": done.rank, "lost": done.lost}
            if self.config.export.to == "gguf" and not self._whole:
                write_gguf(target, self.trained().get_base_model().config)
        self.tell("export", 1, 1, "")
        return target

    @property
    def _whole(self) -> bool:
        """Whether a model is handed over, and not an adapter."""
        return self.config.export.to == "merged" or not self.method.plain_lora

    def evaluate(self) -> Summary:
        """`base/scores.json` (before), `scores.json` (after) and `summary.json`."""
        self.evaluate_base()
        self.train()
        options = self._evaluate_options
        if not self.folder.is_done("evaluate", options, redo=True):
            model = self._handed_over()
            with self.folder.step("evaluate", options):
                self._ask(model, self.path, "trained")
        summary = self.summarise(self.config.evaluate.full_scores)
        for target in (self.path / "adapter", self.path / "model"):
            if (target / "farss.json").is_file():
                write_card(target, dataclasses.asdict(summary), self._command)
        return summary

    def recover_base(self) -> None:
        """`base-recovered/`: the untouched model after the steps of `recover`."""
        self._recover(
            "recover-base", self.common, "base-recovered", lambda: load_model(self.config.model), ("model.dtype", "model.quantization")
        )

    def recover(self) -> None:
        """`recovered/`: knowledge asked once more, after a few steps of question answering."""
        self.export()
        self.recover_base()
        self._recover("recover", self.folder, "recovered", self._as_handed_over, EXPORT_KEYS)
        self.summarise(self.config.evaluate.full_scores)

    def _recover(self, step: str, place: Folder, name: str, load: Callable[[], Any], keys: tuple[str, ...]) -> None:
        config, target, options = self.common_config, place.path / name, self._recover_options(keys)
        if place.is_done(step, options, redo=True):
            return
        if (place.record(step) or {"options": options})["options"] != options:
            shutil.rmtree(target / "checkpoints", ignore_errors=True)  # of other steps, or of another model
        self._live = None  # one model in memory at a time
        with place.step(step, options):
            rows = recovery_rows(config, self.tokenizer)
            model = recover(load(), self.tokenizer, rows, config, target, lambda done, total, loss: self.tell(step, done, total, ""))
            self._ask(model, target, step, knowledge_alone(config))

    def _as_handed_over(self) -> Any:
        """The result as its user loads it."""
        target = self.export()
        if target.name == "model":
            return load_model(replace(self.config.model, path=str(target), quantization="none"))
        return load_adapter(load_model(self.config.model), target)

    @property
    def _command(self) -> str:
        return f"farss compare {self.shared / 'config.yaml'}" if self.shared else f"farss run {self.path / 'config.yaml'}"

    def evaluate_base(self) -> Scores:
        """`base/`: the untouched model's scores."""
        options = options_of(self.common_config, BASE_KEYS)
        if not self.common.is_done("evaluate-base", options, redo=True):
            with self.common.step("evaluate-base", options):
                self._ask(load_model(self.config.model), self.common.path / "base", "base")
        return Scores.load(self.common.path / "base" / "scores.json")

    def summarise(self, full_scores: str | Path | None, only: Callable[[str], bool] | None = None, save: bool = True) -> Summary:
        """`summary.json`: K, T and KT from the stored scores, of all questions or those whose id `only` takes."""
        full = Path(full_scores) if full_scores else None
        summary = summarise(self.common.path / "base", self.path, full, self.config, only)
        pair = self.common.path / "base-recovered", self.path / "recovered"
        if self.config.evaluate.recovery and all((place / "scores.json").is_file() for place in pair):
            summary = replace(summary, recovered=summarise(*pair, None, self.config, only).K)
        if save:
            summary.save(self.path / "summary.json")
        return summary

    def report(self) -> Path:
        """`report.html`, drawn from what the folder holds."""
        return write_report(self.path)

    def all(self) -> Path:
        """Every step."""
        self.all_but_report()
        return self.report()

    def base(self) -> None:
        """What is measured of the untouched model."""
        if self.config.evaluate.asks:
            self.evaluate_base()
        if self.config.evaluate.recovery:
            self.recover_base()

    @property
    def source(self) -> tuple[str, str, str] | None:
        """Where its statistics will lie, what they look at and their name; None: it has a plan already, or needs none."""
        needs = self.method.needs
        if needs == "nothing" or self.folder.record("plan") is not None:
            return None
        name, of = (needs, needs) if isinstance(needs, str) else (needs.name, "knowledge" if "knowledge" in needs.texts else needs.name)
        return str(self.place.path), of, name

    def before_plan(self) -> None:
        """What other runs of a comparison may share: the base's answers, statistics, a boundary."""
        self.claim()
        self.base()  # first: one model in memory at a time, and a question that cannot be asked is found early
        if self.folder.record("plan") is None:
            self.statistics()
            if self.searches:
                self.boundary()

    def all_but_report(self) -> None:
        """Every step that the table of a comparison needs."""
        self.before_plan()
        self.export()
        if self.config.evaluate.asks:
            self.evaluate()
        if self.config.evaluate.recovery:
            self.recover()
        self._live = None  # the next run of a comparison needs the memory

    @property
    def complete(self) -> bool:
        """Whether all of that is done, as it is configured now."""
        steps = {"export": options_of(self.config, EXPORT_KEYS)}
        steps |= {"evaluate": self._evaluate_options} if self.config.evaluate.asks else {}
        steps |= {"recover": self._recover_options(EXPORT_KEYS)} if self.config.evaluate.recovery else {}
        return all(self.folder.is_done(step, options, redo=True) for step, options in steps.items())

    @property
    def _evaluate_options(self) -> dict[str, Any]:
        return options_of(self.common_config, EVALUATE_KEYS) | options_of(self.config, COMPRESSED_KEYS)

    def _recover_options(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """`keys`: on which the model depends that is loaded."""
        return options_of(self.common_config, EVALUATE_KEYS) | options_of(self.config, keys)

    def drop_weights(self) -> None:
        """Delete the trained weights in every form; what was measured of them stays, and the run counts as done."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        for path in (self.path / name for name in ("adapter", "model", "recovered")):
            for file in [*path.rglob("*.safetensors"), *path.rglob("*.gguf"), *path.rglob("*.bin")]:
                file.unlink()

    # --- models -----------------------------------------------------------------------------------------------------

    def _to_look_at(self) -> Any:
        """The base model, whose blocks go to the GPU one at a time, unless they are quantised."""
        model = self.config.model
        return load_model(model, device=torch.device("cpu") if model.quantization == "none" else None, as_stored=True)

    def _adapted(self, plan: Plan, config: Config | None = None) -> Any:
        """The base model with this plan's adapters, before training; with another configuration's seed, if one is given."""
        config = config or self.config
        # Full fine-tuning updates the weights themselves, and bfloat16 would round small updates away.
        model = load_model(config.model, None if plan.layers else torch.float32)
        found = self.statistics()
        if found is not None:
            check_fingerprint(found, model)
        self._regime = self.method.regime(config.plan) if self.method.regime else None
        return attach(model, plan, found, config.train.dropout, config.seed, config.adapter.base, self._regime)

    def trained(self) -> Any:
        """The trained model: still in memory, or rebuilt from the plan and the last checkpoint."""
        if self._live is None:
            model = self._adapted(self.plan())
            restore(model, self.path)
            self._live = model  # not before: where the weights are gone, it is untrained
        return self._live.eval()

    def _prompts(self, model: Any) -> dict[str, torch.Tensor]:
        """A few real examples, on which models are compared."""
        batch = collate(self.examples.rows[:CHECK_PROMPTS], self.tokenizer.pad_token_id)
        return {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}

    def _handed_over(self) -> Any:
        """The trained model with the weights that are handed over: full fine-tuning trains in float32, and is saved as the
        base was; a compressed adapter is another one than was trained."""
        if (self.config.export.rank or self.config.export.energy) and not self._whole:
            self.export()
            self._live = None  # one model in memory at a time
            return self._as_handed_over()
        model, stored = self.trained(), stored_dtype(self.config.model)
        for parameter in [] if self.plan().layers else model.parameters():  # not the buffers: whoever loads it has exact rotary frequencies
            parameter.data = parameter.data.to(stored).to(computing_dtype(stored, model.device))
        return model

    def _ask(self, model: Any, folder: Path, who: str, config: Config | None = None) -> None:
        options = self.config.model
        meta = {"path": options.path, "method": "base" if who.endswith("base") else self.config.plan.method}
        meta |= {"dtype": options.dtype} if options.dtype != "auto" else {}  # another precision answers otherwise
        meta |= {"quantization": options.quantization} if options.quantization != "none" else {}
        evaluate(
            model,
            self.tokenizer,
            config or self.common_config,
            folder,
            meta,
            lambda name, done, total: self.tell(f"evaluate {who}", done, total, name),
        )


def check_questions(options: EvaluateConfig) -> None:
    """Read every question file, the general text and the scores of full fine-tuning once, so that a bad one is found before hours of
    training."""
    for entry in options.asked:
        if isinstance(entry, QuestionSet):
            question_rows(entry)
            example_rows(entry)
    if options.text:
        text_rows(options.text)
    if options.full_scores:
        read_scores(Path(options.full_scores))


def check_fingerprint(found: Survey, model: Any) -> None:
    """Refuse a survey that was made of another model.

    Raises:
        FolderError: with both fingerprints.
    """
    expected, actual = found.meta.get("model"), fingerprint(model)
    if expected != actual:
        raise FolderError(
            f"{found.folder} was made of a model with fingerprint {expected}, but this one has {actual}: survey again in a new folder"
        )


def _check_cap(found: Survey, cap: int) -> Survey:
    if found.cap < cap and any(min(layer.shape) > 2 * found.cap for layer in found.layers.values()):
        raise FolderError(
            f"{found.folder} kept {found.cap} directions at each end, and this plan may need {cap}: "
            f"choose another out, or delete that folder"
        )
    return found


def versions() -> dict[str, str]:
    """Versions of what a result depends on, the machine, and the commit where there is one."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    found["farss"] = _own_version()
    found["python"] = platform.python_version()
    found["machine"] = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads" + (
        f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ", no GPU"
    )
    if not multiplies_in(torch.bfloat16, device_of(ModelConfig())):
        found["machine"] += ", no units for bfloat16 products: computes in float32"
    found["date"] = time.strftime("%Y-%m-%d")
    return found


def _own_version() -> str:
    version = importlib.metadata.version("farss")
    here = Path(__file__).parent
    commit = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return f"{version} ({commit.stdout.strip()})" if commit.returncode == 0 else version
