"""Choose blocks, move what they hold to the others, delete them, and see what that cost."""

from __future__ import annotations

import logging
import random
import shutil
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from farss.batches import Row
from farss.card import write_card
from farss.config import CompareConfig, Config
from farss.data import text_windows
from farss.errors import ConfigError, DataError, nearest
from farss.evaluate import evaluate
from farss.files import read_json, write_json, write_text
from farss.folder import PRUNING, Folder, resolve
from farss.inputs import Inputs, Loaded
from farss.jobs import Tell
from farss.memory import memory_cure
from farss.models import check_room, device_of, load_model, loaded_dtype, quiet, stored_dtype, will_be_quantised
from farss.options import BASE_KEYS, CHOICE_KEYS, SHIFT_KEYS, TRAIN_KEYS, options_of
from farss.places import fits_beside, tensors_of
from farss.pruning.choose import greedy, influences, smallest
from farss.pruning.measure import perplexity, speeds
from farss.pruning.stages import choose_by_scalars, shift
from farss.pruning.surgery import check_deletable, delete_blocks, write_shorter
from farss.pruning.table import DENSE, markdown
from farss.rows import text_rows
from farss.structure import find_blocks, positions
from farss.tasks.benchmarks import grading
from farss.tasks.summary import summarise
from farss.train import check_options, with_products
from farss.versions import versions

log = logging.getLogger(__name__)
Rule = Literal["random", "shortgpt", "sleb", "scalars"]
Then = Literal["delete", "shift", "train", "delete and train"]
FIRST, LAST = 3 / 32, 4 / 32
"""Shares of the blocks, from either end, that scalars on whole outputs are not asked about: the authors' 3 and 4 of 32."""


@dataclass(frozen=True)
class Recipe:
    """One way to a smaller model."""

    rule: Rule
    """How blocks are chosen."""
    then: Then
    """What happens to them."""
    text: str


RECIPES: dict[str, Recipe] = {
    "random": Recipe("random", "delete", "blocks drawn at random are deleted"),
    "shortgpt": Recipe("shortgpt", "delete", "the blocks that turn their input least are deleted (ShortGPT)"),
    "sleb": Recipe("sleb", "delete", "one by one, the block whose absence costs least loss is deleted (SLEB)"),
    "trsp-stage-1": Recipe("scalars", "delete", "the blocks with the smallest learned scalars are deleted (TRSP without its second stage)"),
    "trsp": Recipe("scalars", "shift", "what they change is penalised in a training before they are deleted (TRSP)"),
    "trsp-no-penalty": Recipe("scalars", "train", "the same training without the penalty, then they are deleted"),
    "delete-first": Recipe("scalars", "delete and train", "they are deleted, then the same training of what is left"),
}


def prune(config: Config, tell: Tell) -> Path:
    """Make a smaller model by every method of `prune.methods`, and a table of what each costs.

    Whatever is complete is not done again: a killed pruning goes on where it was.

    Returns:
        The folder: in it one for each method with its `model/`, and `pruning.json` and `.md` about all that were made there.
    """
    quiet()
    work = Pruning(resolve(replace(config, compare=CompareConfig())), tell)
    work.check()
    work.folder.claim(work.config, versions(), prunes=True)
    with work.folder.step(PRUNING, {}):
        work.measure(DENSE)  # first: what cannot be asked is found before hours of training
        for method in work.config.prune.methods:
            work.make(method)
            work.measure(method)
        work.write_table()
    return work.folder.path


