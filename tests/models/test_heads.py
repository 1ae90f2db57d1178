"""Heads start empty and grow without touching what they know."""

import pytest
import torch
import torch.nn.functional as F

from models.heads import CosineHead, LinearHead, PlainHead

HEADS = [LinearHead, PlainHead, CosineHead]


def grown(kind, num_classes, num_features=16):
    head = kind(num_features)
    head.grow(num_classes, torch.Generator().manual_seed(0))
    return head


@pytest.mark.parametrize("kind", HEADS)
def test_a_new_head_has_no_classes(kind):
    head = kind(16)
    assert head.num_classes == 0 and head(torch.randn(5, 16)).shape == (5, 0)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("increment", [0, 1, 2, 5, 50])
def test_growing_keeps_old_rows_bit_for_bit_and_old_logits(kind, increment):
    head = grown(kind, 4)
    features, before = torch.randn(8, 16), {name: value.clone() for name, value in head.state_dict().items()}
    logits = head(features)
    head.grow(4 + increment)
    assert head.num_classes == 4 + increment
    # Close, not equal: a matrix of more rows may take another kernel.
    torch.testing.assert_close(head(features)[:, :4], logits)
    for name, value in before.items():
        kept = head.state_dict()[name]
        assert torch.equal(kept[:4] if kept.ndim else kept, value)


@pytest.mark.parametrize("kind", HEADS)
def test_growing_class_by_class_ends_with_as_many_classes(kind):
    head = kind(16)
    for num_classes in range(1, 8):
        head.grow(num_classes)
    assert head(torch.randn(3, 16)).shape == (3, 7)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_cannot_shrink(kind):
    with pytest.raises(AssertionError, match="cannot shrink to 2"):
        grown(kind, 3).grow(2)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("extra", [0, 1, 16])
def test_widening_keeps_old_columns_bit_for_bit_and_changes_nothing_else(kind, extra):
    head = grown(kind, 4)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.widen(16 + extra, torch.Generator().manual_seed(1))
    assert head.num_features == 16 + extra and head.weight.requires_grad
    after = {**head.state_dict(), "weight": head.weight.data[:, :16]}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "bound"), [(LinearHead, 3), (PlainHead, 1), (CosineHead, 1)])
def test_new_columns_start_as_a_row_of_the_new_length(kind, bound):
    head = grown(kind, 2000)
    head.widen(48, torch.Generator().manual_seed(1))
    columns, bound = head.weight.data[:, 16:], (bound / 48) ** 0.5
    assert bound * 0.99 < columns.abs().max() <= bound
    assert columns.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_features_cannot_become_fewer():
    with pytest.raises(AssertionError, match="features of 16 cannot shrink to 8"):
        grown(LinearHead, 3).widen(8)


@pytest.mark.parametrize("kind", HEADS)
def test_a_generator_decides_the_new_rows(kind):
    state = torch.get_rng_state()
    assert torch.equal(grown(kind, 5).weight, grown(kind, 5).weight)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    head = kind(16)
    head.grow(5)
    assert not torch.equal(head.weight, grown(kind, 5).weight)


@pytest.mark.parametrize(("kind", "bound"), [(LinearHead, (3 / 16) ** 0.5), (CosineHead, (1 / 16) ** 0.5)])
def test_new_rows_are_uniform_within_the_bound_of_pycil(kind, bound):
    weight = grown(kind, 2000).weight
    assert bound * 0.99 < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_linear_rows_follow_torchs_own_kaiming_uniform():
    torch.manual_seed(1)
    reference = torch.nn.init.kaiming_uniform_(torch.empty(6, 16), nonlinearity="linear")
    torch.manual_seed(1)
    head = LinearHead(16)
    head.grow(6)
    torch.testing.assert_close(head.weight.data, reference)
    assert not head.bias.any()


def test_plain_rows_start_as_torchs_own_linear_layer_without_bias():
    torch.manual_seed(1)
    reference = torch.nn.Linear(16, 6, bias=False)
    torch.manual_seed(1)
    head = PlainHead(16)
    head.grow(6)
    features = torch.randn(4, 16)
    torch.testing.assert_close(head(features), reference(features))
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_cosine_logits_are_the_scaled_cosine():
    head = grown(CosineHead, 3)
    head.scale.data.fill_(7.0)
    features = torch.randn(4, 16)
    expected = 7 * F.cosine_similarity(features[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(features), expected)


def test_cosine_logits_do_not_depend_on_any_length():
    head, features = grown(CosineHead, 3), torch.randn(4, 16)
    logits = head(features)
    head.weight.data *= torch.tensor([[0.1], [3.0], [50.0]])
    torch.testing.assert_close(head(features * 11), logits)


def test_the_scale_of_a_cosine_head_starts_at_one_and_survives_growth():
    head = grown(CosineHead, 3)
    assert head.scale.item() == 1
    head.scale.data.fill_(4.0)
    head.grow(5)
    assert head.scale.item() == 4


def test_new_rows_take_the_type_of_the_old_ones():
    head = grown(LinearHead, 2).double()
    head.grow(4)
    assert head.weight.dtype == head.bias.dtype == torch.float64 and head.weight.requires_grad
