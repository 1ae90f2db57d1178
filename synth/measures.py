"""Measures of generated images: pure functions on the features of generated and of real ones.

Where torch-fidelity has a measure, the number is its own; it is imported when it is first needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.training import seeding

SPLITS = 10  # of the Inception Score
KID_SUBSET, KID_SUBSETS = 1000, 100  # above so many images the kernel is averaged over subsets, as its authors do
KMEANS_BATCH, ANGLES = 1024, 1001  # of precision-recall distributions
RESAMPLES = 1000  # of the bootstrap


def frechet_distance(fake: Tensor, real: Tensor) -> float:
    """Compute ||mu_1 - mu_2||^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), Heusel et al., 2017, arXiv:1706.08500, Eq. 6.

    Args:
        fake, real: features, (N, D) and (M, D); more than D of each, else the covariances are singular.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(side.double()) for side in (fake, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kernel_distance(fake: Tensor, real: Tensor, seed: int = 1993) -> float:
    """Compute the unbiased squared MMD under (x . y / D + 1)^3, Binkowski et al., 2018, arXiv:1801.01401, Section 4.

    It may be a little below 0. Above 1,000 images it is the mean over 100 subsets of 1,000.

    Args:
        fake, real: features, (N, D) each, at least 2.
        seed: of the subsets.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(len(fake), len(real), KID_SUBSET)
    subsets = KID_SUBSETS if max(len(fake), len(real)) > KID_SUBSET else 1
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed % 2**32, "verbose": False}
    return kid_features_to_metric(fake.double(), real.double(), **options)[KEY_METRIC_KID_MEAN]


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Compute exp(E KL(p(y|x) || p(y))), Salimans et al., 2016, arXiv:1606.03498, Section 4.

    Args:
        logits: (N, K).
        splits: stretches of the images that are scored one by one.

    Returns:
        Mean and population standard deviation over the splits.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    scores = isc_features_to_metric(logits, splits, shuffle=False)
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]


def precision_recall(fake: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    """Compute which share of either side lies in a ball of the other, Kynkaanniemi et al., 2019, arXiv:1904.06991.

    A ball reaches from an image to its k-th neighbour of the same side (Eq. 1 and 2).

    Args:
        fake, real: features, (N, D) and (M, D), at least k + 2.
        k: at least 1.

    Returns:
        Precision and recall in [0, 1].
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    # In blocks: all distances among 50,000 images would take 20 GB. In doubles, so that an image is 0 from itself.
    options = {"prc_neighborhood": k, "save_cpu_ram": True, "verbose": False}
    shares = prc_features_to_metric(fake.double(), real.double(), **options)
    return shares[KEY_METRIC_PRECISION], shares[KEY_METRIC_RECALL]


def best_f_scores(fake: Tensor, real: Tensor, beta: float = 8.0) -> tuple[float, float]:
    """Compute the largest F_beta and F_(1/beta) of a precision-recall distribution.

    Sajjadi et al., 2018, arXiv:1806.00035, Eq. 7 and Section 4. F_8 tracks recall, F_1/8 precision.

    Args:
        fake, real: shares of the bins, float (B,), which sum to 1.
        beta: above 1.
    """
    angles = torch.linspace(1e-10, math.pi / 2 - 1e-10, ANGLES, dtype=torch.float64)
    slopes = angles.tan()  # lambda
    precision = torch.minimum(slopes[:, None] * real, fake).sum(1)  # alpha(lambda)
    recall = precision / slopes  # beta(lambda)

    def best(b: float) -> float:
        return float((((1 + b**2) * precision * recall) / (b**2 * precision + recall).clamp(min=1e-12)).max())

    return best(beta), best(1 / beta)


def share_of_clusters(fake: Tensor, real: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bin both sides by k-means on all of their images.

    Args:
        fake, real: features, (N, D) and (M, D).
        clusters: bins B, at most N + M.
        seed: of k-means, whose batch size is fixed too: another one gives other bins.

    Returns:
        Two histograms, float64 (B,), each of sum 1.
    """
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(clusters, n_init=10, batch_size=KMEANS_BATCH, random_state=seed % 2**32)
    bins = torch.from_numpy(kmeans.fit_predict(torch.cat([fake, real]).numpy())).long()
    counts = [torch.bincount(side, minlength=clusters).double() for side in bins.split([len(fake), len(real)])]
    return counts[0] / len(fake), counts[1] / len(real)


def nearest_distances(features: Tensor, others: Tensor) -> Tensor:
    """Return the distance of each of N features, (N, D), to the nearest of ``others``, (M, D): float64 (N,)."""
    others = others.double()
    return torch.cat([torch.cdist(chunk.double(), others).amin(1) for chunk in features.split(1024)])


def bootstrap_interval(values: Tensor, seed: int) -> list[float]:
    """Return the 95 % percentile interval of the mean of N values, float (N,)."""
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=seeding.generator(seed, "bootstrap"))
    return values.double()[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
