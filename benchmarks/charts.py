"""The plots of a report, from rows: Matplotlib figures, as PNG for files and as SVG for the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .providers import PROVIDERS
from .rows import Row, digits
from .verdicts import best_of, is_ours

GREY = "#808890"  # of text and axes: readable on light and on dark
# Ours are warm, competitors cool; the palette is Okabe and Ito's, made for colour-blind readers.
COLOURS = {
    "eager": "#999999",
    "eager channels_last": "#56B4E9",
    "cudnn fused": "#CC79A7",
    "compile": "#0072B2",
    "compile max-autotune": "#009E73",
    "compile max-autotune triton": "#7FBC41",
    "fastunet conv+relu": "#F0E442",
    "fastunet conv+relu+pool": "#F5C242",
    "fastunet upsample+concat": "#E69F00",
    "fastunet": "#D55E00",
}
ORDER = [provider.name for provider in PROVIDERS]


#: Cases that the charts of memory and of first results show at most; the table has all.
SHOWN = 4


def charts(rows: Sequence[Row]) -> dict[str, Figure]:
    """Figures by title, of one device's rows; a chart without anything to show is left out.

    Of calls with and without a graph the quicker is drawn.
    """
    best = best_of(rows)
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    networks = [row for row in best if row.kind != "op"]
    shown = [row for row in networks if row.dtype == networks[0].dtype]
    few = list(dict.fromkeys(row.case for row in shown if row.kind == "infer"))[: SHOWN - 1]
    few += list(dict.fromkeys(row.case for row in shown if row.kind == "train"))[:1]
    shown = [row for row in shown if row.case in few]
    made: dict[str, Figure | None] = {}
    for dtype in dtypes:
        some = [row for row in best if row.dtype == dtype]
        made[f"Ladder, {dtype}: each step's speed-up over eager PyTorch"] = _ladder(some)
        made[f"Roofline, {dtype}: operators against this machine's own ceilings"] = _roofline(some)
        made[f"Latency, {dtype}: the seed network against size and batch"] = _latency(some)
    # Graphs share the first result and the memory of weights with the call they replay.
    plain = [row for row in rows if row.state == "ok" and not row.graph and row.case in few]
    memory = [row for row in shown if row.peak_mem_mb is not None]
    made["Peak memory"] = _bars(memory, lambda row: row.peak_mem_mb, "MiB")
    made["Time to first result: compiling and tuning included"] = _bars(
        plain, lambda row: row.first_ms and row.first_ms / 1e3, "seconds", log=True
    )
    return {title: figure for title, figure in made.items() if figure is not None}


def png(figure: Figure) -> bytes:
    return _render(figure, format="png", dpi=120, facecolor="white")


def svg(figure: Figure, title: str) -> str:
    """The ``<svg>`` element, with a transparent ground and a title for those who do not see it."""
    text = _render(figure, format="svg", transparent=True, metadata={"Date": None, "Title": title}).decode()
    return text[text.index("<svg") :]


def _render(figure: Figure, **options: object) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **share: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, **share).flat)
    for axes in panels:
        for spine in axes.spines.values():
            spine.set_color(GREY)
        axes.tick_params(colors=GREY, which="both", labelsize=7)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(GREY)
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    found: dict[str, Any] = {}
    for axes in panels:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    words = {
        "loc": "outside upper center",
        "ncols": max(2, int(figure.get_figwidth() / 2)),
        "frameon": False,
        "labelcolor": GREY,
        "fontsize": 8,
    }
    figure.legend(found.values(), found.keys(), **words)


def _bars(
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    unit: str,
    *,
    log: bool = False,
    note: Callable[[Row], str] = lambda row: "",
) -> Figure | None:
    """A panel a case, a bar a provider, in the order of the providers."""
    if not rows:
        return None
    cases = list(dict.fromkeys(row.case for row in rows))
    names = [name for name in ORDER if any(row.provider == name for row in rows)]
    lines, columns = -(-len(cases) // 2), min(2, len(cases))
    height = 0.6 + lines * (0.45 + 0.19 * len(names))
    figure, panels = _figure(5 if columns == 1 else 9, height, lines, columns, sharey=True, sharex=True)
    highest = max(value(row) or 0.0 for row in rows)
    for axes, case in zip(panels, cases, strict=False):
        axes.grid(visible=False)  # the bars bear their numbers
        axes.set_title(case, fontsize=8, color=GREY, loc="left")
        for row in (row for row in rows if row.case == case):
            size, place = value(row) or 0.0, names.index(row.provider)
            axes.barh(place, size, color=COLOURS[row.provider])
            axes.text(size, place, f" {digits(size)}{note(row)}", color=GREY, fontsize=6.5, va="center")
        axes.set_xlabel(unit, fontsize=7)
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    if log:
        panels[0].set_xscale("log")
    panels[0].set_xlim(right=highest * (8 if log else 1.7))
    return figure


def _ladder(rows: Sequence[Row]) -> Figure | None:
    """For each network, bars in the order of the providers: eager's median over theirs."""
    eager = {row.case: row.median_ms for row in rows if row.provider == "eager" and row.kind == "infer"}

    def ratio(row: Row) -> float:
        return (eager[row.case] or 0.0) / (row.median_ms or 1.0)

    def error(row: Row) -> str:
        return f"x{', graph' if row.graph else ''}, error {row.max_err:.0e}"

    return _bars([row for row in rows if row.case in eager], ratio, "times as fast as eager PyTorch", note=error)


