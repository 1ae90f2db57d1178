"""`report.html`: what one run has reached, lost, kept and made, as one file that needs nothing else to be read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from utils.results.figures import (
    STYLE,
    Figure,
    bar,
    heat_map,
    html,
    human_bytes,
    human_seconds,
    line_chart,
    split_table,
    table,
    tile,
)
from utils.results.gallery import GalleryRow, draw_gallery, panel_sections
from utils.results.metrics import forgetting_per_task
from utils.results.panels import Panel
from utils.run.files import atomic_write

REPLAY_MEMORY = ("exemplars", "bank", "source")
MEMORY_NAMES = {
    "exemplars": "exemplars (real images kept)",
    "bank": "bank (generated images kept)",
    "source": "replay source (all that it learned)",
    "edge_maps": "of it: edge maps",
    "class_embeddings": "of it: class embeddings",
    "generator": "of it: generator",
    "network": "classifier",
    "old_branches": "classifier's branches of earlier tasks",
    "prototypes": "prototypes and other state of the learner",
    "total": "total, from exemplars to prototypes",
    "frozen": "frozen weights, not counted as memory of the past",
    "all_real_data": "for comparison: all real training data",
}
ONLY_OF_SOME = ("edge_maps", "class_embeddings", "generator", "old_branches", "prototypes")  # left out where they are 0
UNIT_NAMES = {
    "real": "real exemplars",
    "compressed": "compressed exemplars",
    "compressed_units": "compressed exemplars, in units",
    "nominal": "units, nominally",
    "true": "units that the bytes of exemplars and edge maps fill",
}
SECONDS_NAMES = {
    "train": "train the classifier",
    "fit_source": "fit the replay source",
    "generate": "generate images",
    "evaluate": "evaluate",
}
CURVES_NOTE = "After every task, in percent of the test images of all classes seen."
TASKS_NOTE = (
    "Percent right on each task's test images, among all classes seen by then. "
    "Lost: points between a task's best accuracy before the end and its accuracy at the end."
)
FEW_SHOT = ("base", "novel", "harmonic_mean", "performance_drop")
SESSIONS_NOTE = (
    "Base: classes of the first session; novel: all later ones; in percent of their test images. Performance drop: "
    "points that the accuracy over all classes seen lies below the first session's."
)


def write_report(
    path: str | Path,
    results: dict[str, Any],
    config: dict[str, Any],
    gallery: Sequence[GalleryRow] = (),
    environment: dict[str, Any] | None = None,
    panels: Sequence[Panel] = (),
) -> None:
    """Write one HTML file without scripts or outside resources; what ``results`` lacks is left out of the page.

    Args:
        path: the file; it appears whole or not at all.
        results: the content of ``results.json`` (design, section 4); unknown keys are ignored.
        config: the resolved config; nested objects are shown with dots.
        gallery: one row per class to show; all of its images are shown.
        environment: versions, device, ...; by default ``results["environment"]``, if there.
        panels: what learner and source have to show, in order; panels of one title and note share a section.

    Raises:
        DataError: if an image file of the gallery cannot be read.
    """
    accuracies = results.get("per_class_accuracy") or []
    command = f"<pre>{html(results['command'])}</pre>" if results.get("command") else ""
    sections = [
        ("Accuracy over classes seen", CURVES_NOTE, _curves(results)),
        ("Accuracy and forgetting per task", TASKS_NOTE, _tasks(results)),
        ("Few-shot sessions", SESSIONS_NOTE, _sessions(results)),
        ("Long tail", "", _long_tail(results)),
        ("Classes", "In learning order, at the end of the run.", _classes(results)),
        ("Real and generated images", "", draw_gallery(gallery, accuracies)),
        *panel_sections(panels),
        ("Memory", "What the run keeps from task to task, beside all the real data that it saw.", _memory(results)),
        ("Time", "", _seconds(results)),
        ("Environment", "", _pairs(environment or results.get("environment") or {})),
        ("Config", "", _pairs(dict(_flat(config)))),
        ("Command", "", command),
    ]
    body = [_header(results), _headline(results)]
    for title, note, content in sections:
        if content:
            note = f"<p>{html(note)}</p>" if note else ""
            body.append(f"<section><h2>{html(title)}</h2>{note}{content}</section>")
    atomic_write(path, _page(_name(results), "\n".join(body)))


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _name(results: dict) -> str:
    return str(results.get("name") or "run")


def _header(results: dict) -> str:
    words = [f"learner {results['model_name']}"] if results.get("model_name") else []
    words.append(f"replay source {results['source']}" if results.get("source") else "no replay source")
    words += [f"{key} {results[key]}" for key in ("dataset", "seed") if results.get(key) is not None]
    if sizes := results.get("task_sizes"):
        words.append(f"{len(sizes)} task{'s' * (len(sizes) > 1)}, {sum(sizes)} classes")
    note = '<div class="badge">upper bound: this learner sees all real data again in every task</div>'
    done, planned = len(results.get("accuracy_matrix") or []), len(results.get("task_sizes") or [])
    unfinished = f'<div class="badge">unfinished: {done} of {planned} tasks</div>' if done < planned else ""
    title = f"<h1>{html(_name(results))}</h1><p>{html(' · '.join(words))}</p>"
    return f"<header>{title}{note if results.get('upper_bound') else ''}{unfinished}</header>"


def _headline(results: dict) -> str:
    tiles = []
    for key, title, note in (
        ("final_accuracy", "Final accuracy", "all classes, after the last task"),
        ("average_incremental_accuracy", "Average incremental", "mean over the tasks"),
    ):
        if results.get(key) is not None:
            tiles.append(tile(title, f"{results[key]:.1f} %", note))
    if results.get("forgetting") is not None:
        per_class = results.get("class_forgetting")
        note = "mean over earlier tasks" if per_class is None else f"mean over tasks, {per_class:.1f} over classes"
        tiles.append(tile("Forgetting", f"{results['forgetting']:.1f} pts", note))
    last = {name: values[-1] for name, values in _few_shot(results).items()}
    if last.get("harmonic_mean") is not None:
        base, novel, both, _ = last.values()
        tiles.append(tile("Harmonic mean", f"{both:.1f} %", f"base {base:.1f} %, novel {novel:.1f} %"))
    memory = results.get("memory_bytes") or {}
    if memory.get("exemplars") is not None:
        kept = sum(memory.get(part) or 0 for part in REPLAY_MEMORY)
        tiles.append(tile("Exemplars", human_bytes(memory["exemplars"]), f"{human_bytes(kept)} with bank and source"))
    seconds = (results.get("seconds") or {}).get("total")
    if seconds is not None:
        tiles.append(tile("Time", human_seconds(seconds), "from start to results"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tasks(results: dict) -> str:
    matrix = results.get("accuracy_matrix")
    if not matrix:
        return ""
    both = heat_map(matrix) + _forgetting(matrix, results.get("task_sizes") or [1] * len(matrix))
    return f'<div class="columns">{both}</div>' if len(matrix) <= 8 else both


def _curves(results: dict) -> str:
    names = {"top-1": "top1_curve", "top-5": "top5_curve", "NME top-1": "nme_top1_curve"}
    curves = {name: results[key] for name, key in names.items() if results.get(key)}
    if not curves or not results.get("task_sizes"):
        return ""
    seen = list(accumulate(results["task_sizes"]))[: max(map(len, curves.values()))]
    padded = [_padded(curve, len(seen)) for curve in curves.values()]
    rows = [[f"after {task}", classes, *values] for task, (classes, *values) in enumerate(zip(seen, *padded))]
    numbers = split_table(["task", "classes", *curves], rows)
    if len(seen) == 1:
        return numbers
    narrow = len(seen) <= 12
    chart = line_chart(curves, seen, "classes seen", width=540 if narrow else 1100)
    return f'<div class="columns">{chart}{numbers}</div>' if narrow else chart + numbers


def _forgetting(matrix: list[list[float]], task_sizes: list[int]) -> str:
    lost = forgetting_per_task(matrix)
    ends = list(accumulate(task_sizes))
    rows = []
    for task, points in enumerate(lost):
        first, last = (ends[task - 1] if task else 0), ends[task] - 1
        classes = f"{first}–{last}" if last > first else f"{first}"
        final = matrix[-1][task]
        shown = bar(abs(points) / 100, "loss" if points > 0 else "gain")
        rows.append([f"{task}", classes, matrix[task][task], final + points, final, points, shown])
    return table(["task", "classes", "when new", "best", "at the end", "lost", ""], rows) if rows else ""


def _few_shot(results: dict) -> dict[str, list[float | None]]:
    """The few-shot figures as lists of one length; empty for other runs."""
    given = results.get("fscil")
    return {name: list(given.get(name) or [None]) for name in FEW_SHOT} if given else {}


def _sessions(results: dict) -> str:
    figures = _few_shot(results)
    if not figures:
        return ""
    names = [name.replace("_", " ") for name in figures]
    sessions = range(max(map(len, figures.values())))
    columns = [_padded(values, len(sessions)) for values in figures.values()]
    numbers = table(["session", *names], ([f"{i}", *cells] for i, cells in enumerate(zip(*columns))))
    if len(sessions) == 1:
        return numbers
    chart = line_chart(dict(zip(names[:3], columns)), sessions, "session", width=540)
    return f'<div class="columns">{chart}{numbers}</div>'


def _long_tail(results: dict) -> str:
    rows = [[f"{name} training images per class", value] for name, value in (results.get("long_tail") or {}).items()]
    return table(["", "accuracy (%)"], rows) if rows else ""


def _classes(results: dict) -> str:
    accuracies = results.get("per_class_accuracy")
    if not accuracies:
        return ""
    count = len(accuracies)
    tasks = [task for task, size in enumerate(results.get("task_sizes") or []) for _ in range(size)]
    columns: dict[str, list] = {"label": [f"{label}" for label in range(count)]}
    columns["class"] = _padded(results.get("class_names"), count)
    columns["task"] = [None if task is None else f"{task}" for task in _padded(tasks, count)]
    columns["train"] = _padded(results.get("train_counts"), count)
    columns["test"] = _padded(results.get("test_counts"), count)
    columns["accuracy (%)"] = list(accuracies)
    columns[""] = [None if value is None else bar(value / 100) for value in accuracies]
    columns = {title: cells for title, cells in columns.items() if any(cell is not None for cell in cells)}
    return split_table(list(columns), list(zip(*columns.values())))


def _padded(values: Sequence | None, count: int) -> list:
    return [*(values or []), *[None] * count][:count]


def _memory(results: dict) -> str:
    counted = {key: value for key, value in (results.get("memory_bytes") or {}).items() if value is not None}
    memory = {key: value for key, value in counted.items() if value or key not in ONLY_OF_SOME}
    if not memory:
        return ""
    largest = max((count for key, count in memory.items() if key != "frozen"), default=0) or 1
    real = memory.get("all_real_data")
    known = [key for key in MEMORY_NAMES if key in memory]
    rows = []
    for key in [*(key for key in memory if key not in MEMORY_NAMES), *known]:
        count = memory[key]
        share = Figure(f"{100 * count / real:,.1f} %") if real else None
        rows.append([MEMORY_NAMES.get(key, key), Figure(human_bytes(count)), share, bar(count / largest)])
    return table(["", "size", "of all real data", ""], rows) + _units(results.get("memory_units") or {})


def _units(units: dict[str, float]) -> str:
    """Exemplars as papers count them; nothing of a run that keeps none."""
    if not units.get("nominal"):
        return ""
    rows = [[name, Figure(f"{units[key]:,.2f}".removesuffix(".00"))] for key, name in UNIT_NAMES.items()]
    return table([f"in raw images of {human_bytes(units['unit_bytes'])}", ""], rows)


def _seconds(results: dict) -> str:
    seconds = {key: value for key, value in (results.get("seconds") or {}).items() if value is not None}
    if not seconds:
        return ""
    total = seconds.pop("total", None) or sum(seconds.values()) or 1
    seconds["other"] = max(total - sum(seconds.values()), 0.0)
    rows = [
        [SECONDS_NAMES.get(key, key), Figure(human_seconds(value)), 100 * value / total, bar(value / total)]
        for key, value in seconds.items()
    ]
    return table(["", "time", "% of the total", ""], [*rows, ["total", Figure(human_seconds(total)), 100.0, ""]])


def _pairs(values: dict[str, Any]) -> str:
    # Settings are shown as JSON has them, digit by digit; results are rounded.
    texts = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in values.items()}
    return split_table(["key", "value"], list(texts.items())) if texts else ""


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
