"""Numbers of GUIDE's card, section 9, P1 to P6: made by the reference code or worked by hand.

Fixture of P3: four pixels; eps(x, t) = sqrt(1 - alpha_bar_t) x; six linear classes of which 0 and 1 are old, 2 and 3
new, 4 and 5 unseen. The previous classifier is the current one seen on -x0.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from learners.guide.guidance import log_likelihood
from synth import build_source_config
from synth.diffusion import Process, linear_process, respace
from synth.samplers import Bend, sample_ddim

ROWS = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 2, 2.0]])
BIAS = torch.tensor([0, 0.1, 0.2, -0.1, 0.3, 0.5])
PROCESS = linear_process()
DDIM50 = respace(PROCESS, "ddim50")


def logits(x0):
    return x0.flatten(1) @ ROWS.T + BIAS


OWN = {"use_old_grad": False, "negate_old_grad": False, "guid_to_new_classes": True, "trim_logits": True}
VARIANTS = {
    "guide": {},
    "guide untrimmed": {"trim_logits": False},
    "away current": {"guid_to_new_classes": False},
    "toward previous": {"use_old_grad": True},
    "away previous": {"use_old_grad": True, "negate_old_grad": True},
}


def shrink(xt, t):
    return (1 - PROCESS.alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1) * xt


def guide_of(variant, labels, scale):
    """Classes 0 and 1 are old, 2 and 3 new."""
    if variant == "unguided":
        return None
    chosen, labels = SimpleNamespace(**OWN | VARIANTS[variant]), torch.tensor(labels)
    sign = -1 if chosen.use_old_grad else 1
    return Bend(lambda x0: scale * log_likelihood(chosen, logits(sign * x0), labels, num_old=2, num_seen=4))


def images(*rows):
    return torch.tensor(rows).view(len(rows), 1, 2, 2)


def assert_rows(actual, *rows):
    assert_close(actual.flatten(1), torch.tensor(rows, dtype=torch.float32), rtol=0, atol=2e-5)


def step_from_500(model, xt, guide):
    """The guided x0 of one ddim50 step at t = 500 and the next xt, at t = 480."""
    seen = []

    def watched(xt, t):
        seen.append(xt.detach())
        return model(xt, t)

    sample_ddim(watched, xt, Process(PROCESS.alpha_bar[[480, 500]], torch.tensor([480, 500])), guide)
    last = Process(PROCESS.alpha_bar[[500]], torch.tensor([500]))  # the last step returns x0 itself
    return sample_ddim(model, xt, last, guide), seen[1]


# ---------------------------------------------------------------------- P1, P2


def test_p1_schedule():
    betas = {0: 1e-3, 1: 0.001019019, 500: 0.010509510, 999: 0.02}
    alpha_bar = {
        0: 0.999, 1: 0.997982, 20: 0.97530112, 100: 0.82098200, 250: 0.42767298, 500: 0.05538883,
        750: 2.157752e-3, 980: 3.752983e-5, 996: 2.725270e-5, 999: 2.565152e-5,
    }  # fmt: skip
    assert {t: PROCESS.betas[t].item() for t in betas} == pytest.approx(betas, rel=1e-6)
    assert {t: PROCESS.alpha_bar[t].item() for t in alpha_bar} == pytest.approx(alpha_bar, rel=1e-6)
    assert DDIM50.betas[[0, 25, 49]].tolist() == pytest.approx([1e-3, 0.18750941, 0.32496804], rel=1e-6)  # of P2


@pytest.mark.parametrize(
    ("steps", "first", "last", "alpha_bar"),
    # GUIDE: betas from 0.001 to 0.02 times 1000 / diffusion_steps; the products were taken in NumPy, float64
    [(1000, 0.001, 0.02, 2.565152e-5), (100, 0.01, 0.2, 1.255497e-05), (250, 0.004, 0.08, 2.054298e-05)],
)
def test_p1_a_shorter_schedule_has_larger_betas(steps, first, last, alpha_bar):
    config = build_source_config({"name": "ddpm", "diffusion_steps": steps})
    process = linear_process(steps, config.beta_start, config.beta_end)
    assert process.betas[[0, -1]].tolist() == pytest.approx([first, last], rel=1e-9)
    assert process.alpha_bar[-1].item() == pytest.approx(alpha_bar, rel=1e-6)
    said = build_source_config({"name": "ddpm", "diffusion_steps": steps, "beta_end": 0.02})
    assert (said.beta_start, said.beta_end) == (0.001, 0.02)  # a file that gives betas says all of its schedule


@pytest.mark.parametrize(
    ("spacing", "first", "last"),
    [
        ("ddim50", [0, 20, 40], [960, 980]),
        ("ddim100", [0, 10, 20], [980, 990]),
        ("ddim250", [0, 4, 8], [992, 996]),
        ("ddim25", [0, 40], [960]),
        ("ddim30", [0, 34], [986]),
        ("ddim40", [0, 25], [975]),
        ("250", [0, 4, 8, 12, 16, 20], [979, 983, 987, 991, 995, 999]),  # without the prefix: from end to end
        ("50", [0, 20, 41, 61, 82, 102], [979, 999]),
        ("", [0, 1, 2], [998, 999]),  # the parser's default: all of them
    ],
)
def test_p2_kept_time_steps(spacing, first, last):
    kept = respace(PROCESS, spacing).timesteps.tolist()
    assert len(kept) == int(spacing.removeprefix("ddim") or 1000)
    assert (kept[: len(first)], kept[-len(last) :]) == (first, last)


# ---------------------------------------------------------------------- P3, P4


@pytest.mark.parametrize(("variant", "gradient", "guided_x0", "following"), [
    ("guide", [-0.0563697, -0.0437682, 0.1482286, -0.0480909],
     [0.0045493, -0.3231840, 0.6504931, -0.0376735], [0.4967298, -1.0020487, 1.5076050, 0.2472725]),
    ("away current", [-0.1789784, 0.0437682, 0.0871193, 0.0480909],
     [-0.2415063, -0.1475124, 0.5278563, 0.1553477], [0.4900010, -0.9972447, 1.5042512, 0.2525509]),
    ("toward previous", [-0.1438820, 0.1438820, 0, 0],
     [-0.1710737, 0.0533996, 0.3530221, 0.0588371], [0.4919271, -0.9917504, 1.4994700, 0.2499117]),
    ("away previous", [0.1438820, -0.1438820, 0, 0],
     [0.4064218, -0.5240960, 0.3530221, 0.0588371], [0.5077196, -1.0075430, 1.4994700, 0.2499117]),
    ("unguided", [0, 0, 0, 0],
     [0.1176741, -0.2353482, 0.3530221, 0.0588371], [0.4998234, -0.9996468, 1.4994700, 0.2499117]),
])  # fmt: skip
def test_p3_one_guided_step(variant, gradient, guided_x0, following):
    x0, xt = step_from_500(shrink, images([0.5, -1, 1.5, 0.25]), guide_of(variant, [0], 0.5))
    assert_rows(x0, guided_x0)
    assert_rows(xt, following)
    plain, alpha_bar = torch.tensor([0.1176741, -0.2353482, 0.3530221, 0.0588371]), PROCESS.alpha_bar[500].item()
    assert_rows((x0.flatten() - plain)[None] * alpha_bar**0.5 / (1 - alpha_bar) / 0.5, gradient)


def test_p4_the_clamp_gates_the_gradient_and_the_guided_image_is_not_clamped_again():
    x0, xt = step_from_500(lambda xt, t: xt * 0, images([0.1, -0.2, 0.3, 0.05]), guide_of("guide", [0], 0.5))
    assert_rows(x0, [-1.599878, -1.475278, 1, -1.268982])
    assert_rows(xt, [0.0555699, -0.2389859, 0.3253098, 0.0149583])


# ---------------------------------------------------------------------- P5, P6


@pytest.mark.parametrize(
    ("variant", "scale", "first", "second"),
    [
        ("unguided", 0, [0.4797953, -0.9595907, 1, 0.2398977], [-1, 0.7196931, -0.4797953, 1]),
        ("guide", 0.0, [0.4797953, -0.9595907, 1, 0.2398977], [-1, 0.7196931, -0.4797953, 1]),
        ("guide", 0.5, [0.3670479, -1, 1, 0.1488398], [-1, 0.5712578, -0.5331917, 1]),
        ("guide", 5.0, [-0.4289702, -1, 1, -0.5267281], [-1, -0.4354936, -0.9632355, 1]),
        ("guide untrimmed", 0.5, [0.3857993, -1, 1, -0.2770785], [-1, 0.5968665, -0.8871641, 1]),
        ("away current", 0.5, [0.0867677, -0.8908058, 1, 0.3373924], [-1, 0.3619845, -0.3814414, 1]),
        ("toward previous", 0.5, [0.1559648, -0.6357597, 1, 0.2398977], [-1, 0.3701589, -0.4797953, 1]),
        ("away previous", 0.5, [0.8392565, -1, 1, 0.2398977], [-1, 1, -0.4797953, 1]),
    ],
)
def test_p5_whole_trajectories(variant, scale, first, second):
    start = images([0.5, -1, 1.5, 0.25], [-2, 0.75, -0.5, 3])
    assert_rows(sample_ddim(shrink, start, DDIM50, guide_of(variant, [0, 1], scale)), first, second)


def test_p6_a_guide_of_scale_zero_changes_nothing_but_last_bits():
    start = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def wavy(xt, t):
        return torch.sin(3 * xt + t.view(-1, 1, 1, 1) / 200)

    plain = sample_ddim(wavy, start, DDIM50)
    assert_close(sample_ddim(wavy, start, DDIM50, guide_of("guide", [0, 1] * 4, 0.0)), plain, rtol=0, atol=1e-4)
    assert_close(sample_ddim(wavy, start, DDIM50), plain, rtol=0, atol=0)
