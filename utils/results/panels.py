"""Panels: small tables of pictures that a learner or a source makes while it works, kept for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from utils.data.images import decode_image, encode_image
from utils.run.files import atomic_write, in_numeric_order, read_json, write_json

INDEX = "panel.json"


class Cell(NamedTuple):
    """One picture, uint8 (C, H, W) with C = 1 or 3, and the words below it; a line break in them is kept."""

    image: Tensor
    caption: str = ""


class PanelRow(NamedTuple):
    """The pictures of one thing, such as a class: one cell per column, None where there is none."""

    name: str
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Panel:
    """A table of pictures with words.

    Args:
        title: title of its section in the report; neighbours of the same title and note share one section.
        note: one or two sentences on what is to be seen.
        columns: names of the columns, at least one.
        rows: each as long as ``columns``.
        part: what this panel shows of the section, such as "Task 3".
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[PanelRow]
    part: str = ""

    def __post_init__(self):
        lengths = [len(row.cells) for row in self.rows]
        assert lengths == [len(self.columns)] * len(self.rows), f"{len(self.columns)} columns, cells per row {lengths}"


class Panels:
    """Panels on disk, `<folder>/<name>/panel.json` with its PNG files beside it.

    Args:
        folder: where they lie; it need not exist.
        enabled: whether this process writes; only the main one of several does.
    """

    def __init__(self, folder: str | Path, enabled: bool = True):
        self.folder, self.enabled = Path(folder), enabled

    def write(self, name: str, panel: Panel) -> None:
        """Store a panel in place of the one of this name; a number in the name, as in `shown_10`, orders them.

        A resumed run writes the same panels again.
        """
        if not self.enabled:
            return
        rows = []
        for i, row in enumerate(panel.rows):
            cells = [_store(self.folder / name / f"{i}-{j}.png", cell) for j, cell in enumerate(row.cells)]
            rows.append({"name": row.name, "cells": cells})
        # Last, because a panel without it does not count: one that was cut off is never read.
        write_json(self.folder / name / INDEX, vars(panel) | {"rows": rows})

    def read(self) -> list[Panel]:
        """Return all panels in the order of their names, in which numbers count as numbers.

        Raises:
            CheckpointError: if a `panel.json` is damaged.
            DataError: if an image cannot be read.
        """
        indices = (folder / INDEX for folder in in_numeric_order(self.folder.glob("*")))
        return [_read(index) for index in indices if index.exists()]


def _store(path: Path, cell: Cell | None) -> dict[str, str] | None:
    if cell is None:
        return None
    atomic_write(path, encode_image(cell.image.cpu(), ".png"), sync=False)
    return {"image": path.name, "caption": cell.caption}


def _read(path: Path) -> Panel:
    words = read_json(path, "delete its folder, and the report does without")
    rows = [PanelRow(row["name"], [_load(path.parent, cell) for cell in row["cells"]]) for row in words.pop("rows")]
    return Panel(**words, rows=rows)


def _load(folder: Path, cell: dict[str, str] | None) -> Cell | None:
    return None if cell is None else Cell(decode_image(folder / cell["image"]), cell["caption"])
