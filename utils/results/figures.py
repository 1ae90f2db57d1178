"""Numbers in words, and the geometry of the report's line charts."""

from __future__ import annotations

from collections.abc import Sequence

LINE_HEIGHT = 17  # px between names beside the last points
NARROW_UP_TO = 12  # points; a chart of more takes the whole width of the page


def human_bytes(count: float) -> str:
    """Write bytes as `512 B`, `1.5 KiB`, `20.3 MiB`, ..."""
    power = min(max(int(count).bit_length() - 1, 0) // 10, 4)  # of 1024
    return f"{count / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def human_count(count: float) -> str:
    """Write a number with three digits as `7`, `1.25 k`, `20.3 M`, `4.1 T`, ..."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 999.5:
            return f"{count:.3g} {unit}".rstrip()
        count /= 1000
    return f"{count:.3g} E"


def human_seconds(seconds: float) -> str:
    """Write seconds as `4.2 s`, `102 s`, `12 min`, `3 h 05 min`."""
    if seconds < 600:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


class Chart:
    """Percentages over ``xs`` as lines: where each thing lies in a picture, in px, y downwards.

    Drawn by the template instead of by a plotting library: lines then follow the reader's light or dark scheme, and
    stay text that can be searched and copied.

    Args:
        series: percentages by name, each at most as long as ``xs``; None is left out of its line.
        xs: ascending, at least two.
        x_title: name of the axis.

    Attributes:
        width: at which the chart is shown, so that its letters have the size of the page's.
        end: right end of the axis; names stand beyond it.
        lowest: the percentage at the floor.
    """

    height, left, top, floor = 300, 36, 12, 256

    def __init__(self, series: dict[str, Sequence[float | None]], xs: Sequence[int], x_title: str):
        self.series, self.xs, self.x_title = series, xs, x_title
        self.is_narrow = len(xs) <= NARROW_UP_TO
        self.width = 540 if self.is_narrow else 1100
        self.end = self.width - max(130, 70 + 7 * max(map(len, series), default=0))
        known = [value for values in series.values() for value in values if value is not None]
        self.lowest = min(int(min(known, default=0) // 20) * 20, 80)

    def across(self, x: float) -> float:
        return round(self.left + (x - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (self.end - self.left), 1)

    def down(self, value: float) -> float:
        return round(self.floor - (value - self.lowest) / (100 - self.lowest) * (self.floor - self.top), 1)

    def y_ticks(self) -> range:
        return range(self.lowest, 101, 20 if self.lowest < 60 else 10)

    def x_ticks(self) -> Sequence[int]:
        """Return at most 12 of ``xs``, the last one among them."""
        return self.xs[::-1][:: -(-len(self.xs) // 12)]

    def lines(self) -> list[list[tuple[float, float, float]]]:
        """Return the points of every series as (x, y, percentage)."""
        known = [[(x, value) for x, value in zip(self.xs, ys) if value is not None] for ys in self.series.values()]
        return [[(self.across(x), self.down(value), value) for x, value in line] for line in known]

    def end_labels(self) -> list[tuple[int, str, float, float, float]]:
        """Return (number, name, last value, x, y) of every line from top to bottom, at least a text line apart."""
        ends = [(i, name, *points[-1]) for i, (name, points) in enumerate(zip(self.series, self.lines())) if points]
        labels, below = [], 0.0
        for number, name, x, y, value in sorted(ends, key=lambda end: end[3]):
            below = max(y, below + LINE_HEIGHT)
            labels.append((number, name, value, x, below))
        return labels
