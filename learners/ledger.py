"""What a run carries to its next task, byte by byte as it lies on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor

from learners.base import Learner
from models.expandable import Branches

TOTAL = ("exemplars", "bank", "source", "network", "old_branches", "prototypes")  # what the total adds up
SOURCE_PARTS = ("edge_maps", "class_embeddings", "generator")


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
        "unit_bytes", a raw image of the data set's own size (of files: the mean over the exemplars); "real" and
        "compressed" exemplars; "compressed_units", what the latter count by their method; "nominal", the units of
        both; "true", the units that their files would fill.
    """
    source, unit = learner.source, _unit_bytes(learner)
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


def _unit_bytes(learner: Learner) -> float:
    data, kept = learner.data, learner.memory.images
    if data.dataset.in_memory:
        return data.all_real_bytes / sum(data.class_counts)
    paths = [path for part in kept.parts if not isinstance(part.images, Tensor) for path in part.images]
    pixels = [_pixels(path) for path in paths] or [data.dataset.image_size**2]
    return data.dataset.channels * sum(pixels) / len(pixels)


def _pixels(path: str) -> int:
    with Image.open(path) as image:  # reads the header alone
        return image.width * image.height


def describe(memory: dict[str, int], units: dict[str, float]) -> str:
    """One line for the log."""
    parts = ", ".join(f"{name.replace('_', ' ')} {memory[name]}" for name in TOTAL if memory[name])
    return (
        f"Memory: {memory['total']} bytes ({parts}); {units['real']} real and {units['compressed']} compressed "
        f"exemplars, {units['nominal']:.2f} units nominally, {units['true']:.2f} in bytes"
    )
