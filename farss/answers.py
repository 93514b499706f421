"""What the untouched model and the result of a run answer, and what their answers say. Nothing is asked twice."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from farss.artifacts import Scores
from farss.card import write_card
from farss.config import Config
from farss.evaluate import evaluate, grade_again
from farss.folder import Folder, replaced
from farss.handover import is_merged, is_whole
from farss.inputs import Inputs
from farss.jobs import Tell
from farss.models import device_of
from farss.options import BASE_KEYS, COMPRESSED_KEYS, EVALUATE_KEYS, EXPORT_KEYS, LOADED_KEYS, RECOVERY_KEYS, options_of
from farss.recovery import knowledge_alone, recover, recovery_rows
from farss.tasks.benchmarks import grading
from farss.tasks.summary import Summary, summarise
from farss.train import products

log = logging.getLogger(__name__)
Load = Callable[[], Any]
"""Gives the model that is asked."""
BASE = "base"
"""What `meta.method` says of the untouched model."""


RECOVERED = {"recover-base": "base-recovered", "recover": "recovered"}
"""Where the answers of these steps lie."""


@dataclass
class Answers:
    """Of one run, and of the untouched model, which the runs of a comparison share."""

    inputs: Inputs
    folder: Folder
    """The run's."""
    common: Folder
    """Holds `base/`."""
    tell: Tell
    command: str
    """That makes the run again."""

    def base(self, load: Load) -> Scores:
        """`base/`: the untouched model's scores."""
        step, options, folder, config = "evaluate-base", self._asked(BASE_KEYS), self.common.path / "base", self.inputs.common_config
        done = self.common.is_done(step, options, redo=True, makes=folder / "scores.json")
        if not done and not self._graded_again(step, self.common, options, folder, config):
            with self.common.step(step, options):
                self._ask(load(), folder, "evaluate base", BASE)
            for name, score in Scores.load(folder / "scores.json").knowledge.items():
                if not score.score:
                    log.warning(f"The untouched model answers none of the {score.questions:,} questions of {name!r}: K will have no value.")
        return Scores.load(folder / "scores.json")

    def after(self, load: Load) -> bool:
        """`scores.json`: those of what is handed over. Returns whether it was asked now."""
        if self._is_asked:
            return False
        options = self._after_options
        if self._graded_again("evaluate", self.folder, options, self.folder.path, self.inputs.common_config):
            return True
        model = load()
        with self.folder.step("evaluate", options):
            self._ask(model, self.folder.path, "evaluate trained", self.inputs.config.plan.method)
        return True

    def recovered_base(self, load: Load) -> bool:
        """`base-recovered/`: the untouched model after the steps of `farss.recovery`. Returns whether it was made now."""
        return self._recover("recover-base", self.common, load, LOADED_KEYS, BASE)

    def recovered(self, load: Load) -> bool:
        """`recovered/`: knowledge asked once more, after a few steps of question answering. Returns whether it was made now."""
        return self._recover("recover", self.folder, load, EXPORT_KEYS, self.inputs.config.plan.method)

    def _recover(self, step: str, place: Folder, load: Load, keys: tuple[str, ...], method: str) -> bool:
        target, options = place.path / RECOVERED[step], self._recover_options(keys)
        config = replaced(self.inputs.common_config, "train", precision=options["train.precision"])
        if place.is_done(step, options, redo=True, makes=target / "scores.json"):
            return False
        if self._graded_again(step, place, options, target, knowledge_alone(config)):
            return True
        # first: where its weights are deleted, or there are too few questions, what was measured stays
        model, rows = load(), recovery_rows(config, self.inputs.tokenizer)
        if (place.record(step) or {"options": options})["options"] != options:
            shutil.rmtree(target / "checkpoints", ignore_errors=True)  # of other steps, or of another model
        with place.step(step, options):
            model = recover(model, self.inputs.tokenizer, rows, config, target, lambda done, total, loss: self.tell(step, done, total, ""))
            self._ask(model, target, f"evaluate {step}", method, knowledge_alone(config))
        return True

    def _graded_again(self, step: str, place: Folder, options: dict[str, Any], folder: Path, config: Config) -> bool:
        """Grade what is asked by the rules of today, where nothing else changed; that needs no model. Returns whether it was done."""
        ungraded = {key: value for key, value in options.items() if key != "grading"}
        if not place.is_done(step, ungraded, redo=True, makes=folder / "scores.json"):
            return False
        if grade_again(config, folder) is None:
            return False
        with place.step(step, options):
            return True

    def _ask(self, model: Any, folder: Path, step: str, method: str, config: Config | None = None) -> None:
        options = self.inputs.config.model
        meta = {"path": options.path, "method": method, "dtype": str(model.dtype).removeprefix("torch.")}  # another one answers otherwise
        meta |= {"quantization": options.quantization} if options.quantization != "none" else {}
        asked = config or self.inputs.common_config
        evaluate(model, self.inputs.tokenizer, asked, folder, meta, lambda name, done, total: self.tell(step, done, total, name))

    # --- what they say ----------------------------------------------------------------------------------------------

    def summarise(self, full_scores: str | Path | None, only: Callable[[str], bool] | None = None) -> Summary:
        """K, T and KT from the stored scores, of all questions or those whose id `only` takes."""
        full, config = Path(full_scores) if full_scores else None, self.inputs.common_config
        found = summarise(self.common.path / "base", self.folder.path, full, config, only)
        if not self._is_recovered:
            return found
        pair = self.common.path / RECOVERED["recover-base"], self.folder.path / RECOVERED["recover"]
        return replace(found, recovered=summarise(*pair, None, config, only).K)

    def save(self, summary: Summary) -> None:
        """`summary.json`, and the card of what was asked."""
        summary.save(self.folder.path / "summary.json")
        for target in (self.folder.path / "adapter", self.folder.path / "model"):
            if (target / "farss.json").is_file() and self._was_asked(target):
                write_card(target, asdict(summary), self.command)

    def _was_asked(self, target: Path) -> bool:
        """Whether this is what was asked, and not another form of it: an adapter that is compressed otherwise, or its merged model."""
        exported, asked = ((self.folder.record(step) or {}).get("options") or {} for step in ("export", "evaluate"))
        if target.name == "model":
            return bool(asked.get("merged")) or self.inputs.config.plan.method == "full"
        same = exported.get("export.to") != "merged" and all(exported.get(key) == asked.get(key) for key in COMPRESSED_KEYS)
        return same and not asked.get("merged")

    # --- what is done -----------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether everything was asked that shall be asked of the run's result, as it is configured now."""
        wanted = self.inputs.config.evaluate
        return (not wanted.recovery or self._recovered(self.folder, "recover", EXPORT_KEYS)) and (not wanted.asks or self._is_asked)

    @property
    def _is_asked(self) -> bool:
        return self.folder.is_done("evaluate", self._after_options, redo=True, makes=self.folder.path / "scores.json")

    @property
    def _is_recovered(self) -> bool:
        """Whether this model and the untouched one were asked once more, as it is configured now."""
        steps = ((self.common, "recover-base", LOADED_KEYS), (self.folder, "recover", EXPORT_KEYS))
        return bool(self.inputs.config.evaluate.recovery) and all(self._recovered(*each) for each in steps)

    def _recovered(self, place: Folder, step: str, keys: tuple[str, ...]) -> bool:
        scores = place.path / RECOVERED[step] / "scores.json"
        return place.is_done(step, self._recover_options(keys), redo=True, makes=scores)

    @property
    def _after_options(self) -> dict[str, Any]:
        config = self.inputs.config
        if not is_whole(config):
            return self._asked(EVALUATE_KEYS) | options_of(config, COMPRESSED_KEYS) | {"merged": None}
        return self._asked(EVALUATE_KEYS) | dict.fromkeys(COMPRESSED_KEYS) | {"merged": True if is_merged(config) else None}

    def _recover_options(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """`keys`: on which the model depends that is loaded."""
        return self._asked(RECOVERY_KEYS) | options_of(self.inputs.config, keys) | {"train.precision": self._recovery_precision}

    @property
    def _recovery_precision(self) -> str:
        """Of the steps on top of every model, which are the same for all: what `auto` was when the untouched one took them."""
        config = self.inputs.common_config
        if config.train.precision != "auto":
            return config.train.precision
        before: str | None = (self.common.record("recover-base") or {}).get("options", {}).get("train.precision")
        return before or products(config.train, device_of(config.model))

    def _asked(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """What answers depend on: these options, and how they are graded."""
        config = self.inputs.common_config
        return options_of(config, keys) | grading(config.evaluate.asked)
