"""Class inversion with published models: what is checked when, in which number format, and from which files."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

from synth.inversion.ldm import LDM, unread
from synth.requests import Requests
from tests.support.sources import weigh
from tests.support.tiny_compvis import compvis_weights, compvis_yaml, write_compvis
from tests.support.tiny_inversion import make_inversion, toy_task
from tests.support.tiny_ldm import tiny_ldm, tiny_ldm_folder, tiny_stable_diffusion
from utils.run.errors import ConfigError, WeightsError


def make_ldm(folder, **keys):
    return make_inversion(folder, LDM, **{"samples_per_class": 4, "g_local_bs": 4, **keys})


def draw_one(source):
    """Fit the first task of the toy data and draw one image of class 0."""
    source.fit_before(*toy_task())
    return source.generate(Requests.of_classes([0], 1, (7, "ldm", 0))).parts[0].images


def test_a_checkpoint_of_compvis_fits_and_draws(tmp_path):
    weights = compvis_weights(tiny_ldm(text_heads=8))
    files = write_compvis(tmp_path, weights, compvis_yaml())
    source = make_ldm(tmp_path / "run", image_size=32, ldm_ckpt=files.pop("source"), **files)
    assert draw_one(source).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_stable_diffusion_fits_and_draws(tmp_path, prediction_type):
    tiny_stable_diffusion(prediction_type).save_pretrained(tmp_path / "sd")
    assert draw_one(make_ldm(tmp_path / "run", ldm_ckpt=str(tmp_path / "sd"))).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("precision", "model_precision", "dtype"),
    [("fp32", "auto", torch.float32), ("bf16", "auto", torch.bfloat16), ("bf16", "fp32", torch.float32)],
)
def test_frozen_weights_have_the_runs_number_format_unless_told(tmp_path, precision, model_precision, dtype):
    source = make_ldm(tmp_path, precision=precision, model_precision=model_precision, ldm_ckpt=tiny_ldm_folder())
    assert {weight.dtype for weight in source.model.parameters()} == {dtype}


def test_vectors_may_be_carried_to_another_number_format(tmp_path):
    fitted = make_ldm(tmp_path / "a", precision="bf16", ldm_ckpt=tiny_ldm_folder())
    draw_one(fitted)
    fitted.save(tmp_path)
    other = make_ldm(tmp_path / "b", ldm_ckpt=tiny_ldm_folder())
    other.load(tmp_path)
    assert len(other.generate(Requests.of_classes([1], 1, (7, "ldm", 0)))) == 1


def test_a_model_that_is_not_there_is_missed_when_the_source_is_made_unless_images_are_there(tmp_path):
    with pytest.raises(WeightsError, match=r"ldm_ckpt='nowhere/model.ckpt': there is no such file"):
        make_ldm(tmp_path, ldm_ckpt="nowhere/model.ckpt")
    source = make_ldm(tmp_path, ldm_ckpt="nowhere/model.ckpt", need_syn_imgs=False)
    assert weigh(source, tmp_path) == (0, 0) and source.fitted_classes == set()


def test_offline_is_what_the_hubs_variable_says(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("models.files.diffusers_folder.hub_answers", lambda: True)
    source = make_ldm(tmp_path, ldm_ckpt="nobody/none")  # it may be fetched when it is needed
    assert source.describe().startswith("nobody/none, not yet on this machine; class inversion")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"nobody/none.*nothing is fetched offline"):
        make_ldm(tmp_path, ldm_ckpt="nobody/none")


def test_an_initializer_of_several_tokens_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"reads the word 'a dog' as a, dog"):
        draw_one(make_ldm(tmp_path, ldm_ckpt=tiny_ldm_folder(), initializer="a dog"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"base_learning_rate": 1e-3}, ["a learning rate of 0.001 * 4: synth.inversion_lr=0.02"]),
        ({"base_learning_rate": "5e-3"}, []),  # a number to OmegaConf, which the original reads with
        ({"base_learning_rate": "slow"}, ["a learning rate of slow * 4: synth.inversion_lr=0.02"]),
        ({"initializer_words": "sculpture"}, []),
        ({"initializer_words": ["bird"]}, ["initializer_words ['bird']: synth.initializer='sculpture'"]),
        ({"num_vectors_per_token": 2}, ["num_vectors_per_token 2: a class is one vector"]),
    ],
)
def test_what_a_yaml_says_and_nobody_reads_is_known(tmp_path, changes, said):
    inversion = {"initializer_words": ["sculpture"], "num_vectors_per_token": 1}
    inversion |= {key: value for key, value in changes.items() if key in inversion}
    model = {"base_learning_rate": changes.get("base_learning_rate", 5e-3)}
    model["params"] = {"personalization_config": {"params": inversion}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model, "data": {"params": {"batch_size": 4}}}))
    assert unread(str(tmp_path / "model.yaml"), LDM.Config.parse({"name": "ldm"})) == said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000 + "]" * 3000, "is unreadable"),
        ("a: &a [x]\nb: *a", "is unreadable"),
        ("- model", "holds a list"),
        (None, "is unreadable .*No such file"),
    ],
)
def test_a_broken_yaml_beside_a_folder_is_refused_when_the_source_is_made(tmp_path, text, message):
    if text is not None:
        (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"model.yaml' {message}"):
        make_ldm(tmp_path, ldm_ckpt=tiny_ldm_folder(), yaml=str(tmp_path / "model.yaml"))


@pytest.mark.parametrize("model", [{"params": 3}, {"params": {"personalization_config": [1]}}, None])
def test_a_yaml_without_an_inversion_says_nothing(tmp_path, model):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    assert unread(str(tmp_path / "model.yaml"), LDM.Config.parse({"name": "ldm"})) == []


def test_the_yaml_that_comes_with_us_contradicts_nothing():
    path = Path(__file__).parents[3] / "exps" / "ldm" / "ldm_dddr.yaml"
    config = LDM.Config.parse(yaml.safe_load(path.read_text())["reprise"]["synth"])
    assert unread(str(path), config) == []
    assert (config.yaml, config.com_round_gen, config.samples_per_class) == ("exps/ldm/ldm_dddr.yaml", 10, 300)
