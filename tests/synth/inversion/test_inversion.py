"""Class inversion: what it asks the model, how long it searches, what it keeps, and what it refuses."""

import json
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from synth.inversion.latents import LatentBatches, encode
from synth.prompts import TRAIN_TEMPLATES, class_words
from synth.requests import Requests
from synth.samplers import SAMPLERS, sample_scheduled, sample_scheduler
from tests.support.sources import weigh
from tests.support.tiny_inversion import TinyInversion, fitted, make_inversion, tiny_model, toy_task
from utils.data.batches import Loading
from utils.data.manager import Task
from utils.data.transforms import to_unit_range
from utils.run.errors import ConfigError, WeightsError


def draw(source, classes=(0, 1), per_class=2):
    return source.generate(Requests.of_classes(list(classes), per_class, (7, "tiny", 0))).parts[0].images


@pytest.mark.parametrize(("coarse_word", "star"), [("", "*"), ("bird", "bird *")])
def test_the_search_draws_a_template_for_every_image_and_drawing_asks_once_per_class(coarse_word, star, tmp_path):
    source = fitted(tmp_path, coarse_word=coarse_word, samples_per_class=60, g_local_bs=20, sample_batch=2)
    assert len(source.prompts) == 120 and len(set(source.prompts)) > 30
    assert set(source.prompts) <= {template.replace("*", star) for template in TRAIN_TEMPLATES}
    source.prompts.clear()
    draw(source, per_class=5)  # five chunks
    assert source.prompts == [f"a photo of {star}", f"a photo of {star}", ""]


def test_without_inversion_the_names_are_the_prompts_and_nothing_is_trained(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps({"n01443537": "goldfish", "n0": "not here"}))
    table, names = str(tmp_path / "words.json"), ["guinea_pig", "n01443537", "c", "d", "e", "f"]
    source = fitted(tmp_path, class_names=names, inversion=False, class_prompts=table)
    draw(source)
    assert source.prompts == ["a photo of guinea pig", "a photo of goldfish", ""]
    assert not source.vectors and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("prompt", ["a photo", "", "* and *"])
def test_a_prompt_needs_one_placeholder(prompt, tmp_path):
    with pytest.raises(ConfigError, match=r"prompt=.*the placeholder \* exactly once"):
        make_inversion(tmp_path, prompt=prompt)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"b": "c"}', "has none of the classes' names, such as a"),
        (None, "is missing"),
        ("{", "is damaged"),
        ('["a"]', "holds a list"),
        ('{"a": 1}', "not all words are text"),
    ],
)
def test_a_broken_table_of_words_is_named(content, said, tmp_path):
    if content is not None:
        (tmp_path / "words.json").write_text(content)
    with pytest.raises(ConfigError, match=f"words.json.*{said}.*: synth.class_prompts must be"):
        class_words(["a"], str(tmp_path / "words.json"))


def test_names_are_words_and_ids_of_imagenet_what_they_stand_for():
    names = ["guinea_pig", "n01443537", "n99999999"]
    assert class_words(names, None) == ["guinea pig", "goldfish, Carassius auratus", "n99999999"]
    assert class_words(names, None, verbatim=True) == names
    both = class_words(["n02012849", "n03126707"], None)  # ImageNet's 134 and 517 are two cranes
    assert both[0].startswith("crane, ") and "bird" in both[0] and "lifts" in both[1]


def test_latents_are_the_moments_of_images_and_mirror_images_whatever_the_chunk(tmp_path):
    model, (_, images) = tiny_model(), toy_task()
    pixels = to_unit_range(images.parts[0].images)
    moments = encode(model, images, mirror=True, chunk=7, run=make_inversion(tmp_path).run, label="")
    assert_close(moments, torch.stack([model.moments(pixels), model.moments(pixels.flip(-1))], dim=1))


def test_grey_images_are_resized_and_coloured_for_a_model_of_photographs(tmp_path):
    model, shapes = tiny_model(), []
    model.image_size, model.image_channels = 16, 3
    model.moments = lambda images: shapes.append(images.shape) or torch.zeros(len(images), 8, 4, 4)
    encode(model, toy_task()[1], mirror=False, chunk=32, run=make_inversion(tmp_path).run, label="")
    assert shapes == [(20, 3, 16, 16)]


