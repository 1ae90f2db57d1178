"""What generated images are worth: every measure, overall, per class and per group, with how far it can be trusted.

A value depends on the number of images, so both sides get equally many, drawn several times, and the same measure of
real against other real images stands beside it. What cannot be computed has a reason and no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from synth.measures import (
    KMEANS_BATCH,
    SPLITS,
    best_f_scores,
    bootstrap_interval,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distances,
    precision_recall,
    share_of_clusters,
)
from utils.results.metrics import frequency_group
from utils.training import seeding

Judgement = dict[str, dict]  # see `judge`
UNKNOWN = -1  # label of an image whose class nobody says
LEAST_FOR_IS = 10 * SPLITS  # images: one alone in its split would score 1 whatever it shows
CLUSTERS_PER_CLASS = 20  # of precision-recall distributions
OF_INCEPTION = {"FD": "FID", "KD": "KID"}  # names that no other network's features deserve


class Features(NamedTuple):
    """What a network says of N images.

    Attributes:
        values: features, float (N, D).
        logits: class scores, float (N, K); None of a network that has none.
        labels: int64 (N,), `UNKNOWN` where nobody says.
    """

    values: Tensor
    logits: Tensor | None
    labels: Tensor

    def take(self, rows: Tensor) -> Features:
        """Return these rows, int64 (n,)."""
        return Features(self.values[rows], None if self.logits is None else self.logits[rows], self.labels[rows])

    def select(self, classes: Iterable[int]) -> Features:
        """Return the images of these classes."""
        return self.take(torch.isin(self.labels, torch.tensor(list(classes))).nonzero().flatten())

    @property
    def classes(self) -> list[int]:
        """The labels that occur, ascending."""
        return [label for label in self.labels.unique().tolist() if label != UNKNOWN]


@dataclass(frozen=True)
class Settings:
    """What shapes every value.

    Attributes:
        extractor: name of the network with a hash of its weights, such as "resnet20@ab12cd".
        is_inception: whether it is the network that FID, KID and IS are defined by.
        k: neighbours that span the ball around an image; for precision and recall.
        repeats: draws of n images from either side.
        seed: of the draws and of k-means.
        reference: real images to compare with.
        clusters: bins of precision-recall distributions, twenty for each class.
    """

    extractor: str
    is_inception: bool = False
    k: int = 5
    repeats: int = 5
    seed: int = 1993
    reference: Literal["train", "test"] = "train"
    clusters: int = CLUSTERS_PER_CLASS
    kmeans_batch: int = KMEANS_BATCH  # which is fixed, and here to be written down

    def full_name(self, name: str) -> str:
        """Return the name of a measure with that of its extractor; Inception's have the names of the literature."""
        return OF_INCEPTION.get(name, name) if self.is_inception else f"{name}[{self.extractor}]"


@dataclass(frozen=True)
class Measure:
    """One value and how far it can be trusted.

    Attributes:
        name: with the extractor, such as "FD[resnet20@ab12cd]".
        value: mean over the repeats; None if it could not be computed.
        n_fake, n_real: images of either side that one repeat compares.
        extractor, k, repeats: see `Settings`.
        ci95: bootstrap interval of the mean over the repeats; it says nothing of images that were never drawn.
        real: the same of real images against other real ones, as many.
        reason: why there is no value.
    """

    name: str
    value: float | None
    n_fake: int
    n_real: int
    extractor: str
    k: int
    repeats: int = 0
    ci95: list[float] | None = None
    real: float | None = None
    reason: str | None = None


class Metric(NamedTuple):
    """Numbers that are computed together.

    Attributes:
        names: of the numbers.
        compute: from equally many generated and real images.
        least: how many images of either side it needs; None: the extractor cannot give it.
        why: it needs so many.
        whole: it is of all classes together and says nothing of one.
    """

    names: tuple[str, ...]
    compute: Callable[[Features, Features, Settings], tuple[float, ...]]
    least: Callable[[Features, Settings], int | None]
    why: str
    whole: bool = False


METRICS = (
    Metric(("FD",), lambda fake, real, _: (frechet_distance(fake.values, real.values),),
           lambda fake, _: fake.values.shape[1] + 1, "with no more than it has features, a covariance is singular"),
    Metric(("KD",), lambda fake, real, settings: (kernel_distance(fake.values, real.values, settings.seed),),
           lambda *_: 2, "pairs are compared"),
    Metric(("precision", "recall"),
           lambda fake, real, settings: precision_recall(fake.values, real.values, settings.k),
           lambda _, settings: settings.k + 2, "k neighbours of every image are looked for"),
    Metric(("IS",), lambda fake, *_: inception_score(fake.logits)[:1],
           lambda fake, _: None if fake.logits is None else LEAST_FOR_IS, "ten parts are scored", whole=True),
    Metric(("F_8", "F_1/8"),
           lambda fake, real, settings: best_f_scores(*share_of_clusters(
               fake.values, real.values, settings.clusters, settings.seed)),
           lambda _, settings: settings.clusters, "each class has twenty clusters", whole=True),
)  # fmt: skip


