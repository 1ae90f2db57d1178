"""Measures of generated images: values of the references on set features, torch-fidelity's own, and hand-made cases."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from synth import measures
from synth.quality import UNKNOWN, Features, Settings, compare, judge

REAL = torch.from_numpy(np.random.RandomState(0).randn(64, 4))
FAKE = torch.from_numpy(np.random.RandomState(1).randn(48, 4) * 1.1 + 0.4)
SETTINGS = Settings("net@abc123")


def features(count: int, dim: int = 8, shift: float = 0.0, classes: int = 2, seed: int = 0) -> Features:
    values = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift
    return Features(values, values[:, :classes], torch.arange(count) % classes)


def test_the_numbers_are_those_of_the_reference_functions():
    # Of CBDM's evaluation on the same features; its Inception Score by its formula.
    assert measures.frechet_distance(FAKE, REAL) == pytest.approx(1.2718202249, abs=1e-9)
    assert measures.precision_recall(FAKE, REAL, 5) == pytest.approx((0.9166667, 0.921875), abs=1e-7)
    assert measures.precision_recall(FAKE, REAL, 3) == pytest.approx((0.8541667, 0.734375), abs=1e-7)
    assert measures.inception_score(3 * FAKE, splits=2) == pytest.approx((2.2727766, 0.0355989), abs=1e-7)


def test_f_scores_are_those_of_the_reference_and_swap_with_the_sides():
    fake, real = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    assert measures.best_f_scores(fake, real) == pytest.approx((0.5038632, 0.9848289), abs=1e-7)
    assert measures.best_f_scores(real, fake) == pytest.approx((0.9848289, 0.5038632), abs=1e-7)


def test_all_four_are_what_torch_fidelity_computes_from_the_same_images():
    import torch_fidelity

    class Pixels(torch_fidelity.FeatureExtractorBase):
        """Four sums of pixels as features and as class scores."""

        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)

        def forward(self, images):
            values = images.float().flatten(1) @ torch.linspace(-1, 1, 192 * 4).sin().view(192, 4) / 3000
            return tuple(values for _ in self.features_list)

        @staticmethod
        def get_provided_features_list():
            return ("pixels",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "pixels"

    class Images(torch.utils.data.Dataset):
        def __init__(self, count, seed):
            generator = torch.Generator().manual_seed(seed)
            self.images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, place):
            return self.images[place]

    torch_fidelity.register_feature_extractor("pixels", Pixels)
    sides = Images(60, 0), Images(60, 1)
    theirs = torch_fidelity.calculate_metrics(
        input1=sides[0], input2=sides[1], feature_extractor="pixels", cuda=False, cache=False, verbose=False, isc=True,
        fid=True, kid=True, prc=True, prc_neighborhood=5, kid_subsets=1, kid_subset_size=60, samples_shuffle=False,
        save_cpu_ram=True,  # it reads in this process
    )  # fmt: skip
    fake, real = (Pixels("pixels", ["pixels"])(side.images)[0] for side in sides)
    assert measures.frechet_distance(fake, real) == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6)
    assert measures.kernel_distance(fake, real) == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert measures.inception_score(fake)[0] == pytest.approx(theirs["inception_score_mean"], abs=1e-6)
    shares = (theirs["precision"], theirs["recall"])
    assert measures.precision_recall(fake, real, 5) == pytest.approx(shares, abs=1e-6)


def test_the_kernel_distance_is_the_unbiased_estimate_written_out():
    x, y = FAKE[:20], REAL[:20]
    xx, yy, xy = ((a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum((kernel.sum() - kernel.trace()) / (20 * 19) for kernel in (xx, yy))
    assert measures.kernel_distance(x, y) == pytest.approx(float(within - 2 * xy.mean()), abs=1e-12)


@pytest.mark.parametrize(("n", "bias"), [(100, 22.71), (500, 4.352)])  # about proportional to 1 / n
def test_equal_distributions_have_the_measured_bias_of_the_frechet_distance(n, bias):
    draws = torch.randn(10, 2, n, 64, generator=torch.Generator().manual_seed(0))
    distances = torch.tensor([measures.frechet_distance(*pair) for pair in draws])
    assert float(distances.mean()) == pytest.approx(bias, rel=0.02)


def test_clusters_of_the_same_images_have_the_same_shares():
    fake, real = measures.share_of_clusters(REAL, REAL, 8, seed=3)
    assert_close(fake, real)
    assert measures.best_f_scores(fake, real) == pytest.approx((1.0, 1.0), abs=1e-4)


def test_nearest_distances_are_the_smallest_of_all():
    assert_close(measures.nearest_distances(FAKE, REAL), torch.cdist(FAKE, REAL).min(1).values)


def test_the_interval_narrows_with_the_number_of_values():
    few, many = (measures.bootstrap_interval(torch.arange(n) % 2, 0) for n in (10, 1000))
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=0.1)


def test_both_sides_get_equally_many_and_real_ones_stand_beside():
    found = compare(features(150, shift=1.0), features(400, seed=1), SETTINGS)
    distance = found["FD"]
    assert (distance.name, distance.n_fake, distance.n_real, distance.repeats) == ("FD[net@abc123]", 150, 150, 5)
    assert distance.ci95[0] <= distance.value <= distance.ci95[1] and distance.real < 1 < distance.value
    assert found["precision"].value < found["precision"].real
    assert compare(features(300), features(400, seed=1), SETTINGS)["FD"].n_real == 200  # half of the real ones


@pytest.mark.parametrize(
    ("count", "absent", "word"),
    [
        (99, {"IS"}, "needs 100 images"),
        (19, {"IS", "F_8", "F_1/8"}, "needs 20 images"),  # twenty clusters
        (8, {"IS", "F_8", "F_1/8", "FD"}, "needs 9 images"),  # of eight features
        (6, {"IS", "F_8", "F_1/8", "FD", "precision", "recall"}, "needs 7 images"),  # five neighbours
        (1, {"IS", "F_8", "F_1/8", "FD", "precision", "recall", "KD"}, "needs 2 images"),
    ],
)
def test_what_too_few_images_cannot_tell_has_a_reason_and_no_number(count, absent, word):
    found = compare(features(count), features(400, seed=1), SETTINGS)
    assert {name for name, measure in found.items() if measure.value is None} == absent
    assert any(word in measure.reason for measure in found.values() if measure.reason)
    assert all((measure.value is None) == (measure.reason is not None) for measure in found.values())


def test_an_extractor_without_class_scores_gives_no_inception_score():
    fake = features(150)._replace(logits=None)
    assert "no class scores" in compare(fake, features(400, seed=1), SETTINGS)["IS"].reason


def test_only_inception_has_the_names_of_the_literature():
    names = [Settings("x@y", is_inception).full_name(name) for is_inception in (True, False) for name in ("FD", "KD")]
    assert names == ["FID", "KID", "FD[x@y]", "KD[x@y]"]


def test_copies_of_training_images_are_nearer_than_real_ones_and_classes_are_judged_alone():
    train, test = features(200), features(50, seed=1)
    judged = judge(train.take(torch.arange(60)), {"train": train, "test": test}, SETTINGS, {0: 300, 1: 5})
    near = judged["overall"]["nearest"]
    assert near.value == pytest.approx(0, abs=1e-6) and near.real > 1 and (near.n_fake, near.n_real) == (60, 200)
    assert judged["groups"].keys() == {"many", "few"} and judged["per_class"].keys() == {0, 1}
    assert judged["per_class"][0]["recall"].n_real == 30


def test_without_labels_all_classes_are_compared_and_none_alone():
    fake = features(60)._replace(labels=torch.full((60,), UNKNOWN))
    judged = judge(fake, {"train": features(200, seed=1), "test": features(50, seed=2)}, SETTINGS, {})
    assert judged["per_class"] == judged["groups"] == {} and judged["overall"]["FD"].n_real == 60
