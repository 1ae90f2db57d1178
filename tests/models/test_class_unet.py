"""The noise predictor: GUIDE's network in size and in how it is told the class."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from synth.ddpm.network import ClassUNet, ClassUNetConfig
from tests.support.learned import count
from utils.run.errors import ConfigError

CLASSES = 5


def tiny(seed=0, image_shape=(1, 8, 8), **changes):
    torch.manual_seed(seed)
    options = {"attention_levels": [1], "layers_per_block": 1, "attention_head_dim": 32, "norm_num_groups": 8}
    options |= {"block_out_channels": [32, 64], "dropout": 0.0}
    return ClassUNet(image_shape, CLASSES, ClassUNetConfig(**options | changes))


def awake(unet):
    """The same network with its zero layers at random, as after some training."""
    for parameter in unet.parameters():
        if not parameter.any() and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return unet


def batch(labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xt = torch.randn(len(labels), 1, 8, 8, generator=generator)
    return xt, torch.arange(len(labels)) * 100, torch.tensor(labels)


def train_step(unet, optimizer, labels, seed=0):
    xt, t, labels = batch(labels, seed)
    loss = F.mse_loss(unet(xt, t, labels), torch.ones_like(xt))
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


IMAGENET = {"block_out_channels": [192, 384, 576, 768], "attention_levels": [1, 2, 3], "resample": "resnet"}


@pytest.mark.parametrize(("side", "num_classes", "options", "parameters"), [
    (32, 10, {}, 52_542_979), (32, 100, {}, 52_542_979), (64, 100, IMAGENET, 295_131_267),
])  # fmt: skip
def test_the_networks_of_guide_have_the_published_size(side, num_classes, options, parameters):
    with torch.device("meta"):
        unet = ClassUNet((3, side, side), num_classes, ClassUNetConfig(**options))
    assert count(unet) == parameters


@pytest.mark.parametrize("resample", ["conv", "resnet"])
@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 12, 8)])
def test_the_prediction_is_exactly_zero_at_first(resample, image_shape):
    unet = tiny(image_shape=image_shape, attention_levels=[0, 1], resample=resample)
    out = unet(torch.randn(2, *image_shape), torch.tensor([0, 999]), torch.tensor([0, 2]))
    assert out.shape == (2, *image_shape) and not out.any()


def test_the_class_has_an_effect_once_more_than_the_last_layer_is_awake():
    unet, (xt, t, _) = tiny().eval(), batch([0, 0])
    torch.nn.init.normal_(unet.unet.conv_out.weight)
    assert torch.equal(unet(xt, t, torch.tensor([0, 1])), unet(xt, t, torch.tensor([3, -1])))
    outs = [awake(unet)(xt, t, torch.full((2,), label)) for label in (-1, 0, 1)]
    assert all((a - b).abs().mean() > 1e-3 for a, b in pairwise(outs))


def test_an_image_depends_on_its_own_label_and_step_only():
    unet, (xt, t, labels) = awake(tiny()).eval(), batch([0, 3, -1, 2])
    for i in range(4):
        alone = unet(xt[i : i + 1], t[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone, unet(xt, t, labels)[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [-2, CLASSES])
def test_a_label_out_of_range_is_never_taken_for_another(label):
    with pytest.raises(RuntimeError, match="Class values"):
        tiny()(*batch([0, label]))


def test_vectors_of_absent_classes_get_a_gradient_of_exactly_zero():
    unet, (xt, t, labels) = awake(tiny()), batch([0, 2, 2])
    weights = [weight for name, weight in unet.named_parameters() if name.endswith("time_emb_proj.weight")]
    for gradient in torch.autograd.grad(unet(xt, t, labels).square().sum(), weights):
        per_class = gradient[:, -CLASSES:].abs().sum(0)
        assert not per_class[[1, 3, 4]].any() and per_class[[0, 2]].all()


@pytest.mark.parametrize("copied", [False, True])
def test_the_places_of_the_class_stay_free_of_time(copied):
    unet = copy.deepcopy(awake(tiny())) if copied else awake(tiny())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        train_step(unet, optimizer, [0, 1, 4], seed=step)
    layer = unet.unet.time_embedding.linear_2
    assert not layer.weight[-CLASSES:].any() and not layer.bias[-CLASSES:].any()
    assert layer.weight[:-CLASSES].any(dim=1).all()


def test_training_lowers_the_loss():
    unet, (xt, t, labels) = tiny(), batch([0, 1, 4])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    before = F.mse_loss(unet(xt, t, labels), torch.ones_like(xt)).item()
    for _ in range(8):
        train_step(unet, optimizer, [0, 1, 4])
    assert before == 1 and F.mse_loss(unet(xt, t, labels), torch.ones_like(xt)) < 0.8


def test_a_plain_diffusers_network_reads_the_weights():
    from diffusers import UNet2DModel

    unet = awake(tiny()).eval()
    plain = UNet2DModel.from_config(unet.unet.config).eval()
    plain.load_state_dict(unet.unet.state_dict())
    xt, t, labels = batch([1, 3])
    embedding = torch.zeros(2, 128)
    embedding[[0, 1], [128 - CLASSES + 1, 128 - CLASSES + 3]] = 1
    torch.testing.assert_close(plain(xt, t, embedding).sample, unet(xt, t, labels))


def test_checkpointing_changes_memory_but_no_gradient():
    unets = [awake(tiny(gradient_checkpointing=checkpointing)).train() for checkpointing in (False, True)]
    losses = [unet(*batch([0, 3])).square().sum() for unet in unets]
    gradients = [torch.autograd.grad(loss, list(unet.parameters())) for loss, unet in zip(losses, unets)]
    torch.testing.assert_close(*gradients)


def test_dropout_acts_in_training_only():
    unet = awake(tiny(dropout=0.5))
    inputs = batch([0, 3])
    assert not torch.equal(unet.train()(*inputs), unet(*inputs))
    assert torch.equal(unet.eval()(*inputs), unet(*inputs))


@pytest.mark.parametrize(("groups", "expected"), [(2, torch.channels_last), (8, torch.contiguous_format)])
def test_wide_groups_work_in_channels_last_with_the_same_result(groups, expected):
    unet = awake(tiny(norm_num_groups=groups)).eval()
    assert unet.unet.conv_in.weight.shape == (32, 1, 3, 3)
    assert unet.unet.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=expected)
    outs = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        unet.memory_format = memory_format
        outs.append(unet.to(memory_format=memory_format)(*batch([0, 4])))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"block_out_channels": [32, 32, 32, 32, 32]}, "5 block_out_channels .* multiple of 16, not 8: give fewer"),
    ({"block_out_channels": [1, 64]}, r"5 classes need block_out_channels\[0\] > 1, not 1"),
    ({"attention_levels": [1, 2]}, r"attention_levels=\[2\] do not exist: levels are 0 to 1"),
    ({"norm_num_groups": 12}, r"block_out_channels=\[32, 64\]: 32 is not a multiple of norm_num_groups=12"),
    ({"attention_head_dim": 48}, r"block_out_channels\[1\]=64 has attention, .* attention_head_dim=48"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_with_a_remedy(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)
