"""Every image once per epoch, in an order that depends on the key alone and needs no state to be resumed."""

from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from utils.data.batches import Batch, ImageBatches, Loading, MixedBatches, PairedBatches, test_batches
from utils.data.images import FeatureSet, ImageSet
from utils.data.transforms import AUGMENTATIONS, ClassifierTransform
from utils.run.errors import ConfigError, DataError

CPU = torch.device("cpu")
LARGE = {"recipe": "imagenet", "size": 16, "in_memory": False}
PAIRS = SimpleNamespace(least_batch=lambda side: 2)  # a network that cannot train on one image


def images_of(count, size=8, start=0) -> ImageSet:
    draw = torch.Generator().manual_seed(start)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=draw)
    return ImageSet.of(pixels, torch.arange(start, start + count))


def loading(recipe="cifar", size=8, in_memory=True, batch_size=4, key=(1993, 0, "train"), **changes) -> Loading:
    transform = ClassifierTransform(AUGMENTATIONS[recipe], size, (0.5,) * 3, (0.5,) * 3, in_memory)
    return Loading(transform, batch_size, key, CPU, **changes)


def batches_of(images, replay=None, **changes) -> ImageBatches:
    """Batches of images that are known by their labels."""
    return ImageBatches(images, replay, loading(**changes))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> ImageSet:
    """Nine files of several sizes."""
    folder, draw = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(draw.integers(256, size=(20 + i, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return ImageSet.of([str(folder / f"{i}.png") for i in range(9)], torch.arange(9))


def labels_of(epoch: Iterable[Batch]) -> list[int]:
    return [label for batch in epoch for label in batch.labels.tolist()]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert [batch.labels.tolist() for batch in left] == [batch.labels.tolist() for batch in right]
    assert_close([batch.images for batch in left], [batch.images for batch in right], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("count", "sizes", "full"),
    [(10, [4, 4, 2], [4, 4]), (8, [4, 4], [4, 4]), (3, [3], [3])],  # the last batch may be smaller, or left out
)
def test_every_image_comes_once_per_epoch_unless_what_does_not_fill_a_batch_is_left_out(count, sizes, full):
    batches, dropping = batches_of(images_of(count)), batches_of(images_of(count), drop_last=True)
    epoch = list(batches.epoch(0))
    assert [len(batch) for batch in epoch] == sizes and len(batches) == len(sizes)
    assert sorted(labels_of(epoch)) == list(range(count))
    assert [len(batch) for batch in dropping.epoch(0)] == full and len(dropping) == len(full)


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(9, 4, [4, 5]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 2, [3]), (3, 4, [3])],  # one alone joins, two do not
)
def test_a_last_batch_that_is_too_small_joins_the_one_before(count, batch_size, sizes):
    joining, apart = (batches_of(images_of(count), batch_size=batch_size, network=network) for network in (PAIRS, None))
    epoch = list(joining.epoch(3))
    assert [len(batch) for batch in epoch] == sizes and len(joining) == len(sizes)
    assert labels_of(epoch) == labels_of(apart.epoch(3))  # the same images in the same order
    assert_same(list(joining.epoch(3, len(sizes) - 1)), epoch[-1:])  # also where a run is taken up
    if len(joining) == len(apart):
        assert_same(epoch, list(apart.epoch(3)))


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (5, 1)])
def test_a_batch_that_can_join_none_is_refused_before_the_first_step(count, batch_size):
    with pytest.raises(ConfigError, match=f"1 of {count} images in a batch: BatchNorm of this network cannot train on"):
        next(batches_of(images_of(count), batch_size=batch_size, network=PAIRS).epoch(0))


@pytest.mark.parametrize(("count", "world"), [(7, 2), (6, 2), (5, 3)])
def test_no_process_gets_fewer_samples_than_the_network_needs(count, world):
    shards = [batches_of(images_of(count), shard=(rank, world), network=PAIRS).epoch(0) for rank in range(world)]
    assert all(len(batch) >= 2 for shard in shards for batch in shard)


def test_every_image_keeps_its_label():
    images = images_of(10)
    for batch in batches_of(images, recipe="none").epoch(0):
        assert_close(batch.images, images.parts[0].images[batch.labels] / 127.5 - 1)


def test_replay_is_marked_wherever_the_shuffle_puts_it():
    batches = batches_of(images_of(6), images_of(5, start=6))
    epoch = list(batches.epoch(0))
    assert all(batch.is_replay.tolist() == [label >= 6 for label in batch.labels.tolist()] for batch in epoch)
    assert sum(int(batch.is_replay.sum()) for batch in epoch) == 5
    assert any(0 < int(batch.is_replay.sum()) < len(batch) for batch in epoch)


