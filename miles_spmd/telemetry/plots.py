"""Curves of a run as inline SVG whose colours are CSS variables, so that they follow the page's light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from miles_spmd.telemetry.metrics import PHASES
from miles_spmd.telemetry.run_data import Series, Stage

# Placeholder colours, one per CSS variable: matplotlib only takes colours it knows.
INK, GRID = "#010203", "#010204"
COLORS = [f"#0102{16 + index}" for index in range(len(PHASES))]
CSS_VARIABLES = {INK: "var(--muted)", GRID: "var(--line)"} | {c: f"var(--c{i})" for i, c in enumerate(COLORS)}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,  # a data set may be called "a$b$"
    "font.size": 11,
    "axes.formatter.useoffset": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
SMALL, WIDE = (4.6, 2.7), (14.4, 3.8)  # inches of 72 CSS pixels
MAX_BARS = 60


def curves(lines: Mapping[str, Series], *, unit: str, log: bool, salt: str) -> str:
    """One or more metrics over the steps. Noisy ones get a smoothed line on top."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(SMALL)
        for color, (label, series) in zip(COLORS, lines.items()):
            steps, heights = np.array([s for s, _ in series]), np.array([v for _, v in series])
            noisy = len(heights) >= 12
            marker = "o" if len(heights) < 3 else None
            axes.plot(steps, heights, color=color, lw=0.8 if noisy else 1.6, alpha=0.35 if noisy else 1, marker=marker)
            if noisy:
                axes.plot(steps, smoothed(heights), color=color, lw=1.8)
            axes.plot([], [], color=color, lw=1.8, label=label)
        values = [value for series in lines.values() for _, value in series]
        if log and min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if unit == "fraction":
            axes.set_ylim(bottom=0)
        else:
            axes.set_ylabel(unit)
        if not any(values):
            axes.set_ylim(0, 1)
        axes.set_xlabel("step")
        if len(lines) > 1:
            axes.legend(loc="best", ncols=len(lines))
        return _svg(figure, salt)


def accuracy(stages: Sequence[Stage]) -> str:
    """Scores of the evaluation sets through all stages, one after the other."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(WIDE)
        names = dict.fromkeys(name for stage in stages for name in stage.scores())
        offsets = np.cumsum([0, *(stage.done for stage in stages)])
        for color, name in zip(COLORS, names):
            points = [
                (offset + step, score)
                for offset, stage in zip(offsets, stages)
                for step, score in stage.scores().get(name, [])
            ]
            axes.plot(*zip(*points), color=color, lw=1.8, marker="o", ms=3.5, label=name, clip_on=False, zorder=3)
        axes.set_ylim(0, 1)
        axes.set_xlabel("step")
        for offset, stage in zip(offsets, stages):
            if len(stages) > 1:
                axes.axvline(offset, color=INK, lw=0.6, ls=(0, (3, 3)), alpha=0.6)
                axes.annotate(stage.name, (offset, 1), xytext=(4, 4), textcoords="offset points", color=INK)
        if len(names) > 1:
            axes.legend(loc="lower right", ncols=len(names))
        return _svg(figure, "accuracy")


def phases(stage: Stage) -> str:
    """Seconds of each step by phase, stacked; many steps are averaged into at most ``MAX_BARS`` bars. What came before
    the first step is left out: it would dwarf them."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(WIDE)
        rows = stage.timed_steps()
        edges = np.linspace(0, len(rows), min(len(rows), MAX_BARS) + 1).astype(int)
        bins = [rows[a:b] for a, b in pairwise(edges)]
        centers = np.array([np.mean([step for step, _ in rows_of_bin]) for rows_of_bin in bins])
        width = 0.85 * (centers[1] - centers[0] if len(centers) > 1 else 1)
        total = _mean_of(bins, "perf/step_time")
        height = np.zeros(len(bins))
        for color, phase in zip(COLORS, PHASES):
            values = _mean_of(bins, f"perf/{phase}_time")
            if values.any():
                axes.bar(centers, values, width, bottom=height, color=color, label=phase.replace("_", " "))
            height += values
        axes.bar(centers, np.maximum(total - height, 0), width, bottom=height, color=INK, alpha=0.25, label="other")
        axes.set_xlabel("step")
        axes.set_ylabel("s")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=9, borderaxespad=0, handlelength=1)
        return _svg(figure, f"phases-{stage.name}")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Weighted mean of the neighbours on both sides (Gaussian), so that a trend is not shown late."""
    distance = np.subtract.outer(np.arange(len(values)), np.arange(len(values)))
    weights = np.exp(-0.5 * (distance / (len(values) / 30)) ** 2)
    return weights @ values / weights.sum(1)


def _mean_of(bins: Sequence[Sequence[tuple[int, Mapping[str, float]]]], metric: str) -> np.ndarray:
    return np.array([np.mean([values.get(metric, 0.0) for _, values in rows]) for rows in bins])


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="x", visible=False)
    return figure, axes


def _svg(figure: Figure, salt: str) -> str:
    """``salt`` keeps the ids of several drawings on one page apart."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", text))  # the other ids ("axes_1") would be on the page many times
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    for attribute in ("width", "height"):  # the viewBox gives the shape, the page the size
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for placeholder, variable in CSS_VARIABLES.items():
        text = text.replace(placeholder, variable)
    return text
