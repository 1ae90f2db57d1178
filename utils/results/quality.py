"""Measures of generated images as rows of a table, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Measures = Mapping[str, dict[str, Any]]  # by name, as JSON has them; see `synth.quality.Measure`
HEAD = ("measure", "value", "95 %", "real against real", "generated", "real", "not computed")


def measure_rows(measures: Measures) -> list[list[str]]:
    """Return a row per measure, below `HEAD`."""
    return [
        [each["name"], short(each["value"]), " to ".join(map(short, each["ci95"] or ())), short(each["real"]),
         str(each["n_fake"]), str(each["n_real"]), each["reason"] or ""] for each in measures.values()
    ]  # fmt: skip


def part_rows(parts: Mapping[str, Measures]) -> tuple[list[str], list[list[str]]]:
    """Return the head and a row per part of the images, such as a class: its name, n of either side, each value."""
    names = list(next(iter(parts.values()), ()))
    rows = [[part, str(own[names[0]]["n_real"]), *(short(own[name]["value"]) for name in names)]
            for part, own in parts.items()]  # fmt: skip
    return ["class", "images", *names], rows


def short(value: float | None) -> str:
    """Write four digits; a dash for what is not known."""
    return "–" if value is None else f"{value:.4g}"
