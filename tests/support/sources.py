"""Sources in their smallest settings on the toy data, and what they leave on disk."""

from fnmatch import fnmatch
from pathlib import Path

from models.heads import LinearHead
from models.incremental import IncrementalNet
from models.options import BackboneOptions
from models.timm_backbone import build_backbone
from synth import SOURCES
from synth.requests import Requests
from tests.support.toy import tiny_source, toy_dataset
from utils.data.images import ImageSet, encode_image
from utils.data.manager import DataManager, Split
from utils.run.files import atomic_write
from utils.training import seeding
from utils.training.run import Run
from utils.training.runtime import Runtime


def make_source(name, folder, seed=7, kind=None, dataset=None, **keys):
    return build(kind or SOURCES[name], {**tiny_source(name), **keys}, folder, seed, dataset=dataset)


def build(kind, keys, folder, seed=7, precision="fp32", dataset=None):
    """A source of this class with these keys, on the toy data unless told otherwise."""
    dataset, run = dataset or toy_dataset(), Run(folder, seed, Runtime(["cpu"], precision), progress=False)
    return kind(kind.Config.parse(keys), run, dataset.num_classes, dataset.class_names, dataset)


def fitted(name, folder, tasks=1, seed=7, **keys):
    source = make_source(name, folder, seed, **keys)
    encoder = toy_encoder() if source.samples == "features" else None
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2))
    for task in list(data.tasks())[:tasks]:
        data.advance(task)
        source.fit_before(task, data.train_images(task))
        replay = ImageSet() if task.index == 0 else source.generate(Requests.of_classes([0, 1], 2, (seed, name, 0)))
        source.fit_after(task, data.train_images(task), replay, ImageSet(), encoder)
    return source


def toy_encoder(num_classes=6) -> IncrementalNet:
    """A classifier of the toy data as it was built: one that has seen no image."""
    seeding.seed_everything("encoder")
    network = IncrementalNet(build_backbone("resnet20", BackboneOptions(image_size=8)), LinearHead(64))
    network.grow(num_classes)
    return network.eval()


def weigh(source, saved) -> tuple[int, int]:
    """Bytes of memory and of frozen weights that a source names, where ``saved`` is what it has saved."""
    sizes = {f"source/{path.name}": path.stat().st_size for path in Path(saved).glob("*") if path.is_file()}
    lines = source.carried()
    named = [name for name in sizes if any(fnmatch(name, file) for line in lines for file in line.files)]
    memory = sum(map(sizes.get, named)) + sum(line.nbytes for line in lines if not line.frozen)
    return memory, sum(line.nbytes for line in lines if line.frozen)


def write_folders(folder: Path, images: ImageSet, class_names: list[str]) -> None:
    """Lay a data set down as users do, `<train|test>/<class>/<i>.png`, with the same images in both."""
    for position, label in enumerate(images.labels.tolist()):
        for split in ("train", "test"):
            path = folder / split / class_names[label] / f"{position}.png"
            atomic_write(path, encode_image(images.image(position), ".png"), sync=False)
