"""ControlNet's DDIM as ESCORT uses it (arXiv:2311.18266): card 8.8, 8.9 and a sampler written by hand."""

import pytest
import torch

from models.latent.control import load_controlnet
from tests.support.tiny_controlnet import tiny_controlnet_folders
from utils.training import seeding

ALPHA_BAR = {1: 0.998296, 51: 0.950524, 951: 0.008155, 981: 0.005776}


@pytest.fixture(scope="module")
def model():
    return load_controlnet(*tiny_controlnet_folders(), offline=True)


def edge_maps(count: int, side: int = 16):
    return torch.rand(count, side, side, generator=seeding.generator("edges")) < 0.3


def images(model, edges, seeds, prompts=("a photo of dog",), steps=20, guidance=9.0, strength=1.0):
    """Before rounding."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompts, negative = model.embed(list(prompts)), model.embed(["row"])
    return model.draw(edges, prompts, negative, generators, steps, guidance, strength)


@pytest.mark.parametrize(("steps", "times"), [(20, range(951, 0, -50)), (50, range(981, 0, -20))])
def test_time_steps_are_the_references(model, steps, times):
    model.pipeline.scheduler.set_timesteps(steps)
    assert model.pipeline.scheduler.timesteps.tolist() == list(times)


def test_noise_levels_are_the_references(model):
    scheduler = model.pipeline.scheduler
    found = scheduler.alphas_cumprod[list(ALPHA_BAR)]  # in float32, which at 981 is half of the last digit off
    torch.testing.assert_close(found, torch.tensor(list(ALPHA_BAR.values())), rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.final_alpha_cumprod, torch.tensor(0.99914998), rtol=0, atol=1e-7)


@torch.no_grad()
def sample_by_hand(model, edges, seed, prompt, negative, steps, guidance, strength):
    """Song et al. (2021), Eq. 12 without noise; Ho & Salimans (2022), Eq. 6, in the form of the reference."""
    unet, vae, control = model.pipeline.unet, model.pipeline.vae, model.controlnet
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()
    hint = edges[None, None].float().repeat(1, 3, 1, 1)

    def noise(x, t, text):
        context = model.embed([text])
        down, mid = control(x, t, context, hint, return_dict=False)
        down, mid = [strength * value for value in down], strength * mid
        return unet(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample

    x = torch.randn(1, 4, edges.shape[0] // 2, edges.shape[1] // 2, generator=torch.Generator().manual_seed(seed))
    jump = 1000 // steps
    for t in reversed(range(1, 1000, jump)):
        now, before = alpha_bar[t], alpha_bar[max(t - jump, 0)]
        away = noise(x, t, negative)
        e = away + guidance * (noise(x, t, prompt) - away)
        x0 = (x - (1 - now).sqrt() * e) / now.sqrt()
        x = before.sqrt() * x0 + (1 - before).sqrt() * e
    return vae.decode(x / 0.18215).sample


@pytest.mark.parametrize(("height", "steps", "guidance", "strength"), [(16, 20, 9.0, 1.0), (24, 5, 2.0, 0.5)])
def test_images_are_those_of_a_sampler_written_by_hand(model, height, steps, guidance, strength):
    edges = edge_maps(1, 24)[:, :height, :16]
    expected = sample_by_hand(model, edges[0], 3, "a photo of dog", "row", steps, guidance, strength)
    found = images(model, edges, [3], ["a photo of dog"], steps, guidance, strength)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_gives_the_images_of_single_calls(model):
    edges, prompts = edge_maps(2), ["a photo of dog", "a sculpture"]
    singles = [images(model, edges[i : i + 1], [i + 7], prompts[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(images(model, edges, [7, 8], prompts), torch.cat(singles), rtol=1e-5, atol=1e-5)


def test_a_seed_gives_the_same_image_twice_and_another_seed_another(model):
    first, again, other = (images(model, edge_maps(1), [seed], steps=2) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01


def test_without_strength_the_edges_do_not_count(model):
    both = edge_maps(1), ~edge_maps(1)
    off, on = ([images(model, edges, [0], steps=2, strength=strength) for edges in both] for strength in (0.0, 1.0))
    assert torch.equal(*off)
    assert (on[0] - on[1]).abs().max() > 0.001


def test_the_control_works_in_the_unconditional_branch_too(model):
    # Equal texts in both branches cancel the guidance, unless only one of them sees the edges.
    pair = [images(model, edge_maps(1), [0], ["row"], steps=2, guidance=guidance) for guidance in (9.0, 1.0)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
