"""One name chooses a backbone: ours, or any of timm's with an explicit weight tag."""

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch.testing import assert_close

from models.options import BackboneOptions
from models.timm_backbone import PILOT_ALIASES, build_backbone, check_backbone_name
from utils.run.errors import ConfigError, WeightsError

TAGGED = "test_vit.r160_in1k"  # timm's own tiny ViT for tests, 160 px


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What the hub would send for TAGGED: the whole network with its classifier, for 160 px."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit").eval()
    path = tmp_path_factory.mktemp("hub") / "model.safetensors"
    save_file(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize(("name", "side", "num_features", "args"), [
    ("test_vit", 32, 64, {}),  # positions for 32 px instead of 160
    ("vit_tiny_patch16_224", 8, 48, {"patch_size": 2, "embed_dim": 48, "depth": 4, "num_heads": 4}),
    ("test_resnet.r160_in1k", 32, 96, {}),  # a tag does no harm from scratch
    ("mobilenetv3_small_050", 32, 1024, {}),  # its pooled features are widened behind num_features
    ("resnet32", 8, 64, {}),
    ("ResNet32", 8, 64, {}),  # PyCIL ignores case
])  # fmt: skip
def test_a_network_from_scratch_gives_its_number_of_features(name, side, num_features, args):
    options = BackboneOptions(pretrained=False, image_size=side, args=args)
    check_backbone_name(name, options)
    backbone = build_backbone(name, options).eval()
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, side, side)).shape == (2, num_features)
    assert backbone.num_features == num_features
    assert not args or len(backbone.network.blocks) == args["depth"]


@pytest.mark.parametrize("alias", PILOT_ALIASES)
def test_names_of_pilot_mean_tagged_weights_of_timm(alias):
    check_backbone_name(alias, BackboneOptions())
    assert PILOT_ALIASES[alias] in timm.list_pretrained("vit_base_patch16_224.*")


@pytest.mark.parametrize("act", [check_backbone_name, build_backbone])
@pytest.mark.parametrize(("name", "message"), [
    ("resent32", "unknown backbone 'resent32'; did you mean 'resnet32'.*Ours: .*resnet20.*any timm model"),
    ("vit_tiny_patch16_244", "did you mean 'vit_tiny_patch16_224'"),
    ("vit_tiny_patch16_224", "no weight tag: say which weights: vit_tiny_patch16_224.augreg_in21k, .*pretrained=f"),
    ("vit_tiny_patch16_224.in21k", "no weights .*did you mean 'vit_tiny_patch16_224.augreg_in21k'"),
    ("vit_tiny_patch16_18x2", "unknown backbone"),
    ("xyz", "unknown backbone 'xyz'. Ours"),
])  # fmt: skip
def test_a_name_that_does_not_say_enough_is_answered_with_names_that_do(act, name, message):
    with pytest.raises(ConfigError, match=message):
        act(name, BackboneOptions())


@pytest.mark.parametrize("act", [check_backbone_name, build_backbone])
@pytest.mark.parametrize(("name", "options", "message"), [
    (TAGGED, {}, "backbone_args=.*another network than the published weights.*pretrained=false.*backbone_weights"),
    ("resnet20", {"pretrained": False}, "backbone_args=.*is for timm's models: resnet20"),
    ("test_vit", {"pretrained": False, "args": {"num_classes": 9}}, "backbone_args.num_classes follows from"),
])  # fmt: skip
def test_arguments_that_cannot_be_given_are_refused_before_anything_is_built(act, name, options, message):
    with pytest.raises(ConfigError, match=message):
        act(name, BackboneOptions(**{"args": {"depth": 2}, **options}))


@pytest.mark.parametrize(("args", "said"), [
    ({"patch_siz": 2}, "unexpected keyword argument 'patch_siz'"), ({"num_heads": 7}, "divisible"),
    ({"patch_size": 0}, "zero"), ({"patch_size": [2]}, "out of range"), ({"act_layer": "none_such"}, "none_such"),
])  # fmt: skip
def test_arguments_that_timm_refuses_are_named_with_its_reason(args, said):
    with pytest.raises(ConfigError, match=f"test_vit for images of 32 px with backbone_args=.*{said}"):
        build_backbone("test_vit", BackboneOptions(pretrained=False, image_size=32, args=args))


@pytest.mark.parametrize("side", [8, 40])
def test_images_that_are_no_whole_patches_are_refused_unless_the_rest_is_padded(side):
    with pytest.raises(ConfigError, match=f"images of {side} px are no whole patches of test_vit: .* multiple of 16"):
        build_backbone("test_vit", BackboneOptions(pretrained=False, image_size=side))
    padding = BackboneOptions(pretrained=False, image_size=40, args={"dynamic_img_pad": True})
    assert build_backbone("test_vit", padding)(torch.zeros(1, 3, 40, 40)).shape == (1, 64)


