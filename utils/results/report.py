"""`report.html`: what one run has reached, lost, kept and made, as one file that needs nothing else to be read.

This file prepares the values; `report.html.j2` holds the page and its words.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.results.cost import TITLES
from utils.results.figures import Chart, human_bytes, human_count, human_seconds
from utils.results.gallery import GalleryRow, thumbnail
from utils.results.metrics import FSCIL, forgetting_per_task, spans
from utils.results.panels import Panel
from utils.results.quality import HEAD, measure_rows, part_rows
from utils.run.files import atomic_write

# In the order of the table; other kinds come first. The template has their names.
MEMORY = ("exemplars", "bank", "source", "edge_maps", "class_embeddings", "generator", "network", "old_branches",
          "prototypes", "total", "frozen", "all_real_data")  # fmt: skip
ALWAYS_SHOWN = {"exemplars", "bank", "source", "network", "total", "frozen", "all_real_data"}  # others only if not 0
UNITS = ("real", "compressed", "compressed_units", "nominal", "true")
CURVES = {"top-1": "top1_curve", "top-5": "top5_curve", "NME top-1": "nme_top1_curve", "val top-1": "val_top1_curve",
          "task known": "task_incremental_curve"}  # fmt: skip
# A misspelled variable is an error instead of an empty place on the page.
PAGES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
PAGES.filters.update(human_bytes=human_bytes, human_count=human_count, human_seconds=human_seconds,
                     thumbnail=thumbnail)  # fmt: skip


class Column(NamedTuple):
    """A column of a table.

    Args:
        title: its head.
        kind: "text", "n" (numbers), "share" (%), "bytes", "count", "seconds", "bar" (a share), "change" (a signed one),
            or "phase", "part", "unit" and "memory", whose words the template has.
        values: a cell per row; None is shown as a dash, text as it is.
    """

    title: str
    kind: str
    values: Sequence[Any]


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
    page = PAGES.get_template("report.html.j2").render(
        results=results, curves=_curves(results), lost=_lost(results), classes=_classes(results),
        sessions=results["fscil"] and _sessions(results["fscil"]), long_tail=_long_tail(results["long_tail"] or {}),
        quality=_quality(results["replay_quality"] or {}),
        gallery=[row for row in gallery if row.real or row.synthetic],
        panels=[(*key, list(group)) for key, group in groupby(panels, lambda panel: (panel.title, panel.note))],
        memory=_memory(results["memory_bytes"] or {}), units=_units(results["memory_units"] or {}),
        seconds=results["seconds"] and _seconds(dict(results["seconds"])), costs=_costs(results["cost"] or {}),
        environment=_pairs(environment or results["environment"] or {}), config=_pairs(_flat(config)),
    )  # fmt: skip
    atomic_write(path, page + "\n")


def _curves(results: dict[str, Any]) -> tuple[list[Column], Chart | None]:
    curves = {name: results[key] for name, key in CURVES.items() if results[key]}
    seen = list(accumulate(results["task_sizes"] or []))[: max(map(len, curves.values()), default=0)]
    tasks = Column("task", "text", [f"after {task}" for task in range(len(seen))])
    trained = Column("training", "seconds", _padded(results["train_seconds"], len(seen)))
    first = [tasks, Column("classes", "n", seen), *[trained] * bool(results["train_seconds"])]
    return _drawn(first, curves, Chart(curves, seen, "classes seen"))


def _sessions(figures: dict[str, list[float | None]]) -> tuple[list[Column], Chart | None]:
    curves = {name.replace("_", " "): figures[name] for name in FSCIL}
    sessions = range(len(figures["base"]))
    drawn = {name: curves[name] for name in list(curves)[:3]}  # the drop is no accuracy
    return _drawn([Column("session", "text", list(map(str, sessions)))], curves, Chart(drawn, sessions, "session"))


def _drawn(first: list[Column], curves: dict[str, Sequence], chart: Chart) -> tuple[list[Column], Chart | None]:
    """Return a table of curves, and their chart where they have more than one point."""
    numbers = [Column(name, "n", _padded(values, len(chart.xs))) for name, values in curves.items()]
    return [*first, *numbers], chart if len(chart.xs) > 1 else None


def _lost(results: dict[str, Any]) -> list[Column]:
    """What every task but the last has lost since its best."""
    matrix = results["accuracy_matrix"] or []
    lost = forgetting_per_task(matrix)
    classes = spans(results["task_sizes"] or [1] * len(matrix))[: len(lost)]
    final = matrix[-1][: len(lost)] if matrix else []
    return lost and [
        Column("task", "text", list(map(str, range(len(lost))))),
        Column("classes", "text", [f"{first}–{last}" if last > first else f"{first}" for first, last in classes]),
        Column("when new", "n", [row[-1] for row in matrix[:-1]]),
        Column("best", "n", [end + points for end, points in zip(final, lost)]),
        Column("at the end", "n", final), Column("lost", "n", lost), Column("", "change", lost),
    ]  # fmt: skip


def _long_tail(groups: dict[str, float | None]) -> list[Column]:
    names = [f"{name} training images per class" for name in groups]
    return names and [Column("", "text", names), Column("accuracy (%)", "n", list(groups.values()))]


def _quality(quality: dict[str, Any]) -> list[list[Column]]:
    """A table of all measures, one of groups, one of classes."""
    if "overall" not in quality:
        return []
    head, rows = part_rows({row["name"]: row["measures"] for row in quality["per_class"]})
    lost = Column("forgetting (pts)", "n", [row["forgetting"] for row in quality["per_class"]])
    tables = [_columns(HEAD, measure_rows(quality["overall"])), _columns(*part_rows(quality["groups"]))]
    return [columns for columns in (*tables, [*_columns(head, rows), lost]) if columns[0].values]


def _columns(head: Sequence[str], rows: list[list[str]]) -> list[Column]:
    """Columns of a table of texts, of which those between the first and the last words are numbers."""
    kinds = ["text", *["n"] * (len(head) - 1)]
    return [Column(title, kind, [row[place] for row in rows]) for place, (title, kind) in enumerate(zip(head, kinds))]


def _classes(results: dict[str, Any]) -> list[Column]:
    accuracies = results["per_class_accuracy"] or []
    count = len(accuracies)
    tasks = [str(task) for task, size in enumerate(results["task_sizes"] or []) for _ in range(size)]
    columns = [
        Column("label", "text", list(map(str, range(count)))),
        Column("class", "text", _padded(results["class_names"], count)),
        Column("task", "text", _padded(tasks, count)),
        Column("train", "n", _padded(results["train_counts"], count)),
        Column("test", "n", _padded(results["test_counts"], count)),
        Column("accuracy (%)", "n", accuracies), Column("", "bar", accuracies),
    ]  # fmt: skip
    return [column for column in columns if any(cell is not None for cell in column.values)]


def _memory(counts: dict[str, int | None]) -> list[Column]:
    order = [*(key for key in counts if key not in MEMORY), *(key for key in MEMORY if key in counts)]
    memory = {key: counts[key] for key in order if counts[key] or (counts[key] == 0 and key in ALWAYS_SHOWN)}
    largest = max((count for key, count in memory.items() if key != "frozen"), default=0) or 1
    real = memory.get("all_real_data")
    return [
        Column("", "memory", list(memory)), Column("size", "bytes", list(memory.values())),
        Column("of all real data", "share", [100 * count / real if real else None for count in memory.values()]),
        Column("", "bar", [100 * count / largest for count in memory.values()]),
    ] if memory else []  # fmt: skip


def _units(units: dict[str, float]) -> list[Column]:
    """Exemplars as papers count them; nothing of a run that keeps none."""
    if not units.get("nominal"):
        return []
    numbers = [f"{units[key]:,.2f}".removesuffix(".00") for key in UNITS]
    return [Column(f"in raw images of {human_bytes(units['unit_bytes'])}", "unit", UNITS), Column("", "n", numbers)]


def _seconds(seconds: dict[str, float]) -> list[Column]:
    total = seconds.pop("total", None) or sum(seconds.values()) or 1
    seconds["other"] = max(total - sum(seconds.values()), 0.0)
    shares = [100 * value / total for value in seconds.values()]
    numbers = [Column("% of the total", "n", [*shares, 100.0]), Column("", "bar", [*shares, ""])]
    times = Column("time", "seconds", [*seconds.values(), total])
    return [Column("", "phase", [*seconds, "total"]), times, *numbers]


def _costs(cost: dict[str, Any]) -> list[list[Column]]:
    """A table of all tasks together, by part; one of every task."""
    if not cost:
        return []
    rows = [(str(task), part) for task, costs in enumerate(cost["tasks"]) for part in costs]
    tasks, parts = zip(*rows)
    costs = [each for costs in cost["tasks"] for each in costs.values()]
    total = cost["total"]
    return [_cost_columns(list(total), list(total.values())),
            [Column("task", "text", tasks), *_cost_columns(parts, costs)]]  # fmt: skip


def _cost_columns(parts: Sequence[str], costs: Sequence[dict[str, Any]]) -> list[Column]:
    kinds = zip(TITLES.items(), ("count", "count", "seconds", "bytes"))
    return [Column("", "part", parts), *(Column(title, kind, [cost[name] for cost in costs])
                                         for (name, title), kind in kinds)]  # fmt: skip


def _pairs(values: dict[str, Any]) -> list[Column]:
    # Settings are shown as JSON has them, digit by digit; results are rounded.
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values.values()]
    return [Column("key", "text", list(values)), Column("value", "text", texts)] if values else []


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _padded(values: Sequence | None, count: int) -> list:
    return [*(values or []), *[None] * count][:count]
