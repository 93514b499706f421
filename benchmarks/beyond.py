"""Beyond the paper: variations on FARSS and LoRA, each at several learning rates, K against T.

    python benchmarks/beyond.py                                              # the embedded world
    FARSS_DATA=../shared/data python benchmarks/beyond.py configs/gemma-banking77.yaml --variants farss farss+stay:1 --rates 0.5 1

A variant is a method, and behind each `+` a change to it:

- `stay:MU` adds `MU / 2 sum_l tr(G_l D_l A_l D_l^T)` to the loss, where `D_l` is the change of a layer's weight, and `A_l` and
  `G_l` are the second moments of activations and gradients on *knowledge* text: the Kronecker-factored second-order estimate of the
  divergence (nats a token) between the base and the fine-tuned model on that text (Ritter et al. 2018 use it between tasks);
- `diagonal:MU` the same with the diagonals of A and G alone;
- `decay:MU` the same with multiples of the identity of the same trace, which know nothing of knowledge: the control;
- `ratio` chooses the directions with the largest (deep) and smallest (shallow) quotient of task score and knowledge score;
- `aside` chooses the shallow directions by the smallest *knowledge* score.

Finished runs are not done again. The knowledge text is `calibration.knowledge`, or what the base writes by itself.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import WORK, environment, table, write_section
from torch import Tensor

from farss.adapter import START, TRAINED, lora_layers
from farss.artifacts import Plan, Survey, read_json, write_json
from farss.cli import bars
from farss.config import Config, load, override
from farss.data import batches, calibration_batches, collate
from farss.evaluate import Summary
from farss.folder import Folder
from farss.maths.directions import select
from farss.methods import Regime
from farss.models import layer_shapes, load_model, target_layers
from farss.pipeline import Run, versions
from farss.survey import survey
from farss.world.demo import demo_config

Factors = dict[str, tuple[Tensor, Tensor]]
"""By layer: `A [n, n]` and `G [m, m]`."""
VARIANTS = ["farss", "farss+stay:1", "farss+stay:10", "farss+decay:1", "farss+ratio", "farss+aside", "lora", "lora+stay:1", "lora+stay:10"]


def moments(model: Any, names: list[str], rows: list[dict[str, Any]], size: int, pad: int) -> Factors:
    """Second moments of inputs and output gradients of the summed loss, mean over real tokens, of whole matrices."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    tokens = 0

    def hook(name: str) -> Any:
        def keep(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        return keep

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    model.get_input_embeddings().weight.requires_grad_(True)  # so that there are gradients at all
    for part in batches(rows, size):
        batch = collate(part, pad)
        labels, mask = batch.pop("labels"), batch["attention_mask"].bool()
        logits = model(**{key: value for key, value in batch.items() if key != "counted"}).logits[:, :-1]
        logits, targets = logits.flatten(0, 1).float(), labels[:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").backward()
        for name, (h, y) in seen.items():
            x, g = h[mask].float(), y.grad[mask].float()
            a, b = sums.get(name, (0.0, 0.0))
            sums[name] = (a + x.T @ x, b + g.T @ g)
        tokens += int(mask.sum())
        model.zero_grad()
    for one in hooks:
        one.remove()
    return {name: (a / tokens, g / tokens) for name, (a, g) in sums.items()}


@dataclass
class Stay(Regime):
    """A price on moving weights that knowledge text uses."""

    kind: str
    price: float
    factors: Factors
    plan: Plan
    last: float = 0.0

    def __post_init__(self) -> None:
        makes = {"stay": lambda x: x, "diagonal": lambda x: x.diagonal().diag(), "decay": lambda x: x.diagonal().mean() * torch.eye(len(x))}
        self.factors = {name: (makes[self.kind](a), makes[self.kind](g)) for name, (a, g) in self.factors.items()}

    def begin(self, model: Any, steps: int) -> None:
        self.layers = lora_layers(model, self.plan)

    def penalty(self) -> Tensor:
        total = torch.zeros(())
        for name, module in self.layers.items():
            a, g = self.factors[name]
            left, right = [], []
            for adapter in (TRAINED, START):
                if adapter in module.lora_B:
                    left.append(module.scaling[adapter] * module.lora_B[adapter].weight)
                    right.append(module.lora_A[adapter].weight)
            p, q = torch.cat(left, 1), torch.cat(right, 0)  # D = p q: the frozen adapter holds the start, negative
            total = total + ((p.T @ (g @ p)) * (q @ (a @ q.T)).T).sum()
        return self.price / 2 * total


@dataclass
class Variant(Run):
    """A run with changes."""

    changes: dict[str, str] = field(default_factory=dict)

    def _knowledge_rows(self) -> list[dict[str, Any]]:
        path = self.common.path / "knowledge-rows.json"
        if not path.is_file():
            rows = self._knowledge()
            write_json(path, [[int(token) for token in row["input_ids"]] for row in rows])
        return [{"input_ids": ids, "completion_mask": [0] + [1] * (len(ids) - 1)} for ids in read_json(path)]

    @cached_property
    def _factors(self) -> Factors:
        path = self.common.path / "knowledge-moments.pt"
        if not path.is_file():
            model = load_model(self.config.model)
            rows = self._knowledge_rows()
            torch.save(moments(model, list(target_layers(model, self.config.model.targets)), rows, 8, self.tokenizer.pad_token_id), path)
        return torch.load(path)

    def _survey_of(self, what: str) -> Survey:
        """Of the task or of the knowledge text, with every direction."""
        place = self.common.path / f"whole-survey-{what}"
        if (place / "survey.json").is_file():
            return Survey.load(place)
        config, rows = self.common_config, self.common_examples.rows if what == "task" else self._knowledge_rows()
        parts = calibration_batches(rows, config.calibration, self.tokenizer.pad_token_id, config.seed, config.data.max_length)
        cap = max(min(layer.shape) for layer in layer_shapes(config.model)[0].values())
        return survey(self._to_look_at(), parts, place, cap, config.model.targets, config.calibration.fisher, config.seed)

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
        for kind in ("stay", "diagonal", "decay"):
            if kind in self.changes:
                self._regime = Stay(kind, float(self.changes[kind]), self._factors, plan)
        return adapted


def variant(config: Config, folder: Path, name: str, rate: float, tell: Any) -> Variant:
    """One run."""
    method, *changes = name.split("+")
    own = config.compare.settings.get(method, {})
    options = [f"plan.method={method}", *(f"{key}={value}" for key, value in own.items())]
    config = override(config, options)
    rate *= config.train.learning_rate
    place = folder / f"{name.replace(':', '-')}-lr{rate:g}"
    config = override(config, [f"out={place}", f"train.learning_rate={rate}", "compare={methods: [], seeds: [], settings: {}}"])
    found = dict(change.partition(":")[::2] for change in changes)
    label = place.name
    return Variant(config, shared=folder, tell=lambda step, done, total, line: tell(f"{label}: {step}", done, total, line), changes=found)


def estimate(summary: Summary, metric: str) -> str:
    found = getattr(summary, metric)
    return "" if found is None else f"{100 * found.value:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def nats(summary: Summary, kind: str) -> str:
    found = [each.gold_change.value for each in summary.benchmarks if each.kind == kind and each.gold_change]
    return f"{sum(found) / len(found):+.2f}" if found else ""


def row(name: str, run: Variant, summary: Summary) -> dict[str, str]:
    """A line of the table."""
    return {
        "variant": name,
        "learning rate": f"{run.config.train.learning_rate:g}",
        **{f"{metric} %": estimate(summary, metric) for metric in ("K", "T", "KT")},
        "kept (nats)": nats(summary, "knowledge"),
        "learned (nats)": nats(summary, "task"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", help="a run file (default: the embedded world), and key=value")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 1.0])
    given = parser.parse_args()
    file = next((Path(each) for each in given.arguments if "=" not in each), None)
    name, config = (file.stem, load(file)) if file else ("world", demo_config(""))
    config = override(config, [each for each in given.arguments if "=" in each])
    folder = WORK / f"beyond-{name}-seed{config.seed}"
    config = override(config, [f"out={folder}"])
    Folder(folder).claim(config, versions())
    rows = []
    with bars() as tell:
        full = variant(config, folder, "full", 1.0, tell)
        full.all_but_report()
        full.drop_weights()
        for each in given.variants:
            for rate in given.rates:
                run = variant(config, folder, each, rate, tell)
                run.all_but_report()
                run.drop_weights()
                summary = run.summarise(full.path / "scores.json")
                rows.append(row(each, run, summary))
                print(rows[-1], flush=True)
    rows.insert(0, row("full", full, full.summarise(full.path / "scores.json")))
    command = " ".join(["python benchmarks/beyond.py", *given.arguments])
    write_section(f"beyond-{name}-seed{config.seed}", f"`{command}`\n\n{table(rows)}\n\n({environment()})", "beyond.md")


if __name__ == "__main__":
    main()
