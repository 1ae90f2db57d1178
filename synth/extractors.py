"""Networks that turn images into features to measure them by: any that the user has, always named with their weights.

A distance between features is one of these features: another network's numbers are never comparable.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from models import BACKBONES
from models.files.weights import UNREADABLE, check_weights_file, first_line, load_exactly, read_weights
from models.heads import HEADS
from models.incremental import IncrementalNet
from models.options import BackboneOptions, backbone_options
from models.timm_backbone import PILOT_ALIASES, build_backbone, check_backbone_name, has_weights
from synth.quality import Features
from utils.data.batches import test_batches
from utils.data.datasets import Dataset
from utils.data.datasets.base import IMAGENET_MEAN, IMAGENET_STD, Triple
from utils.data.images import ImageSet
from utils.data.transforms import classifier_transform, match_channels, resize_to_square, stack_by_size
from utils.run.config import RunConfig
from utils.run.errors import CheckpointError, ConfigError, RepriseError, WeightsError
from utils.run.files import in_numeric_order
from utils.run.folder import read_data, run_manifest
from utils.run.log import log
from utils.training.checkpoint import Checkpoints
from utils.training.runtime import Runtime
from utils.training.seeding import hash_tensors

INCEPTION = "inception"
HINT = "Take the file of this very network"
BATCH = 64  # images at once
KEYS = RunConfig.model_fields.keys() - {"synth", "evaluate_replay"}  # which say nothing of the classifier


@dataclass(frozen=True)
class Extractor:
    """A network with the way in which it looks at images.

    Attributes:
        network_name: as the user knows it.
        weights: SHA-256 of its weights.
        embed: N images to features, float32 (N, D), and class scores, float32 (N, K) or None, on the CPU.
    """

    network_name: str
    weights: str
    embed: Callable[[ImageSet], tuple[Tensor, Tensor | None]]

    @property
    def name(self) -> str:
        """Return the network with six digits of its weights' hash, such as "resnet20@ab12cd"."""
        return f"{self.network_name}@{self.weights[:6]}"

    @torch.no_grad()
    def __call__(self, images: ImageSet) -> Features:
        """Look at N images, at least one; they are uint8, as they lie on disk, on either side of a comparison."""
        return Features(*self.embed(images), images.labels)


def load_extractor(said: str, dataset: Dataset, runtime: Runtime, offline: bool = False) -> Extractor:
    """Load the network that `--extractor` names.

    Args:
        said: folder of a run, of one of its seeds or checkpoints: its classifier; "inception=FILE", torch-fidelity's
            file of TensorFlow's weights; "vgg16=FILE" (or 11, 13, 19, with _bn or without), torchvision's state dict;
            a timm name with its weight tag, or NAME=FILE for any of its networks or ours.
        dataset: of the images.
        runtime: device.
        offline: fetch nothing.

    Raises:
        RepriseError: if there is no such network or file, or the two do not fit; it begins with the flag.
    """
    name, _, file = said.partition("=")
    build = BUILDERS.get(name, partial(_build_backbone, dataset=dataset, offline=offline))
    try:
        if Path(said).is_dir():
            return load_classifier(Path(said), runtime)
        if file or name in BUILDERS:
            check_weights_file(file, said.partition("=")[0])
        network = build(name, file).eval().to(runtime.device)
    except RepriseError as error:
        raise type(error)(f"--extractor {said}: {error}") from error
    return Extractor(name, hash_tensors(network.state_dict()), partial(_embed, network, runtime.device))


def _embed(network: nn.Module, device: torch.device, images: ImageSet) -> tuple[Tensor, Tensor | None]:
    looks = []
    for rows in torch.arange(len(images)).split(BATCH):  # photographs need not fit into memory
        for pixels in stack_by_size(images.take(rows), lambda image: image):
            looks.append(network(match_channels(pixels, 3).contiguous().to(device)))
    return _joined(looks)


