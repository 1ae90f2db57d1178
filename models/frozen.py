"""Networks that are used as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.training import seeding


def weight_bytes(network: nn.Module) -> int:
    """Count the bytes of all weights as they lie in memory."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())


class FrozenModel(nn.Module):
    """A network that is used as it is, and told from others by its weights."""

    def freeze(self) -> FrozenModel:
        """Switch to eval mode, without gradients."""
        return self.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """Compute the SHA-256 over all weights."""
        return seeding.hash_tensors(self.state_dict())


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
        self.__dict__["network"] = network  # nn.Module does not see it: no parameters(), no to(), no train()
        self.freeze()

    def freeze(self, bf16: bool = False) -> None:
        """Make it constant; with ``bf16`` its matrices are kept as autocast would round them at every call."""
        self.network.eval().requires_grad_(False)
        if bf16:
            for module in self.network.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(torch.bfloat16)

    def fingerprint(self) -> str:
        """Compute the SHA-256 over all weights."""
        return seeding.hash_tensors(self.network.state_dict())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return what the network says, without gradients."""
        return self.network(x)

    def __deepcopy__(self, memo: dict) -> Frozen:
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.learned:
            destination |= {prefix + key: value for key, value in self.network.state_dict().items()}

    def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
        if self.learned:
            for name, value in self.network.state_dict(keep_vars=True).items():
                value.data = state_dict[prefix + name].to(value.device)  # also in the number format it was saved in


@contextmanager
def fixed(network: nn.Module) -> Iterator[nn.Module]:
    """Hold a network in eval mode and its parameters without gradients; afterwards both are as they were."""
    training, learned = network.training, nn.ParameterList(p for p in network.parameters() if p.requires_grad)
    try:
        learned.requires_grad_(False)
        yield network.eval()
    finally:
        learned.requires_grad_(True)
        network.train(training)
