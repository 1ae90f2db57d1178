"""Heads start empty and grow without touching what they know."""

import pytest
import torch
import torch.nn.functional as F

from models.heads import CosineHead, Head, LinearHead
from tests.support.learned import snapshot

every_head = pytest.mark.parametrize("kind", [LinearHead, Head, CosineHead])


def grown(kind, num_classes, num_features=16):
    head = kind(num_features)
    head.grow(num_classes, torch.Generator().manual_seed(0))
    return head


@every_head
def test_a_new_head_has_no_classes_and_grows_class_by_class_but_never_shrinks(kind):
    head = kind(16)
    for num_classes in range(8):
        head.grow(num_classes)
        assert head.num_classes == num_classes and head(torch.randn(5, 16)).shape == (5, num_classes)
    with pytest.raises(AssertionError, match="cannot shrink to 2"):
        head.grow(2)
    with pytest.raises(AssertionError, match="features of 16 cannot shrink to 8"):
        head.widen(8)


@every_head
@pytest.mark.parametrize("increment", [0, 1, 2, 5, 50])
def test_growing_keeps_old_rows_bit_for_bit_and_old_logits(kind, increment):
    head = grown(kind, 4)
    features, before = torch.randn(8, 16), snapshot(head)
    logits = head(features)
    head.grow(4 + increment)
    assert head.num_classes == 4 + increment
    # Close, not equal: a matrix of more rows may take another kernel.
    torch.testing.assert_close(head(features)[:, :4], logits)
    for name, value in before.items():
        kept = head.state_dict()[name]
        assert torch.equal(kept[:4] if kept.ndim else kept, value)


@every_head
@pytest.mark.parametrize("extra", [0, 1, 16])
def test_widening_keeps_old_columns_bit_for_bit_and_changes_nothing_else(kind, extra):
    head = grown(kind, 4)
    before = snapshot(head)
    head.widen(16 + extra, torch.Generator().manual_seed(1))
    assert head.num_features == 16 + extra and head.weight.requires_grad
    after = {**head.state_dict(), "weight": head.weight.data[:, :16]}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "bound"), [(LinearHead, 3), (Head, 1), (CosineHead, 1)])  # PyCIL's bounds
def test_new_rows_and_new_columns_are_uniform_within_the_bound_of_their_length(kind, bound):
    head = grown(kind, 2000)
    rows = head.weight.data
    head.widen(48, torch.Generator().manual_seed(1))
    for drawn, limit in ((rows, (bound / 16) ** 0.5), (head.weight.data[:, 16:], (bound / 48) ** 0.5)):
        assert limit * 0.99 < drawn.abs().max() <= limit
        assert drawn.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)


@every_head
def test_a_generator_decides_the_new_rows(kind):
    state = torch.get_rng_state()
    assert torch.equal(grown(kind, 5).weight, grown(kind, 5).weight)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    head = kind(16)
    head.grow(5)
    assert not torch.equal(head.weight, grown(kind, 5).weight)


def kaiming(*shape):
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), nonlinearity="linear")


@pytest.mark.parametrize(("kind", "reference", "names"), [
    (LinearHead, lambda: kaiming(6, 16), ["weight", "bias"]),
    (Head, lambda: torch.nn.Linear(16, 6, bias=False).weight.data, ["weight"]),
])  # fmt: skip
def test_rows_are_those_of_torchs_own_initialisation_and_a_bias_starts_at_zero(kind, reference, names):
    torch.manual_seed(1)
    expected = reference()
    torch.manual_seed(1)
    head, features = kind(16), torch.randn(4, 16, generator=torch.Generator())
    head.grow(6)
    torch.testing.assert_close(head.weight.data, expected)
    torch.testing.assert_close(head(features), features @ expected.T)
    assert [name for name, _ in head.named_parameters()] == names


def test_cosine_logits_are_the_scaled_cosine_whatever_the_lengths():
    head, features = grown(CosineHead, 3), torch.randn(4, 16)
    head.scale.data.fill_(7.0)
    expected = 7 * F.cosine_similarity(features[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(features), expected)
    head.weight.data *= torch.tensor([[0.1], [3.0], [50.0]])
    torch.testing.assert_close(head(features * 11), expected)


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
