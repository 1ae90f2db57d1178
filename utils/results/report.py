"""`report.html`: what one run has reached, lost, kept and made, as one file that needs nothing else to be read.

This file prepares the values; `report.html.j2` holds the page and its words.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from utils.results.figures import Chart, human_bytes, human_seconds
from utils.results.gallery import GalleryRow, thumbnail
from utils.results.metrics import FSCIL, forgetting_per_task
from utils.results.panels import Panel
from utils.run.files import atomic_write

# In the order of the table; other kinds come first. The template has their names.
MEMORY = (
    "exemplars", "bank", "source", "edge_maps", "class_embeddings", "generator", "network", "old_branches",
    "prototypes", "total", "frozen", "all_real_data",
)  # fmt: skip
ALWAYS_SHOWN = {"exemplars", "bank", "source", "network", "total", "frozen", "all_real_data"}  # others only if not 0
UNITS = ("real", "compressed", "compressed_units", "nominal", "true")
CURVES = {
    "top-1": "top1_curve", "top-5": "top5_curve", "NME top-1": "nme_top1_curve", "val top-1": "val_top1_curve"
}  # fmt: skip


class Column(NamedTuple):
    """A column of a table.

    Args:
        title: its head.
        kind: "text", "n" (numbers), "share" (%), "bytes", "seconds", "bar" (a fraction), "change" (a signed one), or
            "phase", "unit" and "memory", whose words the template has.
        values: a cell per row; None is shown as a dash, text as it is.
    """

    title: str
    kind: str
    values: Sequence[Any]


class Curves(NamedTuple):
    """A table of curves; the chart is None where they have one point only."""

    columns: list[Column]
    chart: Chart | None


def write_report(
    path: str | Path, results: dict[str, Any], config: dict[str, Any], gallery: Sequence[GalleryRow] = (),
    environment: dict[str, Any] | None = None, panels: Sequence[Panel] = (),
) -> None:  # fmt: skip
    """Write one HTML file without scripts or outside resources; what ``results`` lacks is left out of the page.

    Args:
        path: the file; it appears whole or not at all.
        results: the content of ``results.json``; unknown keys are ignored.
        config: the resolved config; nested objects are shown with dots.
        gallery: one row per class to show; all of its images are shown.
        environment: versions, device, ...; by default ``results["environment"]``, if there.
        panels: what learner and source have to show, in order; panels of one title and note share a section.

    Raises:
        DataError: if an image file of the gallery cannot be read.
    """
    results = defaultdict(lambda: None, results)
    page = _template().render(
        results=results,
        few_shot=_few_shot(results),
        curves=_curves(results),
        lost=_lost(results),
        sessions=_sessions(_few_shot(results)),
        long_tail=_long_tail(results["long_tail"] or {}),
        classes=_classes(results),
        gallery=_by_task(gallery),
        panels=[(*key, list(group)) for key, group in groupby(panels, lambda panel: (panel.title, panel.note))],
        memory=_memory(results["memory_bytes"] or {}),
        units=_units(results["memory_units"] or {}),
        seconds=_seconds(results["seconds"] or {}),
        environment=_pairs(environment or results["environment"] or {}),
        config=_pairs(dict(_flat(config))),
    )
    atomic_write(path, page)


def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    # A misspelled variable is an error instead of an empty place on the page.
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    pages.filters.update(short=_short, human_bytes=human_bytes, human_seconds=human_seconds, thumbnail=thumbnail)
    return pages.get_template("report.html.j2")


def _short(value: Any) -> str:
    """Write numbers short and None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _curves(results: dict[str, Any]) -> Curves | None:
    curves = {name: results[key] for name, key in CURVES.items() if results[key]}
    if not curves or not results["task_sizes"]:
        return None
    seen = list(accumulate(results["task_sizes"]))[: max(map(len, curves.values()))]
    tasks = Column("task", "text", [f"after {task}" for task in range(len(seen))])
    numbers = [Column(name, "n", _padded(curve, len(seen))) for name, curve in curves.items()]
    chart = Chart(curves, seen, "classes seen") if len(seen) > 1 else None
    return Curves([tasks, Column("classes", "n", seen), *numbers], chart)


def _lost(results: dict[str, Any]) -> list[Column]:
    """What every task but the last has lost since its best."""
    matrix = results["accuracy_matrix"] or []
    lost = forgetting_per_task(matrix) if len(matrix) > 1 else []
    bounds = [0, *accumulate(results["task_sizes"] or [1] * len(matrix))]
    spans = [(first, end - 1) for first, end in pairwise(bounds[: len(lost) + 1])]
    final = [matrix[-1][task] for task in range(len(lost))]
    return lost and [
        Column("task", "text", [f"{task}" for task in range(len(lost))]),
        Column("classes", "text", [f"{first}–{last}" if last > first else f"{first}" for first, last in spans]),
        Column("when new", "n", [matrix[task][task] for task in range(len(lost))]),
        Column("best", "n", [end + points for end, points in zip(final, lost)]),
        Column("at the end", "n", final),
        Column("lost", "n", lost),
        Column("", "change", [points / 100 for points in lost]),
    ]


