"""A latent diffusion model learned on the first task and inverted on later ones."""

import json

import pytest
import torch
from torch.testing import assert_close

from models.latent.small import SmallLDM
from synth.inversion.latents import encode
from synth.inversion.small_ldm import SmallLDMSource, spread
from synth.requests import Requests
from tests.support.sources import weigh
from tests.support.tiny_inversion import make_inversion, tiny_config, toy_task
from tests.support.toy import tiny_source
from utils.run.errors import ConfigError, WeightsError
from utils.training.fit import LossLog


def make(folder, **keys) -> SmallLDMSource:
    return make_inversion(folder, kind=SmallLDMSource, **{**tiny_source("small_ldm"), **keys})


def fitted(folder, tasks=1, **keys):
    source = make(folder, **keys)
    for index in range(tasks):
        source.fit_before(*toy_task(index))
    return source


def trainings(source):
    """(task, purpose) of everything that was trained."""
    lines = (source.run.folder / "metrics.jsonl").read_text().splitlines()
    return list(dict.fromkeys((line["task"], line["purpose"]) for line in map(json.loads, lines)))


def pretrained(folder, names=("row 0", "row 1")):
    """The folder of a model that was trained on classes of these names."""
    source = make(folder / "first", class_names=[*names, "c", "d", "e", "f"])
    source.fit_before(*named_task(names))
    (folder / "weights").mkdir()
    source.save(folder / "weights")
    return source, str(folder / "weights")


def named_task(names):
    task, images = toy_task()
    return type(task)(0, task.classes, tuple(names)), images


def test_the_first_task_trains_the_model_and_its_vectors_and_later_ones_search(tmp_path):
    source = make(tmp_path)
    source.fit_before(*toy_task())
    before = source.model.fingerprint()
    assert_close(torch.stack([source.vectors[0], source.vectors[1]]), source.model.denoiser.table)
    source.fit_before(*toy_task(1))
    assert trainings(source) == [(0, "vae"), (0, "unet"), (1, "invert_r0_c0")]
    assert source.model.fingerprint() == before and sorted(source.vectors) == [0, 1, 2, 3]


def test_the_model_is_frozen_and_draws_with_the_averages(tmp_path):
    average, raw = fitted(tmp_path / "a").model, fitted(tmp_path / "b", ema_rate=0.0).model
    assert not average.training and not any(parameter.requires_grad for parameter in average.parameters())
    weights = [model.denoiser.unet.conv_in.weight for model in (average, raw)]
    assert not torch.equal(*weights)


def test_latents_have_unit_spread(tmp_path):
    source = fitted(tmp_path, vae_steps=20)
    latents = encode(source.model, toy_task()[1], False, 8, source.run, "")
    assert spread(latents) == pytest.approx(1, abs=1e-4)
    assert source.model.scale.item() != 1


def test_labels_are_hidden_in_training_for_guidance(tmp_path, monkeypatch):
    source, shown = make(tmp_path, label_dropout=0.5, unet_steps=20), []
    new_model = source.new_model

    def watched(names):
        model = new_model(names)
        context = model.context
        model.context = lambda prompts, vectors=None: shown.extend(map(bool, prompts)) or context(prompts, vectors)
        return model

    monkeypatch.setattr(source, "new_model", watched)
    source.fit_before(*toy_task())
    assert 0.3 < sum(shown) / len(shown) < 0.7


class Killed(Exception):
    """The process ends."""


@pytest.mark.parametrize("stop", ["vae", "unet", "invert_r0_c0"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(stop, precision, tmp_path, monkeypatch):
    def two_tasks(folder):
        source = make(folder)
        source.run.checkpoint_every, source.run.runtime.bf16 = 2, precision == "bf16"
        for index in (0, 1):
            source.fit_before(*toy_task(index))
        return source.fingerprint()

    def add(self, step, rate, terms, original=LossLog.add):
        if self.training.purpose == stop and step == 2:
            raise Killed
        original(self, step, rate, terms)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LossLog, "add", add)
        two_tasks(tmp_path / "broken")
    assert two_tasks(tmp_path / "broken") == two_tasks(tmp_path / "whole")


def test_the_model_is_memory_where_it_was_learned_and_frozen_where_it_came_from_elsewhere(tmp_path):
    source, weights = pretrained(tmp_path)
    other = fitted(tmp_path / "other", weights=weights)
    (tmp_path / "saved").mkdir()
    other.save(tmp_path / "saved")
    size, (memory, frozen) = source.model.frozen_bytes(), weigh(source, weights)
    assert frozen == 0 and memory > size
    memory, frozen = weigh(other, tmp_path / "saved")
    assert frozen == size and memory < 2000


def test_weights_from_elsewhere_are_not_trained_and_unknown_classes_are_searched(tmp_path):
    source, weights = pretrained(tmp_path, names=("row 1", "another"))
    other = fitted(tmp_path / "other", weights=weights)
    assert trainings(other) == [(0, "invert_r0_c0")]  # of class 0
    assert_close(other.vectors[1], source.vectors[0])  # "row 1", known by its name
    assert other.model.fingerprint() == source.model.fingerprint()


def test_a_class_of_a_later_task_is_searched_though_the_weights_know_its_name(tmp_path):
    _, weights = pretrained(tmp_path, names=("row 2", "row 3"))
    other = fitted(tmp_path / "other", tasks=2, weights=weights)
    assert trainings(other) == [(0, "invert_r0_c0"), (1, "invert_r0_c0")]


def test_a_saved_source_goes_on_with_the_next_task(tmp_path):
    whole, first = fitted(tmp_path / "whole", tasks=2), fitted(tmp_path / "first")
    first.save(tmp_path)
    other = make(tmp_path / "other")
    other.load(tmp_path)
    other.fit_before(*toy_task(1))
    assert other.fingerprint() == whole.fingerprint()


def test_a_watcher_sees_the_model_while_it_learns(tmp_path):
    source, seen = make(tmp_path, unet_steps=6), []
    requests = Requests.of_classes([0], 1, (7, "small_ldm", 0))
    source.watcher = lambda epoch: seen.append((epoch, source.generate(requests).parts[0].images))
    source.fit_before(*toy_task())
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert source.fingerprint() == fitted(tmp_path / "unseen", unet_steps=6).fingerprint()


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        ({"inversion": False}, ConfigError, "inversion=false draws by class names"),
        ({"weights": "nowhere"}, WeightsError, "'nowhere' holds no SmallLDM .*source 'small_ldm'"),
        ({"image_size": 9}, ConfigError, "must be a multiple of 2, not 9"),
        ({"attention_levels": [3]}, ConfigError, r"attention_levels=\[3\] do not exist"),
    ],
)
def test_what_does_not_fit_is_said_when_the_source_is_made(keys, error, said, tmp_path):
    with pytest.raises(error, match=said):
        make(tmp_path, **keys)


def test_a_model_of_coloured_images_is_refused_for_grey_ones(tmp_path):
    SmallLDM((3, 8, 8), ["a"], tiny_config()).save(tmp_path)
    with pytest.raises(ConfigError, match="draws images of 3 channels, but toy has 1"):
        make(tmp_path, weights=str(tmp_path))
