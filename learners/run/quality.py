"""What a finished run's replayed images are worth, as its own classifier sees them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from learners.base import Learner
from synth.extractors import Extractor
from synth.quality import CLUSTERS_PER_CLASS, UNKNOWN, Settings, judge
from synth.requests import Requests
from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.results.metrics import forgetting_per_class
from utils.training.seeding import hash_tensors


def replay_quality(learner: Learner, dataset: Dataset, rows: list[list[float | None]]) -> dict[str, Any]:
    """Measure the images that stood for the past against all real ones of their classes.

    Args:
        learner: after its last task.
        dataset: whole; the evaluator alone may look at it again.
        rows: accuracy per class after every task.

    Returns:
        JSON: "overall" and "groups" as of `synth.quality.judge`; "per_class", a list with label, name, "forgetting" in
        points and "measures" of each class that has images. Or a "reason" alone, where there are none.
    """
    data, source = learner.data, learner.replay.source
    drawn = sum((drawn_images(learner, label) for label in range(data.num_classes)), ImageSet()).merged()
    if not len(drawn):
        return {"reason": f"{source.config.name} has left no images to look at, and can draw none"}

    def embed(images: ImageSet) -> tuple[Tensor, Tensor]:
        return learner.extract_features(images), learner.predict(images)["cnn"]

    extractor = Extractor(learner.config.convnet_type, hash_tensors(learner.network.state_dict()), embed)
    place = torch.full((dataset.num_classes,), UNKNOWN)
    place[data.class_order] = torch.arange(data.num_classes)  # original id -> place in the order of learning
    sides = {"train": dataset.train, "test": dataset.test}
    sides = {name: side.relabelled(place[side.labels]).select(drawn.classes) for name, side in sides.items()}
    clusters, counts = CLUSTERS_PER_CLASS * len(drawn.classes), dict(enumerate(data.class_counts))
    settings = Settings(extractor.name, seed=learner.run.seed, clusters=clusters)
    judged = judge(extractor(drawn), {name: extractor(side) for name, side in sides.items()}, settings, counts)
    lost = [*forgetting_per_class(rows), *[None] * data.num_classes]  # the last task has lost nothing yet
    classes = [{"label": label, "name": data.class_names[label], "forgetting": lost[label], "measures": _plain(own)}
               for label, own in judged["per_class"].items()]  # fmt: skip
    groups = {name: _plain(own) for name, own in judged["groups"].items()}
    return {**asdict(settings), "overall": _plain(judged["overall"]), "groups": groups, "per_class": classes}


def drawn_images(learner: Learner, label: int) -> ImageSet:
    """Return the last images drawn of a class; of a source that keeps none, as many as a task would ask for."""
    replay, source = learner.replay, learner.replay.source
    if paths := replay.newest(label):
        return ImageSet.of(paths, torch.full((len(paths),), label))
    if source.samples != "images" or label not in source.fitted_classes:
        return ImageSet()
    count = source.config.syn_per_class or learner.data.class_counts[label]
    with learner.run.timed("draw"):
        return source.generate(Requests.of_classes([label], count, (learner.run.seed, source.config.name, "quality")))


def _plain(measures: dict) -> dict[str, dict[str, Any]]:
    return {name: asdict(measure) for name, measure in measures.items()}
