"""What a run carries to its next task, byte by byte as it lies on disk, and the budget that it has to fit into."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from learners.base import Learner
from learners.expandable.network import Branches
from synth.stored import save_source
from utils.run.errors import ConfigError
from utils.training.checkpoint import Checkpoints

log = logging.getLogger("reprise")
TOTAL = ("exemplars", "bank", "source", "network", "old_branches", "prototypes")  # what the budget is for
SOURCE_PARTS = ("edge_maps", "class_embeddings", "generator")


# ------------------------------------------------------------------ counting


def saves_source(learner: Learner) -> bool:
    """Whether checkpoints hold the learner's source; one whose replay images were given is never fitted."""
    return learner.source is not None and learner.config.synth.need_syn_imgs


def count_bytes(learner: Learner, folder: Path) -> dict[str, int]:
    """The bytes of a checkpoint, `task_<t>`, and of the images beside it, by what they are for.

    Args:
        learner: in the state that the checkpoint holds.
        folder: of the checkpoint; files of it that hold no tensors count nothing.

    Returns:
        "exemplars", "bank", "source" (the sum of "edge_maps", "class_embeddings" and "generator"), "network",
        "old_branches" (of a network with a branch per task, all but the newest), "prototypes" (class means and what
        else the learner keeps), and "total", their sum. Beside it: "frozen", weights that are used as they came, and
        "all_real_data".
    """
    data, source = learner.data, learner.source
    backbone = learner.network.backbone
    old = backbone.branches[:-1] if isinstance(backbone, Branches) else []
    old_branches = sum(_tensor_bytes(branch.state_dict().values()) for branch in old)
    files = sum(part.nbytes for part in learner.memory.images.parts if not isinstance(part.images, Tensor))
    parts = _source_parts(learner, folder / "source")
    memory = {
        # An upper bound goes back to all of them.
        "exemplars": data.all_real_bytes if learner.upper_bound else _file_bytes(folder, "exemplars") + files,
        "bank": 0 if learner.bank is None else learner.bank.memory_bytes(),
        "source": sum(parts.values()),
        **parts,
        "network": _file_bytes(folder, "network") - old_branches,
        "old_branches": old_branches,
        "prototypes": _file_bytes(folder, "class_means") + _file_bytes(folder, "extra"),
    }
    return {
        **memory,
        "total": sum(memory[part] for part in TOTAL),
        "frozen": learner.frozen_bytes() + (0 if source is None else source.frozen_bytes()),
        "all_real_data": data.all_real_bytes,
    }


def _source_parts(learner: Learner, folder: Path) -> dict[str, int]:
    parts = dict.fromkeys(SOURCE_PARTS, 0)
    for path in folder.rglob("*"):
        if path.is_file():
            parts[learner.source.ledger_parts.get(path.name, "generator")] += path.stat().st_size
    return parts


def _file_bytes(folder: Path, stem: str) -> int:
    """Size of a file of tensors; 0 if it holds none."""
    from safetensors import safe_open

    path = folder / f"{stem}.safetensors"
    with safe_open(path, framework="pt") as file:
        return path.stat().st_size if file.keys() else 0


def _tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_units(learner: Learner, memory: dict[str, int]) -> dict[str, float]:
    """Exemplars in raw images, as papers count them, beside what their bytes come to.

    Args:
        learner: whose exemplars they are.
        memory: of `count_bytes`.

    Returns:
        "unit_bytes", a raw image of the data set's own size (their mean); "real" and
        "compressed" exemplars; "compressed_units", what the latter count by their method; "nominal", the units of
        both; "true", the units that their files would fill.
    """
    source, unit = learner.source, unit_bytes(learner)
    real = sum(learner.data.class_counts) if learner.upper_bound else len(learner.memory.images)
    compressed = 0 if source is None else source.num_compressed
    compressed_units = compressed * (0.0 if source is None else source.nominal_share)
    return {
        "unit_bytes": unit,
        "real": real,
        "compressed": compressed,
        "compressed_units": compressed_units,
        "nominal": real + compressed_units,
        "true": (memory["exemplars"] + memory["edge_maps"]) / unit,
    }


def unit_bytes(learner: Learner) -> float:
    """Bytes of a raw image of the data set, on average."""
    data = learner.data
    pixels = sum(count * height * width for (height, width), count in data.image_sizes.items())
    return data.dataset.channels * pixels / sum(data.class_counts)


