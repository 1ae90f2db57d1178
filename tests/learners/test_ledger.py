"""What a run carries to its next task: counted to the byte."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from learners.ledger import TOTAL, count_units
from tests.toy import toy_experiment
from utils.checkpoint import load_tensors
from utils.images import ImageSet


def newest(experiment):
    folders = (experiment.folder / "checkpoints").glob("task_*")
    return max(folders, key=lambda path: int(path.name.rpartition("_")[2]))


def bytes_on_disk(experiment):
    """All that the next task reads, file by file."""
    checkpoint = newest(experiment)
    files = [path for path in checkpoint.glob("*.safetensors") if load_tensors(path)]
    files += [path for path in (checkpoint / "source").rglob("*") if path.is_file()]
    files += (experiment.folder.parents[1] / "syn_image_toy_seed7").glob("task_*/*/*-*.png")
    return sum(path.stat().st_size for path in files)


def ledgers(experiment):
    """Run it; what the ledger says after every task, and what lies on disk then."""
    found, save = [], experiment._save

    def look(task):
        save(task)
        memory = json.loads((experiment.folder / "results.json").read_text())["memory_bytes"]
        found.append((memory, bytes_on_disk(experiment)))

    experiment._save = look
    experiment.run()
    return found


@pytest.mark.parametrize(
    ("learner", "source"),
    [("finetune", None), ("icarl", None), ("der", None), ("generative_replay", "ddpm"), ("dddr", "small_ldm")],
)
def test_the_total_is_what_lies_on_disk_after_every_task(learner, source, tmp_path):
    found = ledgers(toy_experiment(learner, tmp_path, source))
    assert len(found) == 3
    for memory, on_disk in found:
        assert memory["total"] == on_disk == sum(memory[part] for part in TOTAL)


def test_old_branches_are_told_apart_from_the_rest_of_the_network(tmp_path):
    experiment = toy_experiment("memo", tmp_path)
    memory = experiment.run()["memory_bytes"]
    tensors = load_tensors(newest(experiment) / "network.safetensors")
    old = [tensor for name, tensor in tensors.items() if re.search(r"branches\.[01]\.", name)]
    assert memory["old_branches"] == sum(tensor.nbytes for tensor in old) > 0
    size = (newest(experiment) / "network.safetensors").stat().st_size
    assert memory["network"] + memory["old_branches"] == size


def test_a_source_is_split_by_what_its_files_hold(tmp_path):
    experiment = toy_experiment("finetune", tmp_path, "small_ldm")
    memory = experiment.run()["memory_bytes"]
    vectors = newest(experiment) / "source" / "class_embeddings.safetensors"
    assert memory["class_embeddings"] == vectors.stat().st_size
    assert memory["source"] == memory["class_embeddings"] + memory["generator"] and memory["edge_maps"] == 0


def test_units_count_exemplars_as_raw_images_nominally_and_by_their_bytes(tmp_path):
    experiment = toy_experiment("icarl", tmp_path, "ddpm")
    learner = experiment.check()
    learner.source.num_compressed, learner.source.nominal_share = 48, 1 / 24
    learner.memory.images = ImageSet.of(torch.zeros(18, 1, 8, 8, dtype=torch.uint8), torch.zeros(18).long())
    units = count_units(learner, {"exemplars": 18 * 64, "edge_maps": 48 * 8})
    assert units == {
        "unit_bytes": 64, "real": 18, "compressed": 48, "compressed_units": 2, "nominal": 20, "true": 24
    }  # fmt: skip


def test_a_unit_of_image_files_is_the_mean_of_their_pixels(tmp_path):
    paths = [str(tmp_path / f"{side}.png") for side in (10, 20)]
    for path, side in zip(paths, (10, 20)):
        Image.new("RGB", (side, side)).save(path)
    learner = toy_experiment("icarl", tmp_path).check()
    learner.memory.images = ImageSet.of(paths, torch.zeros(2).long())
    learner.data.dataset = replace(learner.data.dataset, in_memory=False, channels=3)
    assert count_units(learner, {"exemplars": 1500, "edge_maps": 0})["unit_bytes"] == 3 * (100 + 400) / 2
