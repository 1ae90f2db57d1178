"""ASP's network and losses: checks 1 to 12 and 20 of its card, in the card's tiny setting."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from learners.asp.network import PromptViT
from learners.losses import standard_normal_kl
from models.frozen import Frozen
from models.heads import CosineHead
from models.incremental import IncrementalNet
from models.timm_backbone import TimmBackbone
from tests.support.learned import count
from tests.support.tiny_asp import IMAGES, attend_as_tokens, tiny_prompt_vit
from utils.training.schedule import TrainConfig

LABELS = torch.tensor([0, 1, 1, 2, 3])


def tiny_net(trained=False) -> IncrementalNet:
    """Six classes on the tiny network."""
    net = IncrementalNet(tiny_prompt_vit(trained=trained), CosineHead(48))
    net.grow(6, torch.Generator().manual_seed(0))
    return net


def test_checks_1_and_2_the_tiny_network_trains_124257_numbers_and_has_these_shapes():
    net = tiny_net()
    assert net.backbone.tip.shape == (2, 3, 48)
    assert count(net.backbone.f_mu) == count(net.backbone.f_sigma) == 61_840
    assert count(net) == 124_257
    features, mu, sigma = net.backbone.prompted(IMAGES[:2], net.backbone.query(IMAGES[:2]), torch.zeros(4, 144))
    assert net(IMAGES[:2]).shape == (2, 6) and features.shape == (2, 48)
    assert mu.shape == sigma.shape == (4, 144)


def test_check_2_each_token_looks_at_23_and_the_last_block_answers_the_class_token_alone(monkeypatch):
    shapes, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: shapes.append((q, k)) or attend(q, k, v))
    net = tiny_net().backbone
    net.prompted(IMAGES, torch.zeros(5, 48))
    assert [(q.shape[2], k.shape[2]) for q, k in shapes] == [(17, 23), (1, 23)]


def test_check_3_vit_b16_with_60_classes_trains_2044929_numbers_beside_one_vit():
    with torch.device("meta"):
        vit = VisionTransformer(num_classes=0)
        net = IncrementalNet(PromptViT(Frozen(TimmBackbone(vit))), CosineHead(768))
        net.head.weight = nn.Parameter(torch.empty(60, 768))
    assert count(net) == 2_044_929
    assert count(net) + count(vit) == 87_843_585


@pytest.mark.parametrize("behind", [None, 1], ids=["appended", "after the class token"])
def test_check_4_prompts_as_keys_and_values_are_prompts_as_tokens(behind):
    net = tiny_prompt_vit()
    prompts = torch.randn(5, 2, 6, 48)
    expected = attend_as_tokens(net.vit.network.network, IMAGES, prompts, behind)
    assert_close(net._run(IMAGES, prompts), expected, rtol=0, atol=1e-5)


def test_check_5_the_encoders_read_the_first_invariant_prompt_of_each_layer_and_do_not_move_it():
    net, query = tiny_prompt_vit(), torch.randn(2, 48)
    mu = net.encode(query)[0]
    net.tip.data[:, 1:] += 1
    assert_close(net.encode(query)[0], mu, rtol=0, atol=0)
    net.tip.data[:, 0] += 1
    assert not torch.allclose(net.encode(query)[0], mu)
    net.encode(query)[0].sum().backward()
    assert net.tip.grad is None and net.f_mu[0].weight.grad.any()


def test_check_6_without_invariant_prompts_all_layers_get_one_mu():
    mu = tiny_prompt_vit(trained=False).encode(torch.randn(4, 48))[0].view(4, 2, 144)
    assert_close(mu[:, 0], mu[:, 1], rtol=0, atol=0)


def test_check_7_the_mean_prompt_is_the_prompt_of_the_mean_query():
    net = tiny_prompt_vit()
    query = net.query(IMAGES)
    of_each = [net.f_mu(torch.cat([net.tip[layer, 0], q])) for q in query for layer in range(2)]
    by_hand = torch.stack(of_each).detach().view(5, 2, 3, 48).mean(0)
    assert_close(net.mean_prompt(query), by_hand, rtol=0, atol=1e-6)


def test_check_8_noise_alone_makes_two_passes_differ():
    net = tiny_prompt_vit()
    query = net.query(IMAGES)
    assert_close(net.prompted(IMAGES, query)[0], net(IMAGES), rtol=0, atol=0)
    torch.manual_seed(0)
    first, second = (net.prompted(IMAGES, query, torch.randn(10, 144))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_checks_8_and_9_with_average_prompts_of_zero_the_encoder_does_not_matter_and_attention_is_lost():
    net = tiny_prompt_vit(trained=False, alpha=1.0)
    features = net(IMAGES)
    assert (features - net.query(IMAGES)).abs().max() > 0.01
    nn.init.normal_(net.f_mu[1].weight)
    assert_close(net(IMAGES), features, rtol=0, atol=0)


def test_check_10_logits_stay_within_the_scale_and_forget_the_length_of_rows():
    net = tiny_net(trained=True)
    net.head.scale.data.fill_(3.0)
    logits = net(IMAGES)
    net.head.weight.data[2] *= 7
    assert logits.abs().max() <= 3 and logits.shape == (5, 6)
    assert_close(net(IMAGES), logits)


@pytest.mark.parametrize(("dimensions", "value"), [(1, 4.503382), (2304, 10_375.79), (7680, 34_585.97)])
def test_check_11_the_divergence_starts_at_4_5_per_dimension(dimensions, value):
    sigma = F.softplus(torch.tensor(-5.0))
    assert sigma.item() == pytest.approx(0.00671535, abs=5e-9)
    mu, sigma = torch.zeros(3, dimensions, dtype=torch.float64), sigma.double().expand(3, dimensions)
    loss = standard_normal_kl(mu, sigma, torch.ones(3))
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert_close(loss, kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).sum(1).mean())


def test_check_12_cross_entropy_moves_zero_prompts_and_equal_ones_equally():
    net = tiny_net()
    F.cross_entropy(net(IMAGES), LABELS).backward()
    gradient = net.backbone.tip.grad
    assert not net.backbone.tip.any() and gradient.abs().max() > 1e-6
    assert_close(gradient, gradient[:, :1].expand_as(gradient), rtol=0, atol=1e-6)


def test_check_20_the_rate_falls_by_a_cosine_per_epoch():
    config = TrainConfig(lr=0.01, epochs=20, schedule="cosine")
    rates = [config.learning_rate(epoch * 625, steps_per_epoch=625) for epoch in range(20)]
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * epoch / 20)) for epoch in range(20)])
    assert rates[19] == pytest.approx(6.156e-5, abs=5e-9)
    assert config.learning_rate(624, 625) == 0.01


def test_check_20_decay_pulls_scale_and_prompts_and_cannot_reach_the_vit():
    net = tiny_net(trained=True)
    tip, vit = net.backbone.tip.detach().clone(), list(net.backbone.vit.network.parameters())
    optimizer = TrainConfig(lr=0.01, epochs=20, weight_decay=5e-4).make_optimizer(list(net.parameters()))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert net.head.scale.item() == pytest.approx(1 - 0.01 * 5e-4)
    assert_close(net.backbone.tip.detach(), tip * (1 - 0.01 * 5e-4))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not held & {id(parameter) for parameter in vit}
