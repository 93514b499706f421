"""Choose blocks, move what they hold to the others, delete them, and see what that cost."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from farss.card import write_card
from farss.config import CompareConfig, Config
from farss.data import Row, Tokenized
from farss.errors import ConfigError, nearest
from farss.evaluate import evaluate
from farss.files import read_json, write_json, write_text
from farss.folder import CHOICE_KEYS, EVALUATE_KEYS, LOADED_KEYS, TRAIN_KEYS, Folder, options_of, replaced, resolve
from farss.inputs import Inputs, Loaded
from farss.jobs import Tell
from farss.models import check_room, device_of, load_model, loaded_dtype, quiet, stored_dtype, will_be_quantised
from farss.pruning.choose import changes, drawn, greedy, influences, smallest
from farss.pruning.measure import perplexity, speeds, windows
from farss.pruning.regularised import Changes, Scalars
from farss.pruning.surgery import check_deletable, delete_blocks, write_shorter
from farss.pruning.table import markdown
from farss.rows import text_rows
from farss.structure import find_blocks
from farss.tasks.benchmarks import grading
from farss.tasks.summary import summarise
from farss.train import check_options, train
from farss.versions import versions

log = logging.getLogger(__name__)
Rule = Literal["random", "shortgpt", "sleb", "scalars"]
Then = Literal["delete", "shift", "train", "delete and train"]
DENSE = "dense"
"""Name of the whole model in the table."""
FIRST, LAST = 3 / 32, 4 / 32
"""Shares of the blocks, from either end, that scalars on whole outputs are not asked about: the authors' 3 and 4 of 32."""
SEEN = 8
"""Windows on which the chosen blocks are measured before and after they are trained."""


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
        The folder, `<out>/pruned`: a folder for each method with its `model/`, and `pruning.json` and `.md`.
    """
    quiet()
    work = Pruning(resolve(replace(config, compare=CompareConfig())), tell)
    work.check()
    Folder(work.config.out).claim(work.config, versions())
    for method in work.config.prune.methods:
        work.make(method)
    for name in (DENSE, *work.config.prune.methods):
        work.measure(name)
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
        return Folder(Path(self.config.out) / "pruned")

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
        return self._windows(self.config.prune.text)

    @cached_property
    def held_out(self) -> list[Row]:
        """As many windows by which perplexity is measured; none where no text is named."""
        return self._windows(self.config.evaluate.text) if self.config.evaluate.text else []

    def _windows(self, path: str | None) -> list[Row]:
        assert path is not None
        options = self.config.prune
        return windows(text_rows(path), self.tokenizer, options.length, options.sequences, self.config.seed, path)

    @property
    def number(self) -> int:
        """How many blocks are deleted."""
        return round(self.config.prune.ratio * self.blocks)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(find_blocks(self.inputs.architecture)[1])

    @property
    def may(self) -> list[int]:
        """The blocks that may be deleted."""
        options = self.config.prune
        shares = (FIRST, LAST) if options.gate == "output" else (0.0, 0.0)
        first, last = (
            round(share * self.blocks) if given is None else given
            for share, given in zip(shares, (options.keep_first, options.keep_last), strict=True)
        )
        return [*range(first, self.blocks - last)]

    # --- before anything is done --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Find out what cannot be done.

        Raises:
            ConfigError: with the option and the cure.
            ModelError: blocks of this architecture cannot be deleted.
        """
        options, model = self.config.prune, self.config.model
        for method in options.methods:
            if method not in RECIPES:
                raise ConfigError(f"prune.methods holds {method!r}, which is not one of them: {nearest(method, RECIPES)}")
        if not options.text:
            raise ConfigError("prune.text is not given: name a file of general text (column text) to choose the blocks by")
        if will_be_quantised(model):
            raise ConfigError("blocks are deleted from weights that are numbers, and these are quantised: set model.quantization=none")
        if not 1 <= self.number <= len(self.may):
            raise ConfigError(
                f"prune.ratio={options.ratio} of {self.blocks} blocks are {self.number}, and {len(self.may)} may be deleted: choose a "
                f"ratio between {1 / self.blocks:.2g} and {len(self.may) / self.blocks:.2g}, or other prune.keep_first and prune.keep_last"
            )
        check_deletable(self.inputs.architecture, self.may[:1], model.trust_remote_code)  # it moves the places of all after it
        trains = [method for method in options.methods if RECIPES[method].then != "delete"]
        dtypes = {torch.float32} if trains else set()
        if any(RECIPES[method].rule == "scalars" for method in options.methods):
            dtypes.add(loaded_dtype(model))
        for dtype in dtypes:
            check_options(self.config.train, device_of(model), dtype, self.inputs.architecture.supports_gradient_checkpointing)
        check_room(model, whole=bool(trains))
        _ = self.rows, self.held_out
        self.inputs.check_questions(self.config.evaluate)
        for method in options.methods:
            self._is_made(method)
        if options.text == self.config.evaluate.text:
            log.warning("prune.text is evaluate.text: perplexity will be that of text by which the blocks were chosen.")
        elif not self.config.evaluate.text:
            log.warning("Perplexity will be missing: name a file of general text in evaluate.text.")

    # --- which blocks -------------------------------------------------------------------------------------------------

    def chosen(self, rule: Rule) -> list[int]:
        """The blocks that a rule chooses, in its order; `chosen/<rule>.json` says why."""
        path, step = self.folder.path / "chosen" / f"{rule}.json", f"choose-{rule}"
        options = options_of(self.config, CHOICE_KEYS[rule])
        if not (self.folder.is_done(step, options) and path.is_file()):
            with self.folder.step(step, options):
                write_json(path, self._choose(rule, path.with_suffix("")))
        found: list[int] = read_json(path)["blocks"]
        return found

    def _choose(self, rule: Rule, place: Path) -> dict[str, Any]:
        if rule == "random":
            return {"blocks": drawn(self.may, self.number, self.config.seed)}
        if rule == "scalars":
            return self._choose_by_scalars(place)
        tell, size, pad = partial(self.tell, f"choose {rule}"), self.config.evaluate.batch_size, self.tokenizer.pad_token_id
        model = load_model(self.config.model)
        if rule == "sleb":
            return {"blocks": greedy(model, self.rows, self.may, self.number, size, pad, tell)}
        values = influences(model, self.rows, size, pad, tell)
        return {"blocks": smallest({index: values[index] for index in self.may}, self.number), "influence": values}

    def _choose_by_scalars(self, place: Path) -> dict[str, Any]:
        """TRSP's first stage: learn the scalars, take out the block with the smallest, and learn those of the rest anew."""
        path = place.with_name("scalars-so-far.json")  # the rounds that are over: a killed choice goes on with the next
        rounds: list[dict[str, Any]] = read_json(path) if path.is_file() else []
        options, model = self.config.prune, load_model(self.config.model)
        rates = {
            "learning_rate": options.gate_rate,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
        }
        stage = replaced(self.config, "train", max_steps=options.gate_steps, **rates)
        left = [index for index in range(self.blocks) if index not in [each["block"] for each in rounds]]
        delete_blocks(model, [index for index in range(self.blocks) if index not in left])
        while len(rounds) < self.number:
            scalars, turn = Scalars(model, options.gate, options.sparsity), len(rounds)
            tell = self._telling(f"stage 1, block {turn + 1} of {self.number}")
            with scalars.applied():
                train(model, self.tokenizer, Tokenized(self.rows), stage, place / str(turn), on_progress=tell, regime=scalars)
            values = {index: value.item() for index, value in zip(left, scalars.values, strict=True)}
            scalars.remove()
            gone = smallest({index: values[index] for index in left if index in self.may}, 1)[0]
            delete_blocks(model, [left.index(gone)])
            left.remove(gone)
            rounds.append({"block": gone, "scalars": values})
            write_json(path, rounds)
        shutil.rmtree(place, ignore_errors=True)
        return {"blocks": [each["block"] for each in rounds], "rounds": rounds}

    # --- the smaller model --------------------------------------------------------------------------------------------

    def make(self, method: str) -> None:
        """`<method>/model`."""
        if self._is_made(method):
            return
        recipe, place, target = RECIPES[method], self.folder.path / method, self.folder.path / method / "model"
        gone = sorted(self.chosen(recipe.rule))
        with Folder(place).step("prune", self._made_options(method)) as facts:
            whole = recipe.then != "delete"
            model = load_model(self.config.model, dtype=torch.float32 if whole else None, as_stored=not whole)
            if whole:
                facts |= self._trained(model, method, gone, place)
            if recipe.then != "delete and train":
                delete_blocks(model, gone)
            if target.exists():
                shutil.rmtree(target)
            write_shorter(model.requires_grad_(False).eval(), self.tokenizer, target, self.config.model, stored_dtype(self.config.model))
            facts |= {"blocks": gone, "parameters": sum(parameter.numel() for parameter in model.parameters())}
            origin = {"base": self.config.model.path, "deleted": gone, "blocks": self.blocks}
            write_json(target / "farss.json", {"method": method, **origin})
            write_card(target, command=f"farss prune {Path(self.config.out) / 'config.yaml'}")
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        del model
        gc.collect()

    def _trained(self, model: Any, method: str, gone: list[int], place: Path) -> dict[str, Any]:
        """Train what is there; with the penalty on the chosen blocks, or without them."""
        options, then = self.config.prune, RECIPES[method].then
        if then == "delete and train":
            delete_blocks(model, gone)
            gone = []
        model.requires_grad_(True)
        measure = partial(changes, model, self.rows[:SEEN], gone, self.config.evaluate.batch_size, self.tokenizer.pad_token_id)
        before = measure()
        penalty = Changes(model, gone, options.shift if then == "shift" else 0.0, options.norm)
        with penalty.applied():
            rows, tell = Tokenized(self.rows), self._telling(f"{method}, stage 2")
            result = train(model, self.tokenizer, rows, self.config, place, on_progress=tell, regime=penalty)
        result.save(place / "train.json")
        return {"seconds": result.seconds, "relative_change": {"before": before, "after": measure()}}

    def _is_made(self, method: str) -> bool:
        return Folder(self.folder.path / method).is_done("prune", self._made_options(method))

    def _made_options(self, method: str) -> dict[str, Any]:
        recipe = RECIPES[method]
        keys = CHOICE_KEYS[recipe.rule]
        if recipe.then != "delete":
            keys = (*keys, *(key for key in TRAIN_KEYS if not key.startswith(("data.", "adapter"))))
        if recipe.then == "shift":
            keys = (*keys, "prune.shift", "prune.norm")
        return options_of(self.config, keys)

    # --- what it is worth ---------------------------------------------------------------------------------------------

    def measure(self, name: str) -> None:
        """`<name>/scores.json` and `<name>/measured.json`: its answers, its perplexity, and its speed beside the whole model's."""
        place, own = Folder(self.folder.path / name), replace(self.config.model, path=self._path(name), dtype="auto")
        config = replace(self.config, model=own if name != DENSE else self.config.model)
        options = options_of(self.config, (*LOADED_KEYS, *EVALUATE_KEYS, "prune.length", "prune.sequences")) | grading(
            self.config.evaluate.asked
        )
        if place.is_done("measure", options, redo=True):
            return
        with place.step("measure", options):
            model = load_model(config.model)
            facts: dict[str, Any] = {}
            meta = {"path": self.config.model.path, "method": name, "dtype": str(model.dtype).removeprefix("torch.")}
            if self.config.evaluate.asks:
                told = f"ask {name}"
                evaluate(model, self.tokenizer, self.config, place.path, meta, lambda what, done, total: self.tell(told, done, total, what))
            if self.held_out:
                size, pad, tell = self.config.evaluate.batch_size, self.tokenizer.pad_token_id, partial(self.tell, f"perplexity of {name}")
                facts["perplexity"] = perplexity(model, self.held_out, size, pad, tell)
            if name != DENSE:
                beside = {DENSE: load_model(self.config.model), name: model}
                facts["tokens_per_second"] = speeds(beside, partial(self.tell, f"speed of {name}"))
            facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
            write_json(place.path / "measured.json", facts)

    def _path(self, name: str) -> str:
        return str(self.folder.path / name / "model")

    def write_table(self) -> None:
        """`pruning.json` and `pruning.md`."""
        dense = self.folder.path / DENSE
        rows = [{"method": DENSE, "text": "the whole model", "deleted": [], **read_json(dense / "measured.json")}]
        for method in self.config.prune.methods:
            place = self.folder.path / method
            made = Folder(place).record("prune") or {}
            known = {name: made[name] for name in ("seconds", "relative_change") if name in made}
            rows.append(
                {"method": method, "text": RECIPES[method].text, "deleted": made["blocks"], **known, **read_json(place / "measured.json")}
            )
            if self.config.evaluate.asks:
                rows[-1]["summary"] = asdict(summarise(dense, place, None, self.config))
        write_json(self.folder.path / "pruning.json", {"rows": rows, "blocks": self.blocks, "windows": len(self.held_out)})
        write_text(self.folder.path / "pruning.md", markdown(rows))

    def _telling(self, step: str) -> Callable[[int, int, float | None], None]:
        return lambda done, total, loss: self.tell(step, done, total, f"loss {loss:.3f}" if loss is not None else "")