def batches_of(moments):
    return LatentBatches(moments, torch.arange(len(moments)), Loading(None, 4, (1,), torch.device("cpu")))


def batches(views=2):
    moments = torch.zeros(10, views, 2, 1, 1)
    moments[:, :, 0] = torch.arange(10.0).view(10, 1, 1, 1) + 100 * torch.arange(views).view(1, views, 1, 1)
    return batches_of(moments)


def test_an_epoch_shows_every_image_once_and_can_be_entered_in_its_middle():
    whole, rest = list(batches().epoch(3)), list(batches().epoch(3, start=1))
    assert [len(batch) for batch in whole] == [4, 4, 2]
    assert sorted(torch.cat([batch.labels for batch in whole]).tolist()) == list(range(10))
    assert_close([batch.images for batch in whole[1:]], [batch.images for batch in rest], rtol=0, atol=0)


def test_about_half_of_the_latents_are_of_mirror_images():
    values = torch.cat([batch.images.flatten() for epoch in range(20) for batch in batches().epoch(epoch)])
    assert 0.4 < (values >= 100).float().mean() < 0.6
    plain = torch.cat([batch.images.flatten() for batch in batches(views=1).epoch(0)])
    assert sorted(plain.tolist()) == list(range(10))


def test_a_latent_is_a_fresh_sample_of_its_posterior():
    latents = batches_of(torch.tensor([3.0, 0.5]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 20, 20))
    first, second = next(latents.epoch(0)).images, next(latents.epoch(1)).images
    assert first.mean().item() == pytest.approx(3, abs=0.1) and first.std().item() == pytest.approx(0.5, abs=0.06)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("flip", "mirrored"), [(None, False), (False, False), (True, True)])  # toys have no mirror
def test_mirror_images_are_shown_where_the_recipe_or_the_key_says_so(flip, mirrored, tmp_path):
    assert make_inversion(tmp_path, flip=flip).flip is mirrored


