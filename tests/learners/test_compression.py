"""ESCORT in the life of a task: what is compressed, what is shown, what it costs."""

import itertools
import json
import logging
import re
from dataclasses import replace

import pytest
import torch

from learners.run.configure import build_config
from learners.run.experiment import Experiment
from learners.run.plan import describe_replay
from synth import drawing
from tests.support.toy import tiny_source, toy_dataset, toy_experiment, toy_raw
from utils.data.images import ImageSet
from utils.run.errors import BankError, ConfigError
from utils.run.files import file_hash, load_tensors
from utils.training.runtime import Runtime


def escort(folder, learner="icarl", memory_per_class=4, **keys):
    synth = {**tiny_source("small_controlnet"), **keys}
    return toy_experiment(learner, folder, fixed_memory=True, memory_per_class=memory_per_class, synth=synth)


def error_of(folder, learner="icarl", **keys):
    with pytest.raises(ConfigError) as error:
        escort(folder, learner, **keys).check()
    return str(error.value)


# A map of 16x16 bits costs 32 bytes, a grey toy image of 8x8 pixels 64: two maps are one image.
@pytest.mark.parametrize(("real", "compressed"), [(4, 0), (3, 2), (2, 4), (0, 8)])
def test_the_budget_is_images_and_what_maps_cost_of_them(tmp_path, real, compressed):
    learner = escort(tmp_path, real_per_class=real, syn_per_class=compressed).check()
    assert (learner.memory.per_class, learner.memory.handed) == (real, compressed)


def test_with_probability_one_no_real_image_is_shown(tmp_path):
    learner = escort(tmp_path, syn_per_class=2, augmentation_prob=1.0, augmentations_per_image=1).check()
    task = learner.data.task(0)
    learner.data.advance(task)
    learner.replay.source.fit_before(task, learner.data.train_images(task))
    learner.present = learner.data.train_images(task)
    batches = learner.batches(task)
    assert (batches.rows(0) >= len(batches.labels)).all()


def test_more_real_exemplars_than_the_budget_are_refused_without_maps_too(tmp_path):
    assert "real_per_class=5 is more than all" in error_of(tmp_path, real_per_class=5, syn_per_class=0)
    assert "real_per_class=5 is more than all" in error_of(tmp_path / "maps", real_per_class=5, syn_per_class=8)


def test_a_reservoir_compresses_other_images_than_it_keeps(tmp_path):
    experiment = toy_experiment("replay", tmp_path, "small_controlnet", memory_per_class=4, selection="reservoir")
    experiment.learn_all()
    learner, task = experiment.learner, experiment.data.task(2)
    own = experiment.data.train_images(task).select([5])
    real, maps = learner.memory.images.select([5]), learner.replay.source.maps[5]
    kept = {learner.replay.source.compress(real.image(position)).item for position in range(len(real))}
    assert len(maps) == 3 and len(learner.choose(task, 5, own)) == 5
    assert not kept & {one.item for one in maps}


def test_a_reservoir_keeps_no_more_real_exemplars_than_the_maps_leave(tmp_path):
    experiment = toy_experiment("replay", tmp_path, "small_controlnet", memory_per_class=4, selection="reservoir")
    experiment.learn_all()
    assert experiment.learner.memory.images.counts(6).tolist() == [2] * 6  # 2 + 3 / 2 <= 4


def test_real_exemplars_take_what_the_maps_leave(tmp_path):
    assert escort(tmp_path, syn_per_class=3).check().memory.per_class == 2  # 2 + 3 / 2 <= 4


def test_more_than_the_budget_is_refused_with_the_arithmetic(tmp_path):
    message = error_of(tmp_path, real_per_class=3, syn_per_class=3)
    assert "3 + 3 / 2 = 4.500" in message and "memory_per_class=4" in message and "syn_per_class=2 fit" in message


def test_more_exemplars_than_a_class_has_images_are_refused_before_training(tmp_path):
    assert "has only 10 training images" in error_of(tmp_path, memory_per_class=10, real_per_class=6, syn_per_class=5)