def _joined(looks: Iterable[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    features, logits = zip(*looks)
    joined = torch.cat(features).float().cpu()
    return joined, None if logits[0] is None else torch.cat(logits).float().cpu()


# ---------------------------------------------------------------------- a run's own classifier


def load_classifier(folder: Path, runtime: Runtime) -> Extractor:
    """Load the classifier of a run; its features are those before the head.

    Args:
        folder: of a run (its first seed), a seed, or a checkpoint `task_<t>`; of the former two the newest one counts.
        runtime: device.

    Raises:
        CheckpointError: if there is no whole checkpoint.
        WeightsError: if the classifier is no backbone with a head, as that of a learner with a network of its own.
    """
    config, dataset, tensors, num_seen, seed = _read_checkpoint(folder)
    backbone = build_backbone(config.convnet_type, backbone_options(config, dataset))
    head = "cosine" if "head.scale" in tensors else "linear" if "head.bias" in tensors else "plain"
    network = IncrementalNet(backbone, HEADS[head](backbone.num_features))
    network.rebuild({"num_seen": num_seen})
    remedy = "Its learner has a network of its own: name another run with --extractor, or a timm network"
    load_exactly(network, tensors, seed, f"a {config.convnet_type} with a head", remedy)
    network, transform = network.eval().to(runtime.device), classifier_transform(dataset, config.replay_resize)

    def embed(images: ImageSet) -> tuple[Tensor, Tensor]:
        batches = test_batches(images, transform, BATCH, runtime.device, runtime.workers(config.num_workers))
        features = (network.features(batch) for batch in batches)
        return _joined((values, network.head(values)) for values in features)

    return Extractor(config.convnet_type, hash_tensors(network.state_dict()), embed)


def _read_checkpoint(folder: Path) -> tuple[RunConfig, Dataset, dict[str, Tensor], int, Path]:
    """Return the config, the data, the network's tensors, its number of classes, and the folder of the seed."""
    folder = folder.absolute()
    number = folder.name.removeprefix("task_") if folder.parent.name == "checkpoints" else ""
    seed = folder.parents[1] if number else next(iter(in_numeric_order(folder.glob("seed_*"))), folder)
    checkpoints = Checkpoints(seed / "checkpoints", "task")
    raw = run_manifest(seed.parent, None).read()["config"]
    found = (number, *checkpoints.load(int(number))) if number.isdigit() else checkpoints.load_newest(log, False)
    if found is None or "network" not in found[1]:
        remedy = "name a run of main.py whose first task is finished with --extractor"
        raise CheckpointError(f"{seed / 'checkpoints'} holds no classifier: {remedy}")
    _, tensors, state = found
    config = RunConfig.build({key: value for key, value in raw.items() if key in KEYS})
    if state["holds_backbone"]:  # so its weights need not be where the run had them
        config = config.model_copy(update={"pretrained": False, "backbone_weights": None})
    return config, read_data(seed)[0], tensors["network"], state["num_seen"], seed


# ---------------------------------------------------------------------- networks of others


class Prepared(nn.Module):
    """A network that takes uint8 images of any size: stretched to its square, then normalised.

    Args:
        body: float (B, 3, S, S) to features (B, D).
        head: features to class scores (B, K); None: it has none.
        size: S.
        mean, std: of its input, per channel, for pixels in [0, 1].
    """

    def __init__(self, body: nn.Module, head: nn.Module | None, size: int, mean: Triple, std: Triple):
        super().__init__()
        self.body, self.head, self.size, self.mean, self.std = body, head, size, list(mean), list(std)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        square = resize_to_square(pixels, self.size, "bicubic")
        features = self.body(normalize(square.float() / 255, self.mean, self.std))
        return features, None if self.head is None else self.head(features)


def _build_backbone(name: str, file: str, dataset: Dataset, offline: bool) -> nn.Module:
    import timm

    options = BackboneOptions(pretrained=not file, weights=file or None, offline=offline)
    check_backbone_name(name, options)
    if not has_weights(name, options):
        raise ConfigError(f"{name} has no published weights: give {name}=FILE, or the folder of a run")
    size, mean, std = dataset.image_size, dataset.mean, dataset.std
    if name.lower() not in BACKBONES:
        published = timm.get_pretrained_cfg(PILOT_ALIASES.get(name.lower(), name.lower()))
        size, mean, std = published.input_size[-1], published.mean, published.std
    return Prepared(build_backbone(name, replace(options, image_size=size)), None, size, mean, std)


def _build_vgg(name: str, file: str) -> nn.Module:
    with torch.device("meta"):  # half a gigabyte need not be drawn at random first
        network = torchvision.models.get_model(name, weights=None)
    load_exactly(network, read_weights(file), file, f"torchvision's {name}", HINT, assign=True)
    second = nn.Sequential(network.features, network.avgpool, nn.Flatten(), network.classifier[:5])  # its 4,096 numbers
    return Prepared(second, network.classifier[5:], 224, IMAGENET_MEAN, IMAGENET_STD)


def _build_inception(name: str, file: str) -> nn.Module:
    """Build torch-fidelity's network, whose own reader of files would run what is pickled in them."""
    from torch_fidelity import FeatureExtractorInceptionV3

    weights = read_weights(file)
    with tempfile.TemporaryDirectory() as folder:
        plain = f"{folder}/weights.pth"
        torch.save(weights, plain)
        layers = ["2048", "logits_unbiased"]
        try:
            return FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=plain)
        except UNREADABLE as error:
            raise WeightsError(f"{file} does not fit Inception-v3 of 2015 ({first_line(error)}). {HINT}") from error


VGGS = [f"vgg{depth}{suffix}" for depth in (11, 13, 16, 19) for suffix in ("", "_bn")]
BUILDERS = {INCEPTION: _build_inception, **dict.fromkeys(VGGS, _build_vgg)}
