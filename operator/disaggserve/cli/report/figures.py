"""The drawings of the report page: inline SVG by matplotlib whose colours are CSS variables, so that the page decides them.

The same figures give the same bytes: no date, no random ids, coordinates as matplotlib rounds them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from disaggserve.cli.report.curves import SCALES, Breakdown, Report, front
from disaggserve.simulate import Parts

# Stand-ins in the drawing for the CSS variables of page.html.
_VARIABLES = {
    "#010203": "--ink",
    "#010204": "--soft",
    "#010205": "--line",
    "#010206": "--card",
    "#010211": "--c1",
    "#010212": "--c2",
    "#010213": "--c3",
    "#010214": "--c4",
    "#010215": "--c5",
    "#010216": "--bad",
}
INK, SOFT, LINE, CARD, *SERIES, BAD = _VARIABLES
_DASHES = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1)))
_HALF = (5.0, 3.7)  # inches; it stands beside another
_MARKERS = ("o", "s", "^", "D", "v")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
PARTS = ("queue", "prefill", "KV transfer", "wait for decode", "decode")
_PART_COLOURS = (
    SOFT,
    SERIES[0],
    SERIES[2],
    SERIES[3],
    SERIES[1],
)  # prefill and decode as in the drawing of the nodes


@contextmanager
def _drawing(salt: str) -> Iterator[None]:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        yield


def svg(figure: Figure, name: str, label: str) -> str:
    """The drawing as an element for HTML: colours as variables, text in the page's own font, nothing from outside."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(
        out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text
    )
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace("font: 9.5px 'DejaVu Sans'", "font: 9.5px var(--font)")
    text = re.sub(r"'DejaVu Sans'(, sans-serif)?", "var(--font)", text)
    # Ids are hashes of what they name and the salt: made the figure's own, for many drawings stand in one page.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()


