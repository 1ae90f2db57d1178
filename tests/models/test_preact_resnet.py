"""GUIDE's classifier: sizes and closed-form values of the reference."""

import pytest
import torch
from torch.testing import assert_close

from models.heads import Head
from models.incremental import IncrementalNet
from models.options import BackboneOptions
from models.preact_resnet import _Block
from models.timm_backbone import build_backbone
from tests.support.learned import count


def classifier(num_classes) -> IncrementalNet:
    network = IncrementalNet(build_backbone("preact_resnet18", BackboneOptions()), Head(512))
    network.grow(num_classes)
    return network


@pytest.fixture
def constant() -> IncrementalNet:
    """Fresh statistics; convolutions are means of their input, class k has the weight (k + 1) / 512 everywhere."""
    network = classifier(4).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    network.head.weight.data[:] = torch.arange(1, 5)[:, None] / 512
    return network


def ramp(side):
    return torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)


@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 11_173_062), (100, 11_219_142)])
def test_the_network_has_the_parameters_and_buffers_of_the_reference(num_classes, parameters):
    with torch.device("meta"):
        network = classifier(num_classes)
    assert count(network) == parameters
    assert sum(buffer.numel() for buffer in network.buffers()) == 8_731


@torch.no_grad()
@pytest.mark.parametrize(("side", "map_side", "logit"), [(32, 4, 26.0000), (64, 8, 41.76558)])
def test_logits_are_those_of_the_reference(constant, side, map_side, logit):
    assert constant.backbone.groups(constant.backbone.stem(ramp(side))).shape == (1, 512, map_side, map_side)
    assert_close(constant(ramp(side)), logit * torch.arange(1.0, 5).view(1, 4), rtol=5e-6, atol=0)


@torch.no_grad()
def test_the_stem_zeroes_what_is_negative_and_pooled_maps_are_normalised_and_cut_after_pooling(constant):
    stem = constant.backbone.stem(ramp(32))[0, 0]  # (32, 32)
    assert_close(stem[[0, 16, 31], [0, 16, 31]], torch.tensor([0.0510390, 0.2305799, 0.1943147]), rtol=0, atol=1e-6)
    pooled = constant.backbone.groups(constant.backbone.stem(ramp(32))).mean(dim=(2, 3))  # (1, 512)
    assert_close(pooled, torch.full((1, 512), 26.00002), rtol=2e-6, atol=0)
    constant.backbone.norm.running_mean[:2] = torch.tensor([20.0, 30.0])
    features = constant.features(ramp(32))[0]
    assert_close(features[:3], torch.tensor([6.00002, 0.0, 26.00002]), rtol=1e-5, atol=0)


@torch.no_grad()
def test_only_a_shortcut_to_another_shape_has_its_own_normalisation_and_relu():
    same, block, x = _Block(4, 4, stride=1), _Block(4, 8, stride=2).eval(), torch.randn(2, 4, 6, 6)
    for each in (same, block):  # an empty branch leaves the shortcut
        torch.nn.init.zeros_(each.branch[1][2].weight)
    assert_close(same(x), x, rtol=0, atol=0)
    block.shortcut[0].bias.data.fill_(0.5)
    seen = (x[:, :, ::2, ::2] / (1 + 1e-6) ** 0.5 + 0.5).clamp(min=0)
    expected = torch.einsum("oi,bihw->bohw", block.shortcut[2].weight[:, :, 0, 0], seen)
    assert_close(block(x), expected)