def compare(fake: Features, real: Features, settings: Settings, whole: bool = True) -> dict[str, Measure]:
    """Compute every metric on equally many generated and real images.

    n is as many as are generated, but at most half of the real ones, so that n real images can be compared with n
    others. Each repeat draws all three sets anew, without replacement: an image that comes twice would have a
    neighbour at no distance.

    Args:
        fake: at least one image.
        real: of the same network.
        settings: see `Settings`.
        whole: also what is defined over all classes only.
    """
    n, found = min(len(fake.labels), len(real.labels) // 2), {}
    for metric in (metric for metric in METRICS if whole or not metric.whole):
        least = metric.least(fake, settings)
        if least is None or n < least:
            reason = "this extractor has no class scores" if least is None else f"needs {least} images: {metric.why}"
            found |= {name: unknown(name, (n, n), settings, reason) for name in metric.names}
            continue
        rows = [(metric.compute(f, a, settings), metric.compute(b, a, settings))
                for f, a, b in _draws(fake, real, n, settings)]  # fmt: skip
        for place, name in enumerate(metric.names):
            values = torch.tensor([[side[place] for side in row] for row in rows], dtype=torch.float64)  # (repeats, 2)
            found[name] = known(name, values[:, 0], (n, n), settings, float(values[:, 1].mean()))
    return found


def _draws(fake: Features, real: Features, n: int, settings: Settings) -> Iterator[tuple[Features, ...]]:
    """Yield n generated images, n real ones and n other real ones for every repeat."""
    for repeat in range(settings.repeats):
        picks = [torch.randperm(len(side.labels), generator=seeding.generator(settings.seed, repeat, name))
                 for side, name in ((fake, "fake"), (real, "real"))]  # fmt: skip
        yield fake.take(picks[0][:n]), real.take(picks[1][:n]), real.take(picks[1][n : 2 * n])


def known(
    name: str, values: Tensor, counts: tuple[int, int], settings: Settings, real: float, draws: int = 0
) -> Measure:
    """Make the measure of values, float (N,).

    Args:
        name: without the extractor.
        values: one per repeat, or one per image where there is one repeat.
        counts: images of either side.
        settings: see `Settings`.
        real: the same of real images.
        draws: repeats, if they are not those of the settings.
    """
    interval = bootstrap_interval(values, settings.seed)
    return Measure(settings.full_name(name), float(values.mean()), *counts, settings.extractor, settings.k,
                   draws or settings.repeats, interval, real)  # fmt: skip


def unknown(name: str, counts: tuple[int, int], settings: Settings, reason: str) -> Measure:
    """Make the measure of what could not be computed."""
    return Measure(settings.full_name(name), None, *counts, settings.extractor, settings.k, reason=reason)


def nearest_real(fake: Features, train: Features, test: Features, settings: Settings) -> Measure:
    """Measure how near generated images come to a training image, beside how near other real images do.

    A mean far below that of held-out images tells of copies (memorisation).
    """
    near = [nearest_distances(side.values, train.values) for side in (fake, test)]
    counts = (len(fake.labels), len(train.labels))
    return known("nearest", near[0], counts, settings, float(near[1].mean()), draws=1)


def judge(fake: Features, real: Mapping[str, Features], settings: Settings, counts: Mapping[int, int]) -> Judgement:
    """Measure generated images overall, per group and per class, against real ones of the same classes.

    Args:
        fake: at least one image.
        real: "train" and "test", all images of the classes that were drawn.
        settings: see `Settings`.
        counts: images of each class that the source was trained on; empty: nobody says, and there are no groups.

    Returns:
        Measures by name, at "overall"; by group or by label first, at "groups" and "per_class".
    """
    reference, groups = real[settings.reference], {}
    for label in (label for label in fake.classes if label in counts):
        groups.setdefault(frequency_group(counts[label]), []).append(label)
    groups = groups if len(groups) > 1 else {}

    def of_classes(classes: list[int]) -> dict[str, Measure]:
        return compare(fake.select(classes), reference.select(classes), settings, whole=False)

    nearest = {"nearest": nearest_real(fake, real["train"], real["test"], settings)}
    return {"overall": compare(fake, reference, settings) | nearest,
            "groups": {name: of_classes(own) for name, own in groups.items()},
            "per_class": {label: of_classes([label]) for label in fake.classes}}  # fmt: skip
