"""Learners whose classes are solved for, against the published formulas written out; float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from learners.fecam import MahalanobisHead
from learners.ranpac import RIDGES, ProjectedHead, best_ridge, solve_ridge
from tests.support.learned import learned_toy
from tests.support.toy import toy_dataset, toy_experiment

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stripes(count, width=12, classes=3):
    """Features (N, D) of classes that overlap, and their labels."""
    labels = torch.arange(count) % classes
    return torch.randn(count, width, generator=generator()) + 2 * F.one_hot(labels, width), labels


# ------------------------------------------------------------------ RanPAC


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 1e4])
def test_class_vectors_are_those_of_ridge_regression(ridge):
    features, labels = stripes(40)
    h, y = features.double(), F.one_hot(labels).double()
    expected = torch.linalg.inv(h.T @ h + ridge * torch.eye(12)) @ h.T @ y
    weight = solve_ridge(features.T @ features, features.T @ y.float(), ridge)
    assert_close(weight.double(), expected.T, **CLOSE)


@pytest.mark.parametrize("ridge", [0.0, 1e-8])
def test_a_ridge_below_rounding_finds_what_few_images_say(ridge):
    features, labels = stripes(60, width=300)  # fewer than dimensions
    y = F.one_hot(labels).float()
    weight = solve_ridge(features.T @ features, features.T @ y, ridge)
    assert_close(features @ weight.T, y, rtol=0, atol=0.05)
    assert weight.norm() < 1.1 * (torch.linalg.pinv(features) @ y).norm()  # and the shortest vectors that say it


@pytest.mark.parametrize("count", [8, 60])  # fewer and more than dimensions
def test_the_ridge_is_the_best_of_all_on_a_fifth_of_the_images(count):
    features, labels = stripes(count)
    order = torch.randperm(count, generator=generator(5))
    h, y = features.double()[order], F.one_hot(labels).double()[order]
    cut = int(0.8 * count)
    errors = []
    for ridge in RIDGES:
        weight = torch.linalg.solve(h[:cut].T @ h[:cut] + ridge * torch.eye(12), h[:cut].T @ y[:cut])
        errors.append((h[cut:] @ weight - y[cut:]).square().mean())
    assert best_ridge(features, y[order.argsort()].float(), generator(5)) == RIDGES[torch.stack(errors).argmin()]


def test_the_only_image_of_a_task_chooses_a_ridge_as_well():
    assert best_ridge(torch.ones(1, 3), torch.ones(1, 1), generator()) in RIDGES


def test_a_projected_head_is_linear_in_rectified_projections():
    head = ProjectedHead(12, 30, generator(1))
    head.grow(3)
    features = stripes(5)[0]
    projection = torch.randn(12, 30, generator=generator(1))
    assert_close(head(features), (features @ projection).clamp(min=0) @ head.weight.T)
    assert (head.num_features, head.weight.shape) == (12, (3, 30))


@pytest.mark.parametrize("width", [40, 0])
def test_ranpac_ends_the_same_however_classes_are_cut_into_tasks(width, tmp_path):
    keys = {"M": width, "ridge": 0.1, "pretrain_epochs": 0, "precision": "fp32"}
    weights = [learned_toy("ranpac", tmp_path / str(size), init_cls=size, increment=size, **keys)
               .learner.network.head.weight for size in (1, 2, 6)]  # fmt: skip
    assert_close(weights[:2], [weights[2]] * 2, rtol=1e-3, atol=1e-3)


def test_what_ranpac_carries_is_counted(tmp_path):
    experiment = toy_experiment("ranpac", tmp_path, M=40)
    results = experiment.learn_all()
    assert results["memory_bytes"]["prototypes"] > 4 * (40 * 40 + 40 * 6)  # both sums in float32, and the file's names


# ------------------------------------------------------------------ FeCAM


def distances(features, means, covariances, alpha1, alpha2, norm_cov):
    """The paper's distance, class by class and pair by pair."""
    rows = []
    for x in F.normalize(features):
        row = []
        for mean, cov in zip(F.normalize(means), covariances):
            size = len(cov)
            beside = torch.stack([cov[i, j] for i in range(size) for j in range(size) if i != j]).mean()
            used = cov + alpha1 * cov.diagonal().mean() * torch.eye(size) + alpha2 * beside * (1 - torch.eye(size))
            if norm_cov:
                spread = used.diagonal().sqrt()
                used = torch.stack([torch.stack([used[i, j] / (spread[i] * spread[j]) for j in range(size)])
                                    for i in range(size)])  # fmt: skip
            row.append((x - mean) @ torch.linalg.inv(used) @ (x - mean))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize(("alphas", "norm_cov"), [((1.0, 1.0), True), ((1.0, 0.0), False), ((0.0, 0.0), True)])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_logits_are_negative_mahalanobis_distances(power, alphas, norm_cov):
    features, labels = stripes(90)
    features = features.abs() if power != 1 else features
    head = MahalanobisHead(12, alphas, norm_cov, per_class=True)
    head.grow(3)
    head.power.fill_(power)
    transformed = features**power
    own = [transformed[labels == label] for label in range(3)]
    head.weight.data = torch.stack([rows.mean(0) for rows in own])
    head.covariance = torch.stack([rows.T.cov() for rows in own])
    means, covariances = head.weight.data.double(), head.covariance.double()
    expected = distances(transformed[:7].double(), means, covariances, *alphas, norm_cov)
    assert_close(-head(features[:7]).double(), expected, **CLOSE)


