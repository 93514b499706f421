"""The page's figures as PNG and SVG, for papers: the same descriptions, drawn by matplotlib.

Plotly's own export needs a browser. This knows the few traces and axis options that our figures use, and nothing of what
they show.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from farss.files import whole_file
from farss.report.figures import NAMES, Choice, Figure, Trace

WIDTH = 960
"""Pixels, at 100 to the inch."""
MOST = 6
"""A figure with more choices than this is written for its first and its last one, unless it wants every one written; the
page saves any other."""
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
SYMBOLS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "star": "*",
    "hexagon": "h",
    "triangle-down": "v",
    "circle-open": "o",
    "x-thin-open": "x",
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "svg.hashsalt": "farss",  # drawing twice gives the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e2e1dc",
    "grid.linewidth": 0.6,
}


def save_figures(figures: Iterable[Figure], folder: Path) -> None:
    """Write `<figure>.png` and `.svg`; of a figure with several choices `<figure>-<number>-<choice>`. Files of figures that
    are not there any more are deleted."""
    from matplotlib import rc_context

    colours, written = light_colours(), set[str]()
    with rc_context(STYLE):
        for figure in figures:
            for name, choice in _files(figure):
                _save(draw(themed({"data": choice.data, "layout": choice.layout}, colours)), folder / name)
                written.add(name)
    _forget(folder, written)


def _forget(folder: Path, written: set[str]) -> None:
    """Delete what an earlier report wrote and this one did not; files of other names are not ours."""
    ours = re.compile(rf"({'|'.join(NAMES)})(-\d+-[a-z0-9-]*)?")
    for path in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        if ours.fullmatch(path.stem) and path.stem not in written:
            path.unlink()


def _files(figure: Figure) -> list[tuple[str, Choice]]:
    few = figure.every or len(figure.choices) <= MOST
    places = range(len(figure.choices)) if few else (0, len(figure.choices) - 1)
    if len(figure.choices) == 1:
        return [(figure.name, figure.choices[0])]
    slugs = [re.sub(r"[^a-z0-9]+", "-", figure.choices[place].label.lower()).strip("-")[:60] for place in places]
    return [(f"{figure.name}-{place + 1}-{slug}", figure.choices[place]) for place, slug in zip(places, slugs, strict=True)]


def _save(figure: Any, path: Path) -> None:
    for kind, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
        with whole_file(path.with_name(f"{path.name}.{kind}")) as temporary:
            figure.savefig(temporary, format=kind, **options)


def light_colours() -> dict[str, str]:
    """The page's colours by name: its style sheet is the only list of them."""
    sheet = files("farss.report").joinpath("page.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): (#\w+)", sheet.partition("}")[0]))


def themed(value: Any, colours: dict[str, str]) -> Any:
    """The same value with colours in the place of `theme:NAME`."""
    if isinstance(value, dict):
        return {key: themed(entry, colours) for key, entry in value.items()}
    if isinstance(value, list):
        return [themed(entry, colours) for entry in value]
    return colours[value.removeprefix("theme:")] if isinstance(value, str) and value.startswith("theme:") else value


def plain_text(label: str) -> str:
    """A plotly label as matplotlib's text: without its escapes, without signs that no font or file has a place for, and with
    dollar signs that are dollar signs (to matplotlib they are formulas)."""
    text = html.unescape(label).replace("% {", "%{").replace("$", r"\$")
    return "".join(sign if sign.isprintable() else " " for sign in text)


# --- one figure ------------------------------------------------------------------------------------------------------


def draw(described: dict[str, Any]) -> Any:
    """A matplotlib figure of one description."""
    from matplotlib.figure import Figure as Canvas

    layout = described["layout"]
    names = sorted(
        {trace.get("yaxis", "y") for trace in described["data"]},
        key=lambda name: -_axis(layout, name).get("domain", [0, 1])[0],
    )
    shares = [high - low for low, high in (_axis(layout, name).get("domain", [0, 1]) for name in names)]
    canvas = Canvas(figsize=(WIDTH / 100, layout["height"] / 100), layout="constrained")
    plots = canvas.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=shares)[:, 0]
    axes = dict(zip(names, plots, strict=True))
    for trace in described["data"]:
        TRACES[trace["type"]](axes[trace.get("yaxis", "y")], trace)
    for name, plot in axes.items():
        _set_axis(plot, "y", _axis(layout, name))
        _set_axis(plot, "x", layout.get("xaxis", {}) if plot is plots[-1] else {**layout.get("xaxis", {}), "title": {}})
        _annotate(plot, layout, first=plot is plots[0], own=name == "y")
    _legend(canvas, plots, layout)
    return canvas


def _axis(layout: dict[str, Any], name: str) -> dict[str, Any]:
    axis: dict[str, Any] = layout.get(f"yaxis{name[1:]}", {})
    return axis


def _set_axis(plot: Any, letter: str, axis: dict[str, Any]) -> None:
    which = getattr(plot, f"{letter}axis")
    if axis.get("type") == "log":
        getattr(plot, f"set_{letter}scale")("log")
    if "range" in axis:
        getattr(plot, f"set_{letter}lim")(*axis["range"])
    elif axis.get("rangemode") == "tozero":
        getattr(plot, f"set_{letter}lim")(**{{"x": "left", "y": "bottom"}[letter]: 0})
    if "tickvals" in axis:
        which.set_ticks(axis["tickvals"], [plain_text(str(text)) for text in axis.get("ticktext", axis["tickvals"])])
    if axis.get("tickformat") == "~s":
        from matplotlib.ticker import EngFormatter, MaxNLocator

        which.set_major_formatter(EngFormatter(sep=""))
        which.set_major_locator(MaxNLocator(axis["nticks"]))
    if axis.get("autorange") == "reversed":
        which.set_inverted(True)
    which.set_label_text(axis.get("title", {}).get("text", ""))
    plot.grid(axis.get("showgrid", True), axis=letter)


