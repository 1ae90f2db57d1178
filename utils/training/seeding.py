"""Random numbers by name: every choice draws from a generator keyed by what it is for.

A key such as (seed, task, "shuffle", epoch) always gives the same numbers, whatever was drawn before, so a new
purpose moves no other and a resumed run needs no saved generator state.
"""

from __future__ import annotations

import hashlib
from operator import index

import numpy as np
import torch


def derive(*key: int | str) -> int:
    """Compute an integer in [0, 2**63) that depends on every part of the key and on nothing else."""
    plain = tuple(part if isinstance(part, str) else index(part) for part in key)  # a NumPy integer is its number
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=8).digest(), "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Make a CPU generator for this key. Draw on the CPU and move: a seed then means the same on every device."""
    return torch.Generator().manual_seed(derive(*key))


def numpy_generator(*key: int | str) -> np.random.Generator:
    """Make NumPy's counterpart of ``generator``."""
    return np.random.default_rng(derive(*key))


def seed_everything(*key: int | str) -> None:
    """Reseed torch's global generators (dropout, weight initialisation) for this key."""
    torch.manual_seed(derive(*key))


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Compute the SHA-256 of names and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
