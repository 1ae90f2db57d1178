"""Networks that are used as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network outside of everything that training touches.

    It has no parameters, is never switched to train mode, is shared by deep copies, and stands in a checkpoint only
    if the run itself has learned it. Move and build it before wrapping: ``to`` does not reach it either.

    Args:
        network: has ``num_features``.
        learned: its weights come from this run, so checkpoints hold them.
    """

    def __init__(self, network: nn.Module, learned: bool = False):
        super().__init__()
        self.num_features: int = network.num_features
        self.learned = learned
        self._held = (network,)  # a tuple hides it from parameters(), to(), train()
        self.freeze()

    @property
    def network(self) -> nn.Module:
        return self._held[0]

    def freeze(self, bf16: bool = False) -> None:
        """Make it constant; with ``bf16`` its matrices are kept as autocast would round them at every call."""
        self.network.eval().requires_grad_(False)
        if bf16:
            for module in self.network.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(torch.bfloat16)

    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return sum(value.numel() * value.element_size() for value in self.network.state_dict().values())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What the network says, without gradients."""
        return self.network(x)

    def __deepcopy__(self, memo: dict) -> Frozen:
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.learned:
            destination |= {prefix + key: value for key, value in self.network.state_dict().items()}

    def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
        if self.learned:
            own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
            for name, value in self.network.state_dict(keep_vars=True).items():
                value.data = own[name].to(value.device)  # also in the number format it was saved in


@contextmanager
def fixed(network: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode and its parameters without gradients; afterwards both are as they were."""
    training, learned = network.training, [value for value in network.parameters() if value.requires_grad]
    network.eval()
    for value in learned:
        value.requires_grad_(False)
    try:
        yield network
    finally:
        for value in learned:
            value.requires_grad_(True)
        network.train(training)
