"""Tables for the terminal (rich): importance, the plan as a map of ranks, scores, and the comparison of methods."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from farss.artifacts import LayerPlan, Plan, Survey
from farss.report.candidates import departure
from farss.report.figures import SIDES, layer_types, start_text
from farss.report.story import MEANINGS, tiles
from farss.report.tables import METRICS, NATS, Cell, base_cells, cells, columns, gap_heads, gaps
from farss.report.words import SPACE, change, cut, interval, points

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from farss.boundary import Boundary

STYLES = {"least": "yellow", "most": "blue", None: "white"}
SHADES = "░▒▓█"
SPARKS = "▁▂▃▄▅▆▇█"
LABEL_WIDTH = 20
ACROSS = 6
"""Benchmarks side by side."""
ONLY_REPORTED = ("effective_rank", "learning_rate", "peak_memory_init_gib", "peak_memory_gib")
"""Columns for which a terminal has no room; what is said of learning rates stands in a comparison's notes."""
QUESTIONS = ("retained", *NATS, "forgetting")
"""Columns that say what became of right answers and of text, in a table of their own."""


class RankMap:
    """The plan's ranks: blocks as columns, layer types as rows; numbers where the terminal is wide enough, shades where it is not."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.highest = max((layer.rank for layer in plan.layers.values()), default=1)
        types = layer_types({name: layer.block for name, layer in plan.layers.items()})
        self.rows: dict[str, dict[int, LayerPlan]] = {}
        for name, layer in plan.layers.items():
            self.rows.setdefault(types[name], {})[layer.block] = layer

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.plan.layers:
            yield Text(f"{self.plan.method} trains every weight: there are no ranks")
            return
        label = min(LABEL_WIDTH, max(len(kind) for kind in self.rows)) + 1
        room = max(1, options.max_width - label)
        number = len(str(self.highest)) + 1
        width = number if number * self.plan.blocks <= room else 1
        step = max(1, room // width)
        for start in range(0, self.plan.blocks, step):
            yield from self._part(range(start, min(start + step, self.plan.blocks)), label, width)
        yield self._key(width)

    def _part(self, blocks: range, label: int, width: int) -> Iterator[Text]:
        yield Text(" " * label + _ruler(blocks, width), style="dim", no_wrap=True)
        for kind, layers in self.rows.items():
            line = Text(cut(kind, LABEL_WIDTH).ljust(label)[:label], no_wrap=True, overflow="crop")
            for block in blocks:
                line.append_text(self._cell(layers.get(block), width))
            yield line

    def _cell(self, layer: LayerPlan | None, width: int) -> Text:
        if layer is None:
            return Text("·".rjust(width), style="dim")
        shade = SHADES[min(3, 4 * layer.rank // (self.highest + 1))]
        return Text(str(layer.rank).rjust(width) if width > 1 else shade, style=STYLES[layer.side])

    def _key(self, width: int) -> Text:
        blocks = {side: [layer.block for layer in self.plan.layers.values() if layer.side == side] for side in SIDES}
        where = {side: f"{min(some)}" if min(some) == max(some) else f"{min(some)} to {max(some)}" for side, some in blocks.items() if some}
        starts: dict[str | None, str] = {layer.side: start_text(layer) for layer in self.plan.layers.values()}
        words = {side: f"{starts[side]}{f', blocks {at}' if len(where) > 1 else ''}" for side, at in where.items()}
        key = Text("  ").join(Text(f"■ {text}", style=STYLES[side]) for side, text in words.items())
        if width == 1:
            key.append(f"  {SHADES} rank up to {self.highest}", style="dim")
        return key


def _ruler(blocks: range, width: int) -> str:
    """Block numbers over their columns, every so many that they do not touch."""
    every = 1 if width > len(str(blocks.stop - 1)) else 5
    line = ""
    for block in blocks:
        place = (block - blocks.start + 1) * width
        mark = str(block)
        if block % every == 0 and len(line) + len(mark) <= max(place, len(mark)):
            line = line.ljust(place - len(mark)) + mark
    return line


def importance_table(survey: Survey) -> Table:
    """Fisher importance by layer type: one small bar a block, each row from its lowest to its highest."""
    types = layer_types({name: layer.block for name, layer in survey.layers.items()})
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("Layers", "Blocks"):
        table.add_column(head)
    for head in ("lowest", "mean", "highest"):
        table.add_column(Text(f"importance: {head}" if head == "lowest" else head), justify="right")
    for kind in dict.fromkeys(types.values()):
        layers = sorted((survey.layers[name] for name, own in types.items() if own == kind), key=lambda layer: layer.block)
        values = [layer.importance for layer in layers]
        numbers = (min(values), sum(values) / len(values), max(values))
        table.add_row(Text(cut(kind, 40)), Text(_sparks(values), overflow="crop"), *(f"{number:.3g}" for number in numbers))
    return table


def extremes_table(survey: Survey) -> Table:
    """The ten most and the ten least important layers side by side."""
    ordered = sorted(survey.layers.values(), key=lambda layer: layer.importance, reverse=True)
    types = layer_types({name: layer.block for name, layer in survey.layers.items()})
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("Most important", "Least important"):
        table.add_column(head)
        table.add_column("block", justify="right")
        table.add_column("importance", justify="right")
    for pair in zip(ordered[:10], ordered[:-11:-1], strict=True):
        table.add_row(*(text for layer in pair for text in (cut(types[layer.name], 30), str(layer.block), f"{layer.importance:.3g}")))
    return table


def survey_facts(survey: Survey) -> str:
    """What a survey cost, in a sentence or two."""
    meta = survey.meta
    text = f"{survey.examples} examples, {survey.tokens:,} tokens, {meta.get('seconds', 0):.0f} s"
    text += f", peak memory {meta['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in meta else ""
    if "overlap" in meta:
        most, least = (meta["overlap"][side] for side in ("most", "least"))
        text += (
            f"\nfloat32 decompositions: in the last block, {most:.2%} of the {survey.cap} most important directions of each layer "
            f"and {least:.2%} of the least important ones are those of the exact decomposition"
        )
    return text


def boundary_table(found: Boundary) -> Table:
    """Every boundary as far as it was probed: the chosen one bold, those that were dropped on the way dim."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("shallow blocks", "steps", "T %", "K %", "KT %", "95 % interval", "parameters"):
        table.add_column(Text(head), justify="right")
    for each in found.candidates:
        numbers = (points(each.T), points(each.K), points(each.KT), interval(each.low, each.high), f"{each.parameters:,}")
        style = "bold" if each.boundary == found.chosen else "dim" if each.dropped else ""
        table.add_row(str(each.boundary), str(each.steps), *numbers, style=style)
    return table


