"""Our small latent diffusion model: the contract of `LatentDiffusion`, its own files, and what does not fit."""

import json

import pytest
import torch
from torch.testing import assert_close

from models.frozen import weight_bytes
from models.latent.small import SmallLDM
from tests.support.tiny_inversion import tiny_config, tiny_model
from utils.run.errors import ConfigError, WeightsError
from utils.run.files import load_tensors, save_tensors


def pixels(count=3, channels=1, side=8):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("shape", "widths", "latent"), [
    ((1, 8, 8), [8], (4, 8, 8)),  # one level: no smaller latent, only other channels
    ((1, 8, 8), [8, 8], (4, 4, 4)),
    ((3, 32, 32), [8, 8, 8], (4, 8, 8)),
])  # fmt: skip
def test_each_level_of_the_autoencoder_halves_the_latent(shape, widths, latent):
    model = SmallLDM(shape, ["a"], tiny_config(vae_channels=widths)).freeze()
    moments = model.moments(pixels(2, shape[0], shape[1]))
    assert model.latent_shape == latent and moments.shape == (2, 2 * latent[0], *latent[1:])
    assert model.decode(moments[:, : latent[0]]).shape == (2, *shape)
    assert (model.image_channels, model.image_size) == shape[:2]


def test_latents_are_scaled_on_the_way_in_and_back_on_the_way_out():
    plain, scaled = tiny_model(), tiny_model()
    scaled.scale.fill_(0.25)
    assert_close(scaled.moments(pixels()), plain.moments(pixels()) * 0.25)
    latents = torch.randn(2, 4, 4, 4)
    assert_close(scaled.decode(latents * 0.25), plain.decode(latents))


def test_the_context_is_the_vector_in_tokens_and_zeros_for_an_empty_prompt():
    vectors = torch.arange(16.0).view(2, 8)
    context = tiny_model().context(["a photo of *", ""], vectors)
    assert_close(context[0], torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]]))
    assert_close(context[1], torch.zeros(2, 4))
    assert_close(tiny_model().context([""]), torch.zeros(1, 2, 4))


def test_words_are_refused_and_the_search_starts_at_the_mean_of_the_known_vectors():
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"reads no text, so 'a photo of apple' means nothing"):
        model.context(["", "a photo of apple"])
    assert_close(model.initial_vector("sculpture"), (model.denoiser.table[0] + model.denoiser.table[1]) / 2)


def test_gradients_reach_the_vectors_and_nothing_else():
    model, vectors = tiny_model(), torch.randn(3, 8, requires_grad=True)
    zt, t = torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999])
    model.predict(zt, t, model.context(["*"] * 3, vectors)).square().mean().backward()
    assert bool((vectors.grad.abs().sum(1) > 0).all())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_a_place_chooses_among_the_tokens():
    model, zt, t = tiny_model(), torch.randn(1, 4, 4, 4), torch.tensor([500])
    tokens = torch.randn(1, 2, 4) * 5
    swapped, same = model.predict(zt, t, tokens.flip(1)), model.predict(zt, t, tokens)
    repeated = model.predict(zt, t, tokens[:, :1].expand(-1, 2, -1))
    assert_close(swapped, same)  # tokens are a set
    assert (repeated - same).abs().max() > 1e-4


def test_a_model_comes_back_from_its_folder_with_the_same_bits(tmp_path):
    model = tiny_model(prediction_type="v_prediction")
    model.scale.fill_(0.5)
    model.save(tmp_path)
    copy = SmallLDM.load(tmp_path)
    assert copy.fingerprint() == model.fingerprint() != tiny_model(seed=1).fingerprint()
    assert (copy.schedule, copy.class_names) == (model.schedule, ["first", "second"])
    assert not copy.training and not any(parameter.requires_grad for parameter in copy.parameters())
    assert weight_bytes(copy) == sum(value.numel() * 4 for value in model.state_dict().values())


def test_a_folder_without_a_model_is_named_and_weights_that_do_not_fit_are_counted(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere' holds no SmallLDM .*: train one"):
        SmallLDM.load(tmp_path / "nowhere", "train one")
    tiny_model().save(tmp_path)
    weights = load_tensors(tmp_path / "model.safetensors")
    save_tensors(tmp_path / "model.safetensors", {key: weights[key] for key in list(weights)[3:]})
    with pytest.raises(WeightsError, match="3 missing"):
        SmallLDM.load(tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    ({"num_moons": 2}, "num_moons"),  # nobody knows it
    ({"num_heads": "two"}, "num_heads='two'"),
    ({"num_tokens": 3}, "8 is not a multiple of num_tokens=3"),
    ({"image_shape": [1, 8]}, "not enough values"),
    ({"image_shape": [0, 8, 8]}, "does not fit the model.json beside it"),
    ({"class_names": None}, "holds no SmallLDM"),
    (["model"], "must be a mapping, not list"),
])  # fmt: skip
def test_a_damaged_description_is_refused_in_one_line(tmp_path, change, said):
    tiny_model().save(tmp_path)
    content = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(content | change if isinstance(change, dict) else change))
    with pytest.raises(WeightsError, match=said) as caught:
        SmallLDM.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "said"), [
    ({"vae_channels": [8, 8, 8]}, "halve an image 3 times, so its side must be a multiple of 8, not 12"),
    ({"vae_channels": [9]}, r"vae_channels=\[9\]: 9 is not a multiple of norm_num_groups=2"),
    ({"block_out_channels": [8, 9]}, r"9 is not a multiple of norm_num_groups=2"),
    ({"block_out_channels": [8, 10], "num_heads": 4}, r"10 is not a multiple of num_heads=4"),
    ({"num_tokens": 3}, "vector_size=8: 8 is not a multiple of num_tokens=3"),
    ({"attention_levels": [2]}, r"attention_levels=\[2\] do not exist: levels are 0 to 1"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_named_by_key(changes, said):
    with pytest.raises(ConfigError, match=said):
        SmallLDM((1, 12, 12), ["a"], tiny_config(**changes))
