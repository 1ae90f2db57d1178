"""The network of DER and MEMO: a branch per task, old ones untouched, one head over all of them."""

import pytest
import torch
from torch import nn

from learners.expandable.network import ExpandableNet, split_last_stage
from models.heads import LinearHead
from models.options import BackboneOptions
from models.timm_backbone import build_backbone
from tests.support.learned import snapshot
from utils.run.errors import ConfigError

IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def unit(in_channels, channels):
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, bias=False), nn.BatchNorm2d(channels))


def network(*totals, **keys):
    """A trunk of 4 maps and branches of 5 features, grown to these numbers of classes one after the other."""
    torch.manual_seed(0)
    branch = nn.Sequential(unit(4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    keys = {"train_trunk": True, "train_old": False, **keys}
    net = ExpandableNet(nn.Sequential(unit(3, 4), nn.ZeroPad2d(1)), branch, LinearHead(5), **keys)
    for total in totals:
        net.grow(total, torch.Generator().manual_seed(total))
    return net


def train_step(net):
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    logits, auxiliary = net.train().both_logits(IMAGES)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    optimizer.step()


def test_every_task_after_the_first_adds_a_branch_and_all_classes_read_all_branches():
    net = network()
    for num_branches, total in enumerate((2, 3, 10), start=1):
        net.grow(total)
        assert net.features(IMAGES).shape == (6, 5 * num_branches)
        assert net(IMAGES).shape == (6, total) and net.num_classes == total


def test_a_new_branch_starts_as_a_copy_of_the_newest_one_and_features_are_those_of_all_oldest_first():
    net = network(2, 4)
    train_step(net)
    net.grow(6)
    first, second, third = (snapshot(branch) for branch in net.backbone.branches)
    torch.testing.assert_close(third, second, rtol=0, atol=0)
    assert not torch.equal(first["0.0.weight"], third["0.0.weight"])
    maps = net.eval().backbone.trunk(IMAGES)
    by_hand = torch.cat([branch(maps) for branch in net.backbone.branches], dim=1)
    torch.testing.assert_close(net.features(IMAGES), by_hand)


def test_training_leaves_every_bit_of_old_branches_and_moves_trunk_and_newest_branch():
    net = network(2, 4, 6)
    before = [snapshot(part) for part in (*net.backbone.branches, net.backbone.trunk)]
    train_step(net)
    after = [snapshot(part) for part in (*net.backbone.branches, net.backbone.trunk)]
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)  # BatchNorm's statistics, too
    for old, new in zip(before[2:], after[2:]):
        assert all(not torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(("keys", "frozen"), [
    ({}, [False, True, True, False]),  # trunk, then branches
    ({"train_trunk": False}, [True, True, True, False]),
    ({"train_old": True}, [False, False, False, False]),
])  # fmt: skip
def test_from_the_second_task_on_frozen_parts_are_in_eval_mode_whatever_the_mode_of_the_network(keys, frozen):
    net = network(2, **keys)
    for totals, expected in (((), [False, False]), ((4, 6), frozen)):
        for total in totals:
            net.grow(total)
        for mode in (True, False, True):
            net.train(mode)
        parts = (net.backbone.trunk, *net.backbone.branches)
        assert [not any(module.training for module in part.modules()) for part in parts] == expected
        assert [not any(p.requires_grad for p in part.parameters()) for part in parts] == expected


def test_the_trunk_learns_through_frozen_branches_as_well():
    net = network(2, 4)
    with torch.no_grad():
        net.head.weight[:, 5:] = 0  # the new branch says nothing
    net.train()(IMAGES).square().sum().backward()
    assert net.backbone.trunk[0][0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.backbone.branches[0].parameters())


def test_the_auxiliary_head_tells_new_classes_and_one_for_the_past_by_the_newest_branch():
    assert network(2).auxiliary is None
    net = network(2, 5).eval()
    logits, auxiliary = net.both_logits(IMAGES)
    newest = net.backbone.branches[1](net.backbone.trunk(IMAGES))
    torch.testing.assert_close(auxiliary, newest @ net.auxiliary.weight.T)
    torch.testing.assert_close(logits, net(IMAGES))
    assert auxiliary.shape == (6, 1 + 3)


def test_growth_is_drawn_from_the_generator_alone():
    first, second = network(2), network(2)
    torch.manual_seed(1), first.grow(4, torch.Generator().manual_seed(5))
    torch.manual_seed(2), second.grow(4, torch.Generator().manual_seed(5))
    torch.testing.assert_close(snapshot(first), snapshot(second), rtol=0, atol=0)


@pytest.mark.parametrize("totals", [(), (2,), (2, 4), (2, 4, 5)])
def test_a_new_network_takes_the_shapes_of_a_layout(totals):
    net, other = network(*totals), network()
    net.auxiliary = None
    other.rebuild(net.layout())
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.eval()(IMAGES), net.eval()(IMAGES), rtol=0, atol=0)
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in other.parameters()]


def test_a_teacher_shares_frozen_branches_and_does_not_follow_the_rest():
    net = network(2, 4)
    teacher = net.frozen_copy()
    logits = teacher(IMAGES)
    train_step(net)
    torch.testing.assert_close(teacher(IMAGES), logits, rtol=0, atol=0)
    shared = [old is new for old, new in zip(net.backbone.branches, teacher.backbone.branches)]
    assert shared == [True, False] and net.backbone.branches[1].training


VIT = {"pretrained": False, "image_size": 16, "args": {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}}


@pytest.mark.parametrize(("name", "options"), [
    *((name, {}) for name in ("resnet20", "resnet32", "cosine_resnet32", "resnet18", "resnet34", "resnet50")),
    ("vit_tiny_patch16_224", VIT),
])  # fmt: skip
def test_trunk_and_last_stage_one_after_the_other_are_the_backbone(name, options):
    backbone = build_backbone(name, BackboneOptions(**options)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        whole, shapes = backbone(x), [parameter.shape for parameter in backbone.parameters()]
        trunk, last_stage = split_last_stage(backbone)
        torch.testing.assert_close(last_stage(trunk(x)), whole)
    assert [p.shape for p in (*trunk.parameters(), *last_stage.parameters())] == shapes


def test_a_vit_is_cut_in_front_of_its_last_block():
    trunk, last_stage = split_last_stage(build_backbone("vit_tiny_patch16_224", BackboneOptions(**VIT)))
    assert len(trunk.blocks) == 2 and len(list(last_stage.parameters())) == 12 + 2  # a block and the last norm


def test_a_backbone_without_known_stages_is_refused_with_those_that_have_them():
    with pytest.raises(ConfigError, match=r"a PreactResNet cannot be cut .*convnet_type=resnet20, .*resnet50"):
        split_last_stage(build_backbone("preact_resnet18", BackboneOptions()))
    with pytest.raises(ConfigError, match=r"a ConvNeXt cannot be cut .*a vision transformer of timm"):
        split_last_stage(build_backbone("test_convnext", BackboneOptions(pretrained=False)))