@pytest.mark.parametrize(
    ("keys", "index", "classes", "budget"),
    [
        ({}, 0, 60, (2500, 12)),
        ({}, 1, 5, (209, 12)),
        ({"fs_g_local_bs": 5}, 1, 5, (500, 5)),
        ({"fs_g_local_bs": 5}, 0, 5, (209, 12)),
        ({"com_round_gen": 10}, 0, 60, (250, 12)),
        ({"com_round_gen": 10, "g_local_train_steps": 50}, 0, 9, (50, 12)),
    ],
)
def test_the_budget_is_per_class_unless_the_steps_are_given(keys, index, classes, budget, tmp_path):
    source = make_inversion(tmp_path, **{"samples_per_class": 500, "g_local_bs": 12, **keys})
    assert source.budget(Task(index, range(classes), ("",) * classes), classes) == budget


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_sampler_finds_the_only_latent_that_the_model_knows(name, prediction_type):
    schedule = {**tiny_model().schedule, "prediction_type": prediction_type}
    scheduler, z0 = sample_scheduler(name, schedule, 20), torch.linspace(-2, 2, 16).view(1, 1, 4, 4)

    def model(zt, t):
        # Exact for data that is always z0; a sampler of Euler's works on zt scaled back to unit spread.
        alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        eps = (zt - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
        return eps if prediction_type == "epsilon" else alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z0

    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert_close(sample_scheduled(model, noise, scheduler), z0.expand(3, -1, -1, -1), rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("said", "message"),
    [({"timestep_spacing": "odd"}, "not supported"), ({"num_train_timesteps": 20}, "cannot be larger than"),
     ({"beta_schedule": "none"}, "none is not")],
)  # fmt: skip
def test_a_model_whose_noise_the_sampler_cannot_follow_is_refused_when_it_comes(tmp_path, said, message):
    source, model = make_inversion(tmp_path, scheduler="ddim", sample_steps=50), tiny_model()
    model.schedule |= said
    with pytest.raises(ConfigError, match=f"50 steps of scheduler='ddim' do not suit a model with .*{message}"):
        source.use(model)


def test_a_chunk_that_does_not_fit_in_memory_is_halved_once_and_for_all(tmp_path, warnings):
    source = fitted(tmp_path, sample_batch=8)
    expected, decode, asked = draw(source, per_class=4), source.model.decode, []

    def small_device(latents, room=2):
        asked.append(len(latents))
        if len(latents) > room:
            raise torch.OutOfMemoryError("too much")
        return decode(latents)

    source.model.decode = small_device
    assert (draw(source, per_class=4).int() - expected.int()).abs().max() <= 1
    draw(source, per_class=4)
    assert asked == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert "8 images at once" in warnings.text and "2 at a time" in warnings.text
    source.model.decode = partial(small_device, room=0)  # not even for one image
    with pytest.raises(torch.OutOfMemoryError):
        draw(source)


def test_a_search_that_was_cut_off_ends_with_the_same_bits(tmp_path):
    keys = {"com_round_gen": 2, "g_local_train_steps": 6, "num_users": 2, "beta": 0.5}
    whole = fitted(tmp_path / "whole", **keys)
    for stop in (3, 9):  # within the first round and within the second
        broken = make_inversion(tmp_path / str(stop), **keys)
        broken.run.checkpoint_every, losses = 2, iter([broken.loss] * stop)
        broken.loss = lambda *args, losses=losses, **kw: next(losses)(*args, **kw)
        with pytest.raises(StopIteration):  # stands for the end of the process
            broken.fit_before(*toy_task())
        assert_close(fitted(tmp_path / str(stop), **keys).vectors, whole.vectors, rtol=0, atol=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A source that has learned the first task, and the folder where it was saved then."""
    source, folder = fitted(tmp_path_factory.mktemp("run")), tmp_path_factory.mktemp("saved")
    source.save(folder)
    return source, folder


def test_only_vectors_are_kept_and_a_later_task_adds_its_own(saved, tmp_path):
    first, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["class_embeddings.safetensors", "source.json"]
    source = make_inversion(tmp_path)
    source.load(folder)
    source.fit_before(*toy_task(1))
    assert sorted(source.vectors) == [0, 1, 2, 3]
    assert_close({label: source.vectors[label] for label in (0, 1)}, first.vectors, rtol=0, atol=0)


def test_vectors_of_another_model_are_refused_when_it_is_built(saved, tmp_path, monkeypatch):
    other = make_inversion(tmp_path)
    other.load(saved[1])
    monkeypatch.setattr(TinyInversion, "build_model", lambda self: tiny_model(seed=1))
    with pytest.raises(WeightsError, match="found with a model of fingerprint"):
        draw(other)


def test_a_source_that_learned_nothing_is_saved_and_loaded_without_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyInversion, "build_model", lambda self: pytest.fail("the model was built"))
    source = make_inversion(tmp_path)
    source.save(tmp_path)
    source.load(tmp_path)
    assert source.fitted_classes == set() and weigh(source, tmp_path / "nothing") == (0, 0)


def test_the_frozen_model_is_told_apart_from_memory_also_before_it_is_built_again(saved, tmp_path):
    source, folder = saved
    other = make_inversion(tmp_path)
    other.load(folder)
    weights = sum(tensor.numel() * 4 for tensor in tiny_model().state_dict().values())
    memory, frozen = weigh(source, folder)
    assert frozen == weigh(other, folder)[1] == weights and memory < 1000


def test_the_fingerprint_follows_vectors_and_words(saved, tmp_path):
    other = make_inversion(tmp_path)
    other.load(saved[1])
    before = other.fingerprint()
    other.vectors[1] = other.vectors[1] + 1e-3
    named = [make_inversion(tmp_path, inversion=False, class_names=[word] * 6).fingerprint() for word in "ab"]
    assert saved[0].fingerprint() == before != other.fingerprint() and named[0] != named[1]
