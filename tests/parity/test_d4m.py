"""D4M (arXiv:2407.15138) and the learners of its study: numbers worked out by hand, and diffusers' own pipeline."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from torchvision.models import resnet18

from learners.agem import project
from learners.distilled import matching_loss
from learners.memory import reservoir_slots
from learners.task_arithmetic import add, move, subtract, ties
from models.latent.contract import NOISE
from synth.d4m.matching import Mix, draw_mix, keep_top
from synth.d4m.prototypes import cluster
from synth.samplers import sample_scheduled, sample_scheduler
from tests.support.toy import toy_experiment
from utils.data.batches import Batch
from utils.data.transforms import AUGMENTATIONS, ClassifierTransform
from utils.run.errors import ConfigError
from utils.training import seeding
from utils.training.schedule import TrainConfig

EXACT = {"rtol": 0, "atol": 0}
EPSILON = {**NOISE, "prediction_type": "epsilon"}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------- A-GEM


@pytest.mark.parametrize(
    ("g", "r", "expected"),
    [
        ((1, 0), (-1, 1), (0.5, 0.5)),
        ((1, 2), (1, -1), (1.5, 1.5)),
        ((2, -1), (-3, 1), (-0.1, -0.3)),
        ((1, 0), (-1, 0), (0, 0)),
        ((3, 4), (1, 0), (3, 4)),  # they agree
        ((1, 1), (1, -1), (1, 1)),  # neither for nor against
        ((1, 2), (0, 0), (1, 2)),  # no reference, no NaN
        ((-4, -4, -4), (-3, 3, 3), (-16 / 3, -8 / 3, -8 / 3)),
    ],
)
def test_agem_projects_onto_the_nearest_gradient_that_does_not_disagree(g, r, expected):
    gradient, reference = [tensor(*map(float, g))], [tensor(*map(float, r))]
    project(gradient, reference)
    torch.testing.assert_close(gradient[0], tensor(*map(float, expected)), rtol=0, atol=1e-12)
    assert gradient[0].norm() <= tensor(*map(float, g)).norm() and (gradient[0] * reference[0]).sum() > -1e-12
    again = [gradient[0].clone()]
    project(again, reference)
    torch.testing.assert_close(again[0], gradient[0], rtol=0, atol=1e-12)


def test_agem_constrains_the_gradient_and_not_the_step_of_adam():
    bent, r = [tensor(-4.0, -4.0, -4.0)], tensor(-3.0, 3.0, 3.0)
    project(bent, [r])
    assert abs(float((bent[0] * r).sum())) < 1e-12 and float((bent[0].sign() * r).sum()) == -3


# ---------------------------------------------------------------------- reservoir


def test_reservoir_keeps_every_item_equally_often():
    counts, trials = torch.zeros(100), 4000
    for trial in range(trials):
        held = [0] * 10
        for item, slot in reservoir_slots(0, 100, 10, seeding.generator("reservoir", trial)):
            held[slot] = item
        counts[held] += 1
    rates = counts / trials
    assert (rates - 0.1).abs().max() < 4.5 * math.sqrt(0.1 * 0.9 / trials)
    assert (rates[:10].mean() - 0.1).abs() < 0.005  # a draw among one place less would give 0.092 to the first ten


def test_reservoir_fills_its_places_in_order():
    assert list(reservoir_slots(0, 5, 10, seeding.generator("few"))) == [(place, place) for place in range(5)]


# ---------------------------------------------------------------------- task vectors

THETA_0, THETA_A, THETA_B = ({"w": tensor(*values)} for values in ((1.0, 2, 3), (2.0, 2, 1), (1.0, 4, 3)))


def test_task_vectors_add_up():
    a, b = subtract(THETA_A, THETA_0), subtract(THETA_B, THETA_0)
    assert a["w"].tolist() == [1, 0, -2] and b["w"].tolist() == [0, 2, 0] and float((a["w"] * b["w"]).sum()) == 0
    torch.testing.assert_close(move(THETA_0, a, 1.0), THETA_A, **EXACT)
    assert move(THETA_0, a, -1.0)["w"].tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [(0, (1, 2, 3)), (0.25, (1.25, 2.5, 2.5)), (0.3, (1.3, 2.6, 2.4)), (0.5, (1.5, 3, 2)), (1, (2, 4, 1))],
)
def test_merging_follows_the_scaling(scaling, expected):
    total = add([subtract(THETA_A, THETA_0), subtract(THETA_B, THETA_0)])
    torch.testing.assert_close(move(THETA_0, total, scaling)["w"], tensor(*map(float, expected)))


def test_ties_trims_elects_signs_and_averages_what_agrees():
    vectors = [{"w": tensor(4.0, -1, 0.1, 3)}, {"w": tensor(-2.0, -3, 0.2, 0.1)}]
    # Of each the two largest: (4, 0, 0, 3) and (-2, -3, 0, 0); signs +, -, none, +.
    assert ties(vectors, keep=0.5)["w"].tolist() == [4, -3, 0, 3]


# ---------------------------------------------------------------------- prototypes


def rows(count, width=6):
    return torch.randn(count, width, generator=seeding.generator("rows", count)).double()


def test_one_centre_is_the_mean_of_the_rows_of_whole_chunks():
    latents = rows(23)
    found = cluster(latents, 1, seed=0, km_expand=5)
    torch.testing.assert_close(found.centres[0].double(), latents[:20].mean(0), rtol=1e-6, atol=1e-6)
    assert found.counts.tolist() == [20]


def test_a_first_chunk_of_as_many_rows_as_centres_gives_these_rows():
    latents = rows(10)
    found = cluster(latents, 10, seed=0, km_expand=1)
    assert found.counts.tolist() == [1] * 10
    assert sorted(map(tuple, found.centres.tolist())) == sorted(map(tuple, latents.float().tolist()))


def test_one_pass_is_scikit_learns_partial_fit_chunk_by_chunk():
    latents, means = rows(95), MiniBatchKMeans(3, random_state=4, batch_size=30, n_init="auto")
    for chunk in latents[:90].split(30):
        means.partial_fit(chunk.numpy())
    found = cluster(latents, 3, seed=4, km_expand=10)
    np.testing.assert_array_equal(found.centres.numpy(), means.cluster_centers_.astype(np.float32))
    assert found.counts.sum() == 90


def test_full_clustering_drops_nothing_and_says_how_far_the_images_lie():
    latents = rows(37)
    found, means = cluster(latents, 4, seed=1), KMeans(4, n_init=1, random_state=1).fit(latents.numpy())
    assert found.counts.sum() == 37
    squares = found.spread.double().square() * found.counts * latents.shape[1]
    assert float(squares.sum()) == pytest.approx(means.inertia_, rel=1e-5)


def test_latents_keep_their_shape_row_by_row():
    latents = torch.arange(4 * 4 * 64 * 64, dtype=torch.float32).view(4, 4, 64, 64)
    found = cluster(latents, 4, seed=0)
    assert found.centres.shape == (4, 4, 64, 64)
    torch.testing.assert_close(found.centres.sort(dim=0).values, latents, **EXACT)


@pytest.mark.parametrize(("count", "expand", "needed"), [(3, None, 4), (39, 10, 40)])
def test_too_few_images_for_the_prototypes_are_counted(count, expand, needed):
    with pytest.raises(ConfigError, match=f"{count} images, but {needed} are needed for 4 prototypes"):
        cluster(rows(count), 4, seed=0, km_expand=expand)


# ---------------------------------------------------------------------- noise levels and steps


@pytest.mark.parametrize(
    ("name", "strength", "calls", "time", "signal", "noise"),
    [
        ("pndm", 0.3, 16, 301, 0.76735, 0.64123),
        ("pndm", 0.5, 26, 501, 0.52440, 0.85147),
        ("pndm", 0.7, 36, 701, 0.28621, 0.95817),
        ("pndm", 0.75, 38, 741, 0.24567, 0.96935),
        ("ddim", 0.3, 15, 281, 0.78891, 0.61450),
        ("ddim", 0.5, 25, 481, 0.54981, 0.83529),
        ("ddim", 0.7, 35, 681, 0.30763, 0.95151),
        ("ddim", 0.75, 37, 721, 0.26554, 0.96410),
        ("ddim", 0.58, 28, 541, None, None),  # 0.58 * 50 is a little less than 29
    ],
)
def test_strength_says_where_among_fifty_steps_a_prototype_enters(name, strength, calls, time, signal, noise):
    scheduler, times = sample_scheduler(name, EPSILON, 50), []
    first = 50 - int(50 * strength)
    start = scheduler.add_noise(torch.ones(1, 1), torch.ones(1, 1), scheduler.timesteps[first : first + 1])
    sample_scheduled(lambda zt, t: times.append(int(t[0])) or zt * 0, start[..., None, None], scheduler, first)
    assert (len(times), times[0]) == (calls, time)
    if signal is not None:
        assert float(start) == pytest.approx(signal + noise, abs=2e-5)


@pytest.mark.parametrize(("name", "spread"), [("ddim", 0.035), ("dpmpp", 1e-6)])
def test_a_perfect_denoiser_leads_back_to_the_prototype(name, spread):
    x0 = torch.randn(64, 4, 2, 2, generator=seeding.generator("x0"))
    scheduler = sample_scheduler(name, EPSILON, 50)
    alpha_bar = scheduler.alphas_cumprod

    def oracle(zt, t):
        kept = alpha_bar[t.long()].view(-1, 1, 1, 1)
        return (zt - kept.sqrt() * x0) / (1 - kept).sqrt()

    eps = torch.randn(x0.shape, generator=seeding.generator("eps"))
    start = scheduler.add_noise(x0, eps, scheduler.timesteps[15:16])
    assert (sample_scheduled(oracle, start, scheduler, 15) - x0).std() < spread


# ---------------------------------------------------------------------- matching

TEACHER, STUDENT = torch.tensor([[2.0, 0, -1]]), torch.tensor([[0.5, 0.5, -1]])


@pytest.mark.parametrize(("T", "loss"), [(1, 0.337665), (4, 0.025610), (20, 9.3395e-4)])
def test_matching_is_a_divergence_without_the_square_of_the_temperature(T, loss):
    targets = torch.softmax(TEACHER / T, 1)
    assert float(matching_loss(STUDENT, targets, T)) == pytest.approx(loss, rel=1e-4)
    both = torch.cat([TEACHER, STUDENT]), torch.cat([STUDENT, STUDENT])  # a second row that agrees halves the mean
    assert float(matching_loss(both[1], torch.softmax(both[0] / T, 1), T)) == pytest.approx(loss / 2, rel=1e-4)
    assert float(matching_loss(STUDENT + 3, targets, T)) == pytest.approx(loss, rel=1e-3)


def test_gradient_of_matching_is_the_difference_of_the_softened_outputs():
    logits = STUDENT.clone().requires_grad_()
    targets = torch.softmax(TEACHER / 20, 1)
    torch.testing.assert_close(targets, torch.tensor([[0.361592, 0.327182, 0.311225]]), rtol=0, atol=1e-5)
    matching_loss(logits, targets, 20).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.00162e-3, 7.1889e-4, 2.8273e-4]]), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 1e-3), (75, 8.53553e-4), (150, 5e-4), (225, 1.46447e-4), (299, 2.7e-8)]
)
def test_rate_of_a_student_falls_as_a_cosine_by_epoch(epoch, rate):
    config = TrainConfig(1e-3, 300, schedule="cosine")
    assert config.learning_rate(epoch * 10 + 3, 10) == pytest.approx(rate, rel=2e-2 if epoch == 299 else 1e-5)


def test_only_matrices_and_filters_of_a_resnet18_decay():
    config = TrainConfig(1e-3, 1, optimizer="adamw", weight_decay=0.01, decay_vectors=False)
    groups = config.make_optimizer(list(resnet18().parameters())).param_groups
    counts = [
        (group["weight_decay"], len(group["params"]), sum(p.numel() for p in group["params"])) for group in groups
    ]
    assert counts == [(0.01, 21, 11_678_912), (0.0, 41, 10_600)]


def test_cutmix_puts_a_box_of_the_partner_in():
    images = torch.arange(32.0).view(2, 1, 4, 4)
    mixed = Mix(0.75, torch.tensor([1, 0]), (1, 0, 3, 2)).apply(images)
    assert mixed[0, 0].tolist() == [[0, 1, 2, 3], [20, 21, 6, 7], [24, 25, 10, 11], [12, 13, 14, 15]]


def test_box_of_cutmix_has_the_share_of_the_area_that_lambda_leaves():
    for number in range(200):
        mix = draw_mix("cutmix", 1.0, torch.Size([3, 1, 224, 224]), ("box", number))
        side = int(224 * math.sqrt(1 - mix.share))
        top, left, bottom, right = mix.box
        assert bottom - top <= side and right - left <= side and mix.partner.sort().values.tolist() == [0, 1, 2]
        if min(top, left) > 0 and max(bottom, right) < 224:
            assert bottom - top == right - left == side // 2 * 2


def test_largest_probabilities_stay_and_the_rest_is_divided_evenly():
    targets = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]])
    smoothed = torch.tensor([[0.5, 0.3, 0.2 / 3, 0.2 / 3, 0.2 / 3]])
    torch.testing.assert_close(keep_top(targets, 2), smoothed)
    torch.testing.assert_close(keep_top(targets.flip(1), 2), smoothed.flip(1))
    assert all(torch.equal(keep_top(targets, count), targets) for count in (None, 5, 9))


@pytest.mark.parametrize("size", [(224, 224), (375, 500)])
def test_a_crop_and_a_flip_come_back_from_the_key_of_their_batch(size):
    pixels = torch.randint(0, 256, (1, 3, *size), generator=seeding.generator("photo"), dtype=torch.uint8)
    transform = ClassifierTransform(AUGMENTATIONS["imagenet"], 32, (0.0,) * 3, (1.0,) * 3, in_memory=False)

    def view(seed):
        cropped = transform.load_train(pixels[0], seeding.generator("crop", seed))
        return transform.train(cropped[None], seeding.generator("flip", seed))

    views = [view(seed) for seed in range(200)]
    assert all(torch.equal(view(seed), seen) for seed, seen in enumerate(views))
    assert not any(torch.equal(seen, views[0]) for seen in views[1:])


# ---------------------------------------------------------------------- experience replay


def test_every_image_of_a_step_counts_the_same(tmp_path):
    learner = toy_experiment("er", tmp_path, limit_tasks=1, init_epoch=1).check()
    learner.network.forward = lambda images: images  # logits of the images' own, for the losses 2 and 1
    rows = [torch.tensor([[0.0, math.log(math.exp(loss) - 1)]]) for loss in (2, 1)]
    current, remembered = (
        Batch(row.repeat(count, 1), torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool))
        for row, count in zip(rows, (10, 30))
    )
    current.replay = remembered
    loss = learner.compute_loss(current, learner.data.task(0))["cross_entropy"]
    assert float(loss) == pytest.approx(1.25)
