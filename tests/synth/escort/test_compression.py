"""ESCORT's sources one by one: maps, sizes, prompts, and images as they come."""

import json
import logging

import pytest
import torch
from PIL import Image

from synth import SOURCES
from synth.escort.copies import Copied
from synth.escort.small_controlnet import SmallControlNetSource
from tests.support.sources import fitted, make_source, weigh
from tests.support.toy import tiny_source, toy_dataset
from utils.data.images import ImageSet, decode_image
from utils.data.manager import DataManager, Split, Task
from utils.run.errors import ConfigError, NotFittedError, WeightsError
from utils.training import seeding
from utils.training.run import Run
from utils.training.runtime import Runtime


def coloured(folder, **keys):
    """The source controlnet on a data set of coloured files with names that words can be made of."""
    dataset = toy_dataset()
    dataset = type(dataset)(
        **{**vars(dataset), "channels": 3, "in_memory": False, "class_names": ["apple_pie", "002.ak47"]}
    )
    config = SOURCES["controlnet"].Config.parse({**tiny_source("controlnet"), **keys})
    return SOURCES["controlnet"](
        config, Run(folder, 7, Runtime(["cpu"], "fp32"), progress=False), 2, dataset.class_names, dataset
    )


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
def test_images_of_any_size_and_kind_come_back_at_their_own_size_in_colour(tmp_path, resolution):
    source, images = coloured(tmp_path, resolution=resolution), files(tmp_path)
    items = source.read(images)
    drawn = source.generate(source.ask(images.labels, items, torch.zeros(4, dtype=torch.int64)))
    assert [drawn.image(i).shape for i in range(4)] == [(3, 13, 9), (3, 8, 8), (3, 8, 12), (3, 8, 8)]


def test_at_low_resolution_a_map_has_and_costs_the_size_of_the_drawing(tmp_path):
    image = decode_image(files(tmp_path).parts[0].images[0])
    high, low = (coloured(tmp_path, resolution=way).compress(image) for way in ("high", "low"))
    assert (high.shape, low.shape) == ((13, 9), (8, 8))  # the short side to 8, multiples of 8, half to even
    assert (len(high.bits), len(low.bits)) == (15, 8) and high.size == low.size == (13, 9)


def test_an_image_alone_is_drawn_as_among_others(tmp_path):
    source, images = coloured(tmp_path), files(tmp_path)
    requests = source.ask(images.labels, source.read(images), torch.zeros(4, dtype=torch.int64))
    together = source.generate(requests)
    for position in range(4):
        alone = source.generate(requests.take(torch.tensor([position]))).image(0)
        assert (alone.int() - together.image(position).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("keys", "first", "second"),
    [
        ({}, "apple pie, best quality, extremely detailed", "002.ak47, best quality, extremely detailed"),
        ({"resolution": "low"}, "apple pie, clean, clear, bright, neat", "002.ak47, clean, clear, bright, neat"),
        ({"verbatim_names": True, "prompt": "{class}!"}, "apple_pie!", "002.ak47!"),
    ],
)
def test_prompts_are_the_published_ones_with_the_classs_name(tmp_path, keys, first, second):
    assert coloured(tmp_path, **keys).prompts == [first, second]


def test_other_words_in_the_same_table_are_another_source(tmp_path):
    table, fingerprints, settings = tmp_path / "words.json", [], []
    for words in ("pie", "cake"):
        table.write_text(json.dumps({"apple_pie": words}))
        source = coloured(tmp_path, class_prompts=str(table), augmentation_prob=0.4)
        fingerprints.append(source.fingerprint())
        settings.append(copied(source).first_task_settings())
    assert fingerprints[0] != fingerprints[1] and settings[0] != settings[1]
    assert "class_prompts" not in settings[0]  # where the table lies says nothing


def test_networks_are_read_before_a_classifier_trains(tmp_path):
    source = coloured(tmp_path)
    idle = coloured(tmp_path, syn_per_class=0, augmentation_prob=0.0)
    for each in (source, idle):
        each.fit_before(Task(0, range(1), ("apple_pie",)), ImageSet())
    assert source._model is not None and idle._model is None


@pytest.mark.parametrize(("resolution", "steps", "start"), [("high", 20, "longbody"), ("low", 50, "blurry, dark")])
def test_each_script_has_its_steps_and_its_negative_prompt(tmp_path, resolution, steps, start):
    source = coloured(tmp_path, resolution=resolution, sample_steps=None)
    assert source.steps == steps and source.negative.startswith(start)


