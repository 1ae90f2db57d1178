"""ESCORT's budget, its memory and its experiment files: the numbers of its card."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from learners.memory import herding
from learners.run.configure import build_config
from tests.support.toy import tiny_source, toy_dataset, toy_experiment
from utils.data.images import ImageSet
from utils.run.errors import ConfigError
from utils.run.words import read_experiment
from utils.training import seeding


def coloured(num_classes, per_class):
    """Noise: coloured images in memory."""
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    pixels = torch.randint(0, 256, (len(labels), 3, 8, 8), generator=seeding.generator("coloured"))
    images = ImageSet.of(pixels.to(torch.uint8), labels)
    names = [f"kind {label}" for label in range(num_classes)]
    return dataclasses.replace(toy_dataset(), train=images, test=images, class_names=names, channels=3)


def experiment(folder, data, real, compressed, budget, init_cls, increment):
    synth = {**tiny_source("controlnet"), "real_per_class": real, "syn_per_class": compressed}
    keys = {"fixed_memory": True, "memory_per_class": budget, "init_cls": init_cls, "increment": increment}
    return toy_experiment("der", folder, data=data, synth=synth, **keys)


def test_twenty_images_worth_do_not_hold_eighteen_and_forty_nine_maps(tmp_path):
    with pytest.raises(ConfigError, match=r"18 \+ 49 / 24 = 20\.042.*at most syn_per_class=48 fit"):
        experiment(tmp_path, coloured(4, 70), 18, 49, 20, 2, 2).check()


@pytest.mark.parametrize("size", [(375, 500), (333, 500)])  # pixels that fill no whole number of bytes
def test_a_photographs_map_counts_a_twenty_fourth_whatever_its_size(size, tmp_path):
    run = experiment(tmp_path, coloured(2, 70), 18, 48, 20, 1, 1)
    source = run.check().replay.source
    assert source.maps_per_image(SimpleNamespace(image_sizes={size: 3, (300, 301): 2})) == 24


# real_per_class is given in the first two; null takes what the maps leave.
@pytest.mark.parametrize(
    ("given", "real", "compressed"),
    [(18, 18, 48), (20, 20, 0), *((None, 20 - given_up, 24 * given_up) for given_up in range(5))],
)
def test_every_image_that_is_given_up_makes_room_for_twenty_four_maps(given, real, compressed, tmp_path):
    learner = experiment(tmp_path, coloured(2, 112), given, compressed, 20, 1, 1).check()
    assert (learner.memory.per_class, learner.memory.handed) == (real, compressed)


def test_memory_has_30_then_45_then_60_entries(tmp_path):
    """12 classes of 8 images in phases of 6, 3 and 3, R = 2 and S = 3."""
    run, entries = experiment(tmp_path, coloured(12, 8), 2, 3, 20, 6, 3), []
    save = run._save

    def count(task):
        entries.append((len(run.learner.memory.images), sum(map(len, run.learner.replay.source.maps.values()))))
        save(task)

    run._save = count
    run.learn_all()
    assert entries == [(12, 18), (18, 27), (24, 36)]


def test_one_herding_is_cut_into_real_and_compressed_exemplars():
    import numpy as np

    picks = herding(torch.from_numpy(np.random.RandomState(0).randn(30, 4)), 4 + 6)
    assert (picks[:4], picks[4:]) == ([2, 15, 3, 12], [7, 18, 22, 4, 10, 24])


@pytest.mark.parametrize("name", ["food101", "caltech256", "places100", "imagenet100"])
def test_escorts_files_keep_eighteen_images_and_forty_eight_maps_of_every_class(name):
    config, unused = build_config(read_experiment(Path(__file__).parents[2] / "exps" / f"escort_{name}.json"))
    synth = config.synth
    assert unused == [] and (synth.name, synth.resolution) == ("controlnet", "low" if name == "caltech256" else "high")
    assert (config.memory_per_class, synth.real_per_class, synth.syn_per_class) == (20, 18, 48)
    assert (synth.augmentations_per_image, synth.guidance, synth.control_strength) == (5, 9.0, 1.0)
    assert (synth.canny_low, synth.canny_high, synth.copy_noise) == (100, 200, "reference")
    assert synth.verbatim_names == (name != "imagenet100")  # whose folders are ids, not words
    assert (config.model_name, config.convnet_type, config.model_seed) == ("der", "resnet18", 1)
    assert (config.init_epoch, config.epochs, config.milestones) == (200, 170, [80, 120, 150])
