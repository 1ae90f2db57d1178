"""What every registered replay source must hold."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from synth import SOURCES
from synth.ddpm.rehearsal import rehearse
from synth.ddpm.source import DDPM
from synth.requests import Requests, draw_labels
from tests.support.sources import fitted, make_source, weigh
from tests.support.toy import toy_dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split
from utils.data.transforms import stack_images, to_uint8
from utils.run.errors import ConfigError, NotFittedError, WeightsError
from utils.run.files import file_hash
from utils.run.manifest import Manifest
from utils.training import seeding

ALL = SOURCES.names()
KEY = (7, "ddpm-rehearsal", 1)  # of a rehearsal in task 1


def images(source, requests):
    return source.generate(requests).parts[0].images


@pytest.fixture(scope="module", params=ALL)
def source(request, tmp_path_factory):
    """Each source, which has learned two tasks of two classes; only to be looked at."""
    return fitted(request.param, tmp_path_factory.mktemp(request.param), tasks=2)


def ask(source, classes, per_class):
    return Requests.of_classes(classes, per_class, (7, source.config.name, 0))


KINDS = {"images": ((6, 1, 8, 8), torch.uint8), "features": ((6, 64), torch.float32)}


def test_source_gives_one_sample_per_request_in_order_and_copies_of_a_class_differ(source):
    result = source.generate(ask(source, [1, 0], 3))
    assert result.labels.tolist() == [1, 1, 1, 0, 0, 0]
    drawn = result.parts[0].images
    assert (drawn.shape, drawn.dtype) == KINDS[source.samples] and not torch.equal(drawn[3], drawn[4])


def test_image_depends_on_its_own_request_alone(source):
    requests, shuffled = ask(source, [0, 1], 4), torch.tensor([6, 1, 4, 3, 0, 7, 2, 5])
    together, apart = images(source, requests), images(source, requests.take(shuffled))
    difference = (together[shuffled].float() - apart.float()).abs()
    # Another chunk moves a pixel by one grey level at most, a feature by its last bits.
    assert difference.max() <= (1 if source.samples == "images" else 1e-4)


def test_unknown_class_is_refused_by_name(source):
    with pytest.raises(NotFittedError, match=r"\[5\].*learned \[0, 1, 2, 3\]"):
        source.generate(ask(source, [5], 1))


def test_saved_source_generates_the_same_bits_and_its_memory_is_the_bytes_on_disk(source, tmp_path):
    (tmp_path / "saved").mkdir()
    source.save(tmp_path / "saved")
    name, copy = source.config.name, make_source(source.config.name, tmp_path)
    copy.load(tmp_path / "saved")
    assert torch.equal(images(source, ask(source, [0, 3], 2)), images(copy, ask(source, [0, 3], 2)))
    assert copy.fitted_classes == {0, 1, 2, 3} and copy.fingerprint() == source.fingerprint()
    memory, frozen = weigh(source, tmp_path / "saved")
    assert memory == sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*"))
    assert (frozen > 0) is (name in ("controlnet", "d4m", "ldm"))  # whose weights came as they are


def test_same_seed_fits_the_same_source(source, tmp_path):
    name = source.config.name
    again, other = (fitted(name, tmp_path / str(seed), tasks=2, seed=seed).fingerprint() for seed in (7, 8))
    assert again == source.fingerprint()
    assert (other == again) is (name == "controlnet")  # whose weights came as they are


# ---------------------------------------------------------------------- the ddpm

DATA = DataManager(toy_dataset(), Split(init_cls=2, increment=2))
TASK_1 = DATA.task(1)
TWO_EACH = Requests.of_classes([0, 1], 2, (7, "ddpm", 0))


@pytest.mark.parametrize(("counts", "drawn"), [("balanced", 20), ("reference", 24)])  # ceil(20 / 8) * 8
def test_it_rehearses_on_as_many_images_as_asked_for_in_equal_numbers_or_whole_batches(counts, drawn, tmp_path):
    rehearsed = rehearse(fitted("ddpm", tmp_path, counts=counts), TASK_1, num_images=20).counts(6).tolist()
    assert sum(rehearsed[:2]) == sum(rehearsed) == drawn and (counts == "reference" or rehearsed[0] == rehearsed[1])


def test_rehearsal_comes_from_the_raw_weights(tmp_path):
    source = fitted("ddpm", tmp_path, first_task_num_steps=20)
    average = source.generator
    drawn = stack_images(rehearse(source, TASK_1, num_images=8), 8)
    requests = Requests.of_labels(draw_labels([0, 1], 8, seeding.generator(7, 1, "rehearsal"), True), KEY)
    raw = images(source, requests)
    source.generator = average
    assert torch.equal(drawn, raw) and not torch.equal(drawn, images(source, requests))


def test_it_rehearses_on_what_its_manifest_lists_and_draws_only_what_is_damaged_again(tmp_path, monkeypatch):
    def pixels(samples):
        return stack_images(samples, 8)

    source, folder = fitted("ddpm", tmp_path), tmp_path / "rehearsal" / "task_1"
    first = rehearse(source, TASK_1, num_images=20)
    listed, before = Manifest(folder, "images", remedy="").files(), pixels(first)
    assert len(listed) == 20 and all(file_hash(folder / name) == digest for name, digest in listed.items())
    for name in ("0-99.png", "0-1 - Copy.png"):
        (folder / "0" / name).write_bytes((folder / next(iter(listed))).read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(source, "generate", None)
        again = rehearse(source, TASK_1, num_images=20)
    assert [list(part.images) for part in again.parts] == [list(part.images) for part in first.parts]
    (folder / "0" / "0-0.png").write_bytes(b"")
    assert torch.equal(pixels(rehearse(source, TASK_1, num_images=20)), before)


@pytest.mark.parametrize(("rehearsal", "own"), [("own", True), ("replay", False)])
def test_it_rehearses_on_its_own_images_where_it_is_told_to(rehearsal, own, tmp_path):
    source = fitted("ddpm", tmp_path, rehearsal=rehearsal)
    DATA.advance(TASK_1)
    source.fit_after(TASK_1, DATA.train_images(TASK_1), source.generate(TWO_EACH), ImageSet(), None)
    assert (tmp_path / "rehearsal" / "task_1").exists() is own is not source.wants_past


def test_the_ddpm_shows_mirror_images_only_where_asked(tmp_path):
    assert make_source("ddpm", tmp_path).transform.flip is False  # the toy data's own recipe
    assert make_source("ddpm", tmp_path, flip=True).transform.flip is True


def test_attention_may_be_given_by_sides(tmp_path):
    by_side = make_source("ddpm", tmp_path, attention_resolutions=[4]).network.unet.config.down_block_types
    assert by_side == make_source("ddpm", tmp_path, attention_levels=[1]).network.unet.config.down_block_types
    with pytest.raises(ConfigError, match=r"attention_resolutions=\[3\].*sides \[8, 4\]"):
        make_source("ddpm", tmp_path, attention_resolutions=[3])


def test_classifier_free_guidance_hides_labels_and_bends_the_samples(tmp_path):
    guided = fitted("ddpm", tmp_path / "b", guidance=3.0, label_dropout=0.5)
    assert not torch.equal(images(fitted("ddpm", tmp_path / "a"), TWO_EACH), images(guided, TWO_EACH))


def test_ancestral_sampling_draws_its_noise_per_image(tmp_path):
    source = fitted("ddpm", tmp_path, sampler="ddpm")
    alone = images(source, TWO_EACH.take(torch.tensor([2])))
    assert (images(source, TWO_EACH)[2].int() - alone[0].int()).abs().max() <= 1


def test_a_first_task_may_start_from_the_average_of_another_run_that_is_there_and_fits(tmp_path):
    with pytest.raises(ConfigError, match=r"synth.init_weights='.*' holds no DDPM: name a `source` folder"):
        make_source("ddpm", tmp_path, init_weights=str(tmp_path))
    first = fitted("ddpm", tmp_path / "run")
    first.save(tmp_path)
    with pytest.raises(WeightsError, match=r"generator.safetensors.*this UNet.*Set synth's keys as they were there"):
        make_source("ddpm", tmp_path, init_weights=str(tmp_path), block_out_channels=[8, 16])
    second = make_source("ddpm", tmp_path / "b", init_weights=str(tmp_path))
    assert_close(second.network.state_dict(), first.generator.state_dict(), rtol=0, atol=0)
    assert second.generator is second.network and second.fitted_classes == set()
    raw = first.network.state_dict()
    assert not all(torch.equal(value, raw[name]) for name, value in second.network.state_dict().items())


def test_without_clamping_samples_leave_the_range(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("synth.ddpm.source.to_uint8", lambda x0: drawn.append(x0.abs().max()) or to_uint8(x0))
    for clip in (True, False):
        images(fitted("ddpm", tmp_path / str(clip), clip_x0=clip), TWO_EACH)
    assert drawn[0] <= 1 + 1e-6 < drawn[1]


class Whitened(DDPM):
    """Another network and another way to hide labels are all that a subclass says."""

    def build_network(self):
        return OneLayer(1, 1, 3, padding=1)

    def hide_labels(self, labels):
        self.seen = labels
        return torch.full_like(labels, -1)


class OneLayer(nn.Conv2d):
    asked = []

    def forward(self, xt, t, labels):
        self.asked.extend(labels.tolist())
        return super().forward(xt)


def test_a_subclass_with_its_own_network_and_hidden_labels_trains(tmp_path):
    source = fitted("ddpm", tmp_path, kind=Whitened)
    assert set(source.seen.tolist()) == {0, 1} and set(source.network.asked) == {-1}
    assert images(source, TWO_EACH).shape == (4, 1, 8, 8)


@pytest.mark.parametrize("name", ["ddpm", "cbdm", "small_ldm", "small_controlnet", "feature_diffusion"])
def test_a_source_counts_the_flops_of_its_batch(name, tmp_path):
    key = "vae_batch_size" if name == "small_ldm" else "batch_size"
    once, twice = (make_source(name, tmp_path, **{key: batch}).step_flops for batch in (8, 16))
    assert 0 < twice == 2 * once


def test_what_a_published_model_takes_is_not_counted(tmp_path):
    assert make_source("ldm", tmp_path).step_flops is None
