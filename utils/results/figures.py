"""Parts of the report as HTML text: tables, bars, a heat map, a line chart. Nothing is loaded and nothing is run.

They are written by hand instead of by a plotting library so that they follow the reader's light or dark scheme, stay
text that can be searched and copied, and weigh little. Colours are the CSS variables of ``STYLE``.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from utils.data.images import decode_image

LOSSLESS_UP_TO = 64  # px; as in the bank, larger images are stored as jpg
THUMBNAIL = 112  # px; shown at 44, so that a dense screen has pixels enough
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #161615; --muted: #62615c; --line: #e3e2dd;
  --grid: #ecebe7; --c0: #2a6fd0; --c1: #14866d; --c2: #c2571a; --heat: #5c9cf0; --gain: #14866d; --loss: #c2571a; }
@media (prefers-color-scheme: dark) { :root { --page: #131312; --card: #1c1c1a; --ink: #f1f0ec; --muted: #a9a8a1;
  --line: #34332f; --grid: #2a2926; --c0: #5f9df0; --c1: #35b394; --c2: #ec8a4e; --heat: #2263c0; --gain: #35b394;
  --loss: #ec8a4e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 17px; }
h3 { margin: 18px 0 8px; font-size: 14px; color: var(--muted); font-weight: 600; }
p { margin: 4px 0 12px; color: var(--muted); max-width: 85ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px 20px;
  margin-top: 16px; }
.scroll { overflow-x: auto; } section > .scroll + .scroll, svg + .columns { margin-top: 14px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); gap: 14px 36px;
  align-items: start; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin-top: 20px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; white-space: nowrap; }
.tile span, .tile small { display: block; color: var(--muted); font-size: 13px; }
.badge { display: inline-block; margin: 0 0 4px; padding: 3px 10px; border: 1px solid var(--loss); border-radius: 99px;
  color: var(--loss); font-size: 13px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 13.5px; }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: middle; }
th { color: var(--muted); font-weight: 600; font-size: 12.5px; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.text:last-child { overflow-wrap: anywhere; } td.b { width: 24%; padding-right: 0; }
.bar { display: block; width: 100%; min-width: 80px; height: 10px; border-radius: 3px; background: var(--grid); }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--c0); }
.bar i.gain { background: var(--gain); } .bar i.loss { background: var(--loss); }
table.heat { width: auto; border-collapse: separate; border-spacing: 2px; font-size: 12.5px; }
table.heat td, table.heat th { border: 0; padding: 0 5px; height: 28px; min-width: 42px; text-align: center; }
table.heat th { padding-right: 8px; text-align: right; white-space: nowrap; }
table.heat thead th { text-align: center; padding: 0 5px; }
table.heat td.v { border-radius: 3px; background: color-mix(in srgb, var(--heat) calc(var(--v) * 1%), var(--grid)); }
table.small td, table.small th, table.small thead th { padding: 0; min-width: 9px; max-width: 9px; height: 9px;
  line-height: 9px; font-size: 8px; }
table.small th:first-child { min-width: 18px; padding-right: 4px; } table.small { border-spacing: 1px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--muted); font-size: 12px; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); } svg text.end { fill: var(--ink); }
svg .s0 { stroke: var(--c0); fill: var(--c0); } svg .s1 { stroke: var(--c1); fill: var(--c1); }
svg .s2 { stroke: var(--c2); fill: var(--c2); } svg polyline { fill: none !important; stroke-width: 2.2; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr)); gap: 14px 36px; }
.gallery h4, .panel h4 { margin: 0 0 4px; font-size: 13.5px; border-top: 1px solid var(--line); padding-top: 8px; }
.gallery h4 span { color: var(--muted); font-weight: 400; }
.strip { display: grid; grid-template-columns: 76px 1fr; font-size: 12.5px; color: var(--muted); margin: 4px 0; }
.strip div { display: flex; flex-wrap: wrap; gap: 4px; } .strip img { height: 44px; border-radius: 2px; }
.panel { display: grid; gap: 16px 28px;
  grid-template-columns: repeat(auto-fill, minmax(min(calc(var(--columns) * 120px - 8px), 100%), 1fr)); }
.panel h4 + div { display: flex; flex-wrap: wrap; gap: 8px; }
figure { margin: 0; width: 112px; font-size: 12.5px; line-height: 1.35; } figure span { color: var(--muted); }
figure img, figure i { display: block; width: 96px; height: 96px; margin: 2px 0 4px; object-fit: contain; }
figure img { border-radius: 3px; } figure i { border: 1px dashed var(--line); border-radius: 3px; }
figcaption { white-space: pre-line; text-wrap: balance; overflow-wrap: anywhere; }
.pixels { image-rendering: pixelated; }
pre { margin: 8px 0 0; padding: 12px 14px; background: var(--page); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 13px; }
@media print { section, .tile { break-inside: avoid; } body { background: none; } }
"""


