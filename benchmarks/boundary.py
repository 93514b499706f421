"""Is the boundary that the search chooses as good as the best one found by full runs of every candidate?

    python benchmarks/boundary.py                                 # the embedded world
    FARSS_DATA=path/to/data python benchmarks/boundary.py configs/gemma-banking77.yaml

One survey and one evaluation of the base are shared by the search, a full run of every candidate, and full fine-tuning, the
reference of T. Whatever is complete is not done again, so it may be killed and started again. `key=value` overrides options;
`compare.jobs=2` makes two runs at a time.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import environment, percent, run_config, table, write_section

from farss.boundary import Boundary
from farss.config import Config
from farss.configfile import override
from farss.folder import Folder
from farss.jobs import Tell, do_all
from farss.maths.metrics import interval
from farss.models import layer_shapes
from farss.pipeline import Run
from farss.progress import bars
from farss.search import candidates
from farss.tasks.standing import Entry, Standing, standings
from farss.tasks.summary import Summary
from farss.train import TrainResult
from farss.versions import versions


class Measured(NamedTuple):
    """The search, and full runs of every candidate."""

    found: Boundary
    summaries: dict[int, Summary]
    trained: dict[int, TrainResult]
    standings: dict[int, Standing]
    """Of each candidate, over the same draws of questions."""

    def lead(self, one: int, other: int) -> tuple[float, float, float]:
        """By how much KT of one candidate exceeds another's, with the 95 % interval over the questions."""
        values, draws = ([getattr(self.standings[n], part)["KT"] for n in (one, other)] for part in ("estimates", "draws"))
        return values[0].value - values[1].value, *interval(draws[0] - draws[1])


def measure(config: Config, folder: Path) -> Measured:
    """Make every run, whole."""
    Folder(folder).claim(config, versions())
    with bars() as tell:

        def made(name: str, method: str, *options: str) -> Run:
            own = [f"{key}={value}" for key, value in config.compare.settings.get(method, {}).items()]
            common = [f"out={folder / name}", "compare={methods: [], seeds: [], settings: {}}", f"plan.method={method}"]
            return _run(override(config, [*common, *own, *options]), folder, tell)

        full = made("full", "full")
        search = made("search", "farss", "plan.boundary=auto")
        wanted = candidates(layer_shapes(config.model)[1])
        runs = {n: made(f"boundary-{n}", "farss", f"plan.boundary={n}") for n in wanted}
        for run in (search, full, *runs.values()):
            run.check_inputs()
        search.claim()
        search.evaluate_base()
        search.survey()
        do_all(_whole, [(run.config, folder) for run in (full, *runs.values())], config.compare.jobs, tell)
        found = search.boundary()
    summaries = {n: run.summarise(full.path / "scores.json") for n, run in runs.items()}
    trained = {n: TrainResult.load(run.path / "train.json") for n, run in runs.items()}
    stand = standings(folder / "base", {str(n): [Entry(run.path, full.path)] for n, run in runs.items()}, config)
    return Measured(found, summaries, trained, {n: stand[str(n)] for n in runs})


def _run(config: Config, folder: Path, tell: Tell) -> Run:
    name = Path(config.out).name
    return Run(config, shared=folder, tell=lambda step, done, total, line: tell(f"{name}: {step}", done, total, line))


def _whole(item: tuple[Config, Path], tell: Tell) -> None:
    _run(*item, tell).all_but_report()


def written(measured: Measured, arguments: list[str]) -> str:
    """The table, and what it says."""
    found, best = measured.found, max(measured.standings, key=lambda n: (measured.standings[n].estimates["KT"].value, -n))
    probed = {each.boundary: each for each in found.candidates}
    rows = []
    for n, summary in measured.summaries.items():
        one = probed.get(n)
        rows.append(
            {
                "boundary": f"**{n}**" if n == found.chosen else str(n),
                "probed steps": str(one.steps) if one else "none",
                "its KT %": percent(one.KT, one.low, one.high) if one else "",
                "full run: K %": f"{100 * summary.K.value:.1f}",
                "T %": f"{100 * summary.T.value:.1f}",
                "KT %": percent(summary.KT.value, summary.KT.low, summary.KT.high),
                "best minus it": percent(*measured.lead(best, n)) if n != best else "best",
                "training (s)": f"{measured.trained[n].seconds:.0f}",
            }
        )
    gap, *ends = measured.lead(best, found.chosen)
    seconds = float(np.mean([each.seconds for each in measured.trained.values()]))
    verdict = "within" if ends[0] <= 0 else "outside"
    lines = [
        f"{found.sentence} Full runs are best at boundary {best}; its KT exceeds the chosen one's by {percent(gap, *ends)} points: "
        f"the choice is {verdict} the interval.",
        f"The search took {found.seconds:.0f} s, {found.seconds / seconds:.0%} of the {seconds:.0f} s that a full run trains on average.",
        f"K: {found.knowledge}. T: {found.task}.",
    ]
    command = shlex.join(["python", "benchmarks/boundary.py", *arguments])
    return f"`{command}`\n\n{table(rows)}\n\n" + "\n".join(lines) + f"\n\n({environment()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", help="a run file (default: the embedded world), and key=value")
    arguments = parser.parse_args().arguments
    name, config = run_config(arguments, "boundary")
    write_section(f"boundary-{name}", written(measure(config, Path(config.out)), arguments), "boundary.md")


if __name__ == "__main__":
    main()
