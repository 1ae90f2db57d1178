"""The pictures of the report: real beside generated images of every class, and the panels that a run has made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor

from utils.results.figures import html, thumbnail
from utils.results.panels import Cell, Panel, PanelRow

PANEL_IMAGE = 192  # px; shown at 96


@dataclass(frozen=True)
class GalleryRow:
    """Pictures of one class: uint8 (C, H, W) tensors or image files, the real ones and the generated ones."""

    class_index: int
    class_name: str
    task: int
    real: Sequence[Tensor | str | Path]
    synthetic: Sequence[Tensor | str | Path]


def draw_gallery(gallery: Sequence[GalleryRow], accuracies: Sequence[float | None]) -> str:
    """Task by task a card per class, as HTML; rows without images are left out.

    Args:
        accuracies: percentage per class, None if unknown; it may end before the last class.

    Raises:
        DataError: if an image file cannot be read.
    """
    ordered = sorted((row for row in gallery if row.real or row.synthetic), key=lambda row: (row.task, row.class_index))
    known = dict(enumerate(accuracies))
    blocks = []
    for task, rows in groupby(ordered, key=lambda row: row.task):
        cards = "".join(_class_card(row, known.get(row.class_index)) for row in rows)
        blocks.append(f'<h3>Task {task}</h3><div class="gallery">{cards}</div>')
    return "".join(blocks)


def _class_card(row: GalleryRow, accuracy: float | None) -> str:
    note = "" if accuracy is None else f"{accuracy:.1f} % right"
    strips = "".join(
        f'<div class="strip"><span>{name}</span><div>{"".join(map(thumbnail, images))}</div></div>'
        for name, images in (("real", row.real), ("generated", row.synthetic))
        if images
    )
    return f"<div><h4>{row.class_index} {html(row.class_name)} <span>{note}</span></h4>{strips}</div>"


def panel_sections(panels: Sequence[Panel]) -> Iterator[tuple[str, str, str]]:
    """Title, note and HTML of every section; panels of one title and note that follow each other share one."""
    for (title, note), group in groupby(panels, key=lambda panel: (panel.title, panel.note)):
        yield title, note, "".join(map(_draw_panel, group))


def _draw_panel(panel: Panel) -> str:
    part = f"<h3>{html(panel.part)}</h3>" if panel.part else ""
    cards = "".join(_row_card(row, panel.columns) for row in panel.rows)
    return f'{part}<div class="panel" style="--columns:{len(panel.columns)}">{cards}</div>'


def _row_card(row: PanelRow, columns: Sequence[str]) -> str:
    # Every picture names its column, because where the window is narrow the pictures of a row wrap.
    figures = "".join(_figure(cell, column) for cell, column in zip(row.cells, columns, strict=True))
    return f"<div><h4>{html(row.name)}</h4><div>{figures}</div></div>"


def _figure(cell: Cell | None, column: str) -> str:
    picture = "<i></i>" if cell is None else thumbnail(cell.image, PANEL_IMAGE)
    caption = f"<figcaption>{html(cell.caption)}</figcaption>" if cell and cell.caption else ""
    return f"<figure><span>{html(column)}</span>{picture}{caption}</figure>"
