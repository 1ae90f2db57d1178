"""Prompts as extra keys and values: the same as tokens that are thrown away, for every ViT that may come."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch.testing import assert_close

from learners.asp.network import PromptViT
from models.frozen import Frozen
from models.options import BackboneOptions
from models.timm_backbone import TimmBackbone, build_backbone
from tests.support.tiny_asp import IMAGES, TINY_VIT, prompted_as_tokens, tiny_prompt_vit, tiny_vit
from utils.run.errors import ConfigError

VARIANTS = [
    {},
    {"qkv_bias": False},
    {"qk_norm": True},
    {"init_values": 0.3},  # scales on both branches
    {"pre_norm": True},
    {"reg_tokens": 2},  # further tokens before the patches
    {"no_embed_class": True},
    {"dynamic_img_size": True},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg", "fc_norm": True},
]


@pytest.mark.parametrize("variant", [*VARIANTS, "deit_tiny_distilled_patch16_224"], ids=str)
def test_the_query_is_what_timm_itself_says(variant):
    vit = timm.create_model(variant, **TINY_VIT).eval() if isinstance(variant, str) else tiny_vit(**variant)
    with torch.no_grad():
        assert_close(tiny_prompt_vit(vit).query(IMAGES), vit(IMAGES))


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=str)
def test_features_and_gradients_are_those_of_prompts_that_pass_the_blocks_as_tokens(variant):
    net = tiny_prompt_vit(tiny_vit(**variant))
    noise = torch.randn(10, 144)
    features, mu, sigma = net.prompted(IMAGES, net.query(IMAGES), noise)
    expected = prompted_as_tokens(net, IMAGES, noise.view(5, 2, -1))
    assert_close((features, mu.view(5, 2, -1), sigma.view(5, 2, -1)), expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(f.square().sum(), list(net.parameters())) for f in (features, expected[0])]
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_all_tokens_are_computed_where_the_pool_reads_them_all():
    net = tiny_prompt_vit(tiny_vit(class_token=False, global_pool="avg"))
    changed = IMAGES.clone()
    changed[:, :, 24:, 24:] += 1  # the last patch
    assert (net(changed) - net(IMAGES)).abs().max() > 1e-3


def test_it_is_called_like_any_backbone_and_holds_prompts_and_encoders_alone():
    net = tiny_prompt_vit()
    assert net.num_features == 48
    assert_close(net(IMAGES), prompted_as_tokens(net, IMAGES)[0], rtol=0, atol=1e-5)  # without noise
    linear = [f"{name}.{i}.{part}" for name in ("f_mu", "f_sigma") for i in (0, 1) for part in ("weight", "bias")]
    assert sorted(net.state_dict()) == sorted(["tip", "average_prompt", *linear])


def test_a_deep_copy_has_prompts_of_its_own_and_shares_the_vit():
    net = tiny_prompt_vit()
    teacher = copy.deepcopy(net)
    features = net(IMAGES)
    net.tip.data += 1
    assert_close(teacher(IMAGES), features, rtol=0, atol=0)
    assert teacher.vit is net.vit


@pytest.mark.parametrize(("tip_init", "spread"), [("zero", 0.0), ("random", 1.0)])
def test_invariant_prompts_start_as_they_are_told(tip_init, spread):
    net = tiny_prompt_vit(trained=False, num_prompts=20, tip_init=tip_init)
    assert net.tip.shape == (2, 10, 48)
    assert net.tip.std().item() == pytest.approx(spread, abs=0.05)


def test_prompts_and_their_divergence_stay_exact_under_autocast():
    net = tiny_prompt_vit()
    query = net.query(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        mu, sigma = net.encode(query)
        features = net.prompted(IMAGES, query)[0]
    assert_close((mu, sigma), net.encode(query), rtol=0, atol=0)
    assert features.dtype == torch.float32
    assert_close(features, net(IMAGES), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["resnet20", "test_resnet", "test_efficientnet"])
def test_a_network_that_is_no_vision_transformer_is_refused_by_name(name):
    backbone = build_backbone(name, BackboneOptions(pretrained=False))
    with pytest.raises(ConfigError, match=r"prompts need a vision transformer of timm, not a \w*Net.*convnet_type"):
        PromptViT(Frozen(backbone))


@pytest.mark.parametrize("block", [partial(ResPostBlock, init_values=1e-5), ParallelThingsBlock, Block])
def test_blocks_of_another_build_and_gated_attention_are_refused(block):
    vit = tiny_vit(block_fn=block)
    if block is Block:
        vit.blocks[1].attn.gate = torch.nn.Linear(48, 48)
    with pytest.raises(ConfigError, match="plain pre-norm blocks"):
        PromptViT(Frozen(TimmBackbone(vit)))