def _annotate(plot: Any, layout: dict[str, Any], first: bool, own: bool) -> None:
    """Lines across the plots, and texts: those at the head go to the first plot, those with a `y` of the data to their own."""
    for shape in layout.get("shapes", []):
        style = {"color": shape["line"]["color"], "linewidth": 0.75 * shape["line"]["width"]}
        style["zorder"] = 0 if shape.get("layer") == "below" else 2
        style["linestyle"] = DASHES[shape["line"].get("dash", "solid")]
        if shape.get("yref") == "paper":
            plot.axvline(shape["x0"], **style)
        else:
            plot.axhline(shape["y0"], **style)
    for text in layout.get("annotations", []):
        on_paper = text["yref"] == "paper"
        if first if on_paper and text["y"] == 1 else own:
            across = "axes fraction" if text.get("xref") == "paper" else "data"
            plot.annotate(
                plain_text(text["text"]),
                (text["x"], text["y"]),
                xycoords=(across, "axes fraction" if on_paper else "data"),
                xytext=(text.get("xshift", 0), {"top": -2, "bottom": 2}.get(text["yanchor"], 0)),
                textcoords="offset points",
                ha=text["xanchor"],
                va=text["yanchor"].replace("middle", "center"),
                color=text["font"]["color"],
                fontsize=9,
            )


def _legend(canvas: Any, plots: Any, layout: dict[str, Any]) -> None:
    found = [plot.get_legend_handles_labels() for plot in plots]
    handles, labels = ([entry for part in found for entry in part[place]] for place in (0, 1))
    if layout.get("showlegend", len(labels) > 1) and labels:
        beside = max(1, min(8, len(labels), 900 // (60 + 7 * max(map(len, labels)))))  # of 960 pixels
        canvas.legend(handles, labels, loc="outside upper center", ncols=beside, frameon=False, fontsize=9)


# --- traces ----------------------------------------------------------------------------------------------------------


def _numbers(values: list[Any]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _scatter(plot: Any, trace: Trace) -> None:
    x, y, marker = trace["x"], _numbers(trace["y"]), trace.get("marker", {})
    name = plain_text(trace["name"]) if trace.get("showlegend", True) else None
    colour = marker.get("color") or trace["line"]["color"]
    symbol = marker.get("symbol", "circle")
    dots = {"marker": SYMBOLS[symbol], "color": colour, "markersize": 0.8 * marker.get("size", 6)}
    if symbol.endswith("-open"):
        dots["markerfacecolor"] = "none"
    if "lines" in trace["mode"]:
        line = trace["line"]
        style = {**dots, "linestyle": DASHES[line.get("dash", "solid")], "linewidth": 0.75 * line["width"]}
        plot.plot(x, y, **style if "markers" in trace["mode"] else {**style, "marker": ""}, label=name)
    else:
        plot.plot(x, y, **dots, linestyle="", label=name)
    for key in ("error_x", "error_y"):
        if bars := trace.get(key):
            ends = [_numbers(bars["arrayminus"]), _numbers(bars["array"])]
            look = {"ecolor": bars["color"], "elinewidth": bars["thickness"], "capsize": bars["width"] / 2}
            plot.errorbar(x, y, **{f"{key[-1]}err": ends}, fmt="none", **look)


def _heatmap(plot: Any, trace: Trace) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("side", [(place, colour) for place, colour in trace["colorscale"]])
    values = [_numbers(row) for row in trace["z"]]
    look = {"cmap": colours, "vmin": trace["zmin"], "vmax": trace["zmax"], "edgecolors": "white", "linewidth": 1.5}
    plot.pcolormesh(range(len(values[0])), range(len(values)), values, **look)
    size = min(9, 0.3 * WIDTH / len(values[0]))  # points; about half of a cell's width
    for row, line in enumerate(trace["z"]):
        for column, value in enumerate(line):
            if value is not None and size >= 5:
                dark = 2 * value > trace["zmax"]
                plot.text(column, row, str(value), ha="center", va="center", fontsize=size, color="white" if dark else "black")


def _bar(plot: Any, trace: Trace) -> None:
    """Bars of several traces stand on each other."""
    below = [sum(patch.get_height() for patch in plot.patches if round(patch.get_x() + patch.get_width() / 2) == x) for x in trace["x"]]
    plot.bar(trace["x"], trace["y"], bottom=below, width=0.88, color=trace["marker"]["color"], label=plain_text(trace["name"]))


def _contour(plot: Any, trace: Trace) -> None:
    levels = trace["contours"]
    count = round((levels["end"] - levels["start"]) / levels["size"]) + 1
    at = [levels["start"] + place * levels["size"] for place in range(count)]
    if at:
        drawn = plot.contour(trace["x"], trace["y"], trace["z"], levels=at, colors=trace["line"]["color"], linewidths=0.8)
        plot.clabel(drawn, fmt="%g", fontsize=8, colors=levels["labelfont"]["color"])


TRACES = {"scatter": _scatter, "heatmap": _heatmap, "bar": _bar, "contour": _contour}