def describe(memory: dict[str, int], units: dict[str, float]) -> str:
    """One line for the log."""
    parts = ", ".join(f"{name.replace('_', ' ')} {memory[name]}" for name in TOTAL if memory[name])
    return (
        f"Memory: {memory['total']} bytes ({parts}); {units['real']} real and {units['compressed']} compressed "
        f"exemplars, {units['nominal']:.2f} units nominally, {units['true']:.2f} in bytes"
    )


# ------------------------------------------------------------------ the budget


class Kind(NamedTuple):
    """Something of which single items can be given up."""

    name: str
    counts: Callable[[], dict[int, int]]  # how many are left of every class
    drop_last: Callable[[int], int]  # class -> bytes freed, 0 if that class has none


def budget_bytes(learner: Learner) -> int:
    """The budget, which must be set."""
    return round(learner.config.memory_budget_mb * 1e6)


def least_bytes(learner: Learner) -> dict[str, int]:
    """What is known before training of what cannot be dropped after the first task, in bytes."""
    network = learner.network.frozen_copy()
    network.grow(learner.data.task(0).num_seen)
    real = {"exemplars": learner.data.all_real_bytes} if learner.upper_bound else {}
    return {"network": _tensor_bytes(network.state_dict().values()), **real}


def describe_budget(learner: Learner) -> str:
    """One line for `--plan`: the budget and what is known to take of it."""
    parts = ", ".join(f"{name} {count / 1e6:.2f} MB" for name, count in least_bytes(learner).items())
    return (
        f"Memory budget: {learner.config.memory_budget_mb} MB at the end of every task, of which the first leaves at "
        f"least {parts}; {learner.config.memory_drop} images are dropped first"
    )


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
    that the task kept. To be called before the checkpoint is written, and followed by `Bank.prune` after it.

    Args:
        learner: has learned a task.
        index: of that task, for messages.

    Raises:
        ConfigError: if what cannot be dropped is larger than the budget.
    """
    if learner.config.memory_budget_mb is None:
        return
    before = memory = _foresee(learner)
    budget, dropped = budget_bytes(learner), {}
    for kind in _kinds(learner):
        # What an item frees is not exact where it shares a file with others, so each round is weighed anew.
        while memory["total"] > budget and (count := _drop(kind, memory["total"] - budget)):
            dropped[kind.name] = dropped.get(kind.name, 0) + count
            memory = _foresee(learner)
    if dropped:
        words = ", ".join(f"{count} {name}" for name, count in dropped.items())
        log.info("Memory budget: dropped %s; %d bytes before, %d after", words, before["total"], memory["total"])
    _require(learner, {name: memory[name] for name in TOTAL}, f"after task {index} there remain")


def _foresee(learner: Learner) -> dict[str, int]:
    """`count_bytes` of a checkpoint that is not written yet, by writing it elsewhere."""
    fill = partial(save_source, learner.source) if saves_source(learner) else None
    with tempfile.TemporaryDirectory() as folder:
        trial = Checkpoints(folder, "trial")
        trial.save(0, learner.state()[0], {}, fill)
        return count_bytes(learner, trial.path(0))


def _kinds(learner: Learner) -> list[Kind]:
    """What can be dropped, in the order in which it goes."""
    source, bank, memory = learner.source, learner.bank, learner.memory
    kinds = []
    if saves_source(learner):
        kinds.append(Kind("compressed exemplars", source.compressed_counts, source.drop_compressed))
    if bank is not None:
        kinds.append(Kind("replay images", bank.counts, bank.drop_last))
    kinds.append(Kind("real exemplars", memory.counts, memory.drop_last))
    return kinds if learner.config.memory_drop == "generated" else kinds[::-1]


def _drop(kind: Kind, excess: int) -> int:
    """Drop items until so many bytes are freed or none is left; returns their number."""
    left, freed, dropped = kind.counts(), 0, 0
    while freed < excess and left:
        label = max(left, key=lambda label: (left[label], label))
        freed += kind.drop_last(label)
        dropped += 1
        left[label] -= 1
        if not left[label]:
            del left[label]
    return dropped if freed else 0


def _require(learner: Learner, memory: dict[str, int], when: str) -> None:
    total, budget = sum(memory.values()), budget_bytes(learner)
    if total > budget:
        parts = " + ".join(f"{name} {count}" for name, count in memory.items() if count)
        raise ConfigError(
            f"memory_budget_mb={learner.config.memory_budget_mb} allows {budget} bytes, but {when} {parts} = {total} "
            f"bytes that cannot be dropped: set it to at least {-(-total // 1000) / 1000}, or take a smaller network "
            "or source"
        )