def test_a_shared_total_is_refused(tmp_path):
    raw = toy_raw("icarl", tmp_path, fixed_memory=False, synth=tiny_source("small_controlnet"))
    config, _ = build_config(raw)
    with pytest.raises(ConfigError, match="fixed_memory=true"):
        Experiment(config, "toy", 7, toy_dataset(), Runtime(["cpu"], "fp32")).check()


def test_real_exemplars_of_a_learner_without_memory_are_refused(tmp_path):
    assert "real_per_class=2" in error_of(tmp_path, "finetune", real_per_class=2, syn_per_class=3)


def test_first_picks_stay_images_and_the_next_ones_become_maps(tmp_path):
    experiment = escort(tmp_path, real_per_class=2, syn_per_class=3)
    experiment.learn_all()
    learner = experiment.learner
    assert learner.memory.images.counts(6).tolist() == [2] * 6
    assert {label: len(maps) for label, maps in learner.replay.source.maps.items()} == dict.fromkeys(range(6), 3)
    picks = learner.choose(experiment.data.task(2), 5, None)  # of the last task, remembered
    own = experiment.data.train_images(experiment.data.task(2)).select([5])
    kept = learner.memory.images.select([5])
    assert all(torch.equal(kept.image(i), own.image(pick)) for i, pick in enumerate(picks[:2]))
    assert [learner.replay.source.compress(own.image(pick)) for pick in picks[2:]] == learner.replay.source.maps[5]


def test_with_the_method_off_the_run_is_the_plain_learners(tmp_path):
    plain = toy_experiment("icarl", tmp_path / "plain", fixed_memory=True, memory_per_class=4)
    off = escort(tmp_path / "off", real_per_class=4, syn_per_class=0)
    plain.learn_all(), off.learn_all()
    networks = [experiment.folder / "checkpoints" / "task_2" / "network.safetensors" for experiment in (plain, off)]
    first, second = map(load_tensors, networks)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_is_shown_is_drawn(tmp_path):
    experiment = escort(tmp_path, real_per_class=1, syn_per_class=2, augmentations_per_image=5)
    experiment.learn_all()
    bank = experiment.learner.replay.folder
    files = json.loads((bank / "task_0" / "manifest.json").read_text())["files"]
    copies = {int(name.partition("_seed")[2][:2]) for name in files}
    assert len(files) < 4 * 5 and copies <= set(range(5))  # two epochs in each of two tasks show no more
    assert all((bank / "task_0" / name).exists() for name in files)


def test_everything_is_drawn_before_a_training_where_that_is_asked(tmp_path):
    experiment = escort(
        tmp_path, real_per_class=1, syn_per_class=2, augmentation_prob=0.5, augmentations_per_image=3, prepare="all"
    )
    experiment.learn_all()
    files = json.loads((experiment.learner.replay.folder / "task_0" / "manifest.json").read_text())["files"]
    assert len(files) == 2 * 10 * 3  # ten images of each of two classes, exemplars among them


def test_prepared_and_needed_copies_train_the_same_network(tmp_path):
    results = []
    for prepare in ("needed", "all"):
        experiment = escort(
            tmp_path / prepare, real_per_class=1, syn_per_class=2, augmentation_prob=0.5, prepare=prepare
        )
        results.append(experiment.learn_all()["accuracy_matrix"])
    assert results[0] == results[1]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("moment", [20, 50, 80])
def test_a_run_killed_while_it_draws_copies_ends_with_the_same_bits(moment, tmp_path, monkeypatch):
    keys = {"real_per_class": 1, "syn_per_class": 2, "augmentation_prob": 0.5, "augmentations_per_image": 3}
    whole, killed = escort(tmp_path / "whole", **keys), escort(tmp_path / "killed", **keys)
    expected = whole.learn_all()
    save, numbers = drawing.save_image, itertools.count(1)

    def interrupt(path, image, config):
        if next(numbers) == moment:
            raise Interrupted
        return save(path, image, config)

    with pytest.raises(Interrupted), monkeypatch.context() as patch:
        patch.setattr(drawing, "save_image", interrupt)
        killed.learn_all()
    resumed = escort(tmp_path / "killed", **keys)
    assert resumed.learn_all()["accuracy_matrix"] == expected["accuracy_matrix"]
    for name in ("network", "exemplars", "source/edge_maps", "source/model"):
        path = f"checkpoints/task_2/{name}.safetensors"
        first, second = load_tensors(whole.folder / path), load_tensors(resumed.folder / path)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert files_of(whole) == files_of(resumed)


