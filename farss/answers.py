"""What the untouched model and the result of a run answer, and what their answers say. Nothing is asked twice."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from farss.artifacts import OF_BASE, Scores
from farss.card import write_card
from farss.config import Config
from farss.errors import FolderError
from farss.evaluate import BASE, evaluate, grade_again
from farss.files import read_json
from farss.folder import Folder
from farss.handover import is_merged, is_whole
from farss.inputs import Inputs
from farss.jobs import Tell
from farss.models import device_of
from farss.options import BASE_KEYS, COMPRESSED_KEYS, EVALUATE_KEYS, EXPORT_KEYS, LOADED_KEYS, RECOVERY_KEYS, options_of
from farss.recovery import knowledge_alone, recover, recovery_rows
from farss.tasks.benchmarks import grading
from farss.tasks.outcomes import Only
from farss.tasks.summary import Summary, summarise
from farss.train import products

log = logging.getLogger(__name__)
Load = Callable[[], Any]
"""Gives the model that is asked."""


class Asking(NamedTuple):
    """The questions to one model."""

    step: str
    place: Folder
    """Holds the step's record."""
    target: Path
    """Where the answers lie."""
    options: dict[str, Any]
    """On which they depend."""
    config: Config
    """What is asked."""
    method: str
    """Of the model: `BASE`, or that of a run."""

    @property
    def scores(self) -> Path:
        """`scores.json`."""
        return self.target / "scores.json"

    @property
    def done(self) -> bool:
        """Whether they are answered."""
        known = self.place.is_done(self.step, self.options, makes=self.scores)
        return known and Scores.load(self.scores).has_records(self.target / "scores")


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
        one = self._of_base
        asked, scores = self._answered(one, load), Scores.load(one.scores)
        for name, score in scores.knowledge.items() if asked else ():
            if not score.score:
                log.warning(f"The untouched model answers none of the {score.questions:,} questions of {name!r}: K will have no value.")
        return scores

    def after(self, load: Load) -> bool:
        """`scores.json`: those of what is handed over. Returns whether it was asked now."""
        return self._answered(self._of_trained, load)

    def recovered_base(self, load: Load) -> bool:
        """`base-recovered/`: the untouched model after the steps of `farss.recovery`. Returns whether it was made now."""
        return self._recover(self._of_recovered_base, load)

    def recovered(self, load: Load) -> bool:
        """`recovered/`: knowledge asked once more, after a few steps of question answering. Returns whether it was made now."""
        return self._recover(self._of_recovered, load)

    def _recover(self, one: Asking, load: Load) -> bool:
        config, tokenizer = self.inputs.common_config, self.inputs.tokenizer
        config = replace(config, train=replace(config.train, precision=one.options["train.precision"]))

        def ready() -> Any:
            held = load(), recovery_rows(config, tokenizer)
            if (one.place.record(one.step) or {"options": one.options})["options"] != one.options:
                shutil.rmtree(one.target / "checkpoints", ignore_errors=True)  # of other steps, or of another model
            return held

        def taught(held: Any) -> Any:
            model, rows = held
            told = f"train {one.step}"
            return recover(model, tokenizer, rows, config, one.target, lambda done, total, loss: self.tell(told, done, total, ""))

        return self._answered(one, ready, taught)

    def _answered(self, one: Asking, load: Load, taught: Callable[[Any], Any] = lambda model: model) -> bool:
        """Ask, unless that was done. Returns whether it was asked, or graded, now.

        Args:
            taught: makes the model that is asked from what was loaded.
        """
        if one.done:
            return False
        if self._graded_again(one):
            return True
        held = load()  # first: where its weights are deleted, or there are too few questions, what was measured stays
        with one.place.step(one.step, one.options):
            asked = taught(held), self.inputs.tokenizer, one.config, one.target, one.method
            evaluate(*asked, lambda name, done, total: self.tell(one.step, done, total, name))
        return True

    def _graded_again(self, one: Asking) -> bool:
        """Grade what is asked by the rules of today, where nothing else changed; that needs no model. Returns whether it was done."""
        if not self._ungraded(one).done or grade_again(one.config, one.target) is None:
            return False
        with one.place.step(one.step, one.options):
            return True

    def _ungraded(self, one: Asking) -> Asking:
        """The same questions, by whatever rules they are graded."""
        return one._replace(options={key: value for key, value in one.options.items() if key != "grading"})

    # --- what they say ----------------------------------------------------------------------------------------------

    def summarise(self, full_scores: str | Path | None, only: Only | None = None) -> Summary:
        """K, T and KT from the stored scores, of all questions or those whose id `only` takes."""
        full, config = Path(full_scores) if full_scores else None, self.inputs.common_config
        asked = self.common.path / BASE, self.folder.path
        found = summarise(*asked, full, config, only)
        # not of what was recovered: there an adapter lies on what was trained, which may be a whole model
        if len({Scores.load(folder / "scores.json").meta.get(OF_BASE) for folder in asked} - {None}) > 1:
            raise FolderError(
                f"{asked[0]} holds the answers of other weights than those that {asked[1]} was trained on: "
                f"model.path={config.model.path!r} has changed; put it back, or choose another out"
            )
        if not self.inputs.config.evaluate.recovery:
            return found
        before, after = self._of_recovered_base, self._of_recovered
        if not (before.done and after.done):
            return found
        return replace(found, recovered=summarise(before.target, after.target, None, config, only).K)

    def save(self, summary: Summary) -> None:
        """`summary.json`, and the card of what was asked."""
        summary.save(self.folder.path / "summary.json")
        self.write_cards()

    def write_cards(self) -> None:
        """Say in the cards of what was asked what it answered, where it was."""
        path = self.folder.path / "summary.json"
        for target in (self.folder.path / "adapter", self.folder.path / "model"):
            if path.is_file() and (target / "farss.json").is_file() and self._of_trained.done and self._was_asked(target):
                write_card(target, read_json(path), self.command)

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
        return all(one.done for one in self._of_result)

    @property
    def needs_weights(self) -> bool:
        """Whether something is to be asked of the run's result that it was not asked yet."""
        return not all(self._ungraded(one).done for one in self._of_result)

    @property
    def _of_result(self) -> list[Asking]:
        """All that shall be asked of the run's result."""
        wanted = self.inputs.config.evaluate
        return [*([self._of_recovered] if wanted.recovery else []), *([self._of_trained] if wanted.asks else [])]

    @property
    def base_is_known(self) -> bool:
        """Whether the untouched model was asked everything."""
        wanted = self.inputs.config.evaluate
        return (not wanted.asks or self._of_base.done) and (not wanted.recovery or self._of_recovered_base.done)

    @property
    def _of_base(self) -> Asking:
        config = self.inputs.common_config
        return Asking("evaluate-base", self.common, self.common.path / BASE, self._asked(BASE_KEYS), config, BASE)

    @property
    def _of_trained(self) -> Asking:
        config, method = self.inputs.common_config, self.inputs.config.plan.method
        return Asking("evaluate", self.folder, self.folder.path, self._after_options, config, method)

    @property
    def _of_recovered_base(self) -> Asking:
        config, options = knowledge_alone(self.inputs.common_config), self._recover_options(LOADED_KEYS)
        return Asking("recover-base", self.common, self.common.path / "base-recovered", options, config, BASE)

    @property
    def _of_recovered(self) -> Asking:
        config, options = knowledge_alone(self.inputs.common_config), self._recover_options(EXPORT_KEYS)
        return Asking("recover", self.folder, self.folder.path / "recovered", options, config, self.inputs.config.plan.method)

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
