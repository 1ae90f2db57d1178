"""What a run carries from one task to the next: named, weighed, and with single items that may be given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Items(NamedTuple):
    """Single things of one kind, ordered by importance within each class.

    Attributes:
        name: in words, such as "real exemplars".
        generated: whether a network made them.
        units: raw images that one of them counts as, by its method's own count; None: it is no exemplar.
        counts: gives how many are left of every class that has some.
        drop_last: class, number -> bytes freed by giving up so many of its last ones.
    """

    name: str
    generated: bool
    units: float | None
    counts: Callable[[], dict[int, int]]
    drop_last: Callable[[int, int], int]


class Carried(NamedTuple):
    """A line of the ledger.

    Attributes:
        name: such as "exemplars"; lines of one name are added up.
        files: patterns of files in a checkpoint that it takes; a file counts for the first line that names it.
        nbytes: bytes beside these files.
        items: what of it can be given up; None: nothing.
        frozen: weights that are used as they came: no memory of the past, so they stand apart.
    """

    name: str
    files: tuple[str, ...] = ()
    nbytes: int = 0
    items: Items | None = None
    frozen: bool = False