def test_small_images_stay_small_and_larger_replay_is_kept_at_the_networks_size():
    batches = batches_of(images_of(6), images_of(4, size=64, start=6), recipe="vit_crop", size=32)
    assert [tuple(pixels.shape) for pixels in batches.stores] == [(6, 3, 8, 8), (4, 3, 32, 32)]
    assert all(pixels.dtype == torch.uint8 for pixels in batches.stores)
    (batch,) = batches_of(images_of(2), images_of(2, size=16, start=2)).epoch(0)
    assert batch.images.shape == (4, 3, 8, 8)


def test_images_of_two_sizes_stay_with_their_labels_in_every_batch():
    def flat(count, size, start):
        levels = torch.arange(start, start + count).to(torch.uint8)
        return ImageSet.of(levels.view(-1, 1, 1, 1).repeat(1, 3, size, size), torch.arange(start, start + count))

    batches = batches_of(flat(6, 8, 0) + flat(3, 40, 6), flat(5, 16, 9), recipe="vit_crop", size=32)
    for batch in batches.epoch(0):
        levels = ((batch.images + 1) * 127.5).mean((1, 2, 3)).round()
        assert batch.images.shape[1:] == (3, 32, 32)
        assert levels.tolist() == batch.labels.tolist()


def test_a_set_of_two_sizes_is_evaluated_in_stored_order():
    images = images_of(3) + images_of(2, size=64, start=3) + images_of(1, size=32, start=5)
    transform = loading("vit_crop", 32).transform
    together = torch.cat(list(test_batches(images, transform, 2, CPU)))
    apart = [next(test_batches(images.take([i]), transform, 2, CPU)) for i in range(6)]
    assert_close(together, torch.cat(apart), rtol=0, atol=0)


def test_order_and_augmentation_depend_on_key_and_epoch_alone():
    first = list(batches_of(images_of(12)).epoch(0))
    torch.manual_seed(99)
    assert_same(first, list(batches_of(images_of(12)).epoch(0)))
    keys = [((1993, 0, "train"), 0), ((1993, 0, "train"), 1), ((1993, 1, "train"), 0), ((1993, 0, "other"), 0)]
    epochs = [batches_of(images_of(12), key=key).epoch(epoch) for key, epoch in keys]
    assert len(set(map(tuple, map(labels_of, epochs)))) == 4


def test_every_batch_of_an_epoch_is_augmented_anew():
    image = images_of(1).parts[0].images
    same = ImageSet.of(image.expand(12, -1, -1, -1), torch.arange(12))
    first, second, third = (batch.images for batch in batches_of(same).epoch(0))
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize(("count", "world"), [(16, 2), (11, 2), (12, 3), (9, 2), (5, 3)])
def test_shards_partition_every_batch_unless_it_is_smaller_than_their_number(count, world):
    whole = list(batches_of(images_of(count)).epoch(0))
    shards = [list(batches_of(images_of(count), shard=(rank, world)).epoch(0)) for rank in range(world)]
    for step, batch in enumerate(whole):
        pieces = [shard[step].labels.tolist() for shard in shards]
        assert all(pieces)  # an empty batch has no mean loss
        together = pieces[0] if len(batch) < world else [index for piece in pieces for index in piece]
        assert sorted(together) == sorted(batch.labels.tolist())


@pytest.mark.parametrize("recipe", ["none", "imagenet", "imagenet_jitter", "auto_augment"])
def test_large_images_are_the_same_with_and_without_worker_processes(photographs, recipe):
    settings = {**LARGE, "recipe": recipe}
    alone, helped = (list(batches_of(photographs, **settings, num_workers=workers).epoch(0)) for workers in (0, 2))
    assert alone[0].images.shape == (4, 3, 16, 16)
    assert_same(alone, helped)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_large_image_that_breaks_while_it_is_trained_on_is_named_without_a_traceback(tmp_path, damage, workers):
    path = tmp_path / "late.jpg"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(80, 80, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1000]) if damage == "cut off" else path.unlink()  # a whole header is left
    images = ImageSet.of([str(path)], torch.tensor([0]))
    training = batches_of(images, **LARGE, num_workers=workers)
    for batches in (training.epoch(0), test_batches(images, training.transform, 4, CPU, workers)):
        with pytest.raises(DataError) as caught:
            next(batches)
        assert str(caught.value).startswith(f"cannot read the image {path}: ") and "\n" not in str(caught.value)


def test_each_large_image_is_cropped_by_its_own_key(photographs):
    def crops(batch_size):
        batches = batches_of(photographs, **LARGE, batch_size=batch_size)
        return torch.cat(list(batches._load(torch.arange(9).split(batch_size), torch.arange(9), epoch=0)))

    assert_close(crops(2), crops(9), rtol=0, atol=0)


