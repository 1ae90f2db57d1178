"""TDFA's card: splits of 9.1 and 9.2 are in test_splits.py; here 1.10 and the rules of our design, 1.12."""

import pytest
import torch
from torch.testing import assert_close

from learners.run.configure import build_config
from learners.tdfa.filtering import believable, class_ranges, distance_range
from synth.diffusion import classifier_free
from tests.structure import ROOT
from utils.data.subsets import long_tail_counts
from utils.results.metrics import many_medium_few
from utils.run.words import read_experiment


@pytest.mark.parametrize(("num_classes", "groups"), [(100, (35, 35, 30)), (10, (8, 2, 0))])
def test_groups_of_the_long_tailed_cifars_are_those_of_the_card(num_classes, groups):
    counts = long_tail_counts(50_000, num_classes, 0.01)
    starts = (0, groups[0], groups[0] + groups[1], num_classes)
    for index, name in enumerate(("many", "medium", "few")):
        inside = [100.0 if starts[index] <= label < starts[index + 1] else 0.0 for label in range(num_classes)]
        found = many_medium_few(inside, counts)
        assert found[name] == (100 if groups[index] else None)
        assert all(value in (0, None) for other, value in found.items() if other != name)


def test_omega_is_the_references_convention():
    """9.4: e_c = 1, e_u = 0.2, omega = 1.5 give 2.2."""
    conditional, unconditional = (lambda xt, t: torch.tensor(1.0)), (lambda xt, t: torch.tensor(0.2))
    assert_close(classifier_free(conditional, unconditional, 1 + 1.5)(None, None), torch.tensor(2.2))


@pytest.mark.parametrize(("name", "classes"), [("tdfa_cifar100lt", 100), ("tdfa_cifar10lt", 10)])
def test_experiments_have_the_cards_numbers(name, classes):
    config, _ = build_config(read_experiment(ROOT / "exps" / f"{name}.json"))
    assert (config.convnet_type, config.imb_factor, config.init_cls, len(config.seed)) == ("resnet32", 0.01, classes, 3)
    assert config.first_schedule().milestones == (160, 180) and not config.shuffle
    representation = (config.init_epoch, config.init_lr, config.init_weight_decay, config.momentum, config.batch_size)
    assert representation == (200, 0.1, 2e-4, 0.9, 128)
    head = (config.head_epochs, config.head_lr, config.head_batch_size, config.made_weight, config.most_per_real)
    assert head == (30, 0.1, 512, 0.5, 50)
    synth = config.synth
    assert (synth.blocks, synth.width, synth.label_dropout, synth.timestep_respacing) == (4, 512, 0.1, "ddim50")
    walk = (
        synth.walk_steps,
        synth.walk_length,
        synth.walk_noise,
        synth.walk_lambda,
        synth.walk_accept,
        synth.walk_beta,
    )
    assert walk == (10, 0.1, 0.5, 0.5, 0.9, 0.999) and synth.translated_weight == 0.5
    assert (config.filter_low, config.filter_high, config.filter_margin) == (0.05, 0.95, 0.1)


def at(*degrees: float) -> torch.Tensor:
    """Features (N, 2) of any length in these directions."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1) * torch.linspace(1, 3, len(degrees))[:, None]


def cosine_distance(degrees: float) -> torch.Tensor:
    return 1 - torch.tensor(degrees).deg2rad().cos()


def test_few_features_are_measured_from_the_others_prototype():
    # Of 0, 10 and 20 degrees, the others' prototypes lie at 15, 10 and 5.
    assert_close(distance_range(at(0, 10, 20), 0.0, 1.0), torch.stack([cosine_distance(0), cosine_distance(15)]))
    # Twenty are enough: each from the common prototype, at 9.5 degrees.
    assert_close(distance_range(at(*map(float, range(20))), 0.0, 1.0)[1], cosine_distance(9.5))


def test_a_class_of_one_image_has_the_range_of_the_others():
    features, labels = torch.cat([at(0, 10), at(90)]), torch.tensor([0, 0, 1])
    ranges = class_ranges(features, labels, range(2), 0.05, 0.95)
    assert_close(ranges[0], cosine_distance(10).repeat(2))
    assert_close(ranges[1], ranges[0])
    assert class_ranges(at(0, 90), torch.tensor([0, 1]), range(2), 0.05, 0.95).tolist() == [[0, 2], [0, 2]]


@pytest.mark.parametrize(
    ("degrees", "kept"),
    [
        (20.0, True),
        (5.0, False),  # nearer to the prototype than real ones
        (40.0, False),  # farther than real ones
        (31.0, True),  # the other prototype is nearer, but by less than a tenth
        (31.5, False),
    ],
)
def test_only_what_lies_as_real_features_do_is_kept(degrees, kept):
    prototypes = at(0, 61) / at(0, 61).norm(dim=1, keepdim=True)
    ranges = torch.stack([torch.stack([cosine_distance(10), cosine_distance(35)])] * 2)
    found = believable(at(degrees), torch.tensor([0]), prototypes, ranges, margin=0.1)
    assert found.tolist() == [kept]
