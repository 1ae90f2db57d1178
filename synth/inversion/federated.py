"""Several clients that each hold a part of a task's images: how the parts are cut and what is made of the returns."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from utils.training import seeding

MAX_DRAWS = 100  # of a split in which every client has an image, before some may go without


def split_clients(labels: Tensor, num_users: int, beta: float, *key: int | str) -> list[Tensor]:
    """Return the positions of every client's images, ascending; together they are all positions.

    Args:
        labels: int64 (N,).
        num_users: K clients.
        beta: 0 cuts a random permutation in K equal parts. Above 0, each class is shared by proportions from
            Dirichlet(beta): the smaller, the fewer clients hold a class. A client with N / K images takes no more
            classes, and the draw is repeated until every client has an image (DDDR, arXiv:2409.01128, after
            Li et al. 2022, arXiv:2102.02079).
        key: of the random numbers.

    Returns:
        K int64 tensors; some may be empty if there are fewer images than clients or beta is tiny.
    """
    random = seeding.numpy_generator(*key)
    if beta == 0:
        return [torch.from_numpy(np.sort(part)) for part in np.array_split(random.permutation(len(labels)), num_users)]
    for _ in range(MAX_DRAWS):
        owners = _dirichlet_owners(labels.numpy(), num_users, beta, random)
        if len(np.unique(owners)) == num_users:
            break
    return [torch.from_numpy(np.flatnonzero(owners == user)) for user in range(num_users)]


def _dirichlet_owners(labels: np.ndarray, num_users: int, beta: float, random: np.random.Generator) -> np.ndarray:
    """Draw which client holds each image, int64 (N,)."""
    owners = np.full(len(labels), -1)  # -1: nobody yet
    for label in np.unique(labels):
        positions = random.permutation(np.flatnonzero(labels == label))
        room = np.bincount(owners + 1, minlength=num_users + 1)[1:] < len(labels) / num_users
        shares = random.dirichlet([beta] * num_users) * room
        if shares.sum() == 0:  # a tiny beta gave everything to clients that are full
            shares = room.astype(float)
        stops = (shares.cumsum() / shares.sum() * len(positions)).astype(int)[:-1]
        owners[positions] = np.searchsorted(stops, np.arange(len(positions)), side="right")
    return owners