def test_copies_may_share_their_noise_as_in_the_reference(tmp_path):
    own, shared = (make_source("small_controlnet", tmp_path, copy_noise=kind) for kind in ("own", "reference"))
    requests = own.ask(torch.tensor([0, 1]), torch.tensor([5, 6]), torch.tensor([3, 3]))
    first, second = (
        [torch.rand((), generator=one) for one in source._generators(requests)] for source in (own, shared)
    )
    assert first[0] != first[1] and second[0] == second[1] == torch.rand((), generator=torch.Generator().manual_seed(3))


def test_an_oblong_image_comes_back_oblong(tmp_path):
    source = fitted("small_controlnet", tmp_path)
    images = ImageSet.of(torch.randint(0, 256, (1, 1, 8, 14)).to(torch.uint8), torch.tensor([0]))
    drawn = source.generate(source.ask(images.labels, source.read(images), torch.tensor([0])))
    assert drawn.image(0).shape == (1, 8, 14)


def test_black_copies_are_counted(tmp_path, monkeypatch, caplog):
    source, black = fitted("small_controlnet", tmp_path), torch.zeros(1, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(source, "draw", lambda requests, maps, generators: [black, black + 1])
    monkeypatch.setattr(logging.getLogger("reprise"), "propagate", True)
    source.generate(source.requests([0]).take(torch.tensor([0, 1])))
    assert "1 of 2 copies are black" in caplog.text


def test_an_item_that_is_forgotten_is_named(tmp_path):
    source = fitted("small_controlnet", tmp_path)
    with pytest.raises(NotFittedError, match="no edge map of item 123"):
        source.generate(source.ask(torch.tensor([0]), torch.tensor([123]), torch.tensor([0])))


def test_shared_first_tasks_depend_on_copies_only_where_some_are_shown(tmp_path):
    settings = copied(make_source("small_controlnet", tmp_path, augmentation_prob=0.4)).first_task_settings()
    assert settings["augmentation_prob"] == 0.4 and "image_format" in settings and "syn_per_class" not in settings
    assert copied(make_source("small_controlnet", tmp_path, augmentation_prob=0.0)).first_task_settings() == {}


def test_a_damaged_model_is_named_as_what_it_is(tmp_path):
    fitted("small_controlnet", tmp_path / "run").save(tmp_path)
    arguments = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**arguments, "layers_per_block": 2}))
    with pytest.raises(WeightsError, match=r"does not fit the model.json beside it.*Train it again"):
        make_source("small_controlnet", tmp_path, weights=str(tmp_path), map_size=None)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no SmallControlNet .*model.safetensors.*source 'small_controlnet'"):
        make_source("small_controlnet", tmp_path, weights=str(tmp_path), map_size=None)


def test_without_the_first_task_there_is_no_generator(tmp_path):
    with pytest.raises(NotFittedError, match="learns its generator on task 0"):
        _ = make_source("small_controlnet", tmp_path).model


def test_a_map_decides_what_a_small_controlnet_draws(tmp_path):
    source = fitted("small_controlnet", tmp_path, control_steps=30)
    images = ImageSet.of(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0]))
    images.parts[0].images[1, :, 3] = 255
    requests = source.ask(images.labels, source.read(images), torch.tensor([0, 0]))
    same_noise = make_source("small_controlnet", tmp_path, copy_noise="reference")
    same_noise._model, same_noise.at_hand = source.model, source.at_hand
    drawn = same_noise.generate(requests).parts[0].images
    assert not torch.equal(drawn[0], drawn[1])


def test_a_control_begun_after_a_kill_is_the_one_of_an_unbroken_training(tmp_path, monkeypatch):
    whole, train = fitted("small_controlnet", tmp_path / "whole"), SmallControlNetSource._train

    def stop(self, part, *rest):
        if part is self.model.control:
            raise KeyboardInterrupt
        train(self, part, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SmallControlNetSource, "_train", stop)
        fitted("small_controlnet", tmp_path / "killed")
    assert fitted("small_controlnet", tmp_path / "killed").fingerprint() == whole.fingerprint()


def test_a_small_controlnet_that_was_trained_before_is_taken_as_it_is(tmp_path):
    first = fitted("small_controlnet", tmp_path / "a")
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    second = fitted("small_controlnet", tmp_path / "b", weights=str(tmp_path / "saved"), map_size=None)
    with pytest.raises(ConfigError, match="reads maps of 16 pixels"):
        make_source("small_controlnet", tmp_path, weights=str(tmp_path / "saved"), map_size=8)
    assert second.fingerprint() == first.fingerprint() and second.map_shape(8, 8) == (16, 16)
    (tmp_path / "again").mkdir()
    second.save(tmp_path / "again")
    (memory, nothing), (maps, frozen) = weigh(first, tmp_path / "saved"), weigh(second, tmp_path / "again")
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
