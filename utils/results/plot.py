"""Accuracy curves of several runs as one figure for a paper."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev

from utils.run.errors import RepriseError
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


@dataclass(frozen=True)
class Line:
    """One run in the figure: percentages after every task, a curve per seed."""

    name: str
    task_sizes: Sequence[int]
    curves: Sequence[Sequence[float]]


def check_suffix(path: Path) -> None:
    """Refuse a file of a kind that is not drawn.

    Raises:
        RepriseError: naming the kinds that are.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RepriseError(f"cannot draw {path}: its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def plot_lines(lines: Sequence[Line], path: Path) -> None:
    """Draw accuracy over classes seen: the mean over seeds, in a band of one sample standard deviation.

    Args:
        lines: at least one, each of at least one seed; one seed has no band.
        path: the file, a .pdf, .png or .svg; it appears whole or not at all.

    Raises:
        RepriseError: if it is of another kind.
    """
    # Here, because it takes a second to import and no training needs it.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    check_suffix(path)
    num_columns = 1 if max(len(line.name) for line in lines) > 26 else 2
    height = AXES_HEIGHT + LEGEND_ROW * -(-len(lines) // num_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)  # needs no display
        axes = figure.add_subplot(xlabel="classes seen", ylabel="accuracy (%)")
        for number, line in enumerate(lines):
            draw_line(axes, line, number)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        figure.legend(loc="outside lower center", ncols=num_columns, frameon=False)  # beside, it would cover lines
        file = io.BytesIO()
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=300)
    atomic_write(path, file.getvalue())


def draw_line(axes, line: Line, number: int) -> None:
    """Draw one run on matplotlib's ``axes``; its number chooses colour, marker and style."""
    tasks = list(zip(*line.curves))  # a tuple over seeds per task
    seen = list(accumulate(line.task_sizes))[: len(tasks)]
    means = [fmean(values) for values in tasks]
    rounds, place = divmod(number, len(COLOURS))
    colour, style = COLOURS[place], STYLES[rounds % len(STYLES)]
    axes.plot(seen, means, color=colour, linestyle=style, marker=MARKERS[place], label=line.name.replace("$", r"\$"))
    if len(line.curves) > 1:
        stds = [stdev(values) for values in tasks]
        low, high = zip(*((mean - std, mean + std) for mean, std in zip(means, stds)))
        axes.fill_between(seen, low, high, color=colour, alpha=0.18, linewidth=0)