@torch.no_grad()
def test_published_weights_arrive_without_their_classifier_and_serve_other_image_sizes(monkeypatch, published):
    reference, path = published
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, local_files_only: str(path))
    large, small = (build_backbone(TAGGED, BackboneOptions(image_size=side)).eval() for side in (160, 64))
    x = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(reference.head(large(x)), reference(x))
    assert small(torch.randn(1, 3, 64, 64)).shape == (1, 64)


@pytest.mark.parametrize("act", [check_backbone_name, build_backbone])
def test_weights_that_are_absent_offline_are_missed_before_anything_is_built(act, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"timm/test_vit.r160_in1k .*backbone_weights"):
        act(TAGGED, BackboneOptions(offline=True))


def test_checking_a_name_fetches_nothing(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    check_backbone_name(TAGGED, BackboneOptions())


@pytest.mark.parametrize("side", [160, 64])  # timm's own interpolation of positions serves local files too
def test_a_local_file_replaces_published_weights(published, side):
    reference, path = published
    options = BackboneOptions(weights=str(path), image_size=side, offline=True)
    check_backbone_name("test_vit", options)  # no tag is needed
    backbone = build_backbone("test_vit", options).eval()
    torch.testing.assert_close(backbone.network.blocks.state_dict(), reference.blocks.state_dict())


def test_a_local_file_of_another_network_is_refused_and_an_absent_one_is_missed_at_once(published):
    with pytest.raises(WeightsError, match=r"backbone_weights: .*model.safetensors does not fit this backbone \(0 of"):
        build_backbone("resnet32", BackboneOptions(weights=str(published[1])))
    with pytest.raises(WeightsError, match="there is no such file"):
        check_backbone_name("resnet32", BackboneOptions(weights="nowhere.pth"))


@pytest.mark.parametrize(("args", "said"), [
    ({"embed_dim": 32, "num_heads": 2}, r"misshapen: cls_token \(1, 1, 64\) instead of \(1, 1, 32\)"),
    ({"depth": 2}, "unexpected: blocks.2"),
    ({"class_token": False, "global_pool": "avg"}, "unexpected: cls_token"),
])  # fmt: skip
def test_a_local_file_of_another_size_is_refused_with_what_does_not_fit(published, args, said):
    with pytest.raises(WeightsError, match=f"model.safetensors does not fit this backbone .*{said}"):
        build_backbone("test_vit", BackboneOptions(weights=str(published[1]), image_size=160, args=args))


def test_a_local_file_of_another_number_of_classes_serves_without_its_classifier(tmp_path):
    reference = timm.create_model("test_vit", num_classes=7)
    torch.save({"model": reference.state_dict()}, tmp_path / "seven.pth")
    backbone = build_backbone("test_vit", BackboneOptions(weights=str(tmp_path / "seven.pth"), image_size=160))
    torch.testing.assert_close(backbone.network.blocks.state_dict(), reference.blocks.state_dict())


@pytest.mark.parametrize(
    ("name", "options"), [("resnet20", {}), ("test_vit", {"image_size": 32, "args": {"depth": 2}})]
)
def test_a_backbone_reads_back_what_it_saved_also_with_arguments(tmp_path, name, options):
    saved = build_backbone(name, BackboneOptions(pretrained=False, **options))
    save_file(getattr(saved, "network", saved).state_dict(), tmp_path / "saved.safetensors")
    loaded = build_backbone(name, BackboneOptions(weights=str(tmp_path / "saved.safetensors"), **options))
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict())


@pytest.mark.parametrize("classifier", [True, False])
def test_weights_of_another_implementation_are_taken_in_their_order(classifier, tmp_path, caplog):
    caplog.set_level("INFO", "reprise")
    original = torchvision.models.mobilenet_v2().eval()  # timm has it with other names
    weights = original.state_dict()
    if not classifier:
        weights = {key: value for key, value in weights.items() if not key.startswith("classifier")}
    torch.save(weights, tmp_path / "weights.pth")
    backbone = build_backbone("mobilenetv2_100", BackboneOptions(weights=str(tmp_path / "weights.pth"))).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(backbone(x), original.features(x).mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert "names of another implementation" in caplog.text


@pytest.mark.parametrize("change", [
    lambda weights: dict(sorted(weights.items())),  # another order
    lambda weights: {**weights, "more.weight": torch.ones(1, 1, 1, 1)},
    lambda weights: {**weights, "features.0.0.weight": torch.ones(32, 3, 5, 5)},
])  # fmt: skip
def test_weights_that_differ_in_more_than_names_are_refused(change, tmp_path):
    torch.save(change(torchvision.models.mobilenet_v2().state_dict()), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"weights.pth does not fit this backbone \(0 of 312 keys do\)"):
        build_backbone("mobilenetv2_100", BackboneOptions(weights=str(tmp_path / "weights.pth")))
