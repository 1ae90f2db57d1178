"""One table over runs, and their curves: `python -m utils.results.compare outputs/*`."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError
from tabulate import tabulate

from utils.results.cost import TITLES, Cost, add_up, join
from utils.results.figures import human_bytes, human_count, human_seconds
from utils.results.plot import SUFFIXES, Line, plot_lines
from utils.run.command import exit_code
from utils.run.errors import CheckpointError, RepriseError
from utils.run.files import atomic_write, in_numeric_order, read_json

REPLAY_MEMORY = ("exemplars", "bank", "source")  # all that a run keeps beside its classifier
WORDS = ("run", "learner", "source", "data set", "seeds")  # titles of the first columns; numbers follow
# By their name in csv.
NUMBERS = {"final_accuracy": "final acc. (%)", "task_incremental": "task known (%)",
           "average_incremental_accuracy": "avg. incremental (%)", "forgetting": "forgetting (pts)",
           "replay_memory_bytes": "replay memory", "seconds": "time", "training": "training",
           "time_saved": "saved (%)", "evaluations": "evaluations", "flops": "FLOPs",
           "peak_memory": "peak memory"}  # fmt: skip
# Of the last session; columns that only few-shot runs have.
FEW_SHOT = {"base": "base (%)", "novel": "novel (%)", "harmonic_mean": "harmonic mean (%)",
            "performance_drop": "drop (pts)"}  # fmt: skip
# Others: mean ± deviation.
WRITTEN_AS = {"replay_memory_bytes": human_bytes, "seconds": human_seconds, "training": human_seconds,
              "evaluations": human_count, "flops": human_count, "peak_memory": human_bytes}  # fmt: skip


class RunFacts(BaseModel, protected_namespaces=()):
    """What an experiment file says of a run."""

    model_name: str | None = None
    dataset: str | None = None
    synth: dict[str, Any] | None = None


class RunManifest(BaseModel):
    """What a `config.json` holds."""

    config: RunFacts = RunFacts()


class RunCost(BaseModel):
    """What a run took, by part."""

    total: dict[str, Cost]


class SeedResults(BaseModel, protected_namespaces=()):
    """What a `results.json` says of a seed, as far as it is compared; percentages, bytes and seconds."""

    task_sizes: list[int]
    accuracy_matrix: list[list[float]]
    dataset: str | None = None
    upper_bound: bool | None = None
    top1_curve: list[float] | None = None
    final_accuracy: float | None = None
    average_incremental_accuracy: float | None = None
    forgetting: float | None = None
    memory_bytes: dict[str, float | None] | None = None
    seconds: dict[str, float | None] | None = None
    fscil: dict[str, list[float | None]] | None = Field(None, description="figures per session")
    task_incremental_curve: list[float | None] | None = None
    cost: RunCost | None = None
    time_saved: float | None = Field(None, description="% of the training time of the first run in the table")

    def numbers(self, part: str | None = None) -> dict[str, float | None]:
        """Return every number that can be compared, by its name in csv; of few-shot sessions the last one's.

        Args:
            part: of the run, whose cost is compared; None: the run as a whole.
        """
        costs = self.cost.total if self.cost else {}
        if part is not None:
            return vars(costs[part]) if part in costs else {}
        memory, seconds, sessions = self.memory_bytes, self.seconds or {}, self.fscil or {}
        replay = None if memory is None else sum(memory.get(part) or 0 for part in REPLAY_MEMORY)
        last = {name: values[-1] for name, values in sessions.items() if values}
        known = {"task_incremental": (self.task_incremental_curve or [None])[-1], "training": seconds.get("train")}
        spent = vars(add_up(costs.values())) if costs else {}
        return dict(self) | last | known | spent | {"replay_memory_bytes": replay, "seconds": seconds.get("total")}


class Row(NamedTuple):
    """One run, or a part of it: who it is, and the results of its finished seeds."""

    words: list[str]  # below the titles of `WORDS`
    finished: dict[str, SeedResults]  # by seed
    unfinished: list[str]
    part: str | None = None  # whose costs alone are compared

    def parts(self) -> list[Row]:
        """Return a row for each part of the run."""
        costs = [seed.cost.total for seed in self.finished.values() if seed.cost]
        return [self._replace(part=part) for part in join(*costs)]

    def spread(self, number: str) -> tuple[float | None, float | None]:
        """Return mean and sample standard deviation over seeds; None where there are too few values."""
        values = [seed.numbers(self.part).get(number) for seed in self.finished.values()]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None, stdev(known) if len(known) > 1 else None

    def text(self, number: str) -> str:
        mean, std = self.spread(number)
        if mean is None:
            return "-"
        if number in WRITTEN_AS:
            return WRITTEN_AS[number](mean)
        return f"{mean:.2f}" + ("" if std is None else f" ± {std:5.2f}")  # of one width: ± stands below ±

    def line(self) -> Line:
        """Return the curves of the finished seeds, for a plot."""
        seeds = [seed for seed in self.finished.values() if seed.top1_curve]
        return Line(self.words[0], seeds[0].task_sizes if seeds else [], [seed.top1_curve for seed in seeds])


def read_run(folder: Path) -> Row | None:
    """Return the row of one run folder; None if it is not a run (no config.json, or no seed has begun).

    Raises:
        CheckpointError: if a file of the run is damaged or none of ours.
    """
    seeds = in_numeric_order(path for path in folder.glob("seed_*") if path.is_dir())
    if not seeds or not (folder / "config.json").is_file():
        return None
    config = _read(folder / "config.json", RunManifest).config
    paths = {path.name.removeprefix("seed_"): path / "results.json" for path in seeds}
    results = {seed: _read(path, SeedResults) for seed, path in paths.items() if path.is_file()}
    finished = {seed: each for seed, each in results.items() if 0 < len(each.task_sizes) <= len(each.accuracy_matrix)}
    first = next(iter(finished.values()), None)
    unfinished = [seed for seed in paths if seed not in finished]
    learner = (config.model_name or "-") + " (upper bound)" * bool(first and first.upper_bound)
    source, dataset = (config.synth or {}).get("name", "-"), (first and first.dataset) or config.dataset or "-"
    shown = ", ".join([*finished, *(f"{seed}*" for seed in unfinished)])
    return Row([folder.resolve().name, learner, source, dataset, shown], finished, unfinished)


def find_runs(folders: Sequence[str | Path]) -> list[Row]:
    """Return the rows of all runs among these folders, in their order; a folder of runs stands for its runs.

    Raises:
        RepriseError: if a folder does not exist, or there is no run at all.
    """
    rows = []
    for folder in dict.fromkeys(map(Path, folders)):
        if not folder.exists():
            raise RepriseError(f"{folder} does not exist: name folders that main.py has written below its output_dir")
        row = read_run(folder)
        rows += [row] if row else filter(None, map(read_run, sorted(folder.glob("*/"))))
    if not rows:
        places = ", ".join(map(str, folders))
        raise RepriseError(f"no run found in {places}: a run holds config.json and seed_<s> folders")
    if first := rows[0].spread("training")[0]:
        for seed in (seed for row in rows for seed in row.finished.values()):
            spent = seed.numbers()["training"]
            seed.time_saved = None if spent is None else 100 * (1 - spent / first)
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """Return an aligned table for a terminal."""
    return "\n".join([_table(rows, "simple"), *_footnotes(rows)]) + "\n"


def as_latex(rows: Sequence[Row]) -> str:
    """Return a tabular with booktabs' rules."""
    notes = [r"% needs \usepackage{booktabs}", *(f"% {note}" for note in _footnotes(rows))]
    return "\n".join([*notes, _table(rows, "latex_booktabs").replace("±", r"$\pm$")]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Return raw numbers, mean and standard deviation in columns of their own; seeds are separated by blanks."""
    numbers = _numbers(rows)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["run", "learner", "source", "dataset", "seeds", "unfinished_seeds", *["part"] * _by_part(rows)]
    writer.writerow(head + [f"{name}_{part}" for name in numbers for part in ("mean", "std")])
    for row in rows:
        words = [*row.words[:-1], " ".join(row.finished), " ".join(row.unfinished), *[row.part] * _by_part(rows)]
        writer.writerow(words + [value for number in numbers for value in row.spread(number)])
    return file.getvalue()


FORMATS = {"text": as_text, "csv": as_csv, "latex": as_latex}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 if there is nothing to compare or a file is damaged."""
    parser = argparse.ArgumentParser(prog="python -m utils.results.compare", description="One table over runs.")
    parser.add_argument("folders", nargs="*", default=["outputs"], help="run folders, or folders of runs (outputs)")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--cost", action="store_true", help="a line per part of a run: what it has cost")
    parser.add_argument("--output", type=Path, help="write to this file instead of the terminal")
    parser.add_argument("--plot", type=Path, help="also draw accuracy over classes seen: a .pdf, .png or .svg file")
    return exit_code(_compare, parser.parse_args(arguments))


def _compare(options: argparse.Namespace) -> None:
    if options.plot and options.plot.suffix.lower() not in SUFFIXES:
        raise RepriseError(f"cannot draw {options.plot}: its name must end in .pdf, .png or .svg")
    rows = find_runs(options.folders)
    parts = [part for row in rows for part in row.parts()]
    if options.cost and not parts:
        raise RepriseError("no run here says what its parts have cost: wait for one to finish, or repeat an old one")
    table = FORMATS[options.format](parts if options.cost else rows)
    if options.output:
        atomic_write(options.output, table)
    else:
        sys.stdout.write(table)
    if options.plot:
        _plot(rows, options.plot)


def _plot(rows: Sequence[Row], path: Path) -> None:
    lines = [row.line() for row in rows]
    drawn = [line for line in lines if line.curves]
    absent = ", ".join(line.name for line in lines if not line.curves)
    if not drawn:
        raise RepriseError(f"cannot draw {path}: no seed of {absent} has finished; wait, or run main.py")
    plot_lines(drawn, path)
    if absent:
        print(f"not in {path}, because no seed has finished: {absent}", file=sys.stderr)


def _numbers(rows: Sequence[Row]) -> dict[str, str]:
    """Return the columns of numbers: titles by name."""
    if _by_part(rows):
        return TITLES
    few_shot = any(seed.fscil for row in rows for seed in row.finished.values())
    return NUMBERS | (FEW_SHOT if few_shot else {})


def _by_part(rows: Sequence[Row]) -> bool:
    return rows[0].part is not None


def _table(rows: Sequence[Row], style: str) -> str:
    """Return titles and a line per run in one of tabulate's styles."""
    numbers = _numbers(rows)
    cells = [[*row.words, *[row.part] * _by_part(rows), *map(row.text, numbers)] for row in rows]
    titles = [*WORDS, *["part"] * _by_part(rows)]
    sides = ["left"] * len(titles) + ["right"] * len(numbers)
    return tabulate(cells, [*titles, *numbers.values()], style, colalign=sides, disable_numparse=True)


def _footnotes(rows: Sequence[Row]) -> list[str]:
    return ["* unfinished seed, not in the means"] if any(row.unfinished for row in rows) else []


def _read(path: Path, kind: type[BaseModel]) -> Any:
    remedy = f"delete {path.parent} and repeat the run"
    try:
        return kind.model_validate(read_json(path, remedy))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(f"{path} is damaged or not ours: {place}{first['msg']}; {remedy}") from error


if __name__ == "__main__":
    sys.exit(main())
