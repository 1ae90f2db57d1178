"""A frozen network stays outside of everything that training does."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models.frozen import Frozen, fixed, weight_bytes


class Body(nn.Sequential):
    """A small network with every kind of state: matrices, a kernel, statistics, dropout."""

    num_features = 6

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 6)]
        super().__init__(*layers)


def network(learned=False, seed=0) -> nn.Module:
    """A trainable layer behind a frozen body."""
    return nn.Sequential(Frozen(Body(seed), learned), nn.Linear(6, 2))


IMAGES = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_training_neither_sees_nor_moves_it():
    net = network().train()
    before = copy.deepcopy(net[0].network.state_dict())
    net(IMAGES).sum().backward()
    assert [name for name, _ in net.named_parameters()] == ["1.weight", "1.bias"]
    assert all(parameter.grad is None for parameter in net[0].network.parameters())
    assert not any(module.training for module in net[0].network.modules())
    assert_close(net[0].network.state_dict(), before, rtol=0, atol=0)  # statistics included


def test_what_lies_before_it_gets_no_gradient_and_deep_copies_share_it():
    assert not Frozen(Body())(IMAGES.clone().requires_grad_()).requires_grad
    net = network()
    teacher = copy.deepcopy(net)
    assert teacher[0] is net[0] and teacher[1].weight is not net[1].weight


def test_a_checkpoint_holds_it_only_if_this_run_has_learned_it():
    own, learned = ["1.weight", "1.bias"], network(learned=True).state_dict()
    assert list(learned) == [f"0.{key}" for key in Body().state_dict()] + own
    loaded, state = network(seed=1), network(seed=0).state_dict()
    assert list(state) == own
    loaded.load_state_dict(state)  # which leaves it alone
    assert_close(loaded[0].network.state_dict(), Body(1).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_was_learned_comes_back_with_every_bit(bf16):
    saved, loaded = network(learned=True), network(learned=True, seed=1)
    saved[0].freeze(bf16)
    loaded.load_state_dict(saved.state_dict())
    assert_close(loaded[0].network.state_dict(), saved[0].network.state_dict(), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in loaded[0].network.parameters())


def test_bf16_keeps_matrices_and_kernels_as_autocast_rounds_them():
    plain, rounded = Frozen(Body()), Frozen(Body())
    rounded.freeze(bf16=True)
    types = {name: value.dtype for name, value in rounded.network.named_parameters()}
    assert {types[name] for name in ("0.weight", "0.bias", "4.weight", "4.bias")} == {torch.bfloat16}
    assert types["1.weight"] == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(rounded(IMAGES), plain(IMAGES), rtol=0, atol=0)


def test_its_size_is_that_of_its_weights_and_statistics():
    numbers = 4 * 27 + 4 + 4 * 4 + 6 * 16 + 6
    assert weight_bytes(Body()) == 4 * numbers + 8  # and an int64 counter of batches


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_fixed_for_a_while_alone_and_freed_also_after_an_error(training):
    body = Body().train(training)
    body[0].bias.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), fixed(body):
        assert not body.training and not any(value.requires_grad for value in body.parameters())
        raise ZeroDivisionError
    assert body.training is training
    assert [name for name, value in body.named_parameters() if not value.requires_grad] == ["0.bias"]
