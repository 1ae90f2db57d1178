"""Every image once per epoch, in an order that depends on the key alone and needs no state to be resumed."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from utils.data.batches import Batch, ImageBatches, PairedBatches, RenewedBatches, test_batches
from utils.data.images import ImageSet
from utils.data.transforms import AUGMENTATIONS, ClassifierTransform

CPU = torch.device("cpu")


def images_of(count, size=8, start=0) -> ImageSet:
    draw = torch.Generator().manual_seed(start)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=draw)
    return ImageSet.of(pixels, torch.arange(start, start + count))


def batches_of(images, replay=None, recipe="cifar", size=8, in_memory=True, **changes) -> ImageBatches:
    transform = ClassifierTransform(AUGMENTATIONS[recipe], size, (0.5,) * 3, (0.5,) * 3, in_memory)
    settings = {"transform": transform, "batch_size": 4, "key": (1993, 0, "train"), "device": CPU, **changes}
    return ImageBatches(images, replay, **settings)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> ImageSet:
    """Nine files of several sizes."""
    folder, draw = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(draw.integers(256, size=(20 + i, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return ImageSet.of([str(folder / f"{i}.png") for i in range(9)], torch.arange(9))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert [batch.index.tolist() for batch in left] == [batch.index.tolist() for batch in right]
    for one, other in zip(left, right):
        assert_close(one.images, other.images, rtol=0, atol=0)
        assert_close(one.labels, other.labels, rtol=0, atol=0)


@pytest.mark.parametrize(("count", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_every_image_comes_once_per_epoch_and_the_last_batch_may_be_smaller(count, sizes):
    batches = batches_of(images_of(count))
    epoch = list(batches.epoch(0))
    assert [len(batch) for batch in epoch] == sizes
    assert len(batches) == len(sizes)
    assert sorted(torch.cat([batch.index for batch in epoch]).tolist()) == list(range(count))


@pytest.mark.parametrize(("count", "sizes"), [(10, [4, 4]), (8, [4, 4]), (3, [3])])
def test_what_does_not_fill_a_batch_is_left_out_where_asked(count, sizes):
    batches = batches_of(images_of(count), drop_last=True)
    assert [len(batch) for batch in batches.epoch(0)] == sizes and len(batches) == len(sizes)


def test_labels_and_images_belong_to_the_index():
    images = images_of(10)
    batches = batches_of(images, recipe="none")
    for batch in batches.epoch(0):
        assert_close(batch.labels, images.labels[batch.index])
        assert_close(batch.images, images.parts[0].images[batch.index] / 127.5 - 1)


def test_replay_is_marked_wherever_the_shuffle_puts_it():
    batches = batches_of(images_of(6), images_of(5, start=6))
    epoch = list(batches.epoch(0))
    assert all(batch.is_replay.tolist() == [label >= 6 for label in batch.labels.tolist()] for batch in epoch)
    assert sum(int(batch.is_replay.sum()) for batch in epoch) == 5
    assert any(0 < int(batch.is_replay.sum()) < len(batch) for batch in epoch)


def test_replay_of_another_size_is_brought_to_the_networks():
    epoch = list(batches_of(images_of(2), images_of(2, size=16, start=2)).epoch(0))
    assert epoch[0].images.shape == (4, 3, 8, 8)


def test_small_images_stay_small_and_larger_replay_is_kept_at_the_networks_size():
    batches = batches_of(images_of(6), images_of(4, size=64, start=6), recipe="vit_crop", size=32)
    assert [tuple(pixels.shape) for pixels in batches.stores] == [(6, 3, 8, 8), (4, 3, 32, 32)]
    assert all(pixels.dtype == torch.uint8 for pixels in batches.stores)


def test_images_of_two_sizes_stay_with_their_labels_in_every_batch():
    def flat(count, size, start):
        levels = torch.arange(start, start + count).to(torch.uint8)
        return ImageSet.of(levels.view(-1, 1, 1, 1).repeat(1, 3, size, size), torch.arange(start, start + count))

    batches = batches_of(flat(6, 8, 0) + flat(3, 40, 6), flat(5, 16, 9), recipe="vit_crop", size=32)
    for batch in batches.epoch(0):
        levels = ((batch.images + 1) * 127.5).mean((1, 2, 3)).round()
        assert batch.images.shape[1:] == (3, 32, 32)
        assert levels.tolist() == batch.labels.tolist() == batch.index.tolist()


def test_a_set_of_two_sizes_is_evaluated_in_stored_order():
    images = images_of(3) + images_of(2, size=64, start=3) + images_of(1, size=32, start=5)
    transform = ClassifierTransform(AUGMENTATIONS["vit_crop"], 32, (0.0,) * 3, (1.0,) * 3, True)
    together = torch.cat(list(test_batches(images, transform, 2, CPU)))
    apart = [next(test_batches(images.take([i]), transform, 2, CPU)) for i in range(6)]
    assert_close(together, torch.cat(apart), rtol=0, atol=0)


def test_order_and_augmentation_depend_on_the_key_alone():
    first = list(batches_of(images_of(12)).epoch(0))
    torch.manual_seed(99)
    torch.rand(7)
    assert_same(first, list(batches_of(images_of(12)).epoch(0)))


def test_every_batch_of_an_epoch_is_augmented_anew():
    image = images_of(1).parts[0].images
    same = ImageSet.of(image.expand(12, -1, -1, -1), torch.arange(12))
    first, second, third = (batch.images for batch in batches_of(same).epoch(0))
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"key": (1993, 1, "train")}, {"key": (1993, 0, "other")}])
def test_another_key_or_epoch_gives_another_order(change):
    epoch = change.pop("epoch", 0)
    orders = [
        torch.cat([batch.index for batch in batches.epoch(number)]).tolist()
        for batches, number in [(batches_of(images_of(12)), 0), (batches_of(images_of(12), **change), epoch)]
    ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_starting_at_a_step_gives_the_batches_that_would_have_come(start):
    whole = list(batches_of(images_of(12)).epoch(5))
    assert_same(list(batches_of(images_of(12)).epoch(5, start)), whole[start:])


def test_starting_at_a_step_gives_the_same_large_images(photographs):
    def batches():
        return batches_of(photographs, recipe="imagenet", size=16, in_memory=False)

    assert_same(list(batches().epoch(1, 2)), list(batches().epoch(1))[2:])


@pytest.mark.parametrize(("count", "world"), [(16, 2), (11, 2), (12, 3), (9, 2), (5, 3)])
def test_shards_partition_every_batch_unless_it_is_smaller_than_their_number(count, world):
    whole = list(batches_of(images_of(count)).epoch(0))
    shards = [list(batches_of(images_of(count), shard=(rank, world)).epoch(0)) for rank in range(world)]
    for step, batch in enumerate(whole):
        pieces = [shard[step].index.tolist() for shard in shards]
        assert all(pieces)  # an empty batch has no mean loss
        together = pieces[0] if len(batch) < world else [index for piece in pieces for index in piece]
        assert sorted(together) == sorted(batch.index.tolist())


@pytest.mark.parametrize("recipe", ["none", "imagenet", "imagenet_jitter", "auto_augment"])
def test_large_images_are_the_same_with_and_without_worker_processes(photographs, recipe):
    alone, helped = (
        list(batches_of(photographs, recipe=recipe, size=16, in_memory=False, num_workers=workers).epoch(0))
        for workers in (0, 2)
    )
    assert alone[0].images.shape == (4, 3, 16, 16)
    assert_same(alone, helped)


def test_each_large_image_is_cropped_by_its_own_key(photographs):
    def crops(batch_size):
        batches = batches_of(photographs, recipe="imagenet", size=16, in_memory=False, batch_size=batch_size)
        picks = torch.arange(9).split(batch_size)
        return torch.cat(list(batches._load(picks, torch.arange(9), epoch=0)))

    assert_close(crops(2), crops(9), rtol=0, atol=0)


@pytest.mark.parametrize("in_memory", [True, False])
def test_test_batches_keep_the_stored_order_without_augmentation(in_memory):
    images = images_of(10, size=16)
    transform = ClassifierTransform(AUGMENTATIONS["imagenet"], 16, (0.5,) * 3, (0.5,) * 3, in_memory)
    chunks = list(test_batches(images, transform, 4, CPU))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    pixels = images.parts[0].images
    # Small images of the network's size are shown whole, large ones as ImageNet's are.
    views = pixels if in_memory else torch.stack([transform.load_test(image) for image in pixels])
    assert_close(torch.cat(chunks), views / 127.5 - 1)


def test_no_images_give_no_test_batches():
    transform = ClassifierTransform(AUGMENTATIONS["cifar"], 8, (0.5,) * 3, (0.5,) * 3, True)
    assert list(test_batches(ImageSet(), transform, 4, CPU)) == []


@pytest.mark.parametrize("soft", [None, torch.eye(4)])
def test_take_keeps_the_rows_of_a_mask(soft):
    is_replay = torch.tensor([False, True, False, True])
    batch = Batch(torch.rand(4, 3, 2, 2), torch.arange(4), is_replay, torch.arange(4), soft)
    replay = batch.take(batch.is_replay)
    assert replay.labels.tolist() == replay.index.tolist() == [1, 3]
    assert_close(replay.images, batch.images[[1, 3]])
    assert_close(replay.soft_targets, None if soft is None else soft[[1, 3]])


# ---------------------------------------------------------------------- replay beside the present


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


@pytest.mark.parametrize("position", range(9))
def test_paired_batches_go_on_at_any_step_with_the_same_bits(position):
    whole = [batch for epoch in range(3) for batch in paired().epoch(epoch)]
    epoch, start = divmod(position, 3)
    rest = list(paired().epoch(epoch, start))
    assert_same(rest, whole[position : 3 * epoch + 3])
    assert_same([batch.replay for batch in rest], [batch.replay for batch in whole[position : 3 * epoch + 3]])


# ---------------------------------------------------------------------- renewed replay


def renewed(draws, interval=2, real=10, **changes) -> RenewedBatches:
    """Four real images and three replayed ones per batch; the grey level of replay is the step of its draw."""

    def draw(step):
        draws.append(step)
        return ImageSet.of(torch.full((3, 3, 8, 8), step, dtype=torch.uint8), torch.full((3,), 9))

    transform = ClassifierTransform(AUGMENTATIONS["none"], 8, (0.5,) * 3, (0.5,) * 3, in_memory=True)
    options = {"transform": transform, "batch_size": 4, "key": (0,), "device": CPU}
    return RenewedBatches(images_of(real), draw, interval, **{**options, **changes})


def test_replay_is_drawn_every_so_many_steps_and_stands_whole_in_every_batch():
    draws = []
    batches = renewed(draws)
    found = [batch for epoch in range(3) for batch in batches.epoch(epoch)]
    assert len(batches) == 2 and draws == [0, 2, 4]
    assert [(len(batch), int(batch.is_replay.sum())) for batch in found] == [(7, 3)] * 6
    assert all((batch.labels[batch.is_replay] == 9).all() for batch in found)


def test_between_two_draws_the_same_replay_meets_other_real_images_in_another_order():
    first, second = list(renewed([]).epoch(0))
    assert_close(first.images[first.is_replay], second.images[second.is_replay], rtol=0, atol=0)
    assert not set(first.index[~first.is_replay].tolist()) & set(second.index[~second.is_replay].tolist())
    assert first.is_replay.tolist() != second.is_replay.tolist()


@pytest.mark.parametrize("start", [1, 2, 3])
def test_renewed_batches_go_on_between_two_draws_with_the_same_bits(start):
    whole = renewed([], real=16)
    expected, state = [], {}
    for step, batch in enumerate(whole.epoch(0), 1):
        expected.append(batch)
        state = dict(whole.state_dict()) if step == start else state
    draws = []
    resumed = renewed(draws, real=16)
    resumed.load_state_dict(state)
    assert_same(list(resumed.epoch(0, start)), expected[start:])
    assert draws == [step for step in (2,) if step >= start]


def test_without_a_draw_there_are_real_images_alone():
    batches = renewed([])
    batches.draw = None
    assert [len(batch) for batch in batches.epoch(0)] == [4, 4] and batches.state_dict() == {}


def test_a_mixed_batch_smaller_than_the_processes_goes_to_all_of_them():
    alone = renewed([], real=1, batch_size=1, shard=(3, 9))
    assert [len(batch) for batch in alone.epoch(0)] == [4]


def test_processes_share_a_mixed_batch():
    parts = [list(renewed([], shard=(rank, 2)).epoch(0)) for rank in range(2)]
    for shares in zip(*parts):
        assert sorted(torch.cat([share.index for share in shares]).tolist())[-3:] == [10, 11, 12]
        assert sum(map(len, shares)) == 7
