"""Prototypes: a few centres of a class's latents, by k-means."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.run.errors import ConfigError


class Prototypes(NamedTuple):
    """Centres of one class.

    Attributes:
        centres: float32 (K, ...), of the shape of a latent.
        counts: int64 (K,), images that each was made of; in one pass, where centres may be reassigned, k-means' own.
        spread: float32 (K,), root mean square distance of these images from it, per value of a latent.
    """

    centres: Tensor
    counts: Tensor
    spread: Tensor


def chunk_size(count: int, num_centres: int, km_expand: int | None) -> int:
    """Return how many latents are clustered at once, the least that a class must have.

    Raises:
        ConfigError: if a class has fewer.
    """
    size = num_centres * (km_expand or 1)
    if count < size:
        raise ConfigError(f"{count} images, but {size} are needed for {num_centres} prototypes")
    return size


def cluster(latents: Tensor, num_centres: int, seed: int, km_expand: int | None = None) -> Prototypes:
    """Find prototypes of one class's latents (D4M, Su et al., CVPR 2024, arXiv:2407.15138, section 3.2).

    Args:
        latents: float (N, ...) on the CPU, in the order in which they are shown.
        num_centres: K <= N.
        seed: of k-means++.
        km_expand: None: k-means until it stands, on all latents. A number: the reference's way, one pass over chunks of
            ``km_expand * K`` latents; those that fill no chunk are left out.

    Raises:
        ConfigError: if there are too few latents.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    chunk = chunk_size(len(latents), num_centres, km_expand)
    if km_expand is None:
        rows = latents.flatten(1).numpy()
        with threadpool_limits(1, "openmp"):  # several threads add up in the order in which they end
            means = KMeans(num_centres, n_init=1, random_state=seed).fit(rows)
        labels, counts = means.labels_, np.bincount(means.labels_, minlength=num_centres)
    else:
        # In float64, as half precision becomes in the reference; all other settings are scikit-learn's own.
        rows = latents.flatten(1)[: len(latents) // chunk * chunk].double().numpy()
        means = MiniBatchKMeans(num_centres, random_state=seed, batch_size=chunk, n_init="auto")
        for start in range(0, len(rows), chunk):
            means.partial_fit(rows[start : start + chunk])
        labels, counts = means.predict(rows), means._counts
    centres = means.cluster_centers_
    squares = np.bincount(labels, ((rows - centres[labels]) ** 2).mean(1), num_centres)
    members = np.bincount(labels, minlength=num_centres).clip(1)
    return Prototypes(
        torch.from_numpy(centres).float().view(num_centres, *latents.shape[1:]),
        torch.from_numpy(np.asarray(counts)).long(), torch.from_numpy(np.sqrt(squares / members)).float(),
    )  # fmt: skip
