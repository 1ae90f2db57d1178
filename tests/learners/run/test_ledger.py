"""What a run carries to its next task: counted to the byte, and kept within a budget."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from learners.run.configure import build_config
from learners.run.experiment import Experiment
from learners.run.ledger import LINES, _drop, count_units
from learners.run.plan import describe_run
from synth import SOURCES
from synth.bank import Bank
from synth.escort.copies import Copied
from tests.support.toy import Interrupted, interrupt, toy_experiment, toy_raw
from utils.data.images import ImageSet
from utils.run.carried import Carried, Items
from utils.run.errors import ConfigError
from utils.run.files import load_tensors


def newest(experiment):
    return experiment.checkpoints.path(experiment.checkpoints.numbers()[0])


def bytes_on_disk(experiment):
    """All that the next task reads, file by file."""
    checkpoint = newest(experiment)
    files = [path for path in checkpoint.glob("*.safetensors") if load_tensors(path)]
    files += [path for path in (checkpoint / "source").rglob("*") if path.is_file()]
    if not isinstance(experiment.learner.replay, Copied):  # which maps bring back
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
    experiment.learn_all()
    return found


def with_budget(folder, memory, spare, **keys):
    """iCaRL with generated images beside its exemplars, and so many bytes less than it would take."""
    return toy_experiment("icarl", folder, "ddpm", memory_budget_mb=(memory["total"] - spare) / 1e6, **keys)


class Compressor(SOURCES["ddpm"]):
    """Keeps two compressed exemplars of 100 bytes for every class that it has learned."""

    def counts(self):
        self.left = {label: 2 for label in self.fitted_classes} | getattr(self, "left", {})
        return {label: count for label, count in self.left.items() if count}

    def drop_last(self, label, count):
        self.left[label] -= count
        return 100 * count

    def carried(self):
        items = Items("compressed exemplars", True, 1 / 24, self.counts, self.drop_last)
        return [Carried("edge_maps", ("source/maps.bin",), items=items), *super().carried()]

    def save(self, directory):
        super().save(directory)
        (directory / "maps.bin").write_bytes(bytes(100 * sum(self.counts().values())))


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """The ledgers of a run without a budget, after every task."""
    return [memory for memory, _ in ledgers(toy_experiment("icarl", tmp_path_factory.mktemp("free"), "ddpm"))]


@pytest.mark.parametrize(
    ("learner", "source"),
    [
        *((name, None) for name in ("finetune", "icarl", "der")), ("generative_replay", "ddpm"), ("dddr", "small_ldm"),
        ("finetune", "small_controlnet"),
    ],
)  # fmt: skip
def test_the_total_is_what_lies_on_disk_after_every_task(learner, source, tmp_path):
    found = ledgers(toy_experiment(learner, tmp_path, source))
    assert len(found) == 3
    for memory, on_disk in found:
        assert memory["total"] == on_disk == sum(memory[part] for part in LINES)


def test_old_branches_are_told_apart_from_the_rest_of_the_network(tmp_path):
    experiment = toy_experiment("memo", tmp_path)
    memory = experiment.learn_all()["memory_bytes"]
    tensors = load_tensors(newest(experiment) / "network.safetensors")
    old = [tensor for name, tensor in tensors.items() if re.search(r"branches\.[01]\.", name)]
    assert memory["old_branches"] == sum(tensor.nbytes for tensor in old) > 0


def test_a_source_is_split_by_what_its_files_hold(tmp_path):
    experiment = toy_experiment("finetune", tmp_path, "small_ldm")
    memory = experiment.learn_all()["memory_bytes"]
    vectors = newest(experiment) / "source" / "class_embeddings.safetensors"
    assert memory["class_embeddings"] == vectors.stat().st_size
    assert memory["source"] == memory["class_embeddings"] + memory["generator"] and memory["edge_maps"] == 0


def test_units_count_exemplars_as_raw_images_nominally_and_by_their_bytes(tmp_path):
    experiment = toy_experiment("icarl", tmp_path, "ddpm")
    learner = experiment.check()
    maps = Items("compressed exemplars", True, 1 / 24, lambda: {0: 40, 1: 8}, lambda label, count: 0)
    learner.replay.source.carried = lambda: [Carried("edge_maps", items=maps)]
    learner.memory.images = ImageSet.of(torch.zeros(18, 1, 8, 8, dtype=torch.uint8), torch.zeros(18).long())
    units = count_units(learner, {"exemplars": 18 * 64, "edge_maps": 48 * 8})
    assert units == {
        "unit_bytes": 64, "real": 18, "compressed": 48, "compressed_units": 2, "nominal": 20, "true": 24
    }  # fmt: skip


@pytest.mark.parametrize(("sizes", "excess"), [([8] * 90, 401), ([8] * 30 + [3] * 60, 200), ([1] * 90, 200)])
def test_many_items_are_dropped_at_once_as_if_one_by_one(sizes, excess):
    left, calls = {0: sizes[:50], 1: sizes[50:]}, []

    def drop_last(label, count):
        calls.append(count)
        return sum(left[label].pop() for _ in range(count))

    one_by_one, gone, freed = {0: sizes[:50], 1: sizes[50:]}, 0, 0
    while freed < excess and any(one_by_one.values()):
        freed += one_by_one[max(one_by_one, key=lambda label: (len(one_by_one[label]), label))].pop()
        gone += 1
    items = Items("toys", True, None, lambda: {label: len(each) for label, each in left.items()}, drop_last)
    assert _drop(items, excess) == gone and left == one_by_one and len(calls) < gone / 2


def test_a_unit_of_image_files_is_the_mean_of_their_pixels(tmp_path):
    paths = [str(tmp_path / f"{side}.png") for side in (10, 20)]
    for path, side in zip(paths, (10, 20)):
        Image.new("RGB", (side, side)).save(path)
    learner = toy_experiment("icarl", tmp_path).check()
    learner.data._train, learner.data.class_counts = ImageSet.of(paths, torch.zeros(2).long()), [2]
    learner.data.dataset = replace(learner.data.dataset, in_memory=False, channels=3)
    assert count_units(learner, {"exemplars": 1500, "edge_maps": 0})["unit_bytes"] == 3 * (100 + 400) / 2


@pytest.mark.parametrize(
    ("first", "loses", "keeps"), [("generated", "bank", "exemplars"), ("real", "exemplars", "bank")]
)
def test_after_every_task_the_budget_holds_on_disk_and_one_kind_goes_first(first, loses, keeps, free, tmp_path, caplog):
    caplog.set_level("INFO", "reprise")
    experiment = with_budget(tmp_path, free[1], 150, memory_drop=first)
    found = ledgers(experiment)
    assert all(memory["total"] == on_disk <= free[1]["total"] - 150 for memory, on_disk in found)
    assert found[1][0][loses] < free[1][loses] and found[1][0][keeps] == free[1][keeps]
    assert caplog.text.count("Memory budget: dropped") == 2  # the first task needs less
    assert caplog.text.count("Memory: ") == 3


def test_the_class_with_most_loses_its_last_image_and_of_equals_the_later_class(free, tmp_path):
    experiment = with_budget(tmp_path, free[2], 1, memory_drop="real")
    experiment.learn_all()
    assert experiment.learner.memory.counts() == {0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 1}
    stored = load_tensors(newest(experiment) / "exemplars.safetensors")
    assert stored["labels_0"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5] and len(stored["images_0"]) == 11


@pytest.mark.parametrize(
    ("spare", "maps", "loses_images"),
    [(150, {0: 2, 1: 2, 2: 1, 3: 1}, False), (900, {}, True)],  # of four classes that a source learns before the last
)
def test_compressed_exemplars_go_before_replay_images(spare, maps, loses_images, free, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES._entries, "ddpm", Compressor)
    experiment = with_budget(tmp_path, {"total": free[2]["total"] + 800}, spare)
    memory = experiment.learn_all()["memory_bytes"]
    assert memory["edge_maps"] == 100 * sum(maps.values())
    assert experiment.learner.replay.source.counts() == maps
    assert (memory["bank"] < free[2]["bank"]) == loses_images and memory["exemplars"] == free[2]["exemplars"]


@pytest.mark.parametrize("moment", [(Experiment, "_save"), (Bank, "prune")])
def test_a_run_killed_around_its_dropping_ends_with_the_same_bits(moment, free, tmp_path, monkeypatch):
    expected = with_budget(tmp_path / "whole", free[1], 150)
    expected.learn_all()
    killed = with_budget(tmp_path / "killed", free[1], 150)
    learn = killed._learn
    with pytest.raises(Interrupted), monkeypatch.context() as patch:
        killed._learn = lambda task: (learn(task), task.index == 1 and patch.setattr(*moment, interrupt))
        killed.learn_all()
    resumed = with_budget(tmp_path / "killed", free[1], 150)
    memory = resumed.learn_all()["memory_bytes"]
    assert memory["total"] == bytes_on_disk(resumed)
    states = [experiment.learner.network.state_dict() for experiment in (resumed, expected)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_budget_smaller_than_the_classifier_is_refused_before_anything_is_learned(tmp_path):
    experiment = toy_experiment("finetune", tmp_path, memory_budget_mb=0.5)
    with pytest.raises(ConfigError, match=r"memory_budget_mb=0.5 allows 500000 bytes, but .* network (\d+) = \1 bytes"):
        experiment.check()


def test_a_budget_that_a_source_bursts_is_refused_with_the_sum_at_the_first_tasks_end(free, tmp_path):
    experiment = toy_experiment("icarl", tmp_path, "ddpm", memory_budget_mb=(free[0]["network"] + 100) / 1e6)
    experiment.check()
    sum_of_all = r"after task 0 there remain generator \d+ \+ network \d+ \+ prototypes \d+ = "
    with pytest.raises(ConfigError, match=sum_of_all):
        experiment.learn_all()
    assert not (experiment.folder / "checkpoints" / "task_0").exists()


def test_the_plan_shows_the_budget(tmp_path):
    config, _ = build_config({**toy_raw("finetune", tmp_path, memory_budget_mb=2.5), "dataset": "digits"})
    assert "Memory budget: 2.5 MB at the end of every task" in "\n".join(describe_run(config, "toy"))
