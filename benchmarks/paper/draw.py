"""The pictures of the page, as SVG files on a white ground; the same figures give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from benchmarks.paper.facts import TARGET, Application
from benchmarks.paper.measure import Goodput

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "paper",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dde2e8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
# Wong's colours, told apart with any colour vision, and a dash and a marker each.
_LOOKS: Mapping[str, tuple[str, Any, str]] = {
    "vLLM": ("#000000", (0, (1, 1)), "v"),
    "DeepSpeed-MII": ("#cc79a7", (0, (4, 1, 1, 1)), "^"),
    "DistServe": ("#0072b2", "-", "o"),
    "DistServe-Low": ("#56b4e9", (0, (5, 2)), "s"),
    "DistServe-High": ("#009e73", (0, (3, 1)), "D"),
    "joint": ("#d55e00", "-", "P"),
    "mixed": ("#e6b800", (0, (6, 1, 1, 1)), "X"),
    "vLLM++": ("#777777", "-", "v"),
}
PARTS = (
    ("prefill queue", "#b7e1cd"),
    ("prefill", "#009e73"),
    ("KV transfer", "#d55e00"),
    ("wait for decode", "#a9cfe8"),
    ("decode", "#0072b2"),
)
Curves = Mapping[str, Sequence[tuple[float, float]]]  # (x, share) by system


def curves(
    path: Path, found: Mapping[Application, Curves], xlabel: str, measured: bool, falling: bool = False
) -> None:
    """A panel for each application: attainment over rate or over the scale of the promise."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 6.0), layout="constrained")
        panels = figure.subplots(2, 3).ravel()
        for axes, (app, by_system) in zip(panels, found.items(), strict=False):
            for name, points in by_system.items():
                colour, dash, marker = _LOOKS[name]
                axes.plot(
                    [x for x, _ in points], [100 * y for _, y in points], color=colour, linestyle=dash, marker=marker,
                    markersize=3, label=name,
                )  # fmt: skip
            axes.axhline(100 * TARGET, color="#888888", linewidth=1, linestyle=(0, (4, 3)))
            if measured:
                for name, x in (("DistServe", app.distserve), ("vLLM", app.vllm)):
                    axes.plot(
                        [x], [100 * TARGET], marker="*", markersize=13, color=_LOOKS[name][0], linestyle="none",
                        markeredgecolor="white", label=f"{name}, as the paper measured", zorder=5,
                    )  # fmt: skip
            axes.set(title=app.title, xlabel=xlabel, ylabel="kept both limits, %", ylim=(0, 103))
            if falling:
                axes.set_xscale("log")
                axes.invert_xaxis()
                ticks = [x for x in (10, 5, 2, 1, 0.5, 0.2) if min(app.scales) <= x <= max(app.scales)]
                axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
                axes.set_xticks([], minor=True)
        for axes in panels[len(found) :]:
            axes.set_axis_off()
        labels: dict[str, Any] = {}
        for axes in panels[: len(found)]:
            handles, names = axes.get_legend_handles_labels()
            labels.update(zip(names, handles, strict=True))
        panels[-1].legend(labels.values(), labels.keys(), loc="center", fontsize=10)
        _save(figure, path)


def goodputs(path: Path, found: Mapping[Application, Mapping[str, Goodput]]) -> None:
    """Bars of goodput per GPU over what the paper measured, all against the paper's DistServe."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(n for by_system in found.values() for n in by_system))
        width = 0.8 / len(names)
        for k, name in enumerate(names):
            here = [(i, by[name], app) for i, (app, by) in enumerate(found.items()) if name in by]
            x = [i + (k - (len(names) - 1) / 2) * width for i, _, _ in here]
            axes.bar(
                x,
                [g.as_run / app.distserve for _, g, app in here],
                width * 0.92,
                color=_LOOKS[name][0],
                label=name,
            )
            axes.plot(x, [g.steady / app.distserve for _, g, app in here], linestyle="none", marker="_", markersize=9,
                      color="white", markeredgewidth=2)  # fmt: skip
            measured = {"DistServe": lambda a: a.distserve, "vLLM": lambda a: a.vllm}.get(name)
            if measured:
                axes.plot(x, [measured(app) / app.distserve for _, _, app in here], linestyle="none", marker="*",
                          markersize=12, color=_LOOKS[name][0], markeredgecolor="white", zorder=5)  # fmt: skip
        axes.axhline(1, color="#888888", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks(range(len(found)), [a.title.replace(", ", "\n", 1) for a in found])
        axes.set_ylabel("goodput per GPU ÷ DistServe's\nas the paper measured it")
        axes.grid(visible=False, axis="x")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, ncols=len(names), loc="outside upper left", fontsize=8.5)
        _save(figure, path)


def breakdown(
    path: Path,
    bars: Sequence[tuple[float, npt.NDArray[np.float64]]],
    title: str,
    transfers: Mapping[str, npt.NDArray[np.float64]],
) -> None:
    """Shares of a request's time by rate, and the distribution of KV transfer times."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        bottom = np.zeros(len(bars))
        for k, (name, colour) in enumerate(PARTS):
            heights = np.array([100 * shares[k] for _, shares in bars])
            left.bar([f"{rate:g}" for rate, _ in bars], heights, 0.6, bottom=bottom, color=colour, label=name)
            bottom += heights
        left.set(title=title, xlabel="rate per GPU, req/s", ylabel="share of a request's time, %")
        left.grid(visible=False, axis="x")
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside upper left", ncols=len(PARTS), fontsize=8
        )
        for (name, times), (colour, dash) in zip(
            transfers.items(),
            (("#0072b2", "-"), ("#d55e00", (0, (5, 2))), ("#009e73", (0, (2, 1)))),
            strict=False,
        ):
            shares = np.linspace(0, 1, 101)
            right.plot(1000 * np.quantile(times, shares), shares, color=colour, linestyle=dash, label=name)
        right.set(
            title="KV transfer, each request's own", xlabel="ms", ylabel="share of requests", xlim=(0, None)
        )
        right.legend(loc="lower right")
        _save(figure, path)


def ablation(path: Path, found: Mapping[Application, Mapping[str, float]]) -> None:
    """Goodput per GPU of vLLM, vLLM++, DistServe-Low and DistServe-High."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 2.9), layout="constrained")
        for axes, (app, by_system) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
            names = list(by_system)
            axes.bar(range(len(names)), by_system.values(), 0.65, color=[_LOOKS[n][0] for n in names])
            for k, value in enumerate(by_system.values()):
                axes.annotate(
                    f"{value:.2f}", (k, value), xytext=(0, 2), textcoords="offset points", ha="center"
                )
            axes.set_xticks(range(len(names)), [n.replace("-", "-\n") for n in names])
            axes.set(title=app.title, ylabel="goodput per GPU, req/s")
            axes.grid(visible=False, axis="x")
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # As picture in a page it has no fonts but the reader's.
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana")
    path.write_text(text, encoding="utf-8")