def test_without_shrinkage_no_rounding_is_inverted_where_images_are_fewer_than_dimensions():
    features = stripes(30, width=64)[0]
    head = MahalanobisHead(64, (0.0, 0.0), correlations=False, per_class=True)
    head.grow(1)
    head.set_covariance(0, features.T.cov())
    exact = torch.linalg.pinv(features.double().T.cov(), rtol=1e-10, hermitian=True)
    assert_close(head.inverse(0).double(), exact, rtol=1e-2, atol=1e-3)
    head.set_covariance(0, 2 * torch.eye(64))
    assert_close(head.inverse(0), 0.5 * torch.eye(64))


@pytest.mark.parametrize("per_class", [True, False])
def test_covariances_are_measured_once_for_each_class_or_shared_as_their_mean(per_class, tmp_path):
    keys = {"per_class": per_class, "pretrain_epochs": 0, "precision": "fp32"}
    learner = learned_toy("fecam", tmp_path, init_cls=2, increment=2, **keys).learner
    images = toy_dataset().train
    order = {original: label for label, original in enumerate(learner.data.class_order)}
    features = learner.network.head.transformed(learner.extract_features(images))
    labels = torch.tensor([order[int(label)] for label in images.labels])
    expected = torch.stack([features[labels == label].T.cov() for label in range(6)])
    expected = expected if per_class else expected.mean(0, keepdim=True)
    assert_close(learner.network.head.covariance, expected, **CLOSE)


@pytest.mark.parametrize("keys", [{"kshot": 1}, {"kshot": 1, "per_class": False}, {"train_per_class": 1}])
def test_a_class_of_one_image_takes_the_mean_covariance_and_says_so(keys, tmp_path):
    experiment = learned_toy("fecam", tmp_path, init_cls=2, increment=4, pretrain_epochs=0, **keys)
    head, log = experiment.learner.network.head, (experiment.folder / "log.txt").read_text()
    assert "have no covariance and take the mean of all others" in log
    assert head.weight.isfinite().all() and head.covariance.isfinite().all()
    if "kshot" in keys and head.per_class:
        assert_close(head.covariance[2:], head.covariance[:2].mean(0).expand(4, -1, -1))
    predicted = experiment.learner.predict(experiment.data.test_images(range(6)))["cnn"]
    assert predicted.isfinite().all()


def test_tukeys_power_is_left_out_where_a_feature_is_negative(tmp_path):
    learner = toy_experiment("fecam", tmp_path, pretrain_epochs=0).check()
    original = learner.extract_features
    learner.extract_features = lambda images: original(images) - 1
    learner.learn_task(next(iter(learner.data.tasks())))
    assert learner.network.head.power == 1
