"""The order of the steps, and what each one reads and writes in the run folder."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from farss import handover
from farss.adapter import attach
from farss.answers import Answers
from farss.artifacts import Plan, Scores, Survey
from farss.boundary import Boundary, Prober, Setting, find
from farss.boundary import prepare as prepare_search
from farss.config import Config, DataConfig, PlanConfig
from farss.errors import DataError, FolderError
from farss.folder import Folder, command, is_run_folder, resolve
from farss.inputs import Inputs, Loaded
from farss.jobs import Tell, silent
from farss.methods import SURVEY, Method, Regime
from farss.models import check_room, device_of, load_model, loaded_dtype, quiet, will_be_quantised
from farss.options import BOUNDARY_KEYS, EXPORT_KEYS, PLAN_KEYS, TRAIN_KEYS, options_of
from farss.plan import check_plan, make_plan, make_plan_without_survey, method_of, require_boundary
from farss.portable import check_batch, step_zero
from farss.prepared import check_method, was_prepared, write_prepared
from farss.prompts import prompt_facts
from farss.report import write_report
from farss.structure import check_unshared, left_out
from farss.surveys import Surveys, check_fingerprint
from farss.tasks.course import Course, prepare_course
from farss.tasks.outcomes import Only
from farss.tasks.reference import check_not_own
from farss.tasks.summary import Summary
from farss.train import TrainResult, check_options, restore, train, training_steps, with_products
from farss.versions import versions

log = logging.getLogger(__name__)


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
    """Plans of other runs, for which shared statistics shall be wide enough."""
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
        self.method: Method = method_of(self.config.plan)

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
    def inputs(self) -> Inputs:
        """What it reads."""
        return Inputs(self.config, self.common_config, self.loaded)

    @cached_property
    def surveys(self) -> Surveys:
        """What it knows of the model before it is planned."""
        return Surveys(self.inputs, self.place, self.tell, self.beside)

    @cached_property
    def answers(self) -> Answers:
        """What it and the untouched model are asked."""
        again = command("compare", self.shared) if self.shared else command("run", self.path)
        return Answers(self.inputs, self.folder, self.common, self.tell, again)

    @property
    def searches(self) -> bool:
        """Whether the boundary is to be found."""
        return self.config.plan.boundary == "auto" and self.method.boundary

    @cached_property
    def search_setting(self) -> Setting:
        """What a search for the boundary compares, on what, and what it costs."""
        return prepare_search(self.common_config, self.inputs.common_examples, self.inputs.tokenizer, self.inputs.shapes[1])

    def claim(self, trains: bool = True) -> None:
        """Check the inputs and make the folder ours. Nothing is written before all of it is known to be usable.

        Args:
            trains: more is to come than the survey and the plan, which need no room for a whole model on a GPU.
        """
        self.check_inputs(trains)
        self.check_unchanged()
        if self.config.compare.methods and is_run_folder(self.path):
            self.folder.check_kind(self.config)  # the comparison's configuration stays as it is
        else:
            self.folder.claim(self.config, versions())

    def check_inputs(self, trains: bool = True) -> None:
        """Read the tokenizer, the data and every question file, and plan what can be planned without a survey."""
        check_not_own(self.config)
        if self.has_trained:  # they were usable; what is asked may be asked anew
            if not self.answers.complete:
                self.inputs.check_questions()
                self.inputs.check_reference()
                with suppress(DataError):  # the training examples may be gone
                    self.inputs.check_as_trained()
            return
        if trains:
            handover.check(self.config, self.inputs.architecture, self.inputs.shapes[0])
            recomputes = self.inputs.architecture.supports_gradient_checkpointing
            # after a training in float32 the recovery trains adapters on weights as they are loaded
            dtypes = {self._trained_dtype, *([loaded_dtype(self.config.model)] if self.config.evaluate.recovery else [])}
            for dtype in dtypes:
                check_options(self.config.train, device_of(self.config.model), dtype, recomputes)
            without = "leave full out, and name the scores.json of another run in evaluate.full_scores: T is then relative to it"
            check_room(self.config.model, self.config.plan.method == "full", without if self.config.compare.methods else "")
        self.inputs.check()
        layers, blocks = self.inputs.shapes
        for boundary in self.search_setting.schedule.candidates if self.searches else [self.config.plan.boundary]:
            check_plan(replace(self.config.plan, boundary=boundary), layers, blocks, self.config.calibration.svd)

    @property
    def _trained_dtype(self) -> torch.dtype:
        """The precision of the base's weights while it trains."""
        return torch.float32 if self.config.plan.method == "full" else loaded_dtype(self.config.model)

    def check_unchanged(self) -> None:
        """Refuse a folder that holds results of other options.

        Raises:
            FolderError: the first option that differs is named.
        """
        for step, options in self.surveys.steps(self.method.needs).items():
            self.place.refuse_other(step, options)
        if self.searches:  # of one that was trained from, questions may change, and not how it was searched
            self._refuse_other_search(self._boundary_options if self._may_replan else options_of(self.common_config, ("boundary",)))
        self._refuse_other_plan()
        self._refuse_other_training()

    def check_weights(self) -> None:
        """Refuse to ask more of a result whose weights are deleted, before anything that it was asked is replaced.

        Raises:
            FolderError: they are.
        """
        if self.has_trained and self.answers.needs_weights and not (self._has_checkpoints or self._has_weights):
            raise handover.deleted(handover.place_of(self.config, self.path))

    @property
    def steps_before(self) -> list[str]:
        """The shared steps that come before the plan."""
        return [*self.surveys.names(self.method.needs), *([self._boundary_step] if self.searches else [])]

    @property
    def _boundary_step(self) -> str:
        return f"boundary-{self._searched_for}"

    @property
    def _searched_for(self) -> str:
        """Methods and variants of one comparison search apart; the seeds and learning rates of one of them use one search."""
        return self.label or self.config.plan.method

    @property
    def _boundary_options(self) -> dict[str, Any]:
        options = options_of(self.common_config, BOUNDARY_KEYS)
        del options["plan.boundary"]  # a search is the same, whatever was chosen before it
        return with_products(options, self.config, self.place.is_over(self._boundary_step))

    @property
    def _plan_options(self) -> dict[str, Any]:
        return options_of(self.config, PLAN_KEYS)

    @property
    def _train_options(self) -> dict[str, Any]:
        return with_products(options_of(self.config, (*PLAN_KEYS, *TRAIN_KEYS)), self.config, self.has_trained)

    @property
    def has_trained(self) -> bool:
        """Whether the training is over."""
        return self.folder.is_over("train")

    @property
    def _may_replan(self) -> bool:
        """A plan costs seconds: it is made again as long as nothing was trained from it."""
        begun = self.folder.record("train")
        return begun is None or not (begun["done"] or any((self.path / "checkpoints").glob("checkpoint-*")))

    def _refuse_other_search(self, options: dict[str, Any]) -> None:
        if self.place.is_over(self._boundary_step):  # one that failed, or was stopped, may be tried with others
            self.place.refuse_other(self._boundary_step, options)

    def _refuse_other_plan(self) -> None:
        if not self._may_replan:
            self.folder.refuse_other("plan", self._plan_options)
            for step, options in self.surveys.steps(self.method.needs).items():
                self._planned_from.refuse_other(step, options)

    @property
    def _planned_from(self) -> Folder:
        """The folder of the statistics that the plan was made from; in a comparison those of other options lie elsewhere."""
        known = (self.folder.record("plan") or {}).get("statistics")
        return Folder(self.path / known) if known else self.place

    def _refuse_other_training(self) -> None:
        if not self._may_replan:
            cure = None if self.has_trained else f"choose another out, or delete {self.path / 'checkpoints'} to train anew"
            self.folder.refuse_other("train", self._train_options, cure)

    @property
    def _is_planned(self) -> bool:
        statistics, made_from = self.surveys.steps(self.method.needs), self._planned_from
        other = any(made_from.is_other(step, options) for step, options in statistics.items())
        return not other and self.folder.is_done("plan", self._plan_options, makes=self.path / "plan.json")

    @property
    def _is_trained(self) -> bool:
        return self.folder.is_done("train", self._train_options, makes=self.path / "train.json")

    # --- steps ------------------------------------------------------------------------------------------------------

    def survey(self) -> Survey:
        """`survey/`: the statistics and decompositions."""
        return self.surveys.of(SURVEY)

    def statistics(self) -> Survey | None:
        """What the method looks at before it is planned."""
        return self.surveys.of(self.method.needs) if self.method.needs else None

    def boundary(self) -> Boundary:
        """`boundary.json`: the first deep block, found by short probes; shared by the seeds of a comparison.

        Raises:
            ConfigError: the method has no boundary.
        """
        require_boundary(self.config.plan)
        step, options = self._boundary_step, self._boundary_options
        place = self.place.path / "boundary" / self._searched_for
        self._refuse_other_search(options)
        if not self.place.is_done(step, options, makes=place / "boundary.json"):
            known, config = self.survey(), self.common_config

            def tell(done: int, total: int, line: str) -> None:
                self.tell("boundary", done, total, line)

            with self.place.step(step, options) as facts:
                load, adapted = (lambda: load_model(config.model)), (lambda plan: self._adapted(plan, config))
                found = find(Prober(self.search_setting, config, self.inputs.tokenizer, known, load, adapted, place, tell), options)
                found.save(place / "boundary.json")
                facts |= {"seconds": found.seconds}
        result = Boundary.load(place / "boundary.json")
        result.save(self.path / "boundary.json")
        return result

    def plan(self) -> Plan:
        """`plan.json`: ranks and directions. Made again when its options change and nothing was trained from it."""
        options = self._plan_options
        self._refuse_other_plan()
        if self._is_planned:
            return Plan.load(self.path / "plan.json")
        config, known, notes = self.config.plan, self.statistics(), []
        if self.searches:
            found = self.boundary()
            config, notes = replace(config, boundary=found.chosen), [found.sentence]
        made = make_plan(config, known) if known else make_plan_without_survey(config, *self.inputs.shapes)
        notes += [*made.notes, *(left_out(self.inputs.architecture) if made.layers else [])]
        result = replace(made, notes=notes)
        handed_over = "" if self.method.plain_lora else ", handed over as a whole model: no plain LoRA computes it"
        self.tell("plan", 1, 1, f"{result.parameters:,} parameters{handed_over}" if result.layers else "every weight trains")
        with self.folder.step("plan", options) as facts:
            result.save(self.path / "plan.json")
            facts["statistics"] = os.path.relpath(self.place.path, self.path)  # a comparison may be moved
        return result

    def train(self) -> TrainResult:
        """`checkpoints/` and `train.json`."""
        plan, options = self.plan(), self._train_options
        self._refuse_other_training()
        if self._is_trained:
            return TrainResult.load(self.path / "train.json")
        model = self._adapted(plan)
        before = step_zero(model, self._prompts) if plan.layers else {}
        with self.folder.step("train", options) as facts:
            result = train(
                *(model, self.inputs.tokenizer, self.inputs.examples, self.config, self.path),
                on_progress=lambda done, total, loss: self.tell("train", done, total, f"loss {loss:.3f}" if loss is not None else ""),
                regime=self._regime,
                course=self._course,
            )
            data = self.inputs.examples
            result = replace(result, examples=len(data.rows), truncated=data.truncated, dropped=data.dropped)
            result.save(self.path / "train.json")
            facts |= {"seconds": result.seconds, **({"step_zero": before} if before else {})}
        self._live = model
        return result

    @property
    def _course(self) -> Course | None:
        """What is looked at on the way; the same for every run of a comparison."""
        rows, options = self.inputs.examples.rows, self.config.train
        tokens = training_steps(options, len(rows)) * options.batch_size * self.inputs.examples.tokens / len(rows)
        return prepare_course(self.common_config, self.inputs.tokenizer, tokens)

    def prepared(self) -> Path:
        """`prepared/`: a start for another trainer."""
        check_method(self.config.plan.method, will_be_quantised(self.config.model))
        check_unshared(self.inputs.architecture, self.inputs.shapes[0])
        target, plan, model = self.path / "prepared", self.plan(), self.config.model
        prompt = prompt_facts(self._data_as_asked, self.inputs.tokenizer)
        if not target.is_dir():
            write_prepared(self._adapted(plan), plan, self.inputs.tokenizer, target, model.path, prompt, model.trust_remote_code)
        elif not was_prepared(target, plan, prompt, loaded_dtype(model)):
            raise FolderError(f"{target} was prepared for another plan, prompt or model.dtype: delete it, or choose another out")
        return target

    @property
    def _data_as_asked(self) -> DataConfig:
        return self.inputs.examples.as_asked(self.config.data)

    def export(self) -> Path:
        """`adapter/` (or `model/`): what is handed over."""
        handover.check_form(self.config)
        self.train()
        plan, options = self.plan(), options_of(self.config, (*EXPORT_KEYS, "data.system", "data.thinking"))  # the card names them
        target = handover.place_of(self.config, self.path)
        if self._is_exported(options) and not self.has_lost_weights:
            return target
        self.tell("export", 0, 1, "")
        model = self.trained()  # first: where its weights are deleted, the record of what was exported stays
        with self.folder.step("export", options) as facts:
            written = model, plan, self.inputs.tokenizer, replace(self.config, data=self._data_as_asked), self.path
            target, exactness = handover.write(*written, self._prompts, self.answers.command)
            facts |= exactness
        self.answers.write_cards()
        self.tell("export", 1, 1, "")
        return target

    def _is_exported(self, options: dict[str, Any]) -> bool:
        forms = [options, *([options | {"export.to": "gguf"}] if options["export.to"] == "peft" else [])]  # an adapter lies beside its GGUF
        return any(self.folder.is_done("export", each, makes=handover.made_by(self.config, self.path)) for each in forms)

    @property
    def has_lost_weights(self) -> bool:
        """Whether what is handed over is gone and can be written again: `compare.keep` has not deleted what it was made of."""
        return self._has_checkpoints and not self._has_weights

    @property
    def _has_checkpoints(self) -> bool:
        return (self.path / "checkpoints").is_dir()

    @property
    def _has_weights(self) -> bool:
        return handover.weights_are_there(handover.place_of(self.config, self.path))

    def evaluate(self) -> Summary:
        """`base/scores.json` (before), `scores.json` (after) and `summary.json`."""
        self.evaluate_base()
        self.train()
        asked = self.answers.after(self._scored)
        summary = self.answers.summarise(self.config.evaluate.full_scores)
        if asked or not self.shared:  # a comparison's table has written one with T, which a single run does not know
            self.answers.save(summary)
        return summary

    def evaluate_base(self) -> Scores:
        """`base/`: the untouched model's scores."""
        return self.answers.base(self._untouched)

    def recover_base(self) -> None:
        """`base-recovered/`: the untouched model after the steps of `recover`."""
        self.answers.recovered_base(self._untouched)

    def recover(self) -> None:
        """`recovered/`: knowledge asked once more, after a few steps of question answering."""
        self.export()
        self.recover_base()
        if self.answers.recovered(self._read_back) or not self.shared:
            self.summarise(self.config.evaluate.full_scores)

    def summarise(self, full_scores: str | Path | None, only: Only | None = None) -> Summary:
        """`summary.json`, and the card with it.

        Args:
            full_scores: of the full fine-tuning that T is relative to; None: there is no T.
            only: which questions count, by their ids; None: all.
        """
        summary = self.answers.summarise(full_scores, only)
        self.answers.save(summary)
        return summary

    def report(self) -> Path:
        """`report.html`, drawn from what the folder holds."""
        return write_report(self.path)

    def all(self) -> Path:
        """Every step."""
        self.all_but_report()
        return self.report()

    def warn(self) -> None:
        """Say what would be missed at the end."""
        if self.config.export.to == "gguf" and handover.is_whole(self.config):
            log.warning(f"export.to=gguf writes adapters, and {self.config.plan.method} hands over a whole model: llama.cpp converts it.")
        if self.has_trained:
            with suppress(DataError):  # the training examples may be gone
                for sentence in [] if self.answers.complete else self.inputs.warnings_of_questions():
                    log.warning(sentence)
            return
        if self.config.adapter.base == "residual" and self.method.takes_out and self.config.train.dropout:
            log.warning("With adapter.base=residual dropout falls on the adapter's start as well, and costs much: set train.dropout=0.")
        for sentence in self.inputs.warnings():
            log.warning(sentence)

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
        if needs is None or self._is_planned:
            return None
        return str(self.place.path), "knowledge" if "knowledge" in needs.texts else needs.name, needs.name

    @property
    def has_shared(self) -> bool:
        """Whether what runs of a comparison share was made for it: the base's answers, and its statistics."""
        statistics = self.surveys.steps(self.method.needs)
        known = self._is_planned or all(self.place.is_done(step, options) for step, options in statistics.items())
        return known and self.answers.base_is_known

    def before_plan(self) -> None:
        """What other runs of a comparison may share: the base's answers, statistics, a boundary."""
        self.claim()
        if not self.shared:  # a comparison has done it
            self.warn()
        self.base()  # first: one model in memory at a time, and a question that cannot be asked is found early
        if not self._is_planned:
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
        self._free()  # the next run of a comparison needs the memory

    @property
    def complete(self) -> bool:
        """Whether all of that is done, as it is configured now."""
        if not (self.has_trained and self.folder.is_over("export")):  # in whatever form: no score depends on it
            return False
        return self._is_trained and (self.path / "plan.json").is_file() and self.answers.complete

    # --- models -----------------------------------------------------------------------------------------------------

    def _adapted(self, plan: Plan, config: Config | None = None) -> Any:
        """The base model with this plan's adapters, before training; with another configuration's seed, if one is given."""
        config = config or self.config
        # Full fine-tuning updates the weights themselves, and bfloat16 would round small updates away.
        found = self.statistics()  # first: where it is gone, a model is loaded to make it again
        model = load_model(config.model, None if plan.layers else torch.float32)
        if found is not None:
            check_fingerprint(found, model)
        self._regime = self.method.regime(config.plan, plan) if self.method.regime else None
        return attach(model, plan, found, config.train.dropout, config.seed, config.adapter.base, self._regime)

    def _free(self) -> None:
        """Let go of the model: whoever loads the next one frees it."""
        self._live = self._regime = None

    def trained(self) -> Any:
        """The trained model: still in memory, or rebuilt from the plan and the last checkpoint."""
        if self._live is None:
            model = self._adapted(self.plan())
            restore(model, self.path)
            self._live = model  # not before: where the weights are gone, it is untrained
        return self._live.eval()

    @property
    def _prompts(self) -> dict[str, torch.Tensor]:
        """A few real examples, on which models are compared."""
        return check_batch(self.inputs.examples.rows, self.inputs.tokenizer.pad_token_id)

    def _scored(self) -> Any:
        """The model whose answers are those of what is handed over."""
        if not handover.is_as_trained(self.config):
            return self._read_back()
        return self.trained() if self.plan().layers else handover.as_handed_over(self.trained(), self.config)

    def _read_back(self) -> Any:
        """The result as its user loads it."""
        self.export()
        self._free()
        return handover.read(self.config, self.path, self.inputs.tokenizer)

    def _untouched(self) -> Any:
        self._free()
        return load_model(self.config.model)
