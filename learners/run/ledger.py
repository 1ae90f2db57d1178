"""What a run carries to its next task, byte by byte as it lies on disk, and the budget that it has to fit into."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from learners.base import Learner
from learners.run.state import learner_state
from synth.stored import save_source
from utils.data.manager import DataManager
from utils.run.carried import Carried, Items
from utils.run.errors import ConfigError
from utils.run.log import log
from utils.training.checkpoint import Checkpoints

# Lines of every results.json, whether there is something of them or not.
LINES = ("exemplars", "bank", "edge_maps", "class_embeddings", "generator", "network", "old_branches", "prototypes")
APART = ("source", "total", "frozen", "all_real_data")  # sums, and what is no memory


def carried(learner: Learner) -> list[Carried]:
    """Name what learner, replay and source carry on; a source whose samples were given carries nothing."""
    source = learner.replay.source if learner.replay.learns else None
    return [*learner.carried(), *learner.replay.carried(), *(() if source is None else source.carried())]


def fill_of(learner: Learner) -> Callable[[Path], None] | None:
    """Return what adds the learner's source to a checkpoint; None where there is none to keep."""
    return partial(save_source, learner.replay.source) if learner.replay.learns else None


# ---------------------------------------------------------------------- counting


def count_bytes(learner: Learner, folder: Path) -> dict[str, int]:
    """Count the bytes of a checkpoint, `task_<t>`, and of what lies beside it, by what they are for.

    Args:
        learner: in the state that the checkpoint holds.
        folder: of the checkpoint; files of it that hold no tensors count nothing.

    Returns:
        A number for every line that `carried` names; "source", the sum of its files; "total", the sum of all. Beside
        it "frozen", weights that are used as they came, and "all_real_data".
    """
    memory, counted, of_source = dict.fromkeys(LINES, 0), set(), 0
    apart = {"frozen": 0, "all_real_data": learner.data.all_real_bytes}
    for line in carried(learner):
        files = {path for pattern in line.files for path in folder.glob(pattern)} - counted
        counted |= files
        size = line.nbytes + sum(map(_file_bytes, files))
        target = apart if line.frozen else memory
        target[line.name] = target.get(line.name, 0) + size
        of_source += size if any(pattern.startswith("source/") for pattern in line.files) else 0
    return {**memory, "source": of_source, "total": sum(memory.values()), **apart}


def _file_bytes(path: Path) -> int:
    """Return the size of a file; 0 of one of tensors that holds none."""
    if path.suffix != ".safetensors":
        return path.stat().st_size
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return path.stat().st_size if file.keys() else 0


def count_units(learner: Learner, memory: dict[str, int]) -> dict[str, float]:
    """Count exemplars in raw images, as papers do, beside what their bytes come to.

    Args:
        learner: whose exemplars they are.
        memory: of `count_bytes`.

    Returns:
        "unit_bytes", a raw image of the data set's own size (their mean); "real" and
        "compressed" exemplars; "compressed_units", what the latter count by their method; "nominal", the units of
        both; "true", the units that their files would fill.
    """
    kinds = [(line.items.units, sum(line.items.counts().values())) for line in carried(learner) if line.items]
    real = sum(count for units, count in kinds if units == 1)
    compressed = [(units, count) for units, count in kinds if units not in (None, 1)]
    compressed_units, unit = float(sum(units * count for units, count in compressed)), unit_bytes(learner.data)
    return {"unit_bytes": unit, "real": real, "compressed": sum(count for _, count in compressed),
            "compressed_units": compressed_units, "nominal": real + compressed_units,
            "true": (memory["exemplars"] + memory["edge_maps"]) / unit}  # fmt: skip


def unit_bytes(data: DataManager) -> float:
    """Return the bytes of a raw image of the data set, on average."""
    pixels = sum(count * height * width for (height, width), count in data.image_sizes.items())
    return data.dataset.channels * pixels / sum(data.class_counts)


def describe(memory: dict[str, int], units: dict[str, float]) -> str:
    """Write one line for the log."""
    parts = ", ".join(
        f"{name.replace('_', ' ')} {count}" for name, count in memory.items() if count and name not in APART
    )
    exemplars = f"{units['real']} real and {units['compressed']} compressed exemplars"
    counted = f"{units['nominal']:.2f} units nominally, {units['true']:.2f} in bytes"
    return f"Memory: {memory['total']} bytes ({parts}); {exemplars}, {counted}"


