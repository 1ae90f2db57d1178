"""One table over runs: ``python -m utils.results.compare outputs/* [--format text|csv|latex] [--output file]``."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from utils.results.figures import human_bytes, human_seconds
from utils.run.errors import CheckpointError, RepriseError
from utils.run.files import atomic_write

REPLAY_MEMORY = ("exemplars", "bank", "source")
UNFINISHED = "*"
FOOTNOTE = f"{UNFINISHED} unfinished seed, not in the means"
NUM_WORD_COLUMNS = 5  # run, learner, source, data set, seeds; numbers follow
FEW_SHOT = {  # of the last session; columns that only few-shot runs have
    "base": "base (%)", "novel": "novel (%)", "harmonic_mean": "harmonic mean (%)", "performance_drop": "drop (pts)"
}  # fmt: skip
LATEX_WORDS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "&%$#_{}"} | LATEX_WORDS)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; None where there is nothing to average, or only one seed."""

    mean: float | None
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        known = [value for value in values if value is not None]
        return cls(fmean(known) if known else None, stdev(known) if len(known) > 1 else None)

    def text(self, write: Callable[[float], str] = "{:.2f}".format) -> str:
        if self.mean is None:
            return "-"
        return write(self.mean) + (f" ± {write(self.std)}" if self.std is not None else "")


@dataclass(frozen=True)
class Row:
    """One run: figures over its finished seeds; accuracies in percent, memory in bytes."""

    run: str
    learner: str
    source: str
    dataset: str
    seeds: tuple[str, ...]
    unfinished: tuple[str, ...]
    final: Spread
    average: Spread
    forgetting: Spread
    memory: Spread  # exemplars, bank and source: all that a run keeps beside its classifier
    seconds: Spread
    few_shot: dict[str, Spread]  # empty for other runs

    @property
    def spreads(self) -> tuple[Spread, ...]:
        return self.final, self.average, self.forgetting, self.memory, self.seconds


def read_run(folder: str | Path) -> Row | None:
    """The row of one run folder; None if the folder is not a run (no config.json, or no seed has begun).

    Raises:
        CheckpointError: if a file of the run cannot be read.
    """
    folder = Path(folder)
    seed_folders = sorted((path for path in folder.glob("seed_*") if path.is_dir()), key=_natural)
    if not seed_folders or not (folder / "config.json").is_file():
        return None
    config = _read(folder / "config.json")
    results = {path.name.removeprefix("seed_"): _read(path / "results.json") for path in seed_folders}
    finished = {seed: result for seed, result in results.items() if _is_finished(result)}
    done = list(finished.values())
    facts = done[0] if done else {"source": (config.get("synth") or {}).get("name")}
    learner = str(facts.get("model_name") or config.get("model_name") or "-")
    return Row(
        run=folder.resolve().name,
        learner=f"{learner} (upper bound)" if facts.get("upper_bound") else learner,
        source=str(facts.get("source") or "-"),
        dataset=str(facts.get("dataset") or config.get("dataset") or "-"),
        seeds=tuple(finished),
        unfinished=tuple(seed for seed in results if seed not in finished),
        final=Spread.of([result.get("final_accuracy") for result in done]),
        average=Spread.of([result.get("average_incremental_accuracy") for result in done]),
        forgetting=Spread.of([result.get("forgetting") for result in done]),
        memory=Spread.of([_replay_bytes(result) for result in done]),
        seconds=Spread.of([(result.get("seconds") or {}).get("total") for result in done]),
        few_shot=_few_shot(done),
    )


def find_runs(folders: Sequence[str | Path]) -> list[Row]:
    """Rows of all runs among these folders, in their order; a folder of runs stands for its runs.

    Raises:
        RepriseError: if a folder does not exist, or there is no run at all.
    """
    rows = []
    for folder in dict.fromkeys(map(Path, folders)):
        if not folder.exists():
            raise RepriseError(f"{folder} does not exist: name folders that main.py has written below its output_dir")
        row = read_run(folder)
        inner = [] if row else (read_run(path) for path in sorted(folder.glob("*/")))
        rows += [found for found in (row, *inner) if found]
    if not rows:
        raise RepriseError(
            f"no run found in {', '.join(map(str, folders))}: a run is a folder with config.json and seed_<s> folders, "
            "as main.py writes below its output_dir"
        )
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """An aligned table for a terminal."""
    head, cells = _cells(rows)
    columns = [_aligned(title, column, i) for i, (title, *column) in enumerate(zip(head, *cells))]
    lines = ["  ".join(line).rstrip() for line in zip(*columns)]
    rule = "  ".join("-" * len(column[0]) for column in columns)
    return "\n".join([lines[0], rule, *lines[1:], *_footnotes(rows)]) + "\n"


