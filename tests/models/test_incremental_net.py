"""The classifier of every learner: grow, freeze, align."""

import pytest
import torch
from torch import nn

from models.heads import CosineHead, LinearHead
from models.incremental import IncrementalNet
from tests.support.learned import snapshot


class Flat(nn.Module):
    num_features = 12

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x).flatten(1)


def network(num_classes=0, head=LinearHead):
    net = IncrementalNet(Flat(), head(12))
    net.grow(num_classes, torch.Generator().manual_seed(0))
    return net


IMAGES = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head", [LinearHead, CosineHead])
def test_logits_are_as_wide_as_the_classes_seen(head):
    net = network(0, head)
    for num_classes in (2, 3, 10):
        net.grow(num_classes)
        assert net.num_classes == num_classes and net(IMAGES).shape == (5, num_classes)
    assert net.features(IMAGES).shape == (5, 12)


def test_the_logits_of_old_classes_survive_growth_and_layouts_carry_the_shapes():
    net, other = network(4).eval(), network().eval()
    logits = net(IMAGES)
    net.grow(9)
    torch.testing.assert_close(net(IMAGES)[:, :4], logits, rtol=0, atol=0)
    other.rebuild(net.layout())
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(IMAGES), net(IMAGES), rtol=0, atol=0)
    with pytest.raises(AssertionError):  # a head of another width
        IncrementalNet(Flat(), LinearHead(13))


def test_a_frozen_copy_neither_learns_nor_follows_the_original():
    net = network(4).train()
    net(IMAGES).sum().backward()
    teacher = net.frozen_copy()
    logits = teacher(IMAGES)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1
    net(IMAGES)  # moves the statistics of the original only
    torch.testing.assert_close(teacher(IMAGES), logits, rtol=0, atol=0)
    assert not teacher.training and net.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("norms", "factor"),
    [
        ((3.0, 5.0, 1.0, 3.0), 2.0),  # (3 + 5) / (1 + 3)
        ((1.0, 3.0, 5.0, 11.0), 0.25),  # longer ones are shortened
    ],
)
def test_aligning_gives_new_rows_the_mean_length_of_old_ones(norms, factor):
    net = network(4)
    net.head.weight.data = torch.tensor(norms)[:, None] * torch.eye(4, 12)
    net.head.bias.data = torch.arange(4.0)
    assert net.align_new_weights(2) == factor
    for _ in range(2):  # to do it again changes nothing
        expected = torch.tensor([*norms[:2], *(norm * factor for norm in norms[2:])])
        torch.testing.assert_close(net.head.weight.data.diagonal(), expected)
        torch.testing.assert_close(net.head.bias.data, torch.arange(4.0))
        assert net.align_new_weights(2) == 1.0


@pytest.mark.parametrize("num_old", [0, 4])
def test_aligning_needs_old_and_new_classes(num_old):
    with pytest.raises(AssertionError, match=f"num_old={num_old} of 4 classes"):
        network(4).align_new_weights(num_old)


@pytest.mark.parametrize(("side", "least"), [(2, 1), (1, 2)])  # one image of one pixel leaves BatchNorm a single value
def test_batch_norm_says_how_many_images_it_needs_and_learns_nothing_by_it(side, least):
    net = network()
    before = snapshot(net)
    assert net.eval().least_batch(side) == least and not net.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.backbone.norm = nn.Identity()
    assert net.least_batch(side) == 1
