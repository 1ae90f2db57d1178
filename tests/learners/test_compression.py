"""ESCORT in the life of a task: what is compressed, what is shown, what it costs."""

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from learners.run.plan import describe_replay
from synth import drawing
from tests.support.learned import learned_toy
from tests.support.toy import tiny_source, toy_experiment
from utils.data.images import ImageSet
from utils.run.errors import BankError, ConfigError
from utils.run.files import file_hash, load_tensors

SWAPPED = {"real_per_class": 1, "syn_per_class": 2, "augmentation_prob": 0.5, "augmentations_per_image": 3}


def escort(folder, learner="icarl", memory_per_class=4, fixed_memory=True, **keys):
    memory = {"fixed_memory": fixed_memory, "memory_per_class": memory_per_class}
    return toy_experiment(learner, folder, **memory, synth={**tiny_source("small_controlnet"), **keys})


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that keeps two images and three maps of each class."""
    experiment = escort(tmp_path_factory.mktemp("learned"), real_per_class=2, syn_per_class=3)
    experiment.learn_all()
    return experiment


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that shows new images as copies too, and its results."""
    experiment = escort(tmp_path_factory.mktemp("whole"), **SWAPPED)
    return experiment, experiment.learn_all()


def listed(experiment):
    """The copies that the manifest of the first task lists."""
    return json.loads((experiment.learner.replay.folder / "task_0" / "manifest.json").read_text())["files"]


def copies_of(experiment):
    """The copies on disk by name, with their hashes."""
    root = experiment.learner.replay.folder
    return {path.relative_to(root): file_hash(path) for path in root.glob("task_*/*/*.png")}


# A map of 16x16 bits costs 32 bytes, a grey toy image of 8x8 pixels 64: two maps are one image.
@pytest.mark.parametrize(("real", "compressed", "kept"), [(4, 0, 4), (3, 2, 3), (2, 4, 2), (0, 8, 0), (None, 3, 2)])
def test_the_budget_is_images_and_what_maps_cost_of_them(tmp_path, real, compressed, kept):
    learner = escort(tmp_path, real_per_class=real, syn_per_class=compressed).check()
    assert (learner.memory.per_class, learner.memory.handed) == (kept, compressed)


@pytest.mark.parametrize(("keys", "words"), [
    ({"real_per_class": 5, "syn_per_class": 0}, "real_per_class=5 is more than all"),
    ({"real_per_class": 5, "syn_per_class": 8}, "real_per_class=5 is more than all"),
    ({"real_per_class": 3, "syn_per_class": 3}, r"3 \+ 3 / 2 = 4\.500 .*memory_per_class=4: .*=2 fit"),
    ({"memory_per_class": 10, "real_per_class": 6, "syn_per_class": 5}, "has only 10 training images"),
    ({"fixed_memory": False}, "fixed_memory=true"),  # a total that classes share
    ({"learner": "finetune", "real_per_class": 2, "syn_per_class": 3}, "real_per_class=2"),  # it keeps none
])  # fmt: skip
def test_what_does_not_fit_the_memory_is_refused_before_training(tmp_path, keys, words):
    with pytest.raises(ConfigError, match=words):
        escort(tmp_path, **keys).check()


def test_a_reservoir_keeps_what_the_maps_leave_and_compresses_other_images(tmp_path):
    learner = learned_toy("replay", tmp_path, "small_controlnet", memory_per_class=4, selection="reservoir").learner
    real, maps = learner.memory.images.select([5]), learner.replay.source.maps[5]
    kept = {learner.replay.source.compress(real.image(position)).item for position in range(len(real))}
    assert len(maps) == 3 and len(learner.choices[5]) == 5
    assert not kept & {one.item for one in maps}
    assert learner.memory.images.counts(6).tolist() == [2] * 6  # 2 + 3 / 2 <= 4


def test_first_picks_stay_images_and_the_next_ones_become_maps(learned):
    learner, task = learned.learner, learned.data.task(2)
    assert learner.memory.images.counts(6).tolist() == [2] * 6
    assert {label: len(maps) for label, maps in learner.replay.source.maps.items()} == dict.fromkeys(range(6), 3)
    picks = learner.choices[5]  # of the last task
    own, kept = learned.data.train_images(task).select([5]), learner.memory.images.select([5])
    assert all(torch.equal(kept.image(i), own.image(pick)) for i, pick in enumerate(picks[:2]))
    assert [learner.replay.source.compress(own.image(pick)) for pick in picks[2:]] == learner.replay.source.maps[5]


def test_with_the_method_off_the_run_is_the_plain_learners(tmp_path):
    plain = toy_experiment("icarl", tmp_path / "plain", fixed_memory=True, memory_per_class=4)
    off = escort(tmp_path / "off", real_per_class=4, syn_per_class=0)
    plain.learn_all(), off.learn_all()
    paths = [experiment.folder / "checkpoints" / "task_2" / "network.safetensors" for experiment in (plain, off)]
    assert_close(*map(load_tensors, paths), rtol=0, atol=0)


