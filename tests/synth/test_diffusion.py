"""The mathematics of diffusion against closed forms and against diffusers' schedulers."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn
from torch.testing import assert_close

from synth.diffusion import Process, add_noise, classifier_free, linear_process, noise_prediction_loss, respace
from synth.samplers import Bend, _last_variance, sample_ddim, sample_ddpm
from utils.run.errors import ConfigError

BETAS = {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 2e-2, "timestep_spacing": "leading"}


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def wavy(xt, t):
    """Some noise predictor that depends on image and time, with predictions beyond the clamp."""
    return torch.sin(2 * xt + t.view(-1, 1, 1, 1) / 300) + 0.3 * xt.flip(-1)


def test_alpha_bar_falls_and_betas_are_the_schedule():
    process = linear_process(50, 0.01, 0.2)
    assert_close(process.betas, torch.linspace(0.01, 0.2, 50, dtype=torch.float64))
    assert bool((process.alpha_bar.diff() < 0).all())
    assert_close(process.alpha_bar_prev[1:], process.alpha_bar[:-1])
    assert process.alpha_bar_prev[0] == 1


@pytest.mark.parametrize("spacing", ["ddim50", "50", "ddim1", 1, 2, 1000, "1000", "ddim1000"])
def test_respacing_keeps_alpha_bar_and_the_betas_follow(spacing):
    process = linear_process()
    kept = respace(process, spacing)
    assert len(kept) == int(str(spacing).removeprefix("ddim")) and bool((kept.timesteps.diff() > 0).all())
    assert_close(kept.alpha_bar, process.alpha_bar[kept.timesteps], rtol=0, atol=0)
    assert_close((1 - kept.betas).cumprod(0), kept.alpha_bar)


def test_a_subset_can_be_thinned_again():
    once, twice = respace(linear_process(), "ddim50"), respace(respace(linear_process(), "ddim250"), "ddim50")
    assert_close(twice.timesteps, torch.arange(0, 1000, 20))
    assert_close(twice.alpha_bar, once.alpha_bar)


@pytest.mark.parametrize(
    ("spacing", "said"),
    [
        ("ddim60", "no integer stride through 1000 steps gives 60"),  # 17 gives 59, 16 gives 63
        *((count, "use 1 to 1000") for count in ("ddim0", "0", 1001, "ddim2000", "-5", "2.5", "250,250", "9" * 5000)),
        *((text, "use 1 to 1000") for text in ("ddim", "fast", "²", "ddim²", "ddim５", "ddim٣", "ddim1e3", "DDIM5")),
    ],
)
def test_a_spacing_that_cannot_be_is_a_config_error_that_names_its_key(spacing, said):
    with pytest.raises(ConfigError, match=f"synth.train_respacing=.*{said}"):
        respace(linear_process(), spacing, "synth.train_respacing")


def test_noise_that_leaves_nothing_of_an_image_is_a_config_error():
    with pytest.raises(ConfigError, match=r"beta_end=0\.9, diffusion_steps=1000: too much noise"):
        linear_process(1000, 1e-3, 0.9)


def test_noise_is_added_as_diffusers_adds_it():
    x0, eps, t = noise(4, 3, 5, 5), noise(4, 3, 5, 5, seed=1), torch.tensor([0, 10, 500, 999])
    expected = DDPMScheduler(**BETAS).add_noise(x0, eps, t)
    assert_close(add_noise(linear_process(), x0, t, eps), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["1000", "ddim250"])
def test_the_loss_is_the_hand_written_one_at_original_time_steps(spacing):
    process, x0 = respace(linear_process(), spacing), noise(6, 3, 4, 4).clamp(-1, 1)
    torch.manual_seed(3)
    loss = noise_prediction_loss(wavy, process, x0)
    torch.manual_seed(3)
    index, eps = torch.randint(len(process), (6,)), torch.randn(6, 3, 4, 4)
    t = index * (1000 // len(process))
    alpha_bar = (1 - torch.linspace(1e-3, 2e-2, 1000, dtype=torch.float64)).cumprod(0)[t].float().view(6, 1, 1, 1)
    predicted = wavy(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps, t)
    assert_close(loss, ((predicted - eps) ** 2).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("guidance", "of_conditional", "of_unconditional"),
    [(0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (3.0, 3.0, -2.0)],  # 0 is unconditional, 1 the plain conditional
)
def test_classifier_free_guidance_extrapolates_between_two_predictions(guidance, of_conditional, of_unconditional):
    xt, t = noise(2, 1, 4, 4), torch.tensor([5, 7])
    model = classifier_free(wavy, lambda xt, t: xt * 0.1, guidance)
    assert_close(model(xt, t), of_conditional * wavy(xt, t) + of_unconditional * xt * 0.1)


def test_a_guide_leaves_no_gradient_and_no_graph_behind():
    network = nn.Conv2d(1, 1, 3, padding=1)
    process, bend = respace(linear_process(), 4), Bend(lambda x0: x0.flatten(1).sum(1))
    with torch.no_grad():  # as `generate` is called
        sample = sample_ddim(lambda xt, t: network(xt), noise(2, 1, 4, 4), process, bend)
    assert not sample.requires_grad and network.weight.grad is None


@pytest.mark.parametrize("steps", [10, 50, 100, 250])
def test_ddim_equals_diffusers(steps):
    scheduler = DDIMScheduler(**BETAS, steps_offset=0, set_alpha_to_one=True, clip_sample=True)
    scheduler.set_timesteps(steps)
    process, start = respace(linear_process(), f"ddim{steps}"), noise(3, 3, 4, 4)
    assert scheduler.timesteps.tolist() == process.timesteps.flip(0).tolist()
    xt = start
    for t in scheduler.timesteps:
        xt = scheduler.step(wavy(xt, t.expand(3)), t, xt, use_clipped_model_output=True).prev_sample
    assert_close(sample_ddim(wavy, start, process), xt, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("total", "steps"), [(20, 20), (1000, 50)])
def test_ancestral_sampling_equals_diffusers(total, steps):
    scheduler = DDPMScheduler(total, **BETAS, variance_type="fixed_large", clip_sample=True)
    scheduler.set_timesteps(steps)
    process, start, draw = respace(linear_process(total), f"ddim{steps}"), noise(3, 3, 4, 4), generator(1)
    xt = start
    for t in scheduler.timesteps:
        xt = scheduler.step(wavy(xt, t.expand(3)), t, xt, generator=draw).prev_sample
    draw = generator(1)
    ours = sample_ddpm(wavy, start, process, lambda: torch.randn(3, 3, 4, 4, generator=draw))
    assert_close(ours, xt, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ancestral_sampling_asks_for_noise_at_every_step_but_the_last(steps):
    asked = []
    sample_ddpm(wavy, noise(1, 1, 2, 2), linear_process(steps), lambda: asked.append(1) or torch.zeros(1, 1, 2, 2))
    assert len(asked) == steps - 1


@pytest.mark.parametrize("sample", [sample_ddim, lambda *args: sample_ddpm(*args, lambda: torch.zeros(2, 1, 4, 4))])
def test_the_network_is_told_original_time_steps_from_the_noisiest_on_and_builds_no_graph(sample):
    network, told = nn.Conv2d(1, 1, 3, padding=1), []

    def model(xt, t):
        told.append((t.tolist(), torch.is_grad_enabled()))
        return network(xt)

    assert not sample(model, noise(2, 1, 4, 4), respace(linear_process(), "ddim4")).requires_grad
    assert told == [([t, t], False) for t in (750, 500, 250, 0)]


def test_one_step_gives_the_clamped_clean_image():
    process = Process(torch.tensor([0.5], dtype=torch.float64), torch.tensor([9]))
    xt = torch.tensor([0.3, -3.0]).view(2, 1, 1, 1)
    assert_close(sample_ddim(lambda xt, t: xt * 0, xt, process).flatten(), torch.tensor([0.3 * 2**0.5, -1.0]))


def test_a_guide_moves_the_mean_of_ancestral_sampling_by_variance_times_gradient():
    process, start = linear_process(3), noise(2, 1, 2, 2)
    slope = torch.tensor([0.5, -2.0]).view(-1, 1, 1, 1)
    sample = partial(sample_ddpm, lambda xt, t: xt * 0, start * 0.1)
    last = Process(process.alpha_bar[:1], process.timesteps[:1])  # needs no noise
    plain, bent = sample(last, None), sample(last, None, Bend(lambda x0: (slope * x0).flatten(1).sum(1)))
    gradient = slope / process.alpha_bar[0].sqrt()  # of x0 = xt / sqrt(alpha_bar), where the clamp lets it through
    assert_close(bent - plain, (process.betas[0] * gradient).float().expand_as(plain), rtol=1e-4, atol=1e-7)


def test_the_last_guided_step_takes_the_posterior_variance_of_the_step_before():
    scheduler = DDPMScheduler(**BETAS, variance_type="fixed_small")
    assert _last_variance(linear_process()) == pytest.approx(scheduler._get_variance(1).item(), rel=1e-4)
