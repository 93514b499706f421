"""How often the 95 % interval of K holds the truth, where the untouched model answers few questions right.

python benchmarks/coverage.py
"""

from __future__ import annotations

import argparse

import numpy as np
from common import environment, table, write_section

from farss.maths.metrics import interval, mean_ratios, observed_and_resampled

QUESTIONS, RIGHT = 100, (3, 5, 10, 20, 40)
KEPT = 0.8
"""Of the right answers, each by itself; nothing is answered by luck, so it is K."""
DRAWS, RESAMPLES = 500, 2000


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for right in RIGHT:
        generator, ends = np.random.default_rng(right), []
        for seed in range(DRAWS):
            before = np.arange(QUESTIONS) < right
            after = before & (generator.random(QUESTIONS) < KEPT)
            drawn = observed_and_resampled([np.stack([before, after]).astype(float)], RESAMPLES, seed)
            ends.append(interval(mean_ratios(drawn, 1, 0)[1:]))
        low, high = np.array(ends).T
        rows.append(
            {
                "right answers before": f"{right} of {QUESTIONS}",
                "the interval holds the truth": f"{np.mean((low <= KEPT) & (high >= KEPT)):.0%}",
                "it has no width": f"{np.mean(low == high):.0%}",
            }
        )
    how = f"true K {KEPT:.0%}, {DRAWS} draws of the answers, {RESAMPLES} resamples each; {environment()}"
    write_section("coverage", f"{table(rows)}\n\n({how})", "comparing.md")


if __name__ == "__main__":
    main()
