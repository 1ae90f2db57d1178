"""ESCORT's sources one by one: maps, sizes, prompts, and images as they come."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from synth.escort.copies import Copied
from synth.escort.small_controlnet import SmallControlNetSource
from tests.support.sources import fitted, make_source, weigh
from tests.support.toy import toy_dataset
from utils.data.images import ImageSet, decode_image
from utils.data.manager import DataManager, Split, Task
from utils.run.errors import ConfigError, NotFittedError, WeightsError
from utils.training import seeding


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small_controlnet that has learned a task."""
    return fitted("small_controlnet", tmp_path_factory.mktemp("small"))


def coloured(folder, **keys):
    """The source controlnet on a data set of coloured files with names that words can be made of."""
    dataset = replace(toy_dataset(), channels=3, in_memory=False, class_names=["apple_pie", "002.ak47"])
    return make_source("controlnet", folder, dataset=dataset, **keys)


def first_copies(source, images):
    """Requests for a copy of each image at hand."""
    return source.ask(images.labels, source.read(images), torch.zeros(len(images), dtype=torch.int64))


def copied(source):
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2))
    return Copied(None, source, data, source.run, source.run.folder)


def files(folder):
    """A tall colour image, a small grey one, one with an alpha channel, a flat one."""
    chance = seeding.generator("files")
    shapes = {"tall.png": (13, 9, 3), "grey.png": (8, 8), "alpha.png": (8, 12, 4), "flat.png": (8, 8, 3)}
    for name, shape in shapes.items():
        pixels = torch.randint(0, 256, shape, generator=chance).to(torch.uint8)
        Image.fromarray((pixels * 0 if name == "flat.png" else pixels).numpy()).save(folder / name)
    return ImageSet.of([str(folder / name) for name in shapes], torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("resolution", ["high", "low"])
def test_images_of_any_size_and_kind_come_back_at_their_own_size_in_colour_alone_or_among_others(tmp_path, resolution):
    source = coloured(tmp_path, resolution=resolution)
    requests = first_copies(source, files(tmp_path))
    drawn = source.generate(requests)
    assert [drawn.image(i).shape for i in range(4)] == [(3, 13, 9), (3, 8, 8), (3, 8, 12), (3, 8, 8)]
    for position in range(4):
        alone = source.generate(requests.take(torch.tensor([position]))).image(0)
        assert (alone.int() - drawn.image(position).int()).abs().max() <= 1


def test_at_low_resolution_a_map_has_and_costs_the_size_of_the_drawing(tmp_path):
    image = decode_image(files(tmp_path).parts[0].images[0])
    high, low = (coloured(tmp_path, resolution=way).compress(image) for way in ("high", "low"))
    assert (high.shape, low.shape) == ((13, 9), (8, 8))  # the short side to 8, multiples of 8, half to even
    assert (len(high.bits), len(low.bits)) == (15, 8) and high.size == low.size == (13, 9)


@pytest.mark.parametrize(
    ("keys", "name", "words", "avoided", "steps"),
    [
        ({}, "apple pie", ", best quality, extremely detailed", "longbody", 20),
        ({"resolution": "low"}, "apple pie", ", clean, clear, bright, neat", "blurry, dark, messy, dotted", 50),
        ({"verbatim_names": True, "prompt": "{class}!"}, "apple_pie", "!", "longbody", 20),
    ],
)
def test_each_script_has_its_steps_and_its_words_beside_the_classs(tmp_path, keys, name, words, avoided, steps):
    source = coloured(tmp_path, sample_steps=None, **keys)
    assert source.prompts == [name + words, "002.ak47" + words]
    assert source.negative.startswith(avoided) and source.steps == steps


def test_other_words_in_the_same_table_are_another_source(tmp_path):
    table, found = tmp_path / "words.json", []
    for words in ("pie", "cake"):
        table.write_text(json.dumps({"apple_pie": words}))
        source = coloured(tmp_path, class_prompts=str(table), augmentation_prob=0.4)
        found.append((source.fingerprint(), copied(source).first_task_settings()))
    assert all(first != second for first, second in zip(*found))
    assert "class_prompts" not in found[0][1]  # where the table lies says nothing


def test_networks_are_read_before_a_classifier_trains(tmp_path):
    source, idle = coloured(tmp_path), coloured(tmp_path, syn_per_class=0, augmentation_prob=0.0)
    for each in (source, idle):
        each.fit_before(Task(0, range(1), ("apple_pie",)), ImageSet())
    assert "model" in vars(source) and "model" not in vars(idle)


def test_copies_may_share_their_noise_as_in_the_reference(tmp_path):
    own, shared = (make_source("small_controlnet", tmp_path, copy_noise=kind) for kind in ("own", "reference"))
    requests = own.ask(torch.tensor([0, 1]), torch.tensor([5, 6]), torch.tensor([3, 3]))
    first, second = ([one.initial_seed() for one in source._generators(requests)] for source in (own, shared))
    assert first[0] != first[1] and second == [3, 3]


def test_an_oblong_image_comes_back_oblong(small):
    images = ImageSet.of(torch.randint(0, 256, (1, 1, 8, 14)).to(torch.uint8), torch.tensor([0]))
    assert small.generate(first_copies(small, images)).image(0).shape == (1, 8, 14)


def test_black_copies_are_counted(small, monkeypatch, warnings):
    black = torch.zeros(1, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(small, "draw", lambda requests, maps, generators: [black, black + 1])
    small.generate(small.requests([0]).take(torch.tensor([0, 1])))
    assert "1 of 2 copies are black" in warnings.text


def test_an_item_that_is_forgotten_and_a_generator_that_was_not_learned_are_named(small, tmp_path):
    with pytest.raises(NotFittedError, match="no edge map of item 123"):
        small.generate(small.ask(torch.tensor([0]), torch.tensor([123]), torch.tensor([0])))
    for name in ("small_controlnet", "small_ldm"):
        with pytest.raises(NotFittedError, match=f"{name} learns its generator on task 0"):
            _ = make_source(name, tmp_path).model


def test_shared_first_tasks_depend_on_copies_only_where_some_are_shown(tmp_path):
    settings = copied(make_source("small_controlnet", tmp_path, augmentation_prob=0.4)).first_task_settings()
    assert settings["augmentation_prob"] == 0.4 and "image_format" in settings and "syn_per_class" not in settings
    assert copied(make_source("small_controlnet", tmp_path, augmentation_prob=0.0)).first_task_settings() == {}


def test_a_damaged_model_is_named_as_what_it_is(small, tmp_path):
    small.save(tmp_path)
    arguments = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**arguments, "layers_per_block": 2}))
    with pytest.raises(WeightsError, match=r"does not fit the model.json beside it.*Train it again"):
        make_source("small_controlnet", tmp_path, weights=str(tmp_path), map_size=None)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no SmallControlNet .*model.safetensors.*source 'small_controlnet'"):
        make_source("small_controlnet", tmp_path, weights=str(tmp_path), map_size=None)


