"""Images at every border: uint8 tensors or files, in parts, with labels."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from utils.data.images import FeatureSet, ImageSet, decode_image, read_header
from utils.run.errors import DataError


def numbered(count, size=2, start=0, label=0) -> ImageSet:
    """Grey images whose pixels are their number."""
    pixels = torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, size, size)
    return ImageSet.of(pixels, torch.full((count,), label))


def numbers(images: ImageSet) -> list[int]:
    return [int(images.image(position)[0, 0, 0]) for position in range(len(images))]


def noise(*size) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)


def save(folder, name, array, mode="RGB") -> str:
    Image.fromarray(array).convert(mode).save(folder / name)
    return str(folder / name)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "LA"])  # alpha is dropped
def test_a_file_is_grey_or_rgb_and_a_png_decoded_without_loss(tmp_path, mode):
    array = noise(5, 4)
    pixels = decode_image(save(tmp_path, "image.png", array, mode))
    assert pixels.shape == (1 if mode in ("L", "1") else 3, 5, 4) and pixels.dtype == torch.uint8
    assert mode != "RGB" or torch.equal(pixels, torch.from_numpy(array).permute(2, 0, 1))


def of_mode(mode, values) -> Image.Image:
    """An image of one row, whose raw bytes are those of the values."""
    return Image.frombytes(mode, (len(values), 1), values.tobytes())


WIDE = np.array([0, 255, 256, 65535])  # of 16 bits
RED_THEN_BLUE = [Image.new("RGB", (1, 1), colour) for colour in ("red", "blue")]
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be shown on its side


@pytest.mark.parametrize(
    ("name", "image", "options", "pixels"),
    [
        ("16.png", of_mode("I;16", WIDE.astype("<u2")), {}, [0, 0, 1, 255]),
        ("16.tif", of_mode("I;16", WIDE.astype("<u2")), {}, [0, 0, 1, 255]),
        ("16b.tif", of_mode("I;16B", WIDE.astype(">u2")), {}, [0, 0, 1, 255]),
        ("int.tif", Image.fromarray(np.int32([[0, 1, 128, 255]])), {}, [0, 1, 128, 255]),
        ("float.tif", Image.fromarray(np.float32([[0, 0.2, 0.5, 1]])), {}, [0, 51, 128, 255]),
        ("1.png", Image.fromarray(np.array([[False, True]])), {}, [0, 255]),
        ("la.png", Image.new("LA", (1, 1), (90, 7)), {}, [90, 90, 90]),
        ("rgba.png", Image.new("RGBA", (1, 1), (10, 20, 30, 0)), {}, [10, 20, 30]),  # the colour behind the glass
        ("p.png", Image.new("RGB", (1, 1), (10, 20, 30)).quantize(2), {"transparency": 0}, [10, 20, 30]),
        ("cmyk.tif", Image.new("CMYK", (1, 1), (255, 0, 51, 0)), {}, [0, 255, 204]),
        ("pages.tif", RED_THEN_BLUE[0], {"save_all": True, "append_images": RED_THEN_BLUE[1:]}, [255, 0, 0]),
        ("moves.webp", RED_THEN_BLUE[0],
         {"save_all": True, "append_images": RED_THEN_BLUE[1:], "lossless": True}, [255, 0, 0]),
        ("turned.png", Image.fromarray(np.uint8([[10, 20]])), {"exif": TURNED}, [10, 20]),  # as ImageFolder reads it
    ],
)  # fmt: skip
def test_every_kind_of_file_becomes_8_bits_in_one_way(tmp_path, name, image, options, pixels):
    image.save(tmp_path / name, **options)
    assert decode_image(tmp_path / name).flatten().tolist() == pixels
    assert read_header(tmp_path / name)[:2] == (image.height, image.width)


BEYOND = [(np.float32([[0, wrong]]), 1) for wrong in (255, -0.1, np.nan)]
BEYOND += [(np.int32([[0, wrong]]), 255) for wrong in (256, -1)]


@pytest.mark.parametrize(("values", "most"), BEYOND)
def test_32_bits_without_a_common_scale_are_refused_before_and_while_they_are_read(tmp_path, values, most):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    for read in (read_header, decode_image):
        with pytest.raises(DataError, match=rf"deep\.tif: its 32 bits hold more than 0 to {most}, .*; save it with 8"):
            read(tmp_path / "deep.tif")


def test_a_file_that_says_it_is_monstrous_is_named(tmp_path):
    path = save(tmp_path, "vast.png", noise(2, 2))
    content = bytearray((tmp_path / "vast.png").read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)  # width and height
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "vast.png").write_bytes(content)
    for read in (read_header, decode_image):
        with pytest.raises(DataError, match=r"vast\.png: Image size \(3600000000 pixels\) exceeds"):
            read(path)


@pytest.mark.parametrize("damage", ["absent", "empty", "text", "cut off"])
def test_a_file_that_is_no_image_is_named(tmp_path, damage):
    path = tmp_path / "bad.png"
    if damage == "cut off":
        save(tmp_path, "bad.png", noise(64, 64))
        path.write_bytes(path.read_bytes()[:2000])
    elif damage != "absent":
        path.write_text("hello" if damage == "text" else "")
    with pytest.raises(DataError, match=r"bad\.png"):
        decode_image(path)


def test_adding_concatenates_in_order_keeps_parts_of_their_own_size_and_drops_empty_ones():
    both = numbered(2) + numbered(3, size=4, start=10, label=1)
    assert (len(both), both.labels.tolist(), numbers(both)) == (5, [0, 0, 1, 1, 1], [0, 1, 10, 11, 12])
    assert [part.images.shape[-1] for part in both.parts] == [2, 4]
    with pytest.raises(IndexError):
        both.image(5)
    assert (ImageSet() + numbered(0)).parts == () and ImageSet().classes == []
    assert len(ImageSet()) == 0 and ImageSet().labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([3, 0, 3], [0, 10, 10]),  # part by part; one may come twice
        ([1, 0], [1, 0]),  # in the order asked for inside one part
        ([], []),
        (range(2), [0, 1]),
        (torch.tensor([3, 4]), [10, 11]),
    ],
)
def test_take_picks_positions(positions, expected):
    images = numbered(3) + numbered(2, start=10)
    assert numbers(images.take(positions)) == expected


def test_select_keeps_the_stored_order_and_relabelling_moves_labels_across_part_borders():
    images = numbered(2, label=1) + numbered(2, start=10, label=0) + numbered(1, start=20, label=1)
    assert (numbers(images.select([1])), numbers(images.select([5]))) == ([0, 1, 20], [])
    assert (images.classes, images.counts(3).tolist()) == ([0, 1], [2, 3, 0])
    images = (numbered(2) + numbered(1, start=10)).relabelled(torch.tensor([4, 5, 6]))
    assert (images.labels.tolist(), images.parts[1].labels.tolist()) == ([4, 5, 6], [6])
    assert numbers(images) == [0, 1, 10]


def test_files_and_tensors_hold_the_same_image_and_bytes_are_pixels_or_sizes_of_files(tmp_path):
    array = noise(3, 6, 6)
    paths = [save(tmp_path, f"{i}.png", image) for i, image in enumerate(array)]
    files = ImageSet.of(paths, torch.arange(3))
    assert_close(files.image(2), torch.from_numpy(array[2]).permute(2, 0, 1), rtol=0, atol=0)
    assert files.take([1]).parts[0].images == (paths[1],)
    assert numbered(3, size=4).nbytes == 48
    assert (numbered(3, size=4) + files.take([0])).nbytes == 48 + (tmp_path / "0.png").stat().st_size


def test_neighbours_of_one_kind_are_merged_and_nothing_changes_its_place():
    files = [ImageSet.of([name], torch.tensor([label])) for name, label in (("a.png", 4), ("b.png", 5))]
    images = sum(files, numbered(1) + numbered(2, start=1, label=1) + numbered(1, size=4, label=3))
    merged = images.merged()
    assert [len(part) for part in merged.parts] == [3, 1, 2] and merged.labels.tolist() == [0, 1, 1, 3, 4, 5]
    assert numbers(ImageSet(merged.parts[:1])) == [0, 1, 2] and merged.parts[2].images == ("a.png", "b.png")


def marked(count, start=0) -> ImageSet:
    """Images that are known by their number, in a column too."""
    images = numbered(count, start=start)
    return ImageSet.of(images.parts[0].images, images.labels, items=torch.arange(start, start + count))


@pytest.mark.parametrize(
    "work",
    [
        lambda images: images.take([4, 3, 0]),
        lambda images: images.select([1]),
        lambda images: images + marked(2, start=20),
        lambda images: images.merged(),
        lambda images: images.first_of_each(1),
        lambda images: images.relabelled(torch.arange(5)),
    ],
)
def test_columns_travel_with_their_images(work):
    done = work(marked(3) + marked(2, start=10).relabelled(torch.tensor([1, 1])))
    assert len(done) and done.items().tolist() == numbers(done)


def test_images_without_the_column_of_their_neighbours_stay_a_part_of_their_own():
    images = marked(2) + numbered(1, start=5) + marked(1, start=7) + marked(1, start=8)
    assert images.items().tolist() == [0, 1, -1, 7, 8]
    assert [len(part.labels) for part in images.merged().parts] == [2, 1, 2]
    assert images.merged().items().tolist() == [0, 1, -1, 7, 8] and ImageSet().items().tolist() == []
    with pytest.raises(AssertionError):  # a column of another length
        ImageSet.of(numbered(2).parts[0].images, torch.tensor([0, 0]), items=torch.zeros(3))


def test_soft_targets_are_a_samples_own_or_those_of_its_label():
    def softly(label, *targets):
        return ImageSet.of(numbered(1).parts[0].images, torch.tensor([label]), soft_targets=torch.tensor([targets]))

    images = numbered(1, label=2) + softly(0, 0.5, 0.5, 0.0)
    assert images.soft_targets().tolist() == [[0, 0, 1], [0.5, 0.5, 0]]
    assert images.take([0]).soft_targets() is None and ImageSet().soft_targets() is None
    kept = softly(1, 0.25, 0.75)  # of an earlier task: later classes get nothing
    assert (kept + softly(2, 0.0, 0.5, 0.5)).soft_targets().tolist() == [[0.25, 0.75, 0], [0, 0.5, 0.5]]
    assert (kept + numbered(1, label=3)).soft_targets().tolist() == [[0.25, 0.75, 0, 0], [0, 0, 0, 1]]


def test_features_are_samples_like_images():
    features = FeatureSet.of(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0])) + FeatureSet()
    assert features.select([0]).tensor().tolist() == [[0, 1], [4, 5]]
    assert (features + features.take([1])).counts(2).tolist() == [2, 2]
    assert features.nbytes == 24 and FeatureSet().tensor().shape == (0, 0)