def attainment(report: Report, predicted: tuple[float, float, float, float], label: str) -> str:
    """Attainment by rate of every candidate; `predicted` is the plan's own figure: rate, attainment, low, high."""
    with _drawing("attainment"):
        figure = Figure(figsize=(7.4, 3.4 + 0.2 * len(report.curves)), layout="constrained")
        axes = figure.subplots()
        chosen = report.curves[0]
        for n, curve in reversed(list(enumerate(report.curves))):
            rates = [p.rate for p in curve.points]
            width = 2.4 if n == 0 else 1.5
            axes.plot(
                rates,
                [100 * p.attainment for p in curve.points],
                color=SERIES[n],
                linestyle=_DASHES[n],
                linewidth=width,
                label=f"{curve.candidate.name}: {curve.candidate.words} ({curve.candidate.gpus} GPUs)",
            )
        axes.fill_between(
            [p.rate for p in chosen.points],
            [100 * p.low for p in chosen.points],
            [100 * p.high for p in chosen.points],
            color=SERIES[0],
            alpha=0.2,
            linewidth=0,
            label="95 % interval of the chosen",
        )
        rate, mean, low, high = predicted
        target = 100 * report.promise.attainment
        axes.axhline(target, color=BAD, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(
            f"target {target:g} %", (0, target), xycoords=("axes fraction", "data"), xytext=(4, -3),
            textcoords="offset points", ha="left", va="top", color=BAD,
        )  # fmt: skip
        axes.axvline(rate, color=SOFT, linewidth=1)
        axes.annotate(
            f"planned\n{rate:.3g} req/s", (rate, 0), xycoords=("data", "axes fraction"), xytext=(-5, 6),
            textcoords="offset points", ha="right", color=SOFT,
        )  # fmt: skip
        axes.errorbar(
            [rate], [100 * mean], [[100 * (mean - low)], [100 * (high - mean)]], fmt="o", color=SERIES[0],
            markersize=6, capsize=3, markeredgecolor=CARD,
        )  # fmt: skip
        widest = max(p.rate for c in report.curves for p in c.points)
        axes.set(
            xlabel="rate, req/s",
            ylabel="requests that meet TTFT and TPOT, %",
            xlim=(0, widest),
            ylim=(30, 101),
        )
        _legend(figure, axes, 1)
        return svg(figure, "attainment", label)


def breakdown(report: Report, label: str) -> str:
    """Where the time goes: to the first token beside its promise, and over the whole request."""
    with _drawing("breakdown"):
        figure = Figure(figsize=(7.4, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        rows = list(reversed(report.breakdown))
        _stack(left, rows, [b.to_first for b in rows], 1000)
        limit = report.promise.ttft_s * 1000
        left.axvline(limit, color=BAD, linewidth=1.2, linestyle=(0, (4, 2)))
        left.annotate(
            f"promised {limit:g} ms", (limit, 1), xycoords=("data", "axes fraction"), xytext=(-3, 1),
            textcoords="offset points", ha="right", va="bottom", color=BAD,
        )  # fmt: skip
        left.set(xlabel="to the first token, ms", xlim=(0, None))
        _stack(right, rows, [b.whole for b in rows], 1)
        right.set(xlabel="whole request, s", xlim=(0, None))
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=5, handlelength=1.2, columnspacing=1.4)
        return svg(figure, "breakdown", label)


def _stack(axes: Any, rows: list[Breakdown], table: list[Parts[float]], unit: float) -> None:
    left = [0.0] * len(rows)
    for k in range(len(PARTS)):
        widths = [row[k] * unit for row in table]
        axes.barh([f"p{b.percentile}" for b in rows], widths, left=left, color=_PART_COLOURS[k],
                  label=PARTS[k], height=0.6, edgecolor=CARD, linewidth=0.8)  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for k, end in enumerate(left):
        axes.annotate(
            _ms(end / unit), (end, k), xytext=(4, 0), textcoords="offset points", va="center",
            bbox={"facecolor": CARD, "edgecolor": "none", "pad": 1}, zorder=5,
        )  # fmt: skip
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.2)


def growth(report: Report, rate: float, limit: int, label: str) -> str:
    """GPUs that the plan takes by rate, by algorithm, up to the GPUs at hand."""
    with _drawing("growth"):
        figure = Figure(figsize=_HALF, layout="constrained")
        axes = figure.subplots()
        for n, (name, steps) in enumerate(report.growth):
            found = [(s.rate, s.gpus) for s in steps if s.gpus is not None]
            axes.plot(
                [r for r, _ in found], [g for _, g in found], color=SERIES[n], linestyle=_DASHES[n],
                marker=_MARKERS[n], markersize=5, label=name,
            )  # fmt: skip
            refused = next(
                (s for s in steps if s.gpus is None and (not found or s.rate > found[-1][0])), None
            )
            if refused is not None:
                axes.plot(
                    [refused.rate], [limit], marker="x", color=SERIES[n], markersize=8, markeredgewidth=2
                )
        axes.axhline(limit, color=BAD, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(
            f"{limit} GPUs may be used (×: no plan)", (0, limit), xycoords=("axes fraction", "data"), xytext=(4, -3),
            textcoords="offset points", va="top", color=BAD,
        )  # fmt: skip
        axes.axvline(rate, color=SOFT, linewidth=1)
        axes.set(xlabel="rate, req/s", ylabel="GPUs", xlim=(0, None), ylim=(0, limit * 1.06))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, axes, 2)
        return svg(figure, "growth", label)


def promises(report: Report, label: str) -> str:
    """Goodput per GPU by the scale of the promise: each candidate, plans made anew, and the front over all."""
    with _drawing("promises"):
        figure = Figure(figsize=_HALF, layout="constrained")
        axes = figure.subplots()
        best = front(report)
        axes.plot(
            [s for s, _ in best], [g for _, g in best], color=LINE, linewidth=9, solid_capstyle="round",
            label="Pareto front",
        )  # fmt: skip
        for n, curve in reversed(list(enumerate(report.curves))):
            axes.plot(
                SCALES, [g / curve.candidate.gpus for g in curve.goodputs], color=SERIES[n], linestyle=_DASHES[n],
                marker=_MARKERS[n], markersize=4, linewidth=2.4 if n == 0 else 1.5, label=curve.candidate.name,
            )  # fmt: skip
        again = [a for a in report.again if a.gpus is not None]
        axes.plot(
            [a.scale for a in again], [a.goodput_per_gpu for a in again], linestyle="none", marker="*",
            markersize=10, color=INK, markeredgecolor=CARD, label="planned anew for that promise",
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = [s for s in SCALES if s in (0.5, 0.75, 1.0, 1.5, 2.0)]
        axes.set_xticks(
            ticks,
            [f"×{s:g}\n{_ms(report.promise.ttft_s * s)} /\n{_ms(report.promise.tpot_s * s)}" for s in ticks],
        )
        axes.set_xticks([], minor=True)
        axes.set(
            xlabel="promise: TTFT / TPOT, from tight to loose",
            ylabel="goodput per GPU, req/s",
            ylim=(0, None),
        )
        _legend(figure, axes, 2)
        return svg(figure, "promises", label)


def _legend(figure: Figure, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda k: (not labels[k].startswith("chosen"), k))
    figure.legend(
        [handles[k] for k in order], [labels[k] for k in order], loc="outside upper left", ncols=columns,
        handlelength=2.6, columnspacing=1.6,
    )  # fmt: skip


def _ms(value_s: float) -> str:
    return f"{value_s * 1000:.3g} ms" if value_s < 1 else f"{value_s:.3g} s"


__all__ = ["PARTS", "attainment", "breakdown", "growth", "promises", "svg"]
