"""Replay that is drawn anew inside the training, beside fresh real images."""

import pytest
import torch
from torch.testing import assert_close

from learners.guide.batches import RenewedBatches
from utils.data.batches import Loading
from utils.data.images import ImageSet
from utils.data.transforms import AUGMENTATIONS, ClassifierTransform


def renewed(draws, real=10, batch_size=4, **changes) -> RenewedBatches:
    """Four real images and three replayed ones per batch; the grey level of replay is the step of its draw."""

    def draw(step):
        draws.append(step)
        return ImageSet.of(torch.full((3, 3, 8, 8), step, dtype=torch.uint8), torch.tensor([97, 98, 99]))

    transform = ClassifierTransform(AUGMENTATIONS["none"], 8, (0.5,) * 3, (0.5,) * 3, in_memory=True)
    loading = Loading(transform, batch_size, (0,), torch.device("cpu"), **changes)
    pixels = torch.randint(256, (real, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return RenewedBatches(ImageSet.of(pixels, torch.arange(real)), draw, 2, loading)


def test_replay_is_drawn_every_so_many_steps_and_stands_whole_in_every_batch():
    draws = []
    batches = renewed(draws)
    found = [batch for epoch in range(3) for batch in batches.epoch(epoch)]
    assert len(batches) == 2 and draws == [0, 2, 4]
    assert [(len(batch), int(batch.is_replay.sum())) for batch in found] == [(7, 3)] * 6
    assert all(sorted(batch.labels[batch.is_replay].tolist()) == [97, 98, 99] for batch in found)


def test_between_two_draws_the_same_replay_meets_other_real_images_in_another_order():
    first, second = list(renewed([]).epoch(0))
    assert_close(first.images[first.is_replay], second.images[second.is_replay], rtol=0, atol=0)
    assert not set(first.labels[~first.is_replay].tolist()) & set(second.labels[~second.is_replay].tolist())
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
    for batch, wanted in zip(resumed.epoch(0, start), expected[start:], strict=True):
        assert_close((batch.images, batch.labels), (wanted.images, wanted.labels), rtol=0, atol=0)
    assert draws == [step for step in (2,) if step >= start]


def test_without_a_draw_there_are_real_images_alone():
    batches = renewed([])
    batches.draw = None
    assert [len(batch) for batch in batches.epoch(0)] == [4, 4] and batches.state_dict() == {}


def test_processes_share_a_mixed_batch_and_one_smaller_than_they_are_many_goes_to_all():
    for shares in zip(*(renewed([], shard=(rank, 2)).epoch(0) for rank in range(2)), strict=True):
        assert sorted(torch.cat([share.labels for share in shares]).tolist())[-3:] == [97, 98, 99]
        assert sum(map(len, shares)) == 7
    assert [len(batch) for batch in renewed([], real=1, batch_size=1, shard=(3, 9)).epoch(0)] == [4]