def files_of(experiment):
    """The copies on disk by name, with their hashes."""
    root = experiment.learner.replay.folder
    return {path.relative_to(root): file_hash(path) for path in root.glob("task_*/*/*.png")}


def test_a_damaged_copy_is_drawn_again(tmp_path):
    experiment = escort(tmp_path, real_per_class=1, syn_per_class=2)
    experiment.learn_all()
    before = files_of(experiment)
    name = max(before, key=lambda name: name.stem[-2:])  # not a first copy, for which everybody asks
    (experiment.learner.replay.folder / name).write_bytes(b"damaged")
    experiment.learner.replay.folders.clear()
    experiment.learner.replay._first_copies(range(6))
    label, item, copy = re.fullmatch(r"(\d+)-([0-9a-f]{12})_seed(\d\d)", name.stem).groups()
    one = experiment.learner.replay.source.ask(*map(torch.tensor, ([int(label)], [int(item, 16)], [int(copy)])))
    redrawn = experiment.learner.replay.copies(one).image(0)
    assert redrawn.shape == (1, 8, 8)


def test_copies_of_another_generator_are_refused(tmp_path):
    experiment = escort(tmp_path, real_per_class=1, syn_per_class=2)
    experiment.learn_all()
    path = experiment.learner.replay.folder / "task_0" / "manifest.json"
    path.write_text(path.read_text().replace(experiment.learner.replay.source.fingerprint(), "0" * 64))
    experiment.learner.replay.folders.clear()
    with pytest.raises(BankError, match="weights is"):
        experiment.learner.replay._first_copies([0])


def test_finetune_with_compressed_exemplars_is_generative_replay(tmp_path):
    experiment = escort(tmp_path, "finetune", syn_per_class=3)
    assert experiment.learn_all()["memory_units"]["compressed"] == 18
    assert len(experiment.learner.memory.images) == 0


def test_class_order_seeds_do_not_share_a_folder(tmp_path):
    """Trap 1 of the card."""
    first = escort(tmp_path, syn_per_class=2)
    config, _ = build_config({**first.config.model_dump(exclude_none=True), "seed": [7, 8], "model_seed": 1})
    folders = {Experiment(config, "toy", seed, toy_dataset(), Runtime(["cpu"], "fp32")).folder for seed in (7, 8)}
    assert len(folders) == 2


def test_an_image_without_edges_is_said_once_and_drawn(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reprise"), "propagate", True)
    source = escort(tmp_path, syn_per_class=2).check().replay.source
    flat = torch.full((1, 8, 8), 90, dtype=torch.uint8)
    assert source.compress(flat).is_empty and not caplog.text  # as in the generator's training
    items = source.read(ImageSet.of(flat[None] // 2, torch.tensor([0])))
    source._model = source.new_model()
    assert source.generate(source.ask(torch.tensor([0]), items, torch.tensor([0]))).image(0).shape == (1, 8, 8)
    assert caplog.text.count("no edges at all") == 1


def test_the_plan_counts_copies_at_the_size_of_the_images(tmp_path):
    learner = escort(tmp_path, syn_per_class=2).check()
    learner.data.dataset = replace(learner.data.dataset, image_size=224)
    assert "0.0 MB as pixels" in describe_replay(learner, "toy")[0]


def test_report_shows_originals_maps_and_copies(tmp_path):
    experiment = escort(tmp_path, syn_per_class=2)
    experiment.learn_all()
    panel = json.loads((experiment.folder / "panels" / "compressed_1" / "panel.json").read_text())
    assert panel["columns"] == ["original", "edge map", "copy 0", "copy 1", "copy 2"]
    assert [row["name"] for row in panel["rows"]] == list(experiment.data.class_names[2:4])
    assert all(cell is not None for row in panel["rows"] for cell in row["cells"])
