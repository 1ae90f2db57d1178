"""Stable Diffusion with a ControlNet: read from folders, the hub's cache and one file, or refused by name."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.frozen import weight_bytes
from models.latent.control import check_controlnet, load_controlnet
from models.latent.text_to_image import Placement
from tests.support.tiny_controlnet import (
    file_weights,
    narrow_stable_diffusion,
    save,
    tiny_controlnet_folders,
    write_file,
)
from tests.support.tiny_ldm import edit_weights, put_into_cache
from utils.run.errors import WeightsError

WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = {"steps": 2, "guidance": 9.0, "strength": 1.0}


@pytest.fixture(scope="module")
def model():
    return load_controlnet(*tiny_controlnet_folders(), offline=True)


@pytest.fixture
def copies(tmp_path):
    """Folders of base and control that a test may damage."""
    pair = zip(tiny_controlnet_folders(), ("base", "control"))
    return [Path(shutil.copytree(source, tmp_path / name)) for source, name in pair]


def inputs(model, side: int = 8, count: int = 1):
    edges = torch.rand(count, side, side, generator=torch.Generator().manual_seed(0)) < 0.3
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return edges, model.embed(["a photo of dog"] * count), model.embed([""]), generators


# ---------------------------------------------------------------------- what it gives


def test_images_have_the_edges_size_which_is_a_multiple_of_the_pixels_per_latent(model):
    edges, *rest = inputs(model, count=2)
    images = model.draw(edges[:, :, :6], *rest, **SETTINGS)
    assert (images.shape, images.dtype, model.image_channels) == ((2, 3, 8, 6), torch.float32, 3)
    for side in (9, 15):  # not shrunk in silence
        with pytest.raises(AssertionError):
            model.draw(*inputs(model, side), **SETTINGS)


def test_embeddings_are_clips_last_hidden_state_at_full_length_whatever_stands_beside_them(model):
    texts = ["a photo of dog", "row"]
    ids = model.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    expected = model.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(model.embed(texts), expected)
    torch.testing.assert_close(model.embed(["row"]), expected[1:])
    assert expected.shape == (2, 77, 32)


@sdpa_kernel(SDPBackend.MATH)  # flash attention in bf16 asks for kernels that not every CPU runs
def test_bf16_weights_halve_the_bytes_and_keep_the_fingerprint_and_nearly_the_images(model):
    half = load_controlnet(*tiny_controlnet_folders(), placement=Placement(dtype=torch.bfloat16), offline=True)
    full, rough = (each.draw(*inputs(each), **SETTINGS) for each in (model, half))
    torch.testing.assert_close(full, rough, rtol=0, atol=0.1)
    assert weight_bytes(half) * 2 == weight_bytes(model)
    assert half.fingerprint() == model.fingerprint()


def test_weights_are_all_those_of_the_files_with_nothing_left_to_train_and_no_dropout(model):
    paths = [path for folder in tiny_controlnet_folders() for path in Path(folder).rglob("*.safetensors")]
    assert weight_bytes(model) == sum(value.nbytes for path in paths for value in load_file(path).values())
    assert not any(value.requires_grad for value in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("path", ["control", "base/unet"])
def test_the_fingerprint_tells_weights_apart(model, copies, tmp_path, path):
    edit_weights(tmp_path / path / WEIGHTS, lambda weights: weights["conv_in.bias"].add_(1e-6))
    assert load_controlnet(*map(str, copies), offline=True).fingerprint() != model.fingerprint()


# ---------------------------------------------------------------------- folders and the hub


@pytest.mark.parametrize(("gone", "message"), [
    (f"base/unet/{WEIGHTS}", f"base is not a whole text-to-image model of diffusers, it lacks unet/{WEIGHTS}"),
    ("control/config.json", "control is not a whole ControlNet of diffusers, it lacks config.json: copy the files"),
    (f"control/{WEIGHTS}", f"control is not a whole ControlNet of diffusers, it lacks {WEIGHTS}: copy the files"),
])  # fmt: skip
def test_a_missing_file_is_named_with_its_folder(copies, tmp_path, gone, message):
    (tmp_path / gone).unlink()
    with pytest.raises(WeightsError, match=re.escape(message)):
        check_controlnet(*map(str, copies), offline=True)


@pytest.mark.parametrize(("change", "message"), [
    ({"base": "none"}, "base='none': there is no such file or folder. Put the weights there, or name another "
                       "control_sd15_canny.pth, a folder with model_index.json, or a hub id such as stable"),
    ({"controlnet": "none"}, "controlnet='none': there is no such file or folder. Put the weights there, or name "
                             "another folder with config.json, or a hub id such as lllyasviel/sd-controlnet-canny"),
    ({"base": "none.pth"}, "base='none.pth': there is no such file"),
])  # fmt: skip
@pytest.mark.parametrize("act", [check_controlnet, load_controlnet])
def test_a_name_of_nothing_is_an_error_that_says_what_would_do(act, change, message):
    base, controlnet = tiny_controlnet_folders()
    with pytest.raises(WeightsError, match=re.escape(message)):
        act(**({"base": base, "controlnet": controlnet} | change), offline=True)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_bias(path):
    edit_weights(path, lambda weights: weights.pop("controlnet_mid_block.bias"))


def for_another_base(path):
    from diffusers import ControlNetModel

    config = ControlNetModel.load_config(path.parent)
    ControlNetModel.from_config(config | {"cross_attention_dim": 64}).save_pretrained(path.parent)


@pytest.mark.parametrize(("damage", "message"), [
    (cut, "{folder} cannot be read as ControlNetModel"),
    (without_a_bias, "weights in {folder} are not .* 1 missing: controlnet_mid_block.bias"),  # not drawn at random
    (for_another_base, "its cross_attention_dim is 64, the base's 32"),
])  # fmt: skip
def test_a_controlnet_that_is_damaged_or_does_not_fit_is_refused(copies, damage, message):
    damage(copies[1] / WEIGHTS)
    with pytest.raises(WeightsError, match=message.format(folder=copies[1])):
        load_controlnet(*map(str, copies), offline=True)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of the hub with the base alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    put_into_cache(tmp_path, "base", tiny_controlnet_folders()[0])
    return tmp_path


def test_cached_models_are_read_without_asking_the_network(cache, monkeypatch, model):
    put_into_cache(cache, "control", tiny_controlnet_folders()[1])
    monkeypatch.setattr("models.files.diffusers_folder.hub_answers", None)
    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", None)
    found = load_controlnet("nobody/base", "nobody/control", offline=False)
    assert found.fingerprint() == model.fingerprint()


def test_a_model_that_may_be_fetched_is_not_missed_until_its_download_fails(cache, monkeypatch):
    def unreachable(*names, **options):
        raise OSError("no route")

    monkeypatch.setattr("models.files.diffusers_folder.hub_answers", lambda: True)
    monkeypatch.setattr("diffusers.ControlNetModel.from_pretrained", unreachable)
    check_controlnet("nobody/other", "nobody/control", offline=False)
    with pytest.raises(WeightsError, match="nobody/control cannot be read as ControlNetModel: OSError: no route"):
        load_controlnet("nobody/base", "nobody/control", offline=False)


# ---------------------------------------------------------------------- one file


@pytest.fixture(scope="module")
def networks():
    return narrow_stable_diffusion()


@pytest.fixture(scope="module")
def weights(networks):
    return file_weights(*networks)


def test_a_file_draws_the_images_of_the_folders_that_it_was_made_from(networks, weights, tmp_path):
    file = load_controlnet(**write_file(tmp_path, weights), offline=True)
    folders = load_controlnet(*save(*networks), offline=True)
    assert file.fingerprint() == folders.fingerprint()  # every weight, bit for bit
    first, second = [each.draw(*inputs(each, side=64), **SETTINGS) for each in (file, folders)]
    # Both readers lay the weights at other addresses, and another alignment may take another kernel.
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("control_model.zero_convs.3.0.bias", None, "1 missing: controlnet_down_blocks.3.bias"),
    ("control_model.extra", torch.zeros(1), "1 unexpected: control_model.extra"),
    ("control_model.input_blocks.0.0.weight", None, "no Stable Diffusion 1.x with a ControlNet: it has .* weights"),
    ("first_stage_model.decoder.conv_out.bias", torch.zeros(4), r"1 misshapen: decoder.conv_out.bias \(4,\)"),
    ("cond_stage_model.transformer.text_model.final_layer_norm.bias", None, "1 missing: .*final_layer_norm.bias"),
])  # fmt: skip
def test_a_file_with_a_weight_too_few_too_many_or_misshapen_is_refused(weights, tmp_path, key, value, message):
    changed = {name: tensor for name, tensor in (weights | {key: value}).items() if tensor is not None}
    with pytest.raises(WeightsError, match=message):
        load_controlnet(**write_file(tmp_path, changed), offline=True)


@pytest.mark.parametrize(("base", "control", "parts"), [
    ("a/base", "a/control", ["base='a/base'", "controlnet='a/control'", "lacks config.json", "models--a--control"]),
    ("nobody/base", None, ["controlnet='lllyasviel/sd-controlnet-canny': the cache {cache}"]),  # the published one
    ("gone.pth", None, ["base='gone.pth'", "tokenizer='openai/clip-vit-large-patch14' is no folder with a token"]),
    ("gone.pth", "a/control", ["base='gone.pth'", "holds a ControlNet of its own: leave controlnet out"]),
])  # fmt: skip
@pytest.mark.parametrize("act", [check_controlnet, load_controlnet])
def test_all_that_is_missing_offline_is_named_at_once_with_the_place_to_put_it(cache, act, base, control, parts):
    with pytest.raises(WeightsError, match="offline") as caught:
        act(base, control, offline=True)
    assert all(part.format(cache=cache) in str(caught.value) for part in parts)