class Html(str):
    """Text that is HTML already; any other text is escaped where it enters a page."""


class Figure(Html):
    """A number that is written out already, such as `5.9 MiB`."""


class Bar(Html):
    """A bar that stands for a number."""


def html(value: Any) -> str:
    """A value as HTML: numbers short, None as a dash, text escaped."""
    if isinstance(value, Html):
        return value
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def human_bytes(count: float) -> str:
    """`512 B`, `1.5 KiB`, `20.3 MiB`, ..."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """`4.2 s`, `102 s`, `12 min`, `3 h 05 min`."""
    if seconds < 600:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; a column is aligned by its first known cell: numbers to the right, bars across what is left."""
    rows = [list(row) for row in rows]
    known = [next((row[i] for row in rows if row[i] is not None), None) for i in range(len(head))]
    css = [f' class="{_alignment(value)}"' for value in known]
    titles = "".join(f"<th{kind}>{html(title)}</th>" for kind, title in zip(css, head))
    lines = ("".join(f"<td{kind}>{html(cell)}</td>" for kind, cell in zip(css, row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _alignment(value: Any) -> str:
    if isinstance(value, Bar):
        return "b"
    is_number = isinstance(value, (int, float, Figure)) and not isinstance(value, bool)
    return "n" if is_number else "text"


def split_table(head: Sequence[str], rows: Sequence[Sequence[Any]], longest: int = 12) -> str:
    """A table that becomes two, side by side where the window is wide, when it has more rows than ``longest``."""
    if len(rows) <= longest:
        return table(head, rows)
    half = (len(rows) + 1) // 2
    return f'<div class="columns">{table(head, rows[:half])}{table(head, rows[half:])}</div>'


def bar(fraction: float, kind: str = "") -> Bar:
    """A bar that fills this fraction of its cell; kind "gain" or "loss" colours it."""
    width = 100 * min(max(fraction, 0.0), 1.0)
    return Bar(f'<span class="bar"><i class="{kind}" style="width:{width:.2f}%"></i></span>')


def tile(title: str, value: str, note: str = "") -> str:
    """One headline figure."""
    return f'<div class="tile"><span>{html(title)}</span><b>{html(value)}</b><small>{html(note)}</small></div>'


def heat_map(matrix: Sequence[Sequence[float]], numbers_up_to: int = 25) -> str:
    """A lower-triangular table of percentages, coloured by value; more tasks than that are drawn without numbers."""
    small = len(matrix) > numbers_up_to
    # The colour goes with the square: most values lie in the upper half, and would look alike.
    names = [str(j) if not small or j % 10 == 0 else "" for j in range(len(matrix))]
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for i, row in enumerate(matrix):
        cells = "".join(
            f'<td class="v" style="--v:{value * value / 100:.0f}" title="task {j} after task {i}: {value:.2f} %">'
            f"{'' if small else f'{value:.1f}'}</td>"
            for j, value in enumerate(row)
        )
        rows.append(f"<tr><th>{names[i] if small else f'after {i}'}</th>{cells}</tr>")
    kind = "heat small" if small else "heat"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr><th>{"" if small else "task"}</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def line_chart(series: dict[str, Sequence[float | None]], xs: Sequence[int], x_title: str, width: int = 760) -> str:
    """Percentages over ``xs`` as SVG lines, with their last value beside them; the first three have a colour.

    Args:
        width: in px; with the width at which it will be shown, its letters have the size of the page's.
    """
    lowest = min((value for values in series.values() for value in values if value is not None), default=0)
    longest = max(map(len, series), default=0)
    plane = Plane(xs[0], xs[-1], min(int(lowest // 20) * 20, 80), width, right=max(130, 70 + 7 * longest))
    parts, ends = plane.grid(xs, x_title), []
    for number, (name, values) in enumerate(series.items()):
        points = [(plane.across(x), plane.down(value), value) for x, value in zip(xs, values) if value is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        dots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{v:.2f} %</title></circle>' for x, y, v in points)
        parts.append(f'<g class="s{number}"><polyline points="{path}"/>{"".join(dots)}</g>')
        if points:
            ends.append((points[-1], name, number))
    parts += _end_labels(ends)
    label = f'role="img" aria-label="{html(", ".join(series))} over {html(x_title)}"'
    return f'<svg viewBox="0 0 {width} {plane.height}" {label}>{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Plane:
    """Where a value lies in a picture (in px): x from ``first`` to ``last``, y from ``bottom_value`` to 100 %."""

    first: float
    last: float
    bottom_value: int
    width: int
    height: int = 300
    left: int = 36
    right: int = 130  # room for the names beside the last points
    top: int = 12
    bottom: int = 44

    def across(self, x: float) -> float:
        share = (x - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return self.left + share * (self.width - self.left - self.right)

    def down(self, value: float) -> float:
        share = (value - self.bottom_value) / (100 - self.bottom_value)
        return self.height - self.bottom - share * (self.height - self.bottom - self.top)

    def grid(self, xs: Sequence[int], x_title: str) -> list[str]:
        """Lines and numbers of both axes; where there are many ``xs``, only some have a number."""
        parts, end = [], self.width - self.right
        for value in range(self.bottom_value, 101, 20 if self.bottom_value < 60 else 10):
            y = self.down(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
        floor = self.height - self.bottom
        for x in xs[::-1][:: -(-len(xs) // 12)]:
            parts.append(f'<text x="{self.across(x):.1f}" y="{floor + 18}" text-anchor="middle">{x}</text>')
        middle = (self.left + end) / 2
        return [*parts, f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle">{html(x_title)}</text>']


def _end_labels(ends: list[tuple[tuple[float, float, float], str, int]]) -> list[str]:
    """Names beside the last points, from top to bottom, at least one line apart."""
    labels, lowest = [], 0.0
    for (x, y, value), name, number in sorted(ends, key=lambda end: end[0][1]):
        lowest = max(y, lowest + 17)
        labels.append(
            f'<circle class="s{number}" cx="{x + 16:.1f}" cy="{lowest:.1f}" r="4"/>'
            f'<text class="end" x="{x + 25:.1f}" y="{lowest + 4:.1f}">{html(name)} {value:.1f}</text>'
        )
    return labels


def thumbnail(image: Tensor | str | Path, longest: int = THUMBNAIL) -> str:
    """One picture inside the page: small ones exact, as png and drawn with sharp pixels, large ones as a reduced jpg.

    Args:
        image: uint8 (C, H, W), C = 1 or 3, or an image file.
        longest: side of a reduced one in pixels; with twice the px at which it is shown, dense screens have enough.

    Raises:
        DataError: if the file cannot be read.
    """
    pixels = (image if isinstance(image, Tensor) else decode_image(image)).cpu()
    picture = Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())
    file = io.BytesIO()
    small = max(picture.size) <= LOSSLESS_UP_TO
    if small:
        picture.save(file, "PNG")
    else:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        picture.save(file, "JPEG", quality=90)
    kind, css = ("png", ' class="pixels"') if small else ("jpeg", "")
    return f'<img{css} alt="" src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'
