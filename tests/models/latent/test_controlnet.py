"""Stable Diffusion with a ControlNet: read from folders, the hub's cache and one file, or refused by name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.latent.control import EdgeSampling, check_controlnet, load_controlnet
from models.latent.text_to_image import Placement
from tests.support.tiny_controlnet import (
    file_weights,
    narrow_stable_diffusion,
    save,
    tiny_controlnet_folders,
    write_file,
)
from utils.data.transforms import to_uint8
from utils.run.errors import WeightsError

WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = EdgeSampling(steps=2, guidance=9.0, strength=1.0)


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


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------- what it gives


def test_images_are_uint8_of_the_edges_size(model):
    edges, *rest = inputs(model, count=2)
    images = model.draw(edges[:, :, :6], *rest, SETTINGS)
    assert (images.shape, images.dtype, model.image_channels) == ((2, 3, 8, 6), torch.uint8, 3)


def test_colours_are_rounded_to_the_nearest_grey_level(model):
    drawn, floats = model.draw(*inputs(model), SETTINGS), model.draw_floats(*inputs(model), SETTINGS)
    assert torch.equal(drawn, to_uint8(floats))


def test_embeddings_are_clips_last_hidden_state_at_full_length(model):
    texts, base = ["a photo of dog", "row"], model.base
    ids = base.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    expected = base.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(model.embed(texts), expected)
    assert expected.shape == (2, 77, 32)


def test_embeddings_are_independent_of_the_texts_beside_them(model):
    torch.testing.assert_close(model.embed(["a dog", "row"])[1:], model.embed(["row"]))


@pytest.mark.parametrize("side", [9, 15])
def test_a_size_between_latents_is_not_shrunk_in_silence(model, side):
    with pytest.raises(AssertionError):
        model.draw(*inputs(model, side), SETTINGS)


def test_bf16_weights_halve_the_bytes_and_keep_the_fingerprint_and_nearly_the_images(model):
    half = load_controlnet(*tiny_controlnet_folders(), placement=Placement(dtype=torch.bfloat16), offline=True)
    full, rough = (each.draw_floats(*inputs(each), SETTINGS) for each in (model, half))
    torch.testing.assert_close(full, rough, rtol=0, atol=0.1)
    assert half.frozen_bytes() * 2 == model.frozen_bytes()
    assert half.fingerprint() == model.fingerprint()


def test_frozen_bytes_are_those_of_the_files(model):
    paths = [path for folder in tiny_controlnet_folders() for path in Path(folder).rglob("*.safetensors")]
    assert model.frozen_bytes() == sum(value.nbytes for path in paths for value in load_file(path).values())


def test_nothing_is_left_to_train_and_no_dropout_is_on(model):
    networks = [model.controlnet, model.base.networks]
    assert not any(value.requires_grad for network in networks for value in network.parameters())
    assert not any(module.training for network in networks for module in network.modules())


@pytest.mark.parametrize("path", ["control", "base/unet"])
def test_the_fingerprint_tells_weights_apart(model, copies, tmp_path, path):
    weights = load_file(tmp_path / path / WEIGHTS)
    weights["conv_in.bias"] += 1e-6
    save_file(weights, tmp_path / path / WEIGHTS, metadata={"format": "pt"})
    assert load_controlnet(*map(str, copies), offline=True).fingerprint() != model.fingerprint()


# ---------------------------------------------------------------------- folders and the hub


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("base/model_index.json", "base is not a whole text-to-image model of diffusers, it lacks model_index.json"),
        (f"base/unet/{WEIGHTS}", f"base is not a whole text-to-image model of diffusers, it lacks unet/{WEIGHTS}"),
        ("control/config.json", "control is not a whole ControlNet of diffusers, it lacks config.json: copy the files"),
        (f"control/{WEIGHTS}", f"control is not a whole ControlNet of diffusers, it lacks {WEIGHTS}: copy the files"),
    ],
)
def test_a_missing_file_is_named_with_its_folder(copies, tmp_path, gone, message):
    (tmp_path / gone).unlink()
    with pytest.raises(WeightsError, match=re.escape(message)):
        check_controlnet(*map(str, copies), offline=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "none"}, "base='none': there is no such file or folder. Put the weights there, or name another "
                           "control_sd15_canny.pth, a folder with model_index.json, or a hub id such as stable"),
        ({"controlnet": "none"}, "controlnet='none': there is no such file or folder. Put the weights there, or name "
                                 "another folder with config.json, or a hub id such as lllyasviel/sd-controlnet-canny"),
        ({"base": "none.pth"}, "base='none.pth': there is no such file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("act", [check_controlnet, load_controlnet])
def test_a_name_of_nothing_is_an_error_that_says_what_would_do(act, change, message):
    base, controlnet = tiny_controlnet_folders()
    with pytest.raises(WeightsError, match=re.escape(message)):
        act(**({"base": base, "controlnet": controlnet} | change), offline=True)


def test_a_checkpoint_in_the_bases_folder_is_pointed_at(tmp_path):
    (tmp_path / "control_sd15_canny.pth").touch()
    with pytest.raises(WeightsError, match=re.escape(f"base={tmp_path / 'control_sd15_canny.pth'}")):
        check_controlnet(str(tmp_path), None, offline=True)


def test_a_damaged_file_is_named(copies):
    whole = (copies[1] / WEIGHTS).read_bytes()
    (copies[1] / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=f"{copies[1]} cannot be read as ControlNetModel"):
        load_controlnet(*map(str, copies), offline=True)


def test_a_weight_that_is_missing_is_not_drawn_at_random(copies):
    weights = load_file(copies[1] / WEIGHTS)
    del weights["controlnet_mid_block.bias"]
    save_file(weights, copies[1] / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=f"weights in {copies[1]} are not .* 1 missing: controlnet_mid_block.bias"):
        load_controlnet(*map(str, copies), offline=True)


def test_a_controlnet_of_another_base_is_refused(copies):
    from diffusers import ControlNetModel

    config = ControlNetModel.load_config(copies[1])
    ControlNetModel.from_config(config | {"cross_attention_dim": 64}).save_pretrained(copies[1])
    with pytest.raises(WeightsError, match="its cross_attention_dim is 64, the base's 32"):
        load_controlnet(*map(str, copies), offline=True)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of the hub with the base alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    put_into(tmp_path, "base", tiny_controlnet_folders()[0])
    return tmp_path


def put_into(cache, name, files):
    """What a download of the model leaves behind."""
    repository = cache / f"models--nobody--{name}"
    shutil.copytree(files, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


def test_cached_models_are_read_without_asking_the_network(cache, monkeypatch, model):
    put_into(cache, "control", tiny_controlnet_folders()[1])
    monkeypatch.setattr("models.files.diffusers_folder.hub_answers", None)
    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", None)
    found = load_controlnet("nobody/base", "nobody/control", offline=False)
    assert found.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("act", [check_controlnet, load_controlnet])
def test_a_controlnet_that_is_absent_offline_is_named_with_the_place_to_put_it(cache, act):
    with pytest.raises(WeightsError) as caught:
        act("nobody/base", "nobody/control", offline=True)
    for part in ("controlnet='nobody/control'", "lacks config.json", str(cache), "models--nobody--control", "offline"):
        assert part in str(caught.value)


def test_the_published_controlnet_is_meant_where_none_is_named(cache):
    with pytest.raises(WeightsError, match="controlnet='lllyasviel/sd-controlnet-canny': the cache"):
        check_controlnet("nobody/base", None, offline=True)


def test_a_model_that_may_be_fetched_is_not_missed(cache, monkeypatch):
    monkeypatch.setattr("models.files.diffusers_folder.hub_answers", lambda: True)
    check_controlnet("nobody/other", "nobody/control", offline=False)


def test_a_download_that_fails_is_named(cache, monkeypatch):
    def unreachable(*names, **options):
        raise OSError("no route")

    monkeypatch.setattr("models.files.diffusers_folder.hub_answers", lambda: True)
    monkeypatch.setattr("diffusers.ControlNetModel.from_pretrained", unreachable)
    with pytest.raises(WeightsError, match="nobody/control cannot be read as ControlNetModel: OSError: no route"):
        load_controlnet("nobody/base", "nobody/control", offline=False)


# ---------------------------------------------------------------------- one file


@pytest.fixture(scope="module")
def networks():
    return narrow_stable_diffusion()


@pytest.fixture(scope="module")
def weights(networks):
    return file_weights(*networks)


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    """Arguments of `load_controlnet`."""
    return write_file(tmp_path_factory.mktemp("file"), weights)


def test_a_file_draws_the_images_of_the_folders_that_it_was_made_from(networks, file):
    pair = [load_controlnet(**file, offline=True), load_controlnet(*save(*networks), offline=True)]
    assert pair[0].fingerprint() == pair[1].fingerprint()  # every weight, bit for bit
    first, second = [each.draw_floats(*inputs(each, side=64), SETTINGS) for each in pair]
    # Both readers lay the weights at other addresses, and another alignment may take another kernel.
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("control_model.zero_convs.3.0.bias", None, "1 missing: controlnet_down_blocks.3.bias"),
        ("control_model.extra", torch.zeros(1), "1 unexpected: control_model.extra"),
        ("control_model.input_blocks.0.0.weight", None, "no Stable Diffusion 1.x with a ControlNet: it has .* weights"),
        ("first_stage_model.decoder.conv_out.bias", torch.zeros(4), r"1 misshapen: decoder.conv_out.bias \(4,\)"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", None, "1 missing: .*final_layer_norm.bias"),
    ],
)
def test_a_file_with_a_weight_too_few_too_many_or_misshapen_is_refused(weights, tmp_path, key, value, message):
    changed = {name: tensor for name, tensor in (weights | {key: value}).items() if tensor is not None}
    with pytest.raises(WeightsError, match=message):
        load_controlnet(**write_file(tmp_path, changed), offline=True)


def test_a_file_that_would_run_code_is_not_read(tmp_path, weights):
    files = write_file(tmp_path, {"betas": torch.zeros(1), "callback": Path})
    with pytest.raises(WeightsError, match="could run foreign code"):
        load_controlnet(**files, offline=True)


def test_a_file_holds_its_own_controlnet(file):
    with pytest.raises(WeightsError, match="holds a ControlNet of its own: leave controlnet out"):
        check_controlnet(file["base"], "nobody/control", offline=True, tokenizer=file["tokenizer"])


def test_a_file_needs_clips_words(file, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"tokenizer='openai/clip-vit-large-patch14' is no folder with a tokenizer"):
        check_controlnet(file["base"], None, offline=True)


@pytest.mark.parametrize(
    ("base", "control", "second"),
    [("some/base", "some/control", "controlnet='some/control'"), ("gone.pth", None, "tokenizer='openai/clip")],
)
def test_all_that_is_missing_is_named_at_once(tmp_path, monkeypatch, base, control, second):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        check_controlnet(base, control, offline=True)
    assert f"base='{base}'" in str(error.value) and second in str(error.value)