def boundary_departure(found: Boundary, plan: Plan | None) -> str:
    """A sentence where the plan was made with another boundary than the search chose, else nothing."""
    return departure(found.chosen, plan) if found.candidates else ""


def _sparks(values: list[float]) -> str:
    """One small bar a block, on a logarithmic scale."""
    logs = [math.log(value) if value > 0 else -math.inf for value in values]
    known = [value for value in logs if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    span = high - low or 1.0
    return "".join(SPARKS[round(7 * (value - low) / span)] if math.isfinite(value) else " " for value in logs)


def pruning_table(rows: list[dict[str, Any]]) -> Table:
    """What each method made of the model, a model a column."""
    from farss.pruning.table import columns

    table = Table(box=None, pad_edge=False, header_style="dim")
    (_, names), *rest = columns(rows)
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right")
    for head, texts in rest:
        table.add_row(Text(head), *(Text(text) for text in texts))
    return table


def summary_table(summary: Mapping[str, Any] | DataclassInstance) -> Table:
    """Every benchmark before and after, with how many questions it asks, then K, T, KT and forgetting with their 95 % intervals."""
    values = dict(summary) if isinstance(summary, Mapping) else dataclasses.asdict(summary)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for head in ("before %", "after %", "95 % interval", "change"):
        table.add_column(Text(head), justify="right")
    for row in values.get("benchmarks") or []:
        before, after = row.get("before"), row.get("after")
        middle = (points(before), points(after), interval(row.get("low"), row.get("high")), change(before, after))
        asked = f", {row['questions']:,}" if row.get("questions") else ""
        table.add_row(Text(cut(f"{row.get('name')} ({row.get('kind')}{asked})", 40)), *middle)
    for tile in tiles(values):
        name = Text(f"{tile.name}: {tile.meaning}" if tile.name in MEANINGS else tile.name)
        table.add_row(name, "", tile.text.removesuffix(f"{SPACE}%"), tile.detail, style="bold")
    return table


def comparison_table(comparison: dict[str, Any]) -> Group:
    """The balance and the costs of each method, below them its benchmarks, and the paired differences of KT; the report has
    the rest.

    The best of each column is bold, the second best underlined. Several tables, so that they fit 80 columns.
    """
    keys = [column.key for column in columns(comparison)]
    benchmarks = [place for place, key in enumerate(keys) if key.startswith("benchmarks.")]
    answers = [place for place, key in enumerate(keys) if key in QUESTIONS]
    balance = [place for place, key in enumerate(keys) if place not in benchmarks + answers and key not in ONLY_REPORTED]
    parts: list[Any] = [_methods_table(comparison, balance)]
    for first in range(0, len(benchmarks), ACROSS):
        parts += ["", _methods_table(comparison, benchmarks[first : first + ACROSS], before=True)]
    parts += ["", _methods_table(comparison, answers)] if answers else []
    if METRICS[0] in gaps(comparison):
        parts += ["", _gap_table(comparison)]
    return Group(*parts)


def _gap_table(comparison: dict[str, Any]) -> Table:
    """KT of each method against LoRA and against the best other method."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, head in enumerate(gap_heads(METRICS[0])):
        table.add_column(Text(head), justify="right" if place > 1 else "left")
    for gap in gaps(comparison)[METRICS[0]]:
        table.add_row(Text(cut(gap.method, 40)), Text(cut(gap.against, 40)), gap.text, gap.between, gap.p)
    return table


def _methods_table(comparison: dict[str, Any], shown: list[int], before: bool = False) -> Table:
    """One row a method, with these of its columns."""
    heads = columns(comparison)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("Method", no_wrap=True)
    for place in shown:
        table.add_column(Text(cut(heads[place].title, 40)), justify="right", overflow="fold")
    if before and comparison.get("base"):
        base = base_cells(comparison)
        table.add_row(Text("before"), *(Text(base[place].text) for place in shown), style="dim")
    for method, row in cells(comparison).items():
        table.add_row(Text(cut(method, 40)), *(_cell(row[place], heads[place].better != 0) for place in shown))
    return table


def _cell(cell: Cell, detailed: bool) -> Text:
    text = Text(cell.text, style={1: "bold", 2: "underline"}.get(cell.place, ""))
    detail = cell.detail.replace(" to ", "–").replace("± ", "±")
    return text.append(f"\n{detail}", style="dim not bold not underline") if detail and detailed else text