def test_what_is_shown_alone_is_drawn_or_everything_beforehand_and_trains_the_same_network(whole, tmp_path):
    prepared, (needed, results) = escort(tmp_path, prepare="all", **SWAPPED), whole
    assert prepared.learn_all()["accuracy_matrix"] == results["accuracy_matrix"]
    # Ten images of each of two classes, exemplars among them; the epochs show fewer copies.
    assert len(listed(needed)) < len(listed(prepared)) == 2 * 10 * 3
    assert {int(name.partition("_seed")[2][:2]) for name in listed(prepared)} == {0, 1, 2}
    assert all((needed.learner.replay.folder / "task_0" / name).exists() for name in listed(needed))


@pytest.mark.parametrize("moment", [20, 50, 80])
def test_a_run_killed_while_it_draws_copies_ends_with_the_same_bits(moment, whole, tmp_path, monkeypatch):
    save, numbers = drawing.save_image, itertools.count(1)

    def interrupt(*arguments):
        if next(numbers) == moment:
            raise KeyboardInterrupt
        return save(*arguments)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(drawing, "save_image", interrupt)
        escort(tmp_path, **SWAPPED).learn_all()
    resumed, (unbroken, expected) = escort(tmp_path, **SWAPPED), whole
    assert resumed.learn_all()["accuracy_matrix"] == expected["accuracy_matrix"]
    for name in ("network", "exemplars", "source/edge_maps", "source/model"):
        path = f"checkpoints/task_2/{name}.safetensors"
        assert_close(load_tensors(unbroken.folder / path), load_tensors(resumed.folder / path), rtol=0, atol=0)
    assert copies_of(unbroken) == copies_of(resumed)


def test_a_damaged_copy_is_drawn_again(learned):
    replay = learned.learner.replay
    name = max(copies_of(learned), key=lambda name: name.stem[-2:])  # not a first copy, for which everybody asks
    (replay.folder / name).write_bytes(b"damaged")
    replay.bank.folders.clear()
    replay.past(learned.data.task(2))
    label, item, copy = re.fullmatch(r"(\d+)-([0-9a-f]{12})_seed(\d\d)", name.stem).groups()
    one = replay.source.ask(*map(torch.tensor, ([int(label)], [int(item, 16)], [int(copy)])))
    assert replay.copies(one).image(0).shape == (1, 8, 8)


def test_copies_of_another_generator_are_refused(learned):
    replay = learned.learner.replay
    path = replay.folder / "task_0" / "manifest.json"
    ours = path.read_text()
    path.write_text(ours.replace(replay.source.fingerprint(), "0" * 64))
    replay.bank.folders.clear()
    with pytest.raises(BankError, match="weights is"):
        replay.past(learned.data.task(1))
    path.write_text(ours)


def test_finetune_with_compressed_exemplars_is_generative_replay(tmp_path):
    experiment = escort(tmp_path, "finetune", syn_per_class=3)
    assert experiment.learn_all()["memory_units"]["compressed"] == 18
    assert len(experiment.learner.memory.images) == 0


def test_class_order_seeds_do_not_share_a_folder(tmp_path):
    """Trap 1 of the card."""
    first, second = (toy_experiment("icarl", tmp_path, "small_controlnet", seed=seed, model_seed=1) for seed in (7, 8))
    assert first.folder != second.folder


def test_an_image_without_edges_is_said_once_and_drawn(tmp_path, warnings):
    source = escort(tmp_path, syn_per_class=2).check().replay.source
    flat = torch.full((1, 8, 8), 90, dtype=torch.uint8)
    assert not any(source.compress(flat).bits) and not warnings.text  # as in the generator's training
    items = source.read(ImageSet.of(flat[None] // 2, torch.tensor([0])))
    source._model = source.new_model()
    assert source.generate(source.ask(torch.tensor([0]), items, torch.tensor([0]))).image(0).shape == (1, 8, 8)
    assert warnings.text.count("no edges at all") == 1


def test_the_plan_counts_copies_at_the_size_of_the_images(tmp_path):
    learner = escort(tmp_path, syn_per_class=2).check()
    learner.data.dataset = replace(learner.data.dataset, image_size=224)
    assert "0.0 MB as pixels" in describe_replay(learner, "toy")[0]


def test_report_shows_originals_maps_and_copies(learned):
    panel = json.loads((learned.folder / "panels" / "compressed_1" / "panel.json").read_text())
    assert panel["columns"] == ["original", "edge map", "copy 0", "copy 1", "copy 2"]
    assert [row["name"] for row in panel["rows"]] == list(learned.data.class_names[2:4])
    assert all(cell is not None for row in panel["rows"] for cell in row["cells"])
