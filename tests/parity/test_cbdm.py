"""The numbers of class-balancing diffusion (CBDM, arXiv:2305.00562), measured by running its code on tiny inputs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from synth.cbdm.augmentation import SCALE, Geometry, augment, draw_geometry
from synth.cbdm.loss import Balance, class_balanced_loss, class_prior
from synth.cbdm.network import LabelUNet
from synth.cbdm.source import ClassBalancing
from synth.ddpm.network import ClassUNetConfig
from synth.ddpm.sampling import Drawing, Sampling
from synth.diffusion import Process, add_noise, classifier_free_at_once, linear_process
from synth.samplers import sample_ddpm
from utils.data.subsets import long_tail_counts
from utils.training.schedule import TrainConfig

PROCESS = linear_process(1000, 1e-4, 0.02)
CIFAR_UNET = ClassUNetConfig(layers_per_block=2, attention_levels=[1], attention_head_dim=256)

# ---------------------------------------------------------------------- loss

X0 = torch.tensor([[1.0, -1.0], [0.5, 0.0]]).view(2, 1, 1, 2)
EPS = torch.tensor([[0.1, 0.2], [-0.3, 0.4]]).view(2, 1, 1, 2)
T = torch.tensor([250, 750])
TRUE, OTHER = [0, 2], [1, 0]


def fixture_loss(labels, others, tau):
    """eps(x, t, y) = a x + e[y], and a x without a label; total and its gradients in a and e."""
    a, e = torch.tensor(0.5, requires_grad=True), torch.tensor([0.0, 0.1, 0.2], requires_grad=True)
    xt = add_noise(PROCESS, X0, T, EPS)

    def predict(rows, asked):
        known = (asked >= 0).float()
        return a * xt[rows] + (e[asked.clamp(min=0)] * known).view(-1, 1, 1, 1)

    labels = torch.tensor(labels)
    kept = (labels >= 0).nonzero().flatten() if tau else torch.zeros(0, dtype=torch.int64)
    terms = class_balanced_loss(predict, EPS, labels, torch.tensor(others), kept, Balance(tau * T / 1000))
    sum(terms.values()).backward()
    return terms["mse"].item(), terms.get("balancing", torch.tensor(0.0)).item(), a.grad.item(), e.grad.tolist()


@pytest.mark.parametrize(
    ("labels", "others", "tau", "mse", "balancing", "of_a", "of_e"),
    [
        (TRUE, OTHER, 0, 0.1155692, 0, 0.2110960, [-0.0981155, 0, 0.1821396]),  # plain DDPM
        ([-1, -1], OTHER, 0, 0.0991413, 0, 0.1982402, [0, 0, 0]),
        ([-1, -1], OTHER, 1.0, 0.0991413, 0, 0.1982402, [0, 0, 0]),
        (TRUE, OTHER, 1.0, 0.1155692, 0.0203125, 0.2163818, [-0.1606155, 0.0062500, 0.3321396]),
        (TRUE, OTHER, 0.5, 0.1155692, 0.0101562, 0.2137389, [-0.1293655, 0.0031250, 0.2571396]),
        (TRUE, TRUE, 1.0, 0.1155692, 0, 0.2110960, [-0.0981155, 0, 0.1821396]),
    ],
)
def test_loss_and_gradients_are_those_of_the_published_code(labels, others, tau, mse, balancing, of_a, of_e):
    """The gradient in a shows the stopped gradients: without them balancing would add nothing to it."""
    found = fixture_loss(labels, others, tau)
    assert_close(torch.tensor([*found[:3], *found[3]]), torch.tensor([mse, balancing, of_a, *of_e]), rtol=0, atol=2e-7)


def test_a_hidden_label_takes_its_image_alone_out_of_balancing():
    """Per sample, the second of two: 1.25 * 0.25 * 0.1^2 / 2."""
    assert fixture_loss([0, -1], OTHER, 1.0)[1] == pytest.approx(1.25 * 0.25 * 0.01 / 2)


def test_other_labels_follow_the_training_set_or_are_all_alike():
    labels = torch.arange(100).repeat_interleave(torch.tensor(long_tail_counts(50_000, 100, 0.01)))
    prior = class_prior(labels, 100, "train")
    assert_close(prior[[0, 99]], torch.tensor([0.0460957, 0.00046096]), rtol=0, atol=1e-7)
    assert_close(class_prior(labels[labels != 3], 100, "uniform"), (torch.arange(100) != 3) / 99)
    stream = np.random.RandomState(0)  # which has shuffled every class's images before
    for _ in range(100):
        stream.shuffle(np.arange(500))
    assert stream.choice(100, 8, p=prior.numpy()).tolist() == [1, 11, 36, 0, 23, 37, 40, 1]


# ---------------------------------------------------------------------- network


@pytest.mark.parametrize(
    ("num_classes", "augmented", "count"),
    [(10, False, 35_751_427), (100, False, 35_797_507), (10, True, 35_756_035), (100, True, 35_802_115)],
)
def test_the_network_has_the_published_number_of_parameters(num_classes, augmented, count):
    with torch.device("meta"):
        network = LabelUNet((3, 32, 32), num_classes, CIFAR_UNET, augmented)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert sum(parameter.numel() for parameter in network.unet.parameters()) == 35_746_307  # without classes


def test_a_new_network_predicts_nearly_nothing_and_its_attention_is_awake():
    torch.manual_seed(0)
    network = LabelUNet((3, 32, 32), 10, CIFAR_UNET, augmented=True).eval()
    with torch.no_grad():
        predicted = network(torch.randn(1, 3, 32, 32), torch.tensor([5]), torch.tensor([3]))
    assert 1e-6 < predicted.abs().max() < 1e-4
    attention = [module for module in network.modules() if type(module).__name__ == "Attention"]
    assert {module.heads for module in attention} == {1} and len(attention) == 6
    assert_close(attention[0].to_out[0].weight.std().item(), 0.0625, rtol=0.01, atol=0)


# ---------------------------------------------------------------------- augmentation


def test_changes_come_as_often_as_published():
    torch.manual_seed(0)
    shares = (draw_geometry(4000, 0.12).vector() != 0).float().mean(0)
    published = torch.tensor([0.496, 0.060, 0.112, 0.119, 0.119, 0.119, 0.119, 0.120, 0.120])
    assert_close(shares, published, rtol=0, atol=0.025)


def test_without_changes_an_image_is_itself_or_its_exact_mirror_image():
    torch.manual_seed(0)
    images, drawn = torch.rand(64, 3, 8, 8), draw_geometry(64, 0)
    shown, vector = augment(images, drawn), drawn.vector()
    assert vector[:, 1:].abs().max() == 0 and set(vector[:, 0].tolist()) == {0, 1}
    mirrored = vector[:, 0].bool()
    assert torch.equal(shown[mirrored], images[mirrored].flip(-1)) and torch.equal(shown[~mirrored], images[~mirrored])


def geometry(**changes):
    return Geometry(**{name: torch.tensor([changes.get(name, 0.0)]) for name in Geometry._fields})


def test_an_image_turns_and_moves_as_its_numbers_say():
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(augment(image, geometry(angle=math.pi / 2)), image.rot90(1, (-2, -1)), rtol=0, atol=1e-5)
    moved = augment(image, geometry(right=1.0, down=2.0))  # an eighth of the side, and two
    assert_close(moved[..., 2:, 1:], image[..., :-2, :-1], rtol=0, atol=1e-5)
    assert torch.equal(augment(image, geometry(upside_down=1.0)), image.flip(-2))


def test_all_changes_multiply_in_the_published_order():
    """Scale, rotation by minus the angle, stretch along an axis, shift: the last of them acts first."""
    s, theta, stretch, phi, right, down = 0.7, 0.9, -1.3, 2.1, 0.4, -0.8

    def turn(angle):
        return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])

    side, move = 32, np.eye(3)
    move[:2, 2] = [side / 8 * right, side / 8 * down]  # in pixels
    wide = np.diag([SCALE**stretch, SCALE**-stretch, 1])
    wanted = np.diag([SCALE**s, SCALE**s, 1]) @ turn(-theta) @ turn(phi) @ wide @ turn(-phi) @ move
    found = geometry(scale=s, angle=theta, stretch=stretch, axis=phi, right=right, down=down).matrix(side)[0]
    found[:, 2] *= (side - 1) / 2  # from sides of -1 to 1 to pixels
    assert_close(found, torch.from_numpy(wanted[:2]).float(), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- sampling

X = torch.tensor([[1.0, -1.0], [0.5, 0.0]]).view(2, 1, 1, 2)


def no_noise():
    return torch.zeros(2, 1, 1, 2)


def stub(a, e, calls):
    def predict(xt, t, labels):
        calls.append(len(xt))
        known = (labels >= 0).float()
        return a * xt + (torch.tensor(e)[labels.clamp(min=0)] * known).view(-1, 1, 1, 1)

    return predict


def guided(method, omega, predict, labels):
    """What the source samples with."""
    source = object.__new__(ClassBalancing)
    source.config = SimpleNamespace(sample_method=method, omega=omega, guidance_interval=None)
    return source.noise_predictor(predict, labels)


def test_guidance_counts_from_the_conditional():
    model = classifier_free_at_once(lambda xt, t, labels: (labels >= 0) * 0.8 + 0.2, torch.tensor([1]), 1.5)
    assert_close(model(torch.zeros(1), torch.zeros(1)), torch.tensor([2.2]))


@pytest.mark.parametrize(
    ("t", "method", "omega", "mean"),
    [
        (0, "cfg", 1.5, [0.9925496, -0.9975498, 0.4925246, -0.0050002]),
        (500, "cfg", 0, [0.9987509, -1.0008568, 0.4977961, -0.0021058]),
        (500, "cond", 1.5, [0.9987509, -1.0008568, 0.4977961, -0.0021058]),
        (500, "cfg", 1.5, [0.9971716, -1.0024360, 0.4946375, -0.0052644]),
        (999, "cfg", 1.5, [0.9949999, -1.0051017, 0.4899237, -0.0101017]),
        (999, "uncond", 0, [1.0000508, -1.0000508, 0.5000254, 0]),  # above 1: x0 is not clamped
    ],
)
def test_one_step_has_the_published_mean(t, method, omega, mean):
    seen = []
    model = guided(method, omega, stub(0.5, [0, 0.1, 0.2], []), torch.tensor([1, 2]))

    def watched(xt, time):
        seen.append(xt)
        return model(xt, time)

    rest = Process(PROCESS.alpha_bar[: t + 1], PROCESS.timesteps[: t + 1])
    seen.append(sample_ddpm(watched, X, rest, no_noise, clip=False))
    assert_close(seen[1].flatten(), torch.tensor(mean), rtol=0, atol=5e-6)


def test_the_noise_of_a_step_has_the_variance_beta():
    assert_close(PROCESS.betas[[500, 999]].sqrt().float(), torch.tensor([0.1002994, 0.1414213]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "method", "omega", "drawn", "calls"),
    [
        (1000, "cond", 0, [-0.1590864, -0.3222913], 2),
        (1000, "cfg", 1.5, [-0.4000326, -0.8041829], 4),
        (1000, "uncond", 0, [0.0015444, -0.0010296], 2),
        (10, "cond", 0, [0.1461970, -0.2167715], 2),
        (10, "cfg", 1.5, [0.0790869, -0.3509918], 4),
    ],
)
def test_a_whole_chain_ends_where_the_published_one_does(steps, method, omega, drawn, calls):
    """One call a step, with guidance of twice the size, where the published code calls twice."""
    sizes = []
    model = guided(method, omega, stub(0.9, [0, 0.1, 0.2], sizes), torch.tensor([1, 2]))
    process, xt = linear_process(steps, 1e-4, 0.02), torch.tensor([0.3, -0.2]).view(2, 1, 1, 1)
    x0 = sample_ddpm(model, xt, process, lambda: torch.zeros(2, 1, 1, 1), clip=False)
    assert_close(x0.flatten(), torch.tensor(drawn), rtol=0, atol=5e-6)
    assert sizes == [calls] * steps


def test_the_fast_solver_follows_the_exact_path_of_gaussian_data():
    """Of data N(0, s^2), noise x ends at x s / sqrt(alpha_bar s^2 + 1 - alpha_bar); DDIM misses it by 6 %."""
    s2, alpha_bar = 0.25, PROCESS.alpha_bar

    def model(xt, t):
        a = alpha_bar[t].float().view(-1, 1, 1, 1)
        return (1 - a).sqrt() * xt / (a * s2 + 1 - a)

    config = SimpleNamespace(beta_start=1e-4, beta_end=0.02, clip_x0=False)
    xt = torch.linspace(-2, 2, 4).view(4, 1, 1, 1)
    x0 = Drawing(xt, None).follow(model, PROCESS, Sampling("50", "dpmpp"), config)
    exact = xt * math.sqrt(s2 / (alpha_bar[-1] * s2 + 1 - alpha_bar[-1]))
    assert_close(x0, exact.float(), rtol=1e-3, atol=0)


# ---------------------------------------------------------------------- optimisation


def test_the_rate_rises_over_five_thousand_steps_from_nothing():
    config = TrainConfig(lr=2e-4, steps=10_000, warmup_steps=5000)
    assert [config.learning_rate(step, 100) for step in (0, 1, 5000, 9999)] == pytest.approx([0, 4e-8, 2e-4, 2e-4])
