"""The plots of a report, from rows: Matplotlib figures, as PNG for files and as SVG for the page."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .providers import OURS, PROVIDERS
from .rows import Row

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


def charts(rows: Sequence[Row]) -> dict[str, Figure]:
    """Figures by title, of one device's rows; a chart without anything to show is left out."""
    timed = [row for row in rows if row.state == "ok"]
    made = {
        "Ladder: each step's speed-up over eager PyTorch": _ladder(timed),
        "Roofline: operators against this machine's own ceilings": _roofline(timed),
        "Latency of the seed network against batch and size": _latency(timed),
        "Peak memory": _bars(timed, "peak_mem_mb", "MiB"),
        "Time to first result: compiling and tuning included": _bars(timed, "first_ms", "ms", log=True),
    }
    return {title: figure for title, figure in made.items() if figure is not None}


def png(figure: Figure) -> bytes:
    return _render(figure, format="png", dpi=120, facecolor="white")


def svg(figure: Figure, title: str) -> str:
    """The ``<svg>`` element, with a transparent ground and a title for those who do not see it."""
    text = _render(figure, format="svg", transparent=True, metadata={"Date": None, "Title": title}).decode()
    return text[text.index("<svg") :]


def _render(figure: Figure, **options: object) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.tick_params(colors=GREY, which="both")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(GREY)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper center", ncols=4, frameon=False, labelcolor=GREY, fontsize=8)


def _name(row: Row) -> str:
    return row.provider + (" (graph)" if row.graph else "")


def _ladder(rows: Sequence[Row]) -> Figure | None:
    """For each network, bars in the order of the providers: eager's median over theirs."""
    eager = {row.case: row for row in rows if row.kind == "infer" and row.provider == "eager" and not row.graph}
    rows = [row for row in rows if row.case in eager]
    bars = [
        (row, (eager[row.case].median_ms or 0.0) / row.median_ms)
        for row in sorted(rows, key=lambda row: (list(eager).index(row.case), ORDER.index(row.provider), row.graph))
        if row.median_ms
    ]
    if not bars:
        return None
    figure, axes = _figure(8, 0.6 + 0.24 * len(bars) + 0.2 * len(eager))
    place, ticks, labels, last = 0.0, [], [], ""
    for row, ratio in bars:
        place -= 1.0 if row.case == last else 2.0
        if row.case != last:
            axes.text(0, place + 0.85, row.case.removeprefix("infer "), color=GREY, fontsize=8, va="center")
        last = row.case
        axes.barh(place, ratio, color=COLOURS[row.provider], alpha=0.6 if row.graph else 1.0)
        axes.text(ratio, place, f" {ratio:.2f}x, error {row.max_err:.0e}", color=GREY, fontsize=7, va="center")
        ticks.append(place)
        labels.append(_name(row))
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_xlim(0, 1.25 * max(ratio for _, ratio in bars))
    axes.set_xlabel("times as fast as eager PyTorch")
    return figure


def _roofline(rows: Sequence[Row]) -> Figure | None:
    points = [row for row in rows if row.kind == "op" and row.flops]
    if not points:
        return None
    figure, axes = _figure(8, 4.6)
    for provider in ORDER:
        some = [row for row in points if row.provider == provider]
        if some:
            x, y = [row.flops / row.bytes for row in some], [row.tflops or 0.0 for row in some]
            axes.scatter(x, y, s=16, color=COLOURS[provider], label=provider, alpha=0.8)
    lowest, highest = (f(row.flops / row.bytes for row in points) for f in (min, max))
    for dtype in dict.fromkeys(row.dtype for row in points):
        row = next(row for row in points if row.dtype == dtype)
        edge = row.ceiling_tflops / row.ceiling_gbs * 1e3  # flops a byte at which the two ceilings meet
        x = sorted({lowest / 2, edge, highest * 2})
        y = [min(row.ceiling_tflops, v * row.ceiling_gbs * 1e-3) for v in x]
        axes.plot(x, y, color=GREY, linewidth=1, linestyle="--")
        axes.text(x[-1], y[-1], f" {dtype}", color=GREY, fontsize=7, va="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flops a byte, by the operator's shapes")
    axes.set_ylabel("TFLOP/s")
    _legend(figure)
    return figure


def _latency(rows: Sequence[Row]) -> Figure | None:
    points = [row for row in rows if row.case.startswith("infer seed ") and not row.graph]
    if not points:
        return None
    sizes = sorted({(row.height * row.width * row.batch, f"{row.height}² b{row.batch} {row.dtype}") for row in points})
    labels = [label for _, label in sizes]
    figure, axes = _figure(8, 4)
    for provider in ORDER:
        some = {f"{r.height}² b{r.batch} {r.dtype}": r.median_ms for r in points if r.provider == provider}
        x = [i for i, label in enumerate(labels) if label in some]
        if x:
            axes.plot(
                x, [some[labels[i]] or 0.0 for i in x], "o-", color=COLOURS[provider], label=provider, markersize=4
            )
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("ms, median")
    _legend(figure)
    return figure


def _bars(rows: Sequence[Row], field: str, unit: str, *, log: bool = False) -> Figure | None:
    some = [row for row in rows if row.kind != "op" and not row.graph and getattr(row, field) is not None]
    if not some:
        return None
    cases = list(dict.fromkeys(row.case for row in some))
    figure, axes = _figure(8, 3.6)
    providers = [name for name in ORDER if any(row.provider == name for row in some)]
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        values = {row.case: getattr(row, field) for row in some if row.provider == provider}
        x = [i + (index + 0.5) * width - 0.4 for i, case in enumerate(cases) if case in values]
        axes.bar(x, [values[case] for case in cases if case in values], width, color=COLOURS[provider], label=provider)
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=7)
    if log:
        axes.set_yscale("log")
    axes.set_ylabel(unit)
    _legend(figure)
    return figure


def is_ours(row: Row) -> bool:
    """Whether a row is of FastUNet or of one of its steps."""
    return row.provider in OURS
