"""A latent diffusion model learned on the first task and inverted on later ones."""

import json
from functools import cache, partial

import pytest
import torch
from torch.testing import assert_close

from models.frozen import weight_bytes
from models.latent.small import SmallLDM
from synth.inversion.latents import encode
from synth.inversion.small_ldm import SmallLDMSource
from synth.requests import Requests
from tests.support import tiny_inversion
from tests.support.sources import weigh
from tests.support.tiny_inversion import make_inversion, tiny_config, toy_task
from tests.support.toy import Interrupted, interrupt, tiny_source
from utils.run.errors import ConfigError, WeightsError
from utils.training.fit import Progress


def make(folder, build=make_inversion, **keys) -> SmallLDMSource:
    return build(folder, SmallLDMSource, **{**tiny_source("small_ldm"), **keys})


fitted = partial(make, build=tiny_inversion.fitted)


def trainings(source):
    """(task, purpose) of everything that was trained."""
    lines = (source.run.folder / "metrics.jsonl").read_text().splitlines()
    return list(dict.fromkeys((line["task"], line["purpose"]) for line in map(json.loads, lines)))


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory):
    """A model that was trained on two classes, its folder, and two tasks with these weights."""
    folder = tmp_path_factory.mktemp("borrowed")
    names, (task, images) = ("row 1", "row 2"), toy_task()
    first = make(folder / "first", class_names=[*names, "c", "d", "e", "f"])
    first.fit_before(type(task)(0, task.classes, names), images)
    for name in ("weights", "saved"):
        (folder / name).mkdir()
    first.save(folder / "weights")
    other = fitted(folder / "other", tasks=2, weights=str(folder / "weights"))
    other.save(folder / "saved")
    return first, other, folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The fingerprint of a source that has learned two tasks in a number format."""
    return cache(lambda precision: two_tasks(tmp_path_factory.mktemp(precision), precision))


def two_tasks(folder, precision):
    source = make(folder)
    source.run.checkpoint_every, source.run.runtime.bf16 = 2, precision == "bf16"
    for index in (0, 1):
        source.fit_before(*toy_task(index))
    return source.fingerprint()


def test_the_first_task_trains_the_model_and_its_vectors_and_later_ones_search(tmp_path):
    source = make(tmp_path)
    source.fit_before(*toy_task())
    before = source.model.fingerprint()
    assert_close(torch.stack([source.vectors[0], source.vectors[1]]), source.model.denoiser.table)
    source.fit_before(*toy_task(1))
    assert trainings(source) == [(0, "vae"), (0, "unet"), (1, "invert_r0_c0")]
    assert source.model.fingerprint() == before and sorted(source.vectors) == [0, 1, 2, 3]


def test_the_model_is_frozen_with_averaged_weights_and_latents_of_unit_spread(tmp_path):
    source, raw = fitted(tmp_path / "a", vae_steps=20), fitted(tmp_path / "b", vae_steps=20, ema_rate=0.0)
    assert not source.model.training and not any(parameter.requires_grad for parameter in source.model.parameters())
    assert not torch.equal(source.model.denoiser.unet.conv_in.weight, raw.model.denoiser.unet.conv_in.weight)
    mean, std = encode(source.model, toy_task()[1], False, 8, source.run, "").chunk(2, dim=2)
    assert (mean.var() + std.square().mean()).item() == pytest.approx(1, abs=1e-4)
    assert source.model.scale.item() != 1


def test_labels_are_hidden_in_training_for_guidance(tmp_path, monkeypatch):
    shown, context = [], SmallLDM.context

    def watched(model, prompts, vectors=None):
        shown.extend(map(bool, prompts))
        return context(model, prompts, vectors)

    monkeypatch.setattr(SmallLDM, "context", watched)
    fitted(tmp_path, label_dropout=0.5, unet_steps=20)
    assert 0.3 < sum(shown) / len(shown) < 0.7


@pytest.mark.parametrize("stop", ["vae", "unet", "invert_r0_c0"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(stop, precision, whole, tmp_path, monkeypatch):
    def take(self, step, *rest, original=Progress.take):
        if step.purpose == stop and step.number == 2:
            interrupt()
        original(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Progress, "take", take)
        two_tasks(tmp_path, precision)
    assert two_tasks(tmp_path, precision) == whole(precision)


def test_a_saved_source_goes_on_with_the_next_task(whole, tmp_path):
    fitted(tmp_path / "first").save(tmp_path)
    other = make(tmp_path / "other")
    other.load(tmp_path)
    other.fit_before(*toy_task(1))
    assert other.fingerprint() == whole("fp32")


def test_the_model_is_memory_where_it_was_learned_and_frozen_where_it_came_from_elsewhere(borrowed):
    first, other, folder = borrowed
    size, (memory, frozen) = weight_bytes(first.model), weigh(first, folder / "weights")
    assert frozen == 0 and memory > size
    memory, frozen = weigh(other, folder / "saved")
    assert frozen == size and memory < 2000


def test_weights_from_elsewhere_are_not_trained_and_classes_that_they_do_not_know_or_of_later_tasks_searched(borrowed):
    first, other, _ = borrowed
    assert trainings(other) == [(0, "invert_r0_c0"), (1, "invert_r0_c0")]  # of class 0; of 2, too, though it is known
    assert_close(other.vectors[1], first.vectors[0])  # "row 1", known by its name
    assert other.vectors.keys() == {0, 1, 2, 3} and not torch.equal(other.vectors[2], first.vectors[1])
    assert other.model.fingerprint() == first.model.fingerprint()


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
