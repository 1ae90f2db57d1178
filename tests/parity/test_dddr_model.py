"""DDDR's frozen text-to-image model (arXiv:2409.01128) against diffusers' pipelines and formulas written by hand."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from models.files.diffusers_folder import LAYOUTS
from models.files.diffusers_parts import _read_schedule
from models.latent.text_to_image import TextToImage, load_text_to_image
from synth.diffusion import classifier_free
from synth.prompts import TRAIN_TEMPLATES
from synth.samplers import SAMPLERS, sample_scheduled, sample_scheduler
from tests.support.tiny_ldm import tiny_ldm, tiny_ldm_folder, tiny_stable_diffusion
from utils.training import seeding

PIPELINES = {"ldm": tiny_ldm, "sd": partial(tiny_stable_diffusion, "epsilon"), "sd_v": tiny_stable_diffusion}
PROMPT = "a photo of *"


@pytest.fixture(scope="module", params=PIPELINES)
def pair(request, tmp_path_factory):
    """diffusers' pipeline, and our model read from the folder that it wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = PIPELINES[request.param]()
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, load_text_to_image(str(folder))


def part(pipeline, name: str):
    """The VAE or the text encoder of a pipeline, whatever it calls them."""
    return getattr(pipeline, getattr(LAYOUTS[type(pipeline).__name__], name))


def search(model: TextToImage, steps: int):
    """AdamW of DDDR on two vectors that start as the same word, on fixed latents and times."""
    vectors = torch.nn.Parameter(model.initial_vector("sculpture").repeat(2, 1))
    optimizer = torch.optim.AdamW([vectors], lr=0.02)
    noise = torch.randn(2, *model.latent_shape, generator=seeding.generator("noise"))
    for _ in range(steps):
        optimizer.zero_grad()
        context = model.context([PROMPT] * 2, vectors)
        F.mse_loss(model.predict(torch.ones_like(noise), torch.tensor([10, 900]), context), noise).backward()
        optimizer.step()
    return vectors


def test_only_the_vectors_are_trained_and_every_row_goes_its_own_way_from_the_models_own_embedding(pair):
    pipeline, model = pair
    before = seeding.hash_tensors(model.state_dict())
    token = pipeline.tokenizer("sculpture", add_special_tokens=False).input_ids
    own = part(pipeline, "text_encoder").get_input_embeddings().weight[token[0]]
    torch.testing.assert_close(search(model, steps=0).data, own.repeat(2, 1).data, rtol=0, atol=0)
    vectors = search(model, steps=3)
    assert len({*vectors.norm(dim=1).tolist(), own.norm().item()}) == 3
    assert vectors.grad is not None and vectors.grad.abs().sum(1).min() > 0
    assert [name for name, weight in model.named_parameters() if weight.grad is not None] == []
    assert seeding.hash_tensors(model.state_dict()) == before


def test_a_vector_changes_its_own_prompt_and_nothing_else(pair):
    _, model = pair
    one, other = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))
    told, told_other = model.context([PROMPT, ""], one), model.context([PROMPT, ""], other)
    assert not torch.allclose(told[0], told_other[0])
    assert torch.equal(told[1], told_other[1])
    assert torch.equal(told[1:], model.context(["", ""])[1:])
    assert torch.equal(model.context([PROMPT]), model.context([PROMPT]))  # the hook is gone, and dropout is off
    assert not any(module.training for module in model.modules())
    vectors, prompts = torch.randn(3, 32), ["a photo of *", "* of a dog", "sculpture *"]  # classes can share a batch
    alone = [model.context([prompt], vector[None]) for prompt, vector in zip(prompts, vectors)]
    torch.testing.assert_close(model.context(prompts, vectors), torch.cat(alone))


def test_loss_is_the_error_computed_by_hand(pair):
    pipeline, model = pair
    z0, eps, vector = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(1, 32)
    alpha_bar, t = pipeline.scheduler.alphas_cumprod[[10, 900]].view(2, 1, 1, 1), torch.tensor([10, 900])
    zt = alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * eps
    velocity = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z0
    target = eps if model.schedule["prediction_type"] == "epsilon" else velocity
    with torch.no_grad():
        by_hand = (pipeline.unet(zt, t, in_vocabulary(pipeline, vector)).sample - target).square().mean()
        ours = F.mse_loss(model.predict(zt, t, model.context([PROMPT] * 2, vector.expand(2, -1))), target)
    torch.testing.assert_close(ours, by_hand)


def in_vocabulary(pipeline, vector):
    """The context of two prompts whose placeholder has this vector in the text encoder's own table."""
    table = part(pipeline, "text_encoder").get_input_embeddings().weight
    star = pipeline.tokenizer("*", add_special_tokens=False).input_ids[0]
    before = table.data[star].clone()
    table.data[star] = vector
    ids = pipeline.tokenizer([PROMPT] * 2, padding="max_length", max_length=77, return_tensors="pt").input_ids
    context = part(pipeline, "text_encoder")(ids)[0]
    table.data[star] = before
    return context