@dataclass
class Pruning:
    """Of one model, by several methods."""

    config: Config
    tell: Tell
    loaded: Loaded = field(default_factory=Loaded, repr=False)

    @property
    def folder(self) -> Folder:
        """Everything lies here."""
        return Folder(self.config.out)

    @cached_property
    def inputs(self) -> Inputs:
        """The tokenizer and the model's shape."""
        return Inputs(self.config, self.config, self.loaded)

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.inputs.tokenizer

    @cached_property
    def rows(self) -> list[Row]:
        """The windows by which blocks are chosen and what is left is trained."""
        assert self.config.prune.text
        return self._windows(self.config.prune.text)

    @cached_property
    def held_out(self) -> list[Row]:
        """As many windows by which perplexity is measured; none where no text is named."""
        return self._windows(self.config.evaluate.text) if self.config.evaluate.text else []

    def _windows(self, path: str) -> list[Row]:
        options = self.config.prune
        rows, found = text_windows(text_rows(path), self.tokenizer, options.length, options.sequences, self.config.seed)
        if not found:
            raise DataError(f"{path} does not fill a window of prune.length={options.length} tokens: give more text, or lower prune.length")
        if found < options.sequences:
            log.warning(f"{path} fills {found:,} windows of {options.length} tokens, fewer than prune.sequences={options.sequences}.")
        return rows

    @cached_property
    def blocks(self) -> int:
        """How many there are."""
        return len(find_blocks(self.inputs.architecture)[1])

    @property
    def number(self) -> int:
        """How many are deleted."""
        return round(self.config.prune.ratio * self.blocks)

    def may(self, rule: Rule) -> list[int]:
        """The blocks that a rule may choose."""
        options = self.config.prune
        shares = (FIRST, LAST) if rule == "scalars" and options.gate == "output" else (0.0, 0.0)
        first, last = (
            (max(1, round(share * self.blocks)) if share else 0) if given is None else given
            for share, given in zip(shares, (options.keep_first, options.keep_last), strict=True)
        )
        return [*range(first, self.blocks - last)]

    # --- before anything is done --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Find out what cannot be done.

        Raises:
            ConfigError: with the option and the cure.
            ModelError: blocks of this architecture cannot be deleted.
            FolderError: something was made here with other options.
        """
        options, model = self.config.prune, self.config.model
        for method in options.methods:
            if method not in RECIPES:
                raise ConfigError(f"prune.methods holds {method!r}, which is not one of them: {nearest(method, RECIPES)}")
        if not options.text:
            raise ConfigError("prune.text is not given: name a file of general text (column text) to choose the blocks by")
        if will_be_quantised(model):
            raise ConfigError("blocks are deleted from weights that are numbers, and these are quantised: set model.quantization=none")
        recipes = [RECIPES[method] for method in options.methods]
        for rule in {recipe.rule for recipe in recipes}:
            self._check_number(rule)
            self.folder.refuse_other(f"choose-{rule}", self._choice_options(rule))
        limit = positions(self.inputs.architecture)
        if limit and options.length > limit:
            raise ConfigError(f"prune.length={options.length}, and the model knows {limit} positions: set prune.length={limit}")
        check_deletable(self.inputs.architecture, self.may("random")[:1], model.trust_remote_code)  # which moves the places of all after it
        trains = any(recipe.then != "delete" for recipe in recipes)
        scales = any(recipe.rule == "scalars" for recipe in recipes)
        for dtype in {*([torch.float32] if trains else []), *([loaded_dtype(model)] if scales else [])}:
            check_options(self.config.train, device_of(model), dtype, self.inputs.architecture.supports_gradient_checkpointing)
        check_room(model, trains, "choose methods that train nothing (trsp-stage-1, shortgpt, sleb)")
        self.inputs.check_questions()
        for method in options.methods:
            Folder(self.folder.path / method).refuse_other("prune", self._made_options(method))
        if not all(map(self._is_made, options.methods)):
            _ = self.rows
        if options.text == self.config.evaluate.text:
            log.warning("prune.text is evaluate.text: perplexity will be that of text by which the blocks were chosen.")
        elif not self.config.evaluate.text:
            log.warning("Perplexity will be missing: name a file of general text in evaluate.text.")

    def _check_number(self, rule: Rule) -> None:
        may, options = len(self.may(rule)), self.config.prune
        most = min(may, self.blocks - 1)
        if not 1 <= self.number <= most:
            raise ConfigError(
                f"prune.ratio={options.ratio} of {self.blocks} blocks are {self.number}, and {may} may be deleted: choose a ratio between "
                f"{1 / self.blocks:.2g} and {most / self.blocks:.2g}, or other prune.keep_first and prune.keep_last"
            )

    # --- which blocks -------------------------------------------------------------------------------------------------

    def chosen(self, rule: Rule) -> list[int]:
        """The blocks that a rule chooses, in its order; `chosen/<rule>.json` says why."""
        path, step, options = self.folder.path / "chosen" / f"{rule}.json", f"choose-{rule}", self._choice_options(rule)
        self.folder.refuse_other(step, options)
        if not self.folder.is_done(step, options, makes=path):
            with self.folder.step(step, options):
                write_json(path, self._choose(rule, path.with_suffix("")))
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        found: list[int] = read_json(path)["blocks"]
        return found

    def _choice_options(self, rule: Rule) -> dict[str, Any]:
        return with_products(options_of(self.config, CHOICE_KEYS[rule]), self.config, self.folder.is_over(f"choose-{rule}"))

    def _choose(self, rule: Rule, place: Path) -> dict[str, Any]:
        may, told = self.may(rule), partial(self.tell, f"choose {rule}")
        if rule == "random":
            return {"blocks": random.Random(self.config.seed).sample(sorted(may), self.number)}
        if rule == "scalars":
            return choose_by_scalars(self.config, self.tokenizer, self.rows, may, self.number, place, self.tell)
        model, size, pad = load_model(self.config.model), self.config.evaluate.batch_size, self.tokenizer.pad_token_id
        with self._fits():
            if rule == "sleb":
                rounds = greedy(model, self.rows, may, self.number, size, pad, place / "rounds.json", told)
                return {"blocks": [each["block"] for each in rounds], "rounds": rounds}
            values = influences(model, self.rows, size, pad, told)
        return {"blocks": smallest({index: values[index] for index in may}, self.number), "influence": values}

    def _fits(self) -> AbstractContextManager[None]:
        return memory_cure(self.config.evaluate.batch_size, "windows at a time", "evaluate.batch_size")

    # --- the smaller model --------------------------------------------------------------------------------------------

    def make(self, method: str) -> None:
        """`<method>/model`."""
        recipe, place, target = RECIPES[method], self.folder.path / method, self._model(method)
        if not self._is_made(method):
            gone = sorted(self.chosen(recipe.rule))
            check_deletable(self.inputs.architecture, gone, self.config.model.trust_remote_code)  # before anything is trained
            with Folder(place).step("prune", self._made_options(method)) as facts:
                facts |= {"blocks": gone, **self._make(method, gone, target)}
        shutil.rmtree(place / "checkpoints", ignore_errors=True)

    def _make(self, method: str, gone: list[int], target: Path) -> dict[str, Any]:
        recipe, facts = RECIPES[method], dict[str, Any]()
        trains, first = recipe.then != "delete", recipe.then == "delete and train"
        cpu = torch.device("cpu")  # where nothing is computed, and room is for what is read back
        model = load_model(self.config.model, torch.float32 if trains else None, None if trains else cpu, as_stored=not trains)
        if first:
            delete_blocks(model, gone)
        if trains:
            weight = self.config.prune.shift if recipe.then == "shift" else 0.0
            facts = shift(
                *(model, self.tokenizer, self.rows, self.config, [] if first else gone, weight),
                *(self.folder.path / method, method, self.tell),
            )
        if not first:
            delete_blocks(model, gone)
        write_shorter(model.eval().to(cpu), self.tokenizer, target, self.config.model, stored_dtype(self.config.model))
        write_json(target / "farss.json", {"method": method, "base": self.config.model.path, "deleted": gone, "blocks": self.blocks})
        write_card(target, command=f"farss prune {Path(self.config.out) / 'config.yaml'} --methods {method}")
        return facts

    def _is_made(self, method: str) -> bool:
        return Folder(self.folder.path / method).is_done("prune", self._made_options(method), makes=self._model(method))

    def _made_options(self, method: str) -> dict[str, Any]:
        recipe = RECIPES[method]
        keys = (*CHOICE_KEYS[recipe.rule], "model.dtype")
        if recipe.then != "delete":
            keys = (*keys, *(key for key in TRAIN_KEYS if not key.startswith(("data.", "adapter"))))
        if recipe.then == "shift":
            keys = (*keys, *SHIFT_KEYS)
        return with_products(options_of(self.config, keys), self.config, Folder(self.folder.path / method).is_over("prune"))

    def _model(self, method: str) -> Path:
        return self.folder.path / method / "model"

    # --- what it is worth ---------------------------------------------------------------------------------------------

    def measure(self, name: str) -> None:
        """`<name>/scores.json` and `<name>/measured.json`: its answers, its perplexity, and its speed beside the whole model's."""
        place, where = Folder(self.folder.path / name), self.config.model
        options = options_of(self.config, (*BASE_KEYS, "prune.length", "prune.sequences")) | grading(self.config.evaluate.asked)
        if place.is_done("measure", options, makes=place.path / "measured.json"):
            return
        with place.step("measure", options), self._fits():
            model = load_model(where if name == DENSE else replace(where, path=str(self._model(name))))
            facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
            if self.config.evaluate.asks:
                asked = model, self.tokenizer, self.config, place.path, name
                evaluate(*asked, lambda what, done, total: self.tell(f"ask {name}", done, total, what))
            if self.held_out:
                size, pad = self.config.evaluate.batch_size, self.tokenizer.pad_token_id
                facts["perplexity"] = perplexity(model, self.held_out, size, pad, partial(self.tell, f"perplexity of {name}"))
                facts["windows"] = len(self.held_out)
            if name != DENSE:
                facts["tokens_per_second"] = self._speeds(name, model)
            write_json(place.path / "measured.json", facts)

    def _speeds(self, name: str, model: Any) -> dict[str, dict[str, float]]:
        """Beside the whole model's, in turns where there is room for both."""
        tell = partial(self.tell, f"speed of {name}")
        if model.device.type != "cuda" or fits_beside(tensors_of(model), model.device):
            return speeds({DENSE: load_model(self.config.model), name: model}, tell)
        found = speeds({name: model}, tell)
        model.to("cpu")
        return speeds({DENSE: load_model(self.config.model)}, tell) | found

    def write_table(self) -> None:
        """`pruning.json` and `pruning.md`: every method that was made here, and asked what is asked now."""
        dense = self.folder.path / DENSE
        rows = [{"method": DENSE, "text": "the whole model", "deleted": [], **read_json(dense / "measured.json")}]
        for method, recipe in RECIPES.items():
            place = self.folder.path / method
            made, measured = (Folder(place).record(step) or {} for step in ("prune", "measure"))
            if not made.get("done") or measured.get("options") != (Folder(dense).record("measure") or {}).get("options"):
                continue
            known = {name: made[name] for name in ("seconds", "loss", "relative_change") if name in made}
            row = {"method": method, "text": recipe.text, "deleted": made["blocks"], **known, **read_json(place / "measured.json")}
            rows.append(row | ({"summary": asdict(summarise(dense, place, None, self.config))} if self.config.evaluate.asks else {}))
        write_json(self.folder.path / "pruning.json", {"rows": rows, "blocks": self.blocks})
        write_text(self.folder.path / "pruning.md", markdown(rows))
