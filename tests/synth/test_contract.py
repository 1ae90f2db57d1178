"""What every registered replay source must hold."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from synth import SOURCES
from synth.ddpm.source import DDPM
from synth.requests import Requests, draw_labels
from tests.support.sources import fitted, make_source, weigh
from tests.support.toy import toy_dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split
from utils.data.transforms import to_uint8
from utils.run.errors import ConfigError, NotFittedError, WeightsError
from utils.run.files import file_hash
from utils.run.manifest import Manifest
from utils.training import seeding

ALL = SOURCES.names()
KEY = (7, "ddpm-rehearsal", 1)  # of a rehearsal in task 1


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
    memory, frozen = weigh(source, tmp_path / "saved")
    assert memory == sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*"))
    assert (frozen > 0) is (name in ("controlnet", "ldm"))  # whose weights came as they are


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
    assert source.wants_past is not own


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


def test_images_that_it_rehearses_on_are_those_that_its_manifest_lists(tmp_path):
    source, folder = fitted("ddpm", tmp_path), tmp_path / "rehearsal" / "task_1"
    first = source._rehearse(TASK_1, num_images=20)
    listed = Manifest(folder, "images", remedy="").files()
    assert len(listed) == 20 and all(file_hash(folder / name) == digest for name, digest in listed.items())
    for name in ("0-99.png", "0-1 - Copy.png"):
        (folder / "0" / name).write_bytes((folder / next(iter(listed))).read_bytes())
    again = source._rehearse(TASK_1, num_images=20)
    assert [list(part.images) for part in again.parts] == [list(part.images) for part in first.parts]


def test_an_image_of_the_rehearsal_that_was_damaged_is_drawn_again(tmp_path):
    source = fitted("ddpm", tmp_path)
    first = source._rehearse(TASK_1, num_images=20).decoded().parts[0].images
    (tmp_path / "rehearsal" / "task_1" / "0" / "0-0.png").write_bytes(b"")
    assert torch.equal(source._rehearse(TASK_1, num_images=20).decoded().parts[0].images, first)


def test_a_first_task_may_start_from_the_average_of_another_run(tmp_path):
    first = fitted("ddpm", tmp_path / "a")
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    second = make_source("ddpm", tmp_path / "b", init_weights=str(tmp_path / "saved"))
    assert_close(second.network.state_dict(), first.generator.state_dict(), rtol=0, atol=0)
    assert second.generator is second.network and second.fitted_classes == set()
    raw = first.network.state_dict()
    assert not all(torch.equal(value, raw[name]) for name, value in second.network.state_dict().items())


def test_weights_to_start_from_that_are_not_there_or_do_not_fit_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"synth.init_weights='.*' holds no DDPM: name a `source` folder"):
        make_source("ddpm", tmp_path, init_weights=str(tmp_path))
    fitted("ddpm", tmp_path / "run").save(tmp_path)
    with pytest.raises(WeightsError, match=r"generator.safetensors.*this UNet.*Set synth's keys as they were there"):
        make_source("ddpm", tmp_path, init_weights=str(tmp_path), block_out_channels=[8, 16])


def test_without_clamping_samples_leave_the_range(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("synth.ddpm.source.to_uint8", lambda x0: drawn.append(x0.abs().max()) or to_uint8(x0))
    for clip in (True, False):
        images(fitted("ddpm", tmp_path / str(clip), clip_x0=clip), Requests.of_classes([0, 1], 2, (7, "ddpm", 0)))
    assert drawn[0] <= 1 + 1e-6 < drawn[1]


class Whitened(DDPM):
    """Another network and another way to hide labels are all that a subclass says."""

    def build_network(self):
        return OneLayer()

    def hide_labels(self, labels):
        self.seen = labels
        return torch.full_like(labels, -1)


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.asked = nn.Conv2d(1, 1, 3, padding=1), []

    def forward(self, xt, t, labels):
        self.asked += labels.tolist()
        return self.layer(xt)


def test_a_subclass_with_its_own_network_and_hidden_labels_trains(tmp_path):
    source = fitted("ddpm", tmp_path, kind=Whitened)
    assert set(source.seen.tolist()) == {0, 1} and set(source.network.asked) == {-1}
    assert images(source, Requests.of_classes([1], 2, (7, "ddpm", 0))).shape == (2, 1, 8, 8)