# ---------------------------------------------------------------------- the budget


def least_bytes(learner: Learner) -> dict[str, int]:
    """Return bytes that training cannot free: the network, and for upper bounds all images."""
    network = learner.network.frozen_copy()
    network.grow(learner.data.task(0).num_seen)
    real = {"exemplars": learner.data.all_real_bytes} if learner.upper_bound else {}
    return {"network": sum(value.nbytes for value in network.state_dict().values()), **real}


def describe_budget(learner: Learner) -> str:
    """Write one line for `--plan`: the budget and what is known to take of it."""
    parts = ", ".join(f"{name} {count / 1e6:.2f} MB" for name, count in least_bytes(learner).items())
    budget = f"Memory budget: {learner.config.memory_budget_mb} MB at the end of every task, of which the first"
    return f"{budget} leaves at least {parts}; {learner.config.memory_drop} images are dropped first"


def check_budget(learner: Learner) -> None:
    """See, before anything is learned, that the budget has room for what cannot be dropped.

    Raises:
        ConfigError: if not; it shows the sum.
    """
    if learner.config.memory_budget_mb is not None:
        _require(learner, least_bytes(learner), "the first task leaves at least")


def keep_to_budget(learner: Learner, index: int) -> None:
    """Drop images until what is carried to the next task fits ``memory_budget_mb``; nothing without a budget.

    Of the kind that goes first, the class with most of it left (the later class of equals) loses the one that is last
    in its order, until everything fits; then the next kind. Prototypes stay as they were computed, from all exemplars
    that the task kept. To be called before the checkpoint is written, and followed by `Replay.prune` after it.

    Args:
        learner: has learned a task.
        index: of that task, for messages.

    Raises:
        ConfigError: if what cannot be dropped is larger than the budget.
    """
    if learner.config.memory_budget_mb is None:
        return
    before = memory = _foresee(learner)
    budget, dropped = round(learner.config.memory_budget_mb * 1e6), {}
    kinds = [line.items for line in carried(learner) if line.items]  # real ones first
    for items in kinds if learner.config.memory_drop == "real" else kinds[::-1]:
        # What an item frees is not exact where it shares a file with others, so each round is weighed anew.
        while memory["total"] > budget and (count := _drop(items, memory["total"] - budget)):
            dropped[items.name] = dropped.get(items.name, 0) + count
            memory = _foresee(learner)
    if dropped:
        words = ", ".join(f"{count} {name}" for name, count in dropped.items())
        log.info("Memory budget: dropped %s; %d bytes before, %d after", words, before["total"], memory["total"])
    kept = {name: count for name, count in memory.items() if name not in APART}
    _require(learner, kept, f"after task {index} there remain")


def _foresee(learner: Learner) -> dict[str, int]:
    """Count the bytes of a checkpoint that is not written yet, by writing it elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Checkpoints(folder, "trial")
        trial.save(0, learner_state(learner)[0], {}, fill_of(learner))
        return count_bytes(learner, trial.path(0))


def _drop(items: Items, excess: int) -> int:
    """Drop items until so many bytes are freed or none is left; return their number."""
    left, freed, dropped = items.counts(), 0, 0
    while freed < excess and any(left.values()):
        # Half of those that still seem too many go at once, for one by one would take long, and their sizes differ.
        count, going = (excess - freed) * dropped // (2 * freed) if freed else 1, Counter()
        for _ in range(min(max(count, 1), sum(left.values()))):
            label = max(left, key=lambda label: (left[label], label))
            left[label] -= 1
            going[label] += 1
        freed += sum(items.drop_last(label, number) for label, number in going.items())
        dropped += sum(going.values())
    return dropped if freed else 0


def _require(learner: Learner, memory: dict[str, int], when: str) -> None:
    given, total = learner.config.memory_budget_mb, sum(memory.values())
    if total > (budget := round(given * 1e6)):
        parts = " + ".join(f"{name} {count}" for name, count in memory.items() if count)
        raise ConfigError(
            f"memory_budget_mb={given} allows {budget} bytes, but {when} {parts} = {total} bytes that cannot be "
            f"dropped: set it to at least {-(-total // 1000) / 1000}, or take a smaller network or source"
        )
