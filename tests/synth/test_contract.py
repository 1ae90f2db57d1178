"""What every registered replay source must hold."""

import pytest
import torch

from synth import SOURCES
from synth.requests import Requests, draw_labels
from tests.support.toy import tiny_source, toy_dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split
from utils.run.errors import ConfigError, NotFittedError
from utils.training import seeding
from utils.training.run import Run
from utils.training.runtime import Runtime

ALL = SOURCES.names()
KEY = (7, "ddpm-rehearsal", 1)  # of a rehearsal in task 1


def make_source(name, folder, seed=7, **keys):
    config = SOURCES[name].Config.parse({**tiny_source(name), **keys})
    run = Run(folder, seed, Runtime(["cpu"], "fp32"), progress=False)
    dataset = toy_dataset()
    return SOURCES[name](config, run, dataset.num_classes, dataset.class_names, dataset)


def fitted(name, folder, tasks=1, seed=7, **keys):
    source = make_source(name, folder, seed, **keys)
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2))
    for task in list(data.tasks())[:tasks]:
        data.advance(task)
        source.fit_before(task, data.train_images(task))
        replay = ImageSet() if task.index == 0 else source.generate(Requests.of_classes([0, 1], 2, (seed, name, 0)))
        source.fit_after(task, data.train_images(task), replay, ImageSet(), None)
    return source


def images(source, requests):
    return source.generate(requests).parts[0].images


@pytest.mark.parametrize("name", ALL)
def test_source_gives_one_image_per_request_in_order(name, tmp_path):
    source = fitted(name, tmp_path)
    result = source.generate(Requests.of_classes([1, 0], 3, (7, name, 0)))
    assert result.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert result.parts[0].images.shape == (6, 1, 8, 8) and result.parts[0].images.dtype == torch.uint8


@pytest.mark.parametrize("name", ALL)
def test_image_depends_on_its_own_request_alone(name, tmp_path):
    source = fitted(name, tmp_path)
    requests = Requests.of_classes([0, 1], 4, (7, name, 0))
    shuffled = torch.tensor([6, 1, 4, 3, 0, 7, 2, 5])
    together, apart = images(source, requests), images(source, requests.take(shuffled))
    difference = (together[shuffled].int() - apart.int()).abs()
    assert difference.max() <= 1  # another chunk moves a pixel by one grey level at most


@pytest.mark.parametrize("name", ALL)
def test_copies_of_a_class_differ(name, tmp_path):
    drawn = images(fitted(name, tmp_path), Requests.of_classes([0], 2, (7, name, 0)))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name", ALL)
def test_unknown_class_is_refused_by_name(name, tmp_path):
    with pytest.raises(NotFittedError, match=r"\[5\].*learned \[0, 1\]"):
        fitted(name, tmp_path).generate(Requests.of_classes([5], 1, (7, name, 0)))


@pytest.mark.parametrize("name", ALL)
def test_saved_source_generates_the_same_bits(name, tmp_path):
    source, requests = fitted(name, tmp_path / "a", tasks=2), Requests.of_classes([0, 3], 2, (7, name, 1))
    (tmp_path / "saved").mkdir()
    source.save(tmp_path / "saved")
    copy = make_source(name, tmp_path / "b")
    copy.load(tmp_path / "saved")
    assert torch.equal(images(source, requests), images(copy, requests))
    assert copy.fitted_classes == {0, 1, 2, 3} and copy.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("name", ALL)
def test_memory_bytes_are_the_bytes_on_disk(name, tmp_path):
    source = fitted(name, tmp_path / "a")
    (tmp_path / "saved").mkdir()
    source.save(tmp_path / "saved")
    assert source.memory_bytes() == sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*"))


@pytest.mark.parametrize("name", [name for name in ALL if name != "controlnet"])  # whose weights came as they are
def test_same_seed_fits_the_same_source(name, tmp_path):
    prints = [fitted(name, tmp_path / str(i), tasks=2, seed=seed).fingerprint() for i, seed in enumerate((7, 7, 8))]
    assert prints[0] == prints[1] != prints[2]


