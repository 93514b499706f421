"""Beyond the paper: variations on FARSS and LoRA, at several learning rates, K against T.

    python benchmarks/beyond.py                                              # the embedded world
    FARSS_DATA=path/to/data python benchmarks/beyond.py configs/gemma-banking77.yaml --variants farss farss@0.5 farss+stay:1

A variant is a method, behind each `+` a change to it, and behind `@` a factor of its learning rate:

- `stay:MU` adds `MU / 2 sum_l tr(G_l D_l A_l D_l^T)` to the loss, where `D_l` is the change of a layer's weight, and `A_l` and
  `G_l` are the second moments of activations and gradients on *knowledge* text: the Kronecker-factored second-order estimate of the
  divergence (nats a token) between the base and the fine-tuned model on that text (Ritter et al. 2018 use it between tasks);
- `thin:MU` the same with the 64 largest eigenvalues of each, and the mean of the others for the rest: what a large model could afford;
- `diagonal:MU` the same with the diagonals of A and G alone;
- `decay:MU` the same with multiples of the identity of the same trace, which know nothing of knowledge: the control;
- `ratio` chooses the directions with the largest (deep) and smallest (shallow) quotient of task score and knowledge score;
- `aside` chooses the shallow directions by the smallest *knowledge* score;
- `contrast` (of LoRA) starts A from FARSS-plus's directions; `contrast:task` and `contrast:knowledge` from those that it would choose if it
  knew only one of the two, the other being a multiple of the identity: the controls;
- `frozen` leaves A as it starts.

Finished runs are not done again. The knowledge text is `calibration.knowledge`, or what the base writes by itself.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import environment, percent, run_config, table, write_section
from safetensors.torch import load_file
from torch import Tensor

from farss.adapter import START, TRAINED, lora_layers
from farss.artifacts import Plan, Survey
from farss.batches import batches, calibration_batches, collate
from farss.config import Config
from farss.configfile import override
from farss.files import read_json, write_json, write_tensors
from farss.folder import Folder, resolve
from farss.handover import delete_weights
from farss.jobs import do_all
from farss.maths.directions import select
from farss.maths.moments import Moment, kept_rows
from farss.methods import METHODS, Regime
from farss.models import layer_shapes, load_model, weights_fingerprint
from farss.pipeline import Run
from farss.places import moved
from farss.progress import bars
from farss.structure import target_layers
from farss.survey import Site, survey
from farss.tasks.standing import Entry, Standing, standings
from farss.versions import versions

Factors = dict[str, tuple[Tensor, Tensor]]
"""By layer: `A [n, n]` and `G [m, m]`."""
THIN = 64
"""Eigenvalues that a thin penalty keeps."""
VARIANTS = ["farss", "farss@0.5", "farss+stay:1", "farss+decay:1", "farss+ratio", "farss+aside", "lora", "lora+stay:1"]


def task_alone(weight: Tensor, cap: int, task: Tensor, knowledge: Tensor) -> dict[str, Tensor]:
    """FARSS-plus's directions, were knowledge text alike in all directions."""
    return PLUS.read(weight, cap, task, alike(knowledge))


def knowledge_alone(weight: Tensor, cap: int, task: Tensor, knowledge: Tensor) -> dict[str, Tensor]:
    """The same, if the task pulled alike in all directions."""
    return PLUS.read(weight, cap, alike(task), knowledge)


def alike(moment: Tensor) -> Tensor:
    """A multiple of the identity with the same trace."""
    return moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


PLUS = METHODS["farss-plus"].needs
CONTRASTS = {
    "": PLUS,
    "task": replace(PLUS, name="task-alone", read=task_alone),
    "knowledge": replace(PLUS, name="knowledge-alone", read=knowledge_alone),
}


