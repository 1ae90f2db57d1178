"""Floating point operations of networks: products and sums of convolutions, matrix products and attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def count_flops(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a call gives, and the floating point operations that it takes."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    # torch's own table lacks attention on CPUs.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                 lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}  # fmt: skip
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    # Its own tracker follows every module, which takes longer than a small network does.
    counter.mod_tracker = nullcontext()
    counter.mod_tracker.parents = {"Global"}
    with counter:
        result = call()
    return result, counter.get_total_flops()


def forward_flops(network: nn.Module, *inputs: Tensor | None) -> int | None:
    """Count the FLOPs of a forward pass, of which nothing but shapes is computed.

    Args:
        network: in eval mode, since in train mode BatchNorm counts its batches.
        inputs: of the right shapes and the device "meta", so that a large batch takes no memory.

    Returns:
        Products and sums of convolutions, matrix products and attention; None for a network that looks at values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def forward() -> None:
        network(*(given if given is None else torch.zeros(given.shape, dtype=given.dtype) for given in inputs))

    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            return count_flops(forward)[1]
    except RuntimeError:
        return None