@pytest.mark.parametrize("in_memory", [True, False])
def test_test_batches_keep_the_stored_order_without_augmentation(in_memory):
    images = images_of(10, size=16)
    transform = loading("imagenet", 16, in_memory).transform
    chunks = list(test_batches(images, transform, 4, CPU))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2] and not list(test_batches(ImageSet(), transform, 4, CPU))
    pixels = images.parts[0].images
    # Small images of the network's size are shown whole, large ones as ImageNet's are.
    views = pixels if in_memory else torch.stack([transform.load_test(image) for image in pixels])
    assert_close(torch.cat(chunks), views / 127.5 - 1)


def paired(replay_size=4) -> PairedBatches:
    """Three batches of the present per epoch; five images of replay, which go round beneath them."""
    replay = batches_of(ImageSet(), images_of(5, start=50), key=(1993, 1, "replay"), batch_size=replay_size)
    return PairedBatches(batches_of(images_of(10)), replay)


def test_an_epoch_is_one_of_the_present_with_replay_beside_every_batch():
    batches = paired()
    epoch = list(batches.epoch(0))
    assert len(batches) == len(epoch) == 3
    assert_same(epoch, list(batches_of(images_of(10)).epoch(0)))
    assert all(batch.replay.is_replay.all() and not batch.is_replay.any() for batch in epoch)
    assert all((batch.replay.labels >= 50).all() for batch in epoch)


@pytest.mark.parametrize("replay_size", [2, 5, 9])  # more, and fewer, batches than the present has
def test_replay_goes_round_and_round_beneath_the_epochs(replay_size):
    batches = paired(replay_size)
    beside = [batch.replay for epoch in range(3) for batch in batches.epoch(epoch)]
    rounds = [batch for number in range(9) for batch in batches.replay.epoch(number)]
    assert_same(beside, rounds[:9])


@pytest.mark.parametrize("in_memory", [True, False])
def test_every_sample_has_its_own_soft_target_or_that_of_its_label(in_memory):
    soft, others = torch.rand(3, 10), torch.eye(10)
    replay = ImageSet.of(images_of(3, start=7).parts[0].images, torch.tensor([7, 8, 9]), soft_targets=soft)
    for batch in batches_of(images_of(7), replay, in_memory=in_memory).epoch(0):
        assert_close(batch.soft_targets, torch.cat([others[:7], soft])[batch.labels])  # labels are positions
    first = replay.relabelled(torch.arange(3))
    for batch in MixedBatches(first, FeatureSet.of(torch.zeros(7, 3), torch.arange(3, 10)), loading()).epoch(0):
        assert_close(batch.soft_targets, torch.cat([soft, others[3:]])[batch.labels])
    assert next(batches_of(images_of(7)).epoch(0)).soft_targets is None


def mixed(num_images=6, num_features=5, recipe="none") -> MixedBatches:
    """Images and features that are filled with their label; features come behind the images."""
    labels = torch.arange(num_images + num_features)
    images, features = labels[:num_images], labels[num_images:]
    pixels = images.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8)
    features = FeatureSet.of(features.view(-1, 1).expand(-1, 2).float(), features)
    return MixedBatches(ImageSet.of(pixels, images), features, loading(recipe))


def test_labels_of_mixed_batches_are_those_of_images_and_features_behind_each_other():
    epoch = list(mixed().epoch(0))
    assert sorted(labels_of(epoch)) == list(range(11))
    assert any(len(batch.images.images) and len(batch.images.features) for batch in epoch)
    for batch in epoch:
        shown = [(batch.images.images[:, 0, 0, 0] + 1) * 127.5, batch.images.features[:, 0]]
        assert_close(torch.cat(shown).round(), batch.labels.float())
        assert batch.is_replay.tolist() == [label >= 6 for label in batch.labels.tolist()]


@pytest.mark.parametrize(("num_images", "num_features"), [(0, 5), (1, 8)])
def test_a_batch_may_hold_features_alone(num_images, num_features):
    epoch = list(mixed(num_images, num_features).epoch(0))
    assert [len(batch) for batch in epoch] == [len(b.images.images) + len(b.images.features) for b in epoch]
    alone = [batch for batch in epoch if len(batch.images.features) == len(batch)]
    assert alone and all(batch.images.images.shape == (0, 3, 1, 1) and batch.is_replay.all() for batch in alone)


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize(
    "make",
    [
        lambda files: batches_of(images_of(12)),
        lambda files: batches_of(files, **LARGE),
        lambda files: paired(),
        lambda files: mixed(2, 12, recipe="cifar"),  # batches of features alone are among them
    ],
)
def test_starting_at_a_step_gives_the_batches_that_would_have_come(photographs, make, start):
    for epoch in range(6):
        rest, expected = list(make(photographs).epoch(epoch, start)), list(make(photographs).epoch(epoch))[start:]
        assert_same(rest, expected)
        assert_same(*([batch.replay for batch in batches if batch.replay] for batches in (rest, expected)))