def _roofline(rows: Sequence[Row]) -> Figure | None:
    """FastUNet and the best competitor on each operator, under the ceilings of the run."""
    points = [row for row in rows if row.kind == "op" and row.flops]
    if not points:
        return None
    competitors: dict[str, Row] = {}
    for row in points:
        if not is_ours(row) and (row.median_ms or 0.0) < (competitors.get(row.case, row).median_ms or 0.0) * 1.0001:
            competitors[row.case] = row
    figure, panels = _figure(8, 4.6)
    (axes,) = panels
    ours = [row for row in points if row.provider == "fastunet"]
    # Rings and dots, so that one drawn over another still shows.
    for some, label, colour, filled in (
        (list(competitors.values()), "best competitor", COLOURS["compile"], False),
        (ours, "fastunet", COLOURS["fastunet"], True),
    ):
        x, y = [row.flops / row.bytes for row in some], [row.tflops or 0.0 for row in some]
        axes.scatter(x, y, s=14 if filled else 40, color=colour if filled else "none", edgecolors=colour, label=label)
    lowest, highest = (f(row.flops / row.bytes for row in points) for f in (min, max))
    top = max(points, key=lambda row: row.ceiling_tflops)
    if top.ceiling_gbs:
        edge = top.ceiling_tflops / top.ceiling_gbs * 1e3  # flops a byte at which the two ceilings meet
        x = sorted({lowest / 2, edge, highest * 2})
        y = [min(top.ceiling_tflops, v * top.ceiling_gbs * 1e-3) for v in x]
        axes.plot(x, y, color=GREY, linewidth=1, linestyle="--", label="matrix product and copy of the run")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flops a byte, by the operator's shapes")
    axes.set_ylabel("TFLOP/s")
    _legend(figure, panels)
    return figure


def _latency(rows: Sequence[Row]) -> Figure | None:
    """A panel a batch, the side of a square image along x."""
    points = [row for row in rows if row.case.startswith("infer seed ") and row.height == row.width]
    if not points:
        return None
    batches = sorted({row.batch for row in points})
    figure, panels = _figure(max(5, 2.6 * len(batches) + 1), 3.8, 1, len(batches), sharey=True)
    for axes, batch in zip(panels, batches, strict=True):
        sides = sorted({row.height for row in points if row.batch == batch})
        for provider in ORDER:
            some = {row.height: row.median_ms for row in points if (row.batch, row.provider) == (batch, provider)}
            x = [side for side in sides if side in some]
            if x:
                places, values = [sides.index(side) for side in x], [some[side] or 0.0 for side in x]
                axes.plot(places, values, "o-", color=COLOURS[provider], label=provider, markersize=4)
        axes.set_xticks(range(len(sides)), [f"{side}²" for side in sides])
        axes.set_xlim(-0.5, len(sides) - 0.5)
        axes.set_yscale("log")
        axes.set_title(f"batch {batch}", fontsize=8, color=GREY)
    panels[0].set_ylabel("ms, median")
    _legend(figure, panels)
    return figure
