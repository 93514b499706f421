"""Methods x seeds -> one table. One survey and one evaluation of the base are shared by all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farss.artifacts import Plan, Scores, read_json, write_json, write_text
from farss.config import Config, from_dict, set_key, to_dict
from farss.evaluate import Summary
from farss.folder import Folder, resolve
from farss.pipeline import Run, Tell, versions
from farss.plan import method_of
from farss.report import comparison_csv, comparison_markdown, write_report
from farss.train import TrainResult


def compare(config: Config, tell: Tell) -> Path:
    """Run every method of `compare.methods` for every seed, and write `comparison.json`, `.md`, `.csv` and the report.

    Each run lies in `<method>-seed<k>/` and is an ordinary run folder; whatever is complete there is not done again.

    Returns:
        The comparison's folder.
    """
    config = resolve(config)
    runs = [_sub_run(config, method, seed, tell) for seed in seeds(config) for method in config.compare.methods]
    for run in runs:
        run.check_inputs()
        run.check_unchanged()
    Folder(config.out).claim(config, versions())
    for run in runs:
        run.all_but_report()
    rows = [_row(run, _full_scores(config, runs, run)) for run in runs]
    folder = Path(config.out)
    base = Scores.load(folder / "base" / "scores.json")
    comparison = {"rows": rows, "base": {name: x.score for name, x in (base.knowledge | base.task).items()}, "notes": _notes(config)}
    write_json(folder / "comparison.json", comparison)
    write_text(folder / "comparison.md", comparison_markdown(comparison))
    write_text(folder / "comparison.csv", comparison_csv(comparison))
    for run in runs:
        run.report()
    write_report(folder)
    return folder


def seeds(config: Config) -> list[int]:
    """The seeds of a comparison."""
    return config.compare.seeds or [config.seed]


def _sub_run(config: Config, method: str, seed: int, tell: Tell) -> Run:
    """The run of one method and seed: the comparison's configuration with `compare.settings[method]` applied."""
    values = to_dict(config)
    for key, value in {"plan.method": method, "seed": seed, **config.compare.settings.get(method, {})}.items():
        set_key(values, key, value)
    values["out"] = str(Path(config.out) / f"{method}-seed{seed}")
    values["compare"] = {}

    def named(step: str, done: int, total: int, line: str) -> None:
        shared = step in ("survey", "evaluate base")
        tell(step if shared else f"{method} seed {seed}: {step}", done, total, line)

    sub = from_dict(values)
    method_of(sub.plan)
    return Run(sub, shared=Path(config.out), shared_seed=config.seed, tell=named)


def _full_scores(config: Config, runs: list[Run], run: Run) -> Path | None:
    """The reference of T: the full fine-tuning run of the same seed, or the file that the configuration names."""
    for other in runs:
        if other.config.plan.method == "full" and other.config.seed == run.config.seed:
            return other.path / "scores.json"
    return Path(config.evaluate.full_scores) if config.evaluate.full_scores else None


def _row(run: Run, full: Path | None) -> dict[str, Any]:
    """One line of the table."""
    summary: Summary = run.summarise(full)
    plan, trained, scores = (
        Plan.load(run.path / "plan.json"),
        TrainResult.load(run.path / "train.json"),
        Scores.load(run.path / "scores.json"),
    )
    values = read_json(run.path / "summary.json")
    before = [run.common.record(step) for step in run.steps_before]
    return {
        "method": plan.method,
        "seed": run.config.seed,
        "folder": run.path.name,
        "rank": plan.rank,
        "learning_rate": run.config.train.learning_rate,
        "parameters": trained.parameters,
        **{key: values[key] for key in ("K", "T", "KT", "forgetting")},
        "seconds_init": sum(record["seconds"] for record in before if record),
        "seconds_train": trained.seconds,
        "peak_memory_gib": trained.peak_memory_gib,
        "benchmarks": {
            entry["name"]: {"score": entry["after"], "low": entry.get("low"), "high": entry.get("high"), "kind": entry["kind"]}
            for entry in values["benchmarks"]
        },
        "gold_loglikelihood": {name: x.gold_loglikelihood for name, x in (scores.knowledge | scores.task).items()},
        "notes": list(plan.notes) + list(summary.notes),
    }


def _notes(config: Config) -> list[str]:
    """What a reader must know to judge the table."""
    notes = [f"Learning rate {config.train.learning_rate:g} for every method unless its own settings say otherwise."]
    notes += [f"{method}: {', '.join(f'{k}={v}' for k, v in settings.items())}" for method, settings in config.compare.settings.items()]
    return notes
