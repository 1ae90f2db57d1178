"""Our own backbones: known sizes, known shapes, any stem."""

import pytest
import torch
from torchvision.models.resnet import BasicBlock

from models import BACKBONES
from models.options import BackboneOptions
from models.resnet import _Block
from models.timm_backbone import build_backbone
from tests.support.learned import count


@pytest.mark.parametrize(("name", "stem", "parameters"), [
    # PyCIL counts an unused 10-way layer and the head: 469,354 for 80 classes.
    ("resnet32", "cifar", 469_354 - (64 + 1) * 80 - (64 + 1) * 10),
    # Two shortcuts, 16 -> 32 and 32 -> 64 channels, become a 1x1 convolution with BatchNorm.
    ("cosine_resnet32", "cifar", 463_504 + 32 * (16 + 2) + 64 * (32 + 2)),
    ("resnet20", "cifar", 269_072),  # 269,722 of the paper, less the 650 of the classifier
    ("resnet18", "imagenet", 11_176_512), ("resnet18", "cifar", 11_168_832), ("resnet18", "imagenet_small", 11_168_832),
    ("resnet34", "imagenet", 21_284_672), ("resnet50", "imagenet", 23_508_032),
])  # fmt: skip
def test_backbones_have_the_published_number_of_parameters(name, stem, parameters):
    with torch.device("meta"):
        assert count(build_backbone(name, BackboneOptions(stem=stem))) == parameters


@pytest.mark.parametrize("name", BACKBONES.names())
@pytest.mark.parametrize("side", [8, 32])
def test_every_backbone_maps_images_to_its_number_of_features(name, side):
    backbone = build_backbone(name, BackboneOptions()).eval()
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, side, side))
    assert features.shape == (2, backbone.num_features)


@pytest.mark.parametrize(("stem", "side"), [
    ("cifar", 64),  # no reduction before the first stage
    ("imagenet_small", 32),  # max-pool only
    ("imagenet", 16),  # strided convolution and max-pool
])  # fmt: skip
def test_the_stem_decides_how_large_the_first_stage_is(stem, side):
    network = build_backbone("resnet18", BackboneOptions(stem=stem)).eval()
    seen = []
    network.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    assert seen == [(1, 64, side, side)]


def test_a_network_for_a_cosine_head_projects_its_shortcuts_and_has_features_of_both_signs():
    network = build_backbone("cosine_resnet32", BackboneOptions()).eval()
    block = network.stages[1][0]
    # torchvision's block is the published one, with a 1x1 convolution as shortcut (He et al., option B).
    shortcut = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 1, 2, bias=False), torch.nn.BatchNorm2d(32))
    reference = BasicBlock(16, 32, 2, shortcut).eval()
    reference.load_state_dict({name.replace("projection", "downsample"): v for name, v in block.state_dict().items()})
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(x), reference(x))
    features = network(torch.randn(4, 3, 32, 32))
    assert (features < 0).any() and (features > 0).any()  # the last block ends without ReLU


def test_a_shortcut_takes_every_second_pixel_and_appends_zero_channels():
    block = _Block(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 6, 6)
    out = block(x)  # an empty branch leaves the shortcut
    torch.testing.assert_close(out[:, :2], x[:, :, ::2, ::2])
    assert out.shape == (1, 4, 3, 3) and not out[:, 2:].any()


@pytest.mark.parametrize(("name", "rel"), [("resnet32", 0.05), ("resnet18", 0.05), ("preact_resnet18", 0.01)])
def test_convolutions_start_kaiming_normal_by_fan_out(name, rel):
    torch.manual_seed(0)
    for module in build_backbone(name, BackboneOptions()).modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 9000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=rel)


def test_the_same_seed_builds_the_same_network():
    def build():
        torch.manual_seed(3)
        return build_backbone("resnet20", BackboneOptions()).state_dict()

    torch.testing.assert_close(build(), build(), rtol=0, atol=0)


def test_a_torchvision_weight_file_fits_resnet18_without_its_classifier(tmp_path):
    from torchvision.models import resnet18

    reference = resnet18(weights=None).eval()
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    options = BackboneOptions(stem="imagenet", weights=str(tmp_path / "resnet18.pth"))
    backbone = build_backbone("resnet18", options).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(reference.fc(backbone(x)), reference(x))