def _few_shot(results: dict[str, Any]) -> dict[str, list[float | None]]:
    """The few-shot figures per session; empty for other runs."""
    given = results["fscil"]
    return {name: list(given.get(name) or [None]) for name in FSCIL} if given else {}


def _sessions(figures: dict[str, list[float | None]]) -> Curves | None:
    if not figures:
        return None
    sessions = range(max(map(len, figures.values())))
    curves = {name.replace("_", " "): _padded(values, len(sessions)) for name, values in figures.items()}
    columns = [Column(name, "n", values) for name, values in curves.items()]
    drawn = {name: curves[name] for name in list(curves)[:3]}  # the drop is no accuracy
    chart = Chart(drawn, sessions, "session") if len(sessions) > 1 else None
    return Curves([Column("session", "text", [f"{i}" for i in sessions]), *columns], chart)


def _long_tail(groups: dict[str, float | None]) -> list[Column]:
    names = [f"{name} training images per class" for name in groups]
    return names and [Column("", "text", names), Column("accuracy (%)", "n", list(groups.values()))]


def _classes(results: dict[str, Any]) -> list[Column]:
    accuracies = results["per_class_accuracy"] or []
    count = len(accuracies)
    tasks = [f"{task}" for task, size in enumerate(results["task_sizes"] or []) for _ in range(size)]
    columns = [
        Column("label", "text", [f"{label}" for label in range(count)]),
        Column("class", "text", _padded(results["class_names"], count)),
        Column("task", "text", _padded(tasks, count)),
        Column("train", "n", _padded(results["train_counts"], count)),
        Column("test", "n", _padded(results["test_counts"], count)),
        Column("accuracy (%)", "n", accuracies),
        Column("", "bar", [None if value is None else value / 100 for value in accuracies]),
    ]
    return [column for column in columns if any(cell is not None for cell in column.values)]


def _by_task(gallery: Sequence[GalleryRow]) -> list[tuple[int, list[GalleryRow]]]:
    rows = sorted((row for row in gallery if row.real or row.synthetic), key=lambda row: (row.task, row.class_index))
    return [(task, list(group)) for task, group in groupby(rows, lambda row: row.task)]


def _memory(counts: dict[str, int | None]) -> list[Column]:
    order = [*(key for key in counts if key not in MEMORY), *(key for key in MEMORY if key in counts)]
    memory = {key: counts[key] for key in order if counts[key] or (counts[key] == 0 and key in ALWAYS_SHOWN)}
    largest = max((count for key, count in memory.items() if key != "frozen"), default=0) or 1
    real = memory.get("all_real_data")
    return [
        Column("", "memory", list(memory)),
        Column("size", "bytes", list(memory.values())),
        Column("of all real data", "share", [100 * count / real if real else None for count in memory.values()]),
        Column("", "bar", [count / largest for count in memory.values()]),
    ] if memory else []  # fmt: skip


def _units(units: dict[str, float]) -> list[Column]:
    """Exemplars as papers count them; nothing of a run that keeps none."""
    if not units.get("nominal"):
        return []
    numbers = [f"{units[key]:,.2f}".removesuffix(".00") for key in UNITS]
    title = f"in raw images of {human_bytes(units['unit_bytes'])}"
    return [Column(title, "unit", UNITS), Column("", "n", numbers)]


def _seconds(given: dict[str, float | None]) -> list[Column]:
    seconds = {key: value for key, value in given.items() if value is not None}
    if not seconds:
        return []
    total = seconds.pop("total", None) or sum(seconds.values()) or 1
    seconds["other"] = max(total - sum(seconds.values()), 0.0)
    return [
        Column("", "phase", [*seconds, "total"]),
        Column("time", "seconds", [*seconds.values(), total]),
        Column("% of the total", "n", [*(100 * value / total for value in seconds.values()), 100.0]),
        Column("", "bar", [*(value / total for value in seconds.values()), ""]),
    ]


def _pairs(values: dict[str, Any]) -> list[Column]:
    # Settings are shown as JSON has them, digit by digit; results are rounded.
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values.values()]
    return [Column("key", "text", list(values)), Column("value", "text", texts)] if values else []


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _padded(values: Sequence | None, count: int) -> list:
    return [*(values or []), *[None] * count][:count]
