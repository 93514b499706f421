"""What a run knows of the model before it is planned: made once, and found again by every run that looks at the same."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from farss import processes
from farss.artifacts import Survey
from farss.batches import Row, choose, plain_rows, unlearnt
from farss.config import PlanConfig
from farss.errors import FolderError
from farss.files import reading, write_text
from farss.folder import Folder
from farss.inputs import Inputs
from farss.jobs import Tell
from farss.memory import peak_gib, reset_peak
from farss.methods import Reading
from farss.models import check_room, device_of, load_model, stored_dtype, tokenizer_fingerprint, weights_fingerprint, will_be_quantised
from farss.options import OWN_TEXT, READING_KEYS, options_of
from farss.plan import method_of, survey_cap
from farss.precision import dtype_name
from farss.survey import LENGTH, Site, batches_for, look, own_text


@dataclass
class Surveys:
    """The statistics of one run, or of all runs of a comparison that look at the same."""

    inputs: Inputs
    place: Folder
    """Holds `survey/` and other statistics."""
    tell: Tell
    beside: list[PlanConfig] = field(default_factory=list)
    """Plans of other runs, for those of which that look at the same they shall be wide enough."""

    def steps(self, needs: Reading | None) -> dict[str, dict[str, Any]]:
        """What is made for a method, in its order, by the names of the steps, with what each depends on."""
        if needs is None:
            return {}
        config = self.inputs.common_config
        found = {step: options_of(config, READING_KEYS["knowledge" if step == OWN_TEXT else needs.of]) for step in self.names(needs)}
        found[needs.name] |= {"over": needs.over} if needs.over == "examples" else {}  # there were CorDA's covariances without
        found[needs.name] |= {"model.dtype": self._cast}
        return found

    def names(self, needs: Reading | None) -> list[str]:
        """The steps of these; to know them no model is needed."""
        if needs is None:
            return []
        writes = "knowledge" in needs.texts and not self.inputs.common_config.calibration.knowledge
        return [*([OWN_TEXT] if writes else []), needs.name]

    @cached_property
    def _cast(self) -> str:
        """The precision in which the weights are looked at; auto: as they are stored, whether `model.dtype` names that or not."""
        model = self.inputs.common_config.model
        as_stored = model.dtype == "auto" or model.dtype == dtype_name(stored_dtype(replace(model, dtype="auto")))
        return "auto" if as_stored else model.dtype

    def of(self, needs: Reading) -> Survey:
        """`<its name>/`: what a method looks at."""
        config, place = self.inputs.common_config, self.place.path / needs.name
        options, device = self.steps(needs)[needs.name], device_of(config.model)
        self.place.refuse_other(needs.name, options)
        if self.place.is_done(needs.name, options, makes=place):
            found = Survey.load(place)
            found.check_cap(self._cap(needs))
            return found
        cap, texts = self._cap(needs, *self.beside), [self._batches(text, needs) for text in needs.texts]
        reset_peak(device)
        model = self.base_model()
        with self.place.step(needs.name, options) as facts:
            site = Site(model, place, cap, config.model.targets, self._meta(model), partial(self.tell, needs.name), device)
            found = look(site, needs, texts, config.calibration, config.seed)
            facts |= {name: found.meta[name] for name in ("seconds", "peak_memory_gib")}
        return found

    def knowledge(self) -> list[Row]:
        """The knowledge text: the user's, or what the model writes by itself, which is kept in `own_text.jsonl`."""
        config, tokenizer = self.inputs.common_config, self.inputs.tokenizer
        count = config.calibration.examples
        if config.calibration.knowledge:
            return plain_rows(choose(self.inputs.knowledge, count, config.seed), tokenizer, config.data.max_length)
        path, options = self.place.path / "own_text.jsonl", options_of(config, READING_KEYS["knowledge"])
        self.place.refuse_other(OWN_TEXT, options)
        if processes.rank() == 0 and not self.place.is_done(OWN_TEXT, options, makes=path):
            self._write_own_text(path, options)
        processes.wait()  # all read what the first has written
        with reading(path, "texts that are whole"):
            return unlearnt([json.loads(line)["tokens"] for line in path.read_text(encoding="utf-8").strip().split("\n")])

    def _write_own_text(self, path: Path, options: dict[str, Any]) -> None:
        config, tokenizer = self.inputs.common_config, self.inputs.tokenizer
        count, length = config.calibration.examples, min(LENGTH, config.data.max_length)
        check_room(config.model, whole=False)  # the model writes where it lies as a whole
        with self.place.step(OWN_TEXT, options) as facts:
            begun, device = time.monotonic(), device_of(config.model)
            reset_peak(device)
            writer = load_model(config.model)  # on the GPU, where there is one
            ids = own_text(writer, tokenizer, count, length, config.seed, lambda done, total: self.tell("own text", done, total, ""))
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            rows = [json.dumps({"text": text, "tokens": row}, ensure_ascii=False) for text, row in zip(texts, ids, strict=True)]
            write_text(path, "\n".join(rows) + "\n")
            facts |= {"seconds": round(time.monotonic() - begun, 1), "peak_memory_gib": round(peak_gib(device), 2)}

    def _batches(self, text: str, needs: Reading) -> list[dict[str, torch.Tensor]]:
        """The examples of the task, or of knowledge, that are looked at."""
        config = self.inputs.common_config
        rows = self.inputs.common_examples.rows if text == "task" else self.knowledge()
        return batches_for(needs, rows, config.calibration, self.inputs.tokenizer.pad_token_id, config.seed, config.data.max_length)

    def base_model(self) -> Any:
        """The base model, whose blocks go to the GPU one at a time, unless they are quantised."""
        model = self.inputs.config.model
        return load_model(model, device=None if will_be_quantised(model) else torch.device("cpu"), as_stored=True)

    def _meta(self, model: Any) -> dict[str, str]:
        path = self.inputs.common_config.model.path
        return {"model": weights_fingerprint(model), "tokenizer": tokenizer_fingerprint(self.inputs.tokenizer), "path": path}

    def _cap(self, needs: Reading, *beside: PlanConfig) -> int:
        """How many directions at each end the statistics hold that our plan, and those of these that look at the same, can be made of."""
        plans = [plan for plan in (self.inputs.common_config.plan, *beside) if method_of(plan).needs == needs]
        return max((survey_cap(plan, *self.inputs.shapes) for plan in plans), default=1)


def check_fingerprint(found: Survey, model: Any) -> None:
    """Refuse a survey that was made of another model.

    Raises:
        FolderError: with both fingerprints.
    """
    expected, actual = found.meta.get("model"), weights_fingerprint(model)
    if expected != actual:
        raise FolderError(
            f"{found.folder} was made of a model with fingerprint {expected}, but this one has {actual}: survey again in a new folder"
        )
