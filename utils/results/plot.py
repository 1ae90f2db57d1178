"""Accuracy curves of several runs as one figure for a paper."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.run.files import atomic_write

SUFFIXES = (".pdf", ".png", ".svg")
# Okabe and Ito's colours, told apart by colour-blind readers; without yellow, which is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"  # for print without colours
STYLES = ("-", "--", ":")  # another one for every round of the colours
WIDTH, AXES_HEIGHT, LEGEND_ROW = 3.4, 2.3, 0.16  # inches; the width is that of a column
STYLE = {
    "font.size": 8, "legend.fontsize": 7, "lines.linewidth": 1.2, "lines.markersize": 3, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False,
    "pdf.fonttype": 42,  # TrueType: venues refuse matplotlib's default, Type 3
}  # fmt: skip


class Line(NamedTuple):
    """One run in the figure: percentages after every task, a curve per seed."""

    name: str
    task_sizes: Sequence[int]
    curves: Sequence[Sequence[float]]


def plot_lines(lines: Sequence[Line], path: Path) -> None:
    """Draw accuracy over classes seen: the mean over seeds, in a band of one sample standard deviation.

    Args:
        lines: at least one, each of at least one seed; one seed has no band.
        path: the file, a .pdf, .png or .svg; it appears whole or not at all.
    """
    # Here, because it takes a second to import and no training needs it.
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    looks = cycler(linestyle=STYLES) * cycler(color=COLOURS, marker=MARKERS)
    num_columns = 1 if max(len(line.name) for line in lines) > 26 else 2
    height = AXES_HEIGHT + LEGEND_ROW * -(-len(lines) // num_columns)
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": looks}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot(xlabel="classes seen", ylabel="accuracy (%)")
        for line in lines:
            draw_line(axes, line)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        figure.legend(loc="outside lower center", ncols=num_columns, frameon=False)  # beside, it would cover lines
        file = io.BytesIO()
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=300)
    atomic_write(path, file.getvalue())


def draw_line(axes, line: Line) -> None:
    """Draw one run on matplotlib's ``axes``, in the next look of their cycle."""
    tasks = np.array(list(zip(*line.curves)))  # (tasks, seeds)
    seen, means = list(accumulate(line.task_sizes))[: len(tasks)], tasks.mean(axis=1)
    (drawn,) = axes.plot(seen, means, label=line.name.replace("$", r"\$"))
    if len(line.curves) > 1:
        stds = tasks.std(axis=1, ddof=1)
        axes.fill_between(seen, means - stds, means + stds, color=drawn.get_color(), alpha=0.18, linewidth=0)