@pytest.mark.parametrize("guidance", [1.0, 10.0])
def test_images_are_those_of_the_librarys_pipeline(pair, guidance):
    pipeline, model = pair
    noise = torch.randn(1, *model.latent_shape, generator=seeding.generator("images"))
    theirs = pipeline(
        "a photo of a dog", num_inference_steps=4, guidance_scale=guidance, latents=noise.clone(), output_type="np",
        eta=0.0, height=model.image_size, width=model.image_size,
    ).images  # fmt: skip
    with torch.no_grad():
        context, nothing = model.context(["a photo of a dog"]), model.context([""])
        conditional, unconditional = (lambda zt, t, c=c: model.predict(zt, t, c) for c in (context, nothing))
        scheduler = sample_scheduler("ddim", model.schedule, 4)
        ours = model.decode(sample_scheduled(classifier_free(conditional, unconditional, guidance), noise, scheduler))
    expected = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-4)


# What the scheduler's file of Stable Diffusion 1.5 says, and what files of other models say beside it.
SD15 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
SPACED = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
KARRAS = {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True, "set_alpha_to_one": True}
BETWEEN = {"timestep_spacing": "linspace", "thresholding": True, "clip_sample": True}


@pytest.mark.parametrize("said", [{}, SPACED, KARRAS, BETWEEN, {"trained_betas": [0.01] * 1000}])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_stable_diffusion_is_drawn_by_the_librarys_schedulers_made_from_its_own_file(tmp_path, name, said):
    import diffusers

    config = SD15 | said
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    kind, own = SAMPLERS[name]
    # Where the file says no spacing, Euler's sampler visits whole steps here, as it always did.
    theirs = getattr(diffusers, kind).from_config((own if name == "euler" else {}) | config)
    theirs.set_timesteps(7)
    ours = sample_scheduler(name, _read_schedule(tmp_path), 7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=0)
    noise, times = torch.randn(2, 4, 8, 8, generator=seeding.generator("noise")), []
    theirs_zt = noise * theirs.init_noise_sigma
    for t in theirs.timesteps:
        model_input = theirs.scale_model_input(theirs_zt, t)
        theirs_zt = theirs.step(model_input / 2, t, theirs_zt).prev_sample
    found = sample_scheduled(lambda zt, t: times.append(t[0].item()) or zt / 2, noise, ours)
    torch.testing.assert_close(found, theirs_zt, rtol=0, atol=0)
    assert times == theirs.timesteps.tolist()


def test_latents_are_the_scaled_posterior(pair):
    pipeline, model = pair
    images = torch.rand(2, 3, model.image_size, model.image_size) * 2 - 1
    with torch.no_grad():
        posterior = part(pipeline, "vae").encode(images).latent_dist
    mean, std = model.moments(images).chunk(2, dim=1)
    torch.testing.assert_close(mean, 0.18215 * posterior.mean)
    torch.testing.assert_close(std, 0.18215 * (0.5 * posterior.logvar).exp())


def test_words_of_prompts_are_in_the_vocabulary():
    model = load_text_to_image(tiny_ldm_folder())
    tokenizer = model.tokenizer
    assert len(tokenizer) == model.text_encoder.config.vocab_size
    for word in ("*", "sculpture"):
        ids = tokenizer(word, padding="max_length", max_length=77).input_ids
        assert sum(token != tokenizer.pad_token_id for token in ids) == 3  # [CLS] word [SEP]
    tokens = tokenizer(list(TRAIN_TEMPLATES)).input_ids
    assert len(tokens) == 81
    assert sum(token == tokenizer.unk_token_id for row in tokens for token in row) == 0


def weights_of(build) -> int:
    """Number of weights of a network that is never filled."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in build().parameters())


def test_the_yaml_that_comes_with_us_describes_a_network_of_the_published_size():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as compvis
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    description = yaml.safe_load((Path(__file__).parents[2] / "exps" / "ldm" / "ldm_dddr.yaml").read_text())
    unet = compvis.create_unet_diffusers_config_from_ldm(description, {})
    vae = compvis.create_vae_diffusers_config_from_ldm(description, {})
    text = description["model"]["params"]["cond_stage_config"]["params"]
    bert = LDMBertConfig(d_model=text["n_embed"], encoder_layers=text["n_layer"])
    assert weights_of(lambda: UNet2DConditionModel.from_config(unet)) == 872_300_484
    assert weights_of(lambda: AutoencoderKL.from_config(vae)) == 83_653_863
    assert weights_of(lambda: LDMBertModel(bert)) == 581_994_042
