"""Features of un-augmented images are computed once, in batches that do not depend on what was asked before."""

import pytest
import torch
from torch.testing import assert_close

from learners.kept_features import KeptFeatures
from utils.data.images import ImageSet

PIXELS = torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IMAGES = ImageSet.of(PIXELS, torch.tensor([2, 0, 1, 0, 2]))
WIDE_AND_TALL = ImageSet.of(PIXELS[:1].view(1, 1, 2, 8), torch.tensor([0])) + IMAGES.take([0])


class Counter:
    """Answers with sums over an image's pixels and remembers what it was asked for."""

    def __init__(self):
        self.asked: list[list[int]] = []

    def __call__(self, images: ImageSet) -> torch.Tensor:
        self.asked.append(images.labels.tolist())
        return torch.cat([part.images.flatten(1).float().sum(1, keepdim=True) for part in images.parts])


@pytest.mark.parametrize("asked_before", [[], [2], [0, 1], [4, 3, 2, 1, 0]])
def test_an_image_is_computed_once_and_with_its_class_whatever_was_asked_for_before(asked_before):
    kept, compute = KeptFeatures(), Counter()
    if asked_before:
        kept.of(IMAGES.select(IMAGES.labels[asked_before].tolist()), compute)
    assert_close(kept.of(IMAGES, compute), PIXELS.flatten(1).float().sum(1, keepdim=True))
    assert sorted(compute.asked) == [[0, 0], [1], [2, 2]]


def test_only_what_is_missing_is_computed():
    kept, compute = KeptFeatures(), Counter()
    kept.of(IMAGES.take([1, 2]), compute)
    kept.of(IMAGES, compute)
    assert compute.asked == [[0], [1], [0], [2, 2]]


def test_the_same_bytes_in_another_shape_are_another_image():
    kept = KeptFeatures()
    kept.of(WIDE_AND_TALL, Counter())
    assert len(kept.rows) == 2


def test_files_are_known_by_their_paths():
    kept, asked = KeptFeatures(), []
    files = ImageSet.of(["a.png", "b.png", "a.png"], torch.tensor([0, 0, 0]))
    kept.of(files, lambda images: asked.extend(images.parts[0].images) or torch.arange(3.0).view(3, 1))
    assert set(kept.rows) == {"a.png", "b.png"}


@pytest.mark.parametrize("on_disk", [False, True])
def test_another_run_of_the_same_network_finds_the_rows_in_the_folder(on_disk, tmp_path):
    images = IMAGES
    if on_disk:
        paths = [tmp_path / f"{i}.bin" for i in range(5)]
        for path, pixels in zip(paths, PIXELS):
            path.write_bytes(pixels.numpy().tobytes())
        images = ImageSet.of([str(path) for path in paths], IMAGES.labels)
    rows = {label: torch.randn(int((IMAGES.labels == label).sum()), 3) for label in range(3)}
    folder, asked = tmp_path / "features", []

    def compute(part: ImageSet) -> torch.Tensor:
        asked.append(int(part.labels[0]))
        return rows[asked[-1]]

    first = KeptFeatures(folder, lambda: "weights").of(images, compute)
    assert_close(KeptFeatures(folder, lambda: "weights").of(images, compute), first, rtol=0, atol=0)
    assert asked == [0, 1, 2]
    KeptFeatures(folder, lambda: "other weights").of(images, compute)
    assert asked == [0, 1, 2] * 2
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:20])  # cut off
    assert_close(KeptFeatures(folder, lambda: "weights").of(images, compute), first, rtol=0, atol=0)
    assert asked == [0, 1, 2] * 3