TASK_1 = DataManager(toy_dataset(), Split(init_cls=2, increment=2)).task(1)


def test_reference_counts_rehearse_in_whole_batches(tmp_path):
    images = fitted("ddpm", tmp_path, counts="reference")._rehearse(TASK_1, num_images=20)
    assert len(images) == 24 and set(images.labels.tolist()) <= {0, 1}  # ceil(20 / 8) * 8


def test_balanced_counts_rehearse_equally(tmp_path):
    assert fitted("ddpm", tmp_path)._rehearse(TASK_1, num_images=20).counts(2).tolist() == [10, 10]


def test_rehearsal_comes_from_the_raw_weights(tmp_path):
    source = fitted("ddpm", tmp_path, first_task_num_steps=20)
    average = source.generator
    drawn = source._rehearse(TASK_1, num_images=8).decoded().parts[0].images
    requests = Requests.of_labels(draw_labels([0, 1], 8, seeding.generator(7, 1, "rehearsal"), True), KEY)
    raw = images(source, requests)
    source.generator = average
    assert torch.equal(drawn, raw) and not torch.equal(drawn, images(source, requests))


def test_rehearsal_that_was_drawn_before_a_kill_is_not_drawn_again(tmp_path, monkeypatch):
    source = fitted("ddpm", tmp_path)
    first = source._rehearse(TASK_1, num_images=20).decoded().parts[0].images
    monkeypatch.setattr(source, "generate", None)
    assert torch.equal(source._rehearse(TASK_1, num_images=20).decoded().parts[0].images, first)


@pytest.mark.parametrize(("rehearsal", "own"), [("own", True), ("replay", False)])
def test_it_rehearses_on_its_own_images_where_it_is_told_to(rehearsal, own, tmp_path):
    source = fitted("ddpm", tmp_path, rehearsal=rehearsal)
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2))
    data.advance(TASK_1)
    replay = source.generate(Requests.of_classes([0, 1], 2, (7, "ddpm", 0)))
    source.fit_after(TASK_1, data.train_images(TASK_1), replay, ImageSet(), None)
    assert (tmp_path / "rehearsal" / "task_1").exists() is own
    assert type(source).wants_replay(source.config) is not own


def test_the_ddpm_shows_mirror_images_only_where_asked(tmp_path):
    assert make_source("ddpm", tmp_path).transform.flip is False  # the toy data's own recipe
    assert make_source("ddpm", tmp_path, flip=True).transform.flip is True


def test_attention_may_be_given_by_sides(tmp_path):
    by_side = make_source("ddpm", tmp_path, attention_resolutions=[4]).network.unet.config.down_block_types
    assert by_side == make_source("ddpm", tmp_path, attention_levels=[1]).network.unet.config.down_block_types
    with pytest.raises(ConfigError, match=r"attention_resolutions=\[3\].*sides \[8, 4\]"):
        make_source("ddpm", tmp_path, attention_resolutions=[3])


def test_classifier_free_guidance_hides_labels_and_bends_the_samples(tmp_path):
    requests = Requests.of_classes([0, 1], 2, (7, "ddpm", 0))
    plain = images(fitted("ddpm", tmp_path / "a"), requests)
    guided = images(fitted("ddpm", tmp_path / "b", guidance=3.0, label_dropout=0.5), requests)
    assert not torch.equal(plain, guided)


def test_ancestral_sampling_draws_its_noise_per_image(tmp_path):
    source = fitted("ddpm", tmp_path, sampler="ddpm")
    requests = Requests.of_classes([0, 1], 2, (7, "ddpm", 0))
    alone = images(source, requests.take(torch.tensor([2])))
    assert (images(source, requests)[2].int() - alone[0].int()).abs().max() <= 1