def test_a_map_decides_what_a_small_controlnet_draws(tmp_path):
    source = fitted("small_controlnet", tmp_path, control_steps=30, copy_noise="reference")  # the same in both copies
    images = ImageSet.of(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0]))
    images.parts[0].images[1, :, 3] = 255
    drawn = source.generate(first_copies(source, images)).parts[0].images
    assert not torch.equal(drawn[0], drawn[1])


def test_a_control_begun_after_a_kill_is_the_one_of_an_unbroken_training(small, tmp_path, monkeypatch):
    train = SmallControlNetSource._train

    def stop(self, part, *rest):
        if part is self.model.control:
            raise KeyboardInterrupt
        train(self, part, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SmallControlNetSource, "_train", stop)
        fitted("small_controlnet", tmp_path / "killed")
    assert fitted("small_controlnet", tmp_path / "killed").fingerprint() == small.fingerprint()


def test_a_small_controlnet_that_was_trained_before_is_taken_as_it_is(small, tmp_path):
    saved, again = tmp_path / "saved", tmp_path / "again"
    small.save(saved)
    second = fitted("small_controlnet", tmp_path / "b", weights=str(saved), map_size=None)
    with pytest.raises(ConfigError, match="reads maps of 16 pixels"):
        make_source("small_controlnet", tmp_path, weights=str(saved), map_size=8)
    assert second.fingerprint() == small.fingerprint() and second.map_shape(8, 8) == (16, 16)
    second.save(again)
    (memory, nothing), (maps, frozen) = weigh(small, saved), weigh(second, again)
    assert frozen > 0 == nothing and maps < memory


@pytest.mark.parametrize(
    ("name", "keys", "error", "words"),
    [
        ("small_controlnet", {"map_size": 12}, ConfigError, "map_size=12: it must be the side of the images, 8"),
        ("small_controlnet", {"block_out_channels": [8] * 5}, ConfigError, "a multiple of 16, not 8"),
        ("small_controlnet", {"weights": "nowhere"}, WeightsError, "with the source 'small_controlnet'"),
        ("small_controlnet", {"need_syn_imgs": False}, ConfigError, "need_syn_imgs must be true"),
        ("small_controlnet", {"source_dir": "run"}, ConfigError, "let synth.weights name the folder"),
        ("small_controlnet", {"canny_low": 300}, ConfigError, "canny_low=300 is above canny_high=200"),
        ("controlnet", {"short_side": 32, "grid": 64}, ConfigError, "short_side=32 is below synth.grid=64"),
        ("controlnet", {"prompt": "a photo"}, ConfigError, "names the class exactly once, as {class}"),
        ("controlnet", {"base": "nowhere/at all"}, WeightsError, "base='nowhere/at all'"),
        ("controlnet", {"augmentation_prob": 1.5}, ConfigError, "augmentation_prob=1.5"),
    ],
)
def test_what_does_not_fit_is_named(name, keys, error, words, tmp_path):
    with pytest.raises(error) as raised:
        make_source(name, tmp_path, **keys)
    assert words in str(raised.value)