def _aligned(title: str, cells: Sequence[str], position: int) -> list[str]:
    """Cells of one width: words begin and numbers end in one line, and ``±`` stands below ``±``."""
    if position < NUM_WORD_COLUMNS:
        pad = str.ljust
    else:
        pad = str.rjust
        means, stds = zip(*(cell.partition(" ± ")[::2] for cell in cells))
        width = max(map(len, stds))
        tails = [(f" ± {std:>{width}}" if std else " " * (width + 3)) if width else "" for std in stds]
        cells = [mean + tail for mean, tail in zip(means, tails)]
    width = max(map(len, [title, *cells]))
    return [pad(cell, width) for cell in [title, *cells]]


def as_latex(rows: Sequence[Row]) -> str:
    """A tabular with booktabs' rules."""
    head, cells = _cells(rows)
    lines = [" & ".join(_latex(cell) for cell in line) + r" \\" for line in [head, *cells]]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    notes = [f"% {note}" for note in _footnotes(rows)]
    columns = "l" * NUM_WORD_COLUMNS + "r" * (len(head) - NUM_WORD_COLUMNS)
    table = [rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]
    return "\n".join([r"% needs \usepackage{booktabs}", *notes, *table]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Raw numbers, mean and standard deviation in columns of their own; seeds are separated by blanks."""
    few_shot = _few_shot_columns(rows)
    numbers = [
        "final_accuracy",
        "average_incremental_accuracy",
        "forgetting",
        "replay_memory_bytes",
        "seconds",
        *few_shot,
    ]
    head = ["run", "learner", "source", "dataset", "seeds", "unfinished_seeds"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head + [f"{name}_{part}" for name in numbers for part in ("mean", "std")])
    for row in rows:
        writer.writerow([row.run, row.learner, row.source, row.dataset, " ".join(row.seeds), " ".join(row.unfinished)]
                        + [value for spread in (*row.spreads, *_few_shot_of(row, few_shot))
                           for value in (spread.mean, spread.std)])  # fmt: skip
    return file.getvalue()


FORMATS = {"text": as_text, "csv": as_csv, "latex": as_latex}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, 2 if there is nothing to compare or a file is damaged."""
    parser = argparse.ArgumentParser(prog="python -m utils.results.compare", description="One table over runs.")
    parser.add_argument("folders", nargs="*", default=["outputs"], help="run folders, or folders of runs (outputs)")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--output", type=Path, help="write to this file instead of the terminal")
    options = parser.parse_args(arguments)
    try:
        table = FORMATS[options.format](find_runs(options.folders))
        if options.output:
            atomic_write(options.output, table)
        else:
            sys.stdout.write(table)
    except RepriseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["run", "learner", "source", "data set", "seeds"]
    head += ["final acc. (%)", "avg. incremental (%)", "forgetting (pts)", "replay memory", "time"]
    few_shot = _few_shot_columns(rows)
    cells = [[*_words(row), *(spread.text() for spread in _few_shot_of(row, few_shot))] for row in rows]
    return [*head, *(FEW_SHOT[name] for name in few_shot)], cells


def _words(row: Row) -> Iterator[str]:
    yield from (row.run, row.learner, row.source, row.dataset)
    yield ", ".join([*row.seeds, *(seed + UNFINISHED for seed in row.unfinished)])
    yield from (row.final.text(), row.average.text(), row.forgetting.text())
    for spread, write in ((row.memory, human_bytes), (row.seconds, human_seconds)):
        yield "-" if spread.mean is None else write(spread.mean)


def _few_shot(done: Sequence[dict[str, Any]]) -> dict[str, Spread]:
    sessions = [result["fscil"] for result in done if result.get("fscil")]
    return {name: Spread.of([values[name][-1] for values in sessions]) for name in FEW_SHOT} if sessions else {}


def _few_shot_columns(rows: Sequence[Row]) -> list[str]:
    return list(FEW_SHOT) if any(row.few_shot for row in rows) else []


def _few_shot_of(row: Row, columns: Sequence[str]) -> list[Spread]:
    return [row.few_shot.get(name, Spread(None, None)) for name in columns]


def _footnotes(rows: Sequence[Row]) -> list[str]:
    return [FOOTNOTE] if any(row.unfinished for row in rows) else []


def _latex(cell: str) -> str:
    if " ± " in cell:
        return f"${cell.replace('±', chr(92) + 'pm')}$"
    return "--" if cell == "-" else cell.translate(LATEX_ESCAPES)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Seeds in numeric order."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.name.split("_")]


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in this file; empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; delete its folder and repeat the run") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; delete its folder and repeat the run")
    return value


def _is_finished(result: dict[str, Any]) -> bool:
    """A seed in progress has no results yet, or fewer rows than tasks."""
    return bool(result) and len(result.get("accuracy_matrix", [])) >= len(result.get("task_sizes", []))


def _replay_bytes(result: dict[str, Any]) -> int | None:
    memory = result.get("memory_bytes")
    return None if memory is None else sum(memory.get(part) or 0 for part in REPLAY_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