def moments(model: Any, names: list[str], rows: list[dict[str, Any]], size: int, pad: int) -> Factors:
    """Second moments of inputs and output gradients of the summed loss, mean over real tokens, of whole matrices."""
    found = {name: (Moment(), Moment()) for name in names}
    mask = torch.empty(0)

    def hook(name: str) -> Any:
        def record(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name][0].add(kept_rows(args[0].detach(), mask))
            output.register_hook(lambda gradient: found[name][1].add(kept_rows(gradient, mask)))

        return record

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    model.get_input_embeddings().weight.requires_grad_(True)  # so that there are gradients at all
    for part in batches(rows, size):
        batch = moved(collate(part, pad), model.device)
        labels, mask = batch.pop("labels"), batch["attention_mask"].bool()
        logits = model(**{key: value for key, value in batch.items() if key != "counted"}).logits[:, :-1]
        logits, targets = logits.flatten(0, 1).float(), labels[:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").backward()
        model.zero_grad()
    for one in hooks:
        one.remove()
    return {name: (a.mean.cpu(), g.mean.cpu()) for name, (a, g) in found.items()}


class Root(NamedTuple):
    """A positive semidefinite matrix as `columns columns^T + rest I`."""

    columns: Tensor
    """[d, q]."""
    rest: float = 0.0

    def form(self, x: Tensor) -> Tensor:
        """`x^T M x` of `x [d, r]`."""
        seen = self.columns.T @ x
        return seen.T @ seen + self.rest * (x.T @ x)


def root(matrix: Tensor, kind: str) -> Root:
    """What a kind of penalty knows of a second moment `[d, d]`."""
    if kind == "decay":
        return Root(matrix.new_empty(len(matrix), 0), float(matrix.diagonal().mean()))
    if kind == "diagonal":
        return Root(matrix.diagonal().sqrt().diag())
    values, vectors = torch.linalg.eigh(matrix.double())
    kept = min(len(values), THIN if kind == "thin" else len(values))
    left_out = float(values[:-kept].clamp_min(0).mean()) if kept < len(values) else 0.0
    return Root((vectors[:, -kept:] * (values[-kept:] - left_out).clamp_min(0).sqrt()).float(), left_out)


@dataclass
class Stay(Regime):
    """A price on moving weights that knowledge text uses."""

    kind: str
    price: float
    factors: Factors
    plan: Plan

    def __post_init__(self) -> None:
        self.roots = {name: (root(a, self.kind), root(g, self.kind)) for name, (a, g) in self.factors.items()}

    def begin(self, model: Any, steps: int) -> None:
        self.layers = lora_layers(model, self.plan)

    def penalty(self) -> Tensor:
        total = torch.zeros(())
        for name, module in self.layers.items():
            adapters = [adapter for adapter in (TRAINED, START) if adapter in module.lora_B]  # D = p q: START holds the start, negative
            p = torch.cat([module.scaling[adapter] * module.lora_B[adapter].weight for adapter in adapters], 1)
            q = torch.cat([module.lora_A[adapter].weight for adapter in adapters], 0)
            a, g = self.roots[name]
            total = total + (g.form(p) * a.form(q.T)).sum()
        return self.price / 2 * total


@dataclass
class Variant(Run):
    """A run with changes."""

    changes: dict[str, str] = field(default_factory=dict)

    def _knowledge_rows(self) -> list[dict[str, Any]]:
        path = self.common.path / "knowledge-rows.json"
        if not path.is_file():
            rows = self.surveys.knowledge()
            write_json(path, [[int(token) for token in row["input_ids"]] for row in rows])
        return [{"input_ids": ids, "completion_mask": [0] + [1] * (len(ids) - 1)} for ids in read_json(path)]

    @cached_property
    def _factors(self) -> Factors:
        path = self.common.path / "knowledge-moments.safetensors"
        if not path.is_file():
            model, rows = load_model(self.config.model), self._knowledge_rows()
            found = moments(model, list(target_layers(model, self.config.model.targets)), rows, 8, self.inputs.tokenizer.pad_token_id)
            write_tensors(path, {f"{side}.{name}": each for name, pair in found.items() for side, each in zip("AG", pair, strict=True)})
        held = load_file(path)
        return {key[2:]: (held[key], held[f"G.{key[2:]}"]) for key in held if key.startswith("A.")}

    def _survey_of(self, what: str) -> Survey:
        """Of the task or of the knowledge text, with every direction."""
        place = self.common.path / f"whole-survey-{what}"
        if (place / "survey.json").is_file():
            return Survey.load(place)
        config, rows = self.common_config, self.inputs.common_examples.rows if what == "task" else self._knowledge_rows()
        parts = calibration_batches(rows, config.calibration, self.inputs.tokenizer.pad_token_id, config.seed, config.data.max_length)
        cap = max(min(layer.shape) for layer in layer_shapes(config.model)[0].values())
        model = self.surveys.base_model()
        site = Site(model, place, cap, config.model.targets, {"model": weights_fingerprint(model)})
        return survey(site, parts, config.calibration.fisher, config.seed)

    def statistics(self) -> Survey | None:
        rules = {"ratio", "aside"} & set(self.changes)
        return self._survey_of("task") if rules else super().statistics()

    def plan(self) -> Plan:
        plan = super().plan()
        if not {"ratio", "aside"} & set(self.changes):
            return plan
        task, knowledge = self._survey_of("task"), self._survey_of("knowledge")
        layers = {}
        for name, layer in plan.layers.items():
            ours, theirs = task.directions(name).scores.double(), knowledge.directions(name).scores.double()
            aside = theirs if layer.side == "least" else ours
            score = ours / (theirs + 1e-3 * theirs.mean()) if "ratio" in self.changes else aside
            layers[name] = replace(layer, directions=select(score, layer.rank, layer.side).tolist())
        return replace(plan, layers=layers)

    def _adapted(self, plan: Plan, config: Config | None = None) -> Any:
        adapted = super()._adapted(plan, config)
        for kind in ("stay", "thin", "diagonal", "decay"):
            if kind in self.changes:
                self._regime = Stay(kind, float(self.changes[kind]), self._factors, plan)
        chosen = self.surveys.of(CONTRASTS[self.changes["contrast"]]) if "contrast" in self.changes else None
        for name, module in lora_layers(adapted, plan).items() if plan.layers else ():
            first = module.lora_A[TRAINED].weight
            if chosen:
                with torch.no_grad():
                    first.copy_(chosen.vectors(name, [*range(plan.layers[name].rank)])[1].T)
            if "frozen" in self.changes:
                first.register_hook(torch.zeros_like)  # AdamW without weight decay leaves it
        return adapted


def variant(config: Config, folder: Path, name: str, seed: int, tell: Any) -> Variant:
    """One run: it is asked the questions of the configuration's seed, and trained with its own."""
    what, _, factor = name.partition("@")
    method, *changes = what.split("+")
    own = config.compare.settings.get(method, {})
    common = override(config, [f"plan.method={method}", *(f"{key}={value}" for key, value in own.items())])
    rate = common.train.learning_rate * float(factor or 1)
    place = folder / f"{what.replace(':', '-')}-lr{rate:g}{f'-seed{seed}' if seed != config.seed else ''}"
    common = override(common, [f"train.learning_rate={rate}", "compare={methods: [], seeds: [], settings: {}}"])
    found = dict(change.partition(":")[::2] for change in changes)

    def named(step: str, done: int, total: int, line: str) -> None:
        tell(f"{place.name}: {step}", done, total, line)

    return Variant(override(common, [f"out={place}", f"seed={seed}"]), shared=folder, shared_config=common, tell=named, changes=found)


def share(run: Variant) -> None:
    """Make what a run has in common with others."""
    run.before_plan()
    run.plan()  # with the surveys of both texts, where directions are chosen by them
    if "contrast" in run.changes:
        run.surveys.of(CONTRASTS[run.changes["contrast"]])
    if {"stay", "thin", "diagonal", "decay"} & set(run.changes):
        _ = run._factors


def run_one(item: tuple[Config, Path, str, int], tell: Any) -> None:
    run = variant(*item, tell)
    run.all_but_report()
    delete_weights(run.path)


def row(name: str, run: Variant, found: Standing) -> dict[str, str]:
    """A line of the table."""
    known = found.estimates
    shares = {f"{metric} %": percent(x.value, x.low, x.high) if (x := known.get(metric)) else "" for metric in ("K", "T", "KT")}
    nats = {metric: f"{x.value:+.2f} ({x.low:+.2f} to {x.high:+.2f})" if (x := known.get(metric)) else "" for metric in ("kept", "learned")}
    rate = f"{run.config.train.learning_rate:g}"
    return {"variant": name.partition("@")[0], "learning rate": rate, **shares, **{f"{key} (nats)": text for key, text in nats.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", help="a run file (default: the embedded world), and key=value")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, help="of the training; the questions are those of the run file's seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--title", default="beyond", help="of the table in docs/beyond.md, and of the runs' folder")
    given = parser.parse_args()
    name, config = run_config(given.arguments, given.title)
    folder, seeds = Path(f"{config.out}-seed{config.seed}"), given.seeds or [config.seed]
    config = resolve(override(config, [f"out={folder}"]))
    Folder(folder).claim(config, versions())
    names = ["full", *given.variants]
    with bars() as tell:
        if given.jobs > 1:
            for each in names:
                share(variant(config, folder, each, seeds[0], tell))
        do_all(run_one, [(config, folder, each, seed) for seed in seeds for each in [*given.variants, "full"]], given.jobs, tell)
        runs = {each: [variant(config, folder, each, seed, tell) for seed in seeds] for each in names}
    entries = {each: [Entry(one.path, full.path) for one, full in zip(group, runs["full"], strict=True)] for each, group in runs.items()}
    found = standings(folder / "base", entries, config)
    rows = [row(each, group[0], found[each]) for each, group in runs.items()]
    command = shlex.join(["python", "benchmarks/beyond.py", *sys.argv[1:]])
    write_section(f"{given.title}-{name}-seed{config.seed}", f"`{command}`\n\n{table(rows)}\n\n({environment()})", "beyond.md")


if __name__ == "__main__":
    main()
