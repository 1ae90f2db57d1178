"""Reading data sets: class folders, scikit-learn's digits, and what torchvision would download."""

import itertools
import json
import os
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data.datasets import DATASETS, find_dataset, load_dataset
from utils.data.images import encode_image
from utils.run.errors import ConfigError, DataError

COLOUR, LARGE = ("RGB", (8, 8)), ("RGB", (80, 80))
NOISE = encode_image(torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator()), ".png")


def write_image(path, mode="RGB", size=(8, 8), level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).convert(mode).save(path)


def write_folders(folder, classes=("cat", "dog"), images=(COLOUR, COLOUR), splits=("train", "test")):
    """`folder/<split>/<class>/<i>.png`, one for every (mode, (width, height)) of ``images``."""
    for split in splits:
        for name in classes:
            for i, (mode, size) in enumerate(images):
                write_image(folder / split / name / f"{i}.png", mode, size)
    return folder


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_any_folder_of_small_images_is_a_data_set_in_memory(tmp_path):
    write_folders(tmp_path / "Pets")
    dataset = load_dataset("Pets", tmp_path, offline=True)
    assert (dataset.name, dataset.class_names, dataset.train.labels.tolist()) == ("Pets", ["cat", "dog"], [0, 0, 1, 1])
    assert dataset.in_memory and dataset.train.parts[0].images.shape == (4, 3, 8, 8)
    assert (dataset.image_size, dataset.channels, dataset.augmentation) == (8, 3, "cifar")
    assert dataset.source == f"class folders in {tmp_path / 'Pets'} (4 training and 4 test images, 2 classes)"


def test_large_images_stay_files_and_feed_a_224_pixel_network(tmp_path):
    write_folders(tmp_path / "pets", images=[("RGB", (80, 60)), ("RGB", (70, 90))])
    dataset = load_dataset("pets", tmp_path)
    assert not dataset.in_memory and isinstance(dataset.train.parts[0].images[0], str)
    assert (dataset.image_size, dataset.augmentation, dataset.mean[0]) == (224, "imagenet", 0.485)
    assert dataset.train.image(1).shape == (3, 90, 70) and dataset.root == str(tmp_path / "pets")
    write_folders(tmp_path / "odd", images=[("RGB", (8, 8)), ("RGB", (9, 7))])  # small, but not of one size
    assert not load_dataset("odd", tmp_path).in_memory


@pytest.mark.parametrize(
    ("modes", "channels"),
    [("L 1", 1), ("L RGB", 3), ("RGBA P", 3), ("LA L", 3)],  # all grey; mixed; alpha counts as colour, also over grey
)
def test_grey_and_transparent_images_share_one_number_of_channels(tmp_path, modes, channels):
    write_folders(tmp_path / "pets", images=[(mode, (8, 8)) for mode in modes.split()])
    dataset = load_dataset("pets", tmp_path)
    assert dataset.channels == channels and dataset.train.parts[0].images.shape == (4, channels, 8, 8)


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.mark.parametrize(
    ("name", "classes", "order"),
    [
        ("pets", ["10", "2", "0"], ["0", "2", "10"]),  # all numbers
        ("pets", ["10", "2", "a"], ["10", "2", "a"]),  # as ImageFolder
        ("cifar10", CIFAR10[::-1], CIFAR10),  # as published
    ],
)
def test_class_folders_sort_by_number_only_where_all_are_numbers(tmp_path, name, classes, order):
    write_folders(tmp_path / name, classes, [COLOUR])
    dataset = load_dataset(name, tmp_path)
    assert dataset.class_names == order and dataset.train.labels.tolist() == list(range(len(order)))


def test_images_are_found_at_any_depth_and_hidden_and_other_files_are_ignored(tmp_path):
    folder = write_folders(tmp_path / "pets")
    write_image(folder / "train" / "cat" / "images" / "more.JPEG")
    names = ("cat/.hidden.png", "cat/notes.txt", "readme.md", ".a/b.png", "cat/.a/b.png", "__MACOSX/a.png", "cat.png")
    write_files(folder, {f"train/{name}": b"" for name in names})
    write_image(folder / "exemplars" / "cat" / "0_seed00.jpg")  # beside train and test
    dataset = load_dataset("pets", tmp_path)
    assert (dataset.train.counts(2).tolist(), dataset.class_names) == ([3, 2], ["cat", "dog"])


@pytest.mark.parametrize(
    ("options", "files", "said"),
    [
        ({}, {"train/emu/a.txt": b"", "test/emu/a.txt": b""}, r"no image in the class folders emu of .*train"),
        ({}, {"train/emu/0.png": b"", "test/fox/0.png": b""}, "Only in train: emu; only in test: fox"),
        ({"splits": ["train"]}, {}, r"no folder test: put test images into .*test/<class>/<image>"),
        ({}, {"test/dog/9.png": b"not an image"}, r"cannot read the image .*test/dog/9\.png"),
        ({"images": [LARGE]}, {"test/dog/9.png": b"not an image"}, r"cannot read the image .*test/dog/9\.png"),
        ({}, {"train/cat/9.png": NOISE[: len(NOISE) // 2]}, r"cannot read the image .*cat/9\.png"),  # cut off
    ],
)
def test_what_is_wrong_with_class_folders_is_named_at_load(tmp_path, options, files, said):
    write_files(write_folders(tmp_path / "pets", **options), files)
    with pytest.raises(DataError, match=said):
        load_dataset("pets", tmp_path)


def test_links_among_class_folders_multiply_no_image_and_the_test_folder_may_be_one(tmp_path):
    folder = write_folders(tmp_path / "pets", splits=["train"])
    (folder / "test").symlink_to(folder / "train")
    dataset = load_dataset("pets", tmp_path)
    assert torch.equal(dataset.train.parts[0].images, dataset.test.parts[0].images)
    (folder / "test").unlink()
    write_folders(folder, splits=["test"])
    for name in ("cat", "dog"):
        (folder / "train" / name / "all").symlink_to(folder / "train")
    assert load_dataset("pets", tmp_path).train.counts(2).tolist() == [2, 2]
    (folder / "train" / "emu").symlink_to(folder / "train" / "cat")  # a class of another's images
    write_image(folder / "test" / "emu" / "0.png")
    with pytest.raises(DataError, match=r"no image in the class folders emu of .*train"):
        load_dataset("pets", tmp_path)


def test_class_names_are_any_utf8_and_others_are_named_without_reading_an_image(tmp_path):
    names = ["a\nb", "a\tb", "A", "a", "\x07", "\u00e9" * 127]
    folder = write_folders(tmp_path / "pets", names)
    dataset = load_dataset("pets", tmp_path)
    assert dataset.class_names == sorted(names) and len(dataset.train) == 12
    try:
        os.mkdir(os.path.join(os.fsencode(folder), b"train", b"caf\xe9"))
    except OSError:
        pytest.skip("this disk takes only UTF-8")
    with pytest.raises(DataError, match=r"pets/train/caf\\xe9' is not UTF-8: rename it"):
        find_dataset("pets", tmp_path)


def test_an_unknown_name_is_answered_with_the_nearest_and_with_the_folder_form(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown data set 'cifr100'; did you mean 'cifar100'.*cifr100/<train|test>"):
        load_dataset("cifr100", tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ImageNetR", r"looked for .*/ImageNetR, .*/imagenetr, .*/imagenet-r; put .*/train/<class>/<image>"),
        ("cub_official", r"unpacked as .*CUB_200_2011 with images.txt beside images/"),
        ("pets", r"put its images into .*pets/train/<class>/<image>"),  # a folder without train and test
    ],
)
def test_absent_data_says_what_was_looked_for_and_where_to_put_it(tmp_path, name, said):
    write_image(tmp_path / "pets" / "cat" / "0.png")
    found = find_dataset(name, tmp_path)
    assert not found.present and re.search(said, found.text)
    with pytest.raises(DataError, match=said):
        load_dataset(name, tmp_path)


def test_names_are_read_in_any_case_and_folders_as_written_or_lower(tmp_path):
    write_folders(tmp_path / "one" / "CIFAR10", ["a"])
    write_folders(tmp_path / "two" / "cifar10", ["a", "b"])
    assert load_dataset("CIFAR10", tmp_path / "one").class_names == ["a"]
    dataset = load_dataset("Cifar10", tmp_path / "two")
    assert (dataset.class_names, dataset.name) == (["a", "b"], "cifar10")


def test_imagenet_is_tested_on_val_where_test_has_no_classes(tmp_path):
    folder = write_folders(tmp_path / "imagenet100", splits=["train", "val"])
    write_image(folder / "test" / "unlabelled" / "0.png", level=7)
    dataset = load_dataset("imagenet100", tmp_path)
    assert (len(dataset.test), dataset.image_size, dataset.augmentation) == (4, 224, "imagenet")


def test_tiny_imagenet_is_read_as_published(tmp_path):
    folder = write_folders(tmp_path / "tiny-imagenet-200", classes=["n01", "n02"], splits=["train"])
    for i in range(2):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", level=10 + 10 * i)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n")
    dataset = load_dataset("tiny_imagenet", tmp_path)
    levels = dataset.test.parts[0].images[:, 0, 0, 0].tolist()
    assert (dataset.test.labels.tolist(), levels) == ([0, 1], [20, 10])


def test_imagenet100_can_be_drawn_from_all_of_imagenet(tmp_path):
    for name in (f"n{i:04}" for i in range(1000)):
        (tmp_path / "imagenet1000" / "train" / name).mkdir(parents=True)
    expected = sorted(f"n{i:04}" for i in np.random.RandomState(1993).permutation(1000)[:100])
    write_folders(tmp_path / "imagenet1000", classes=expected, images=[COLOUR], splits=["train", "val"])
    assert load_dataset("imagenet100", tmp_path).class_names == expected


def photograph(width, height, mode="RGB"):
    """Smooth colours, which a JPEG keeps within a few grey levels."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8)).convert(mode)


@pytest.fixture
def odd_photographs(tmp_path):
    """ImageNet-100 with three JPEGs of odd sizes, one of them grey, and a PNG with alpha in every class and split."""
    images = {"a.jpeg": (90, 71), "b.JPG": (33, 200), "c.jpg": (101, 64, "L"), "d.png": (80, 77, "RGBA")}
    for folder in (tmp_path / "imagenet100" / split / name for split in ("train", "val") for name in ("n01", "n02")):
        folder.mkdir(parents=True)
        for name, size_and_mode in images.items():
            photograph(*size_and_mode).save(folder / name)
    return tmp_path


def as_the_original_reads(image):
    """Squash, as PIL does, and cut out the middle: uint8 (3, 64, 64)."""
    squashed = image.convert("RGB").resize((76, 76), Image.BILINEAR).crop((6, 6, 70, 70))
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1)


def test_photographs_are_read_into_memory_at_64_pixels_squashed_and_cut(odd_photographs):
    dataset, again = (load_dataset("imagenet100_64", odd_photographs) for _ in range(2))
    assert (dataset.in_memory, dataset.image_size, dataset.channels) == (True, 64, 3)
    assert (dataset.augmentation, dataset.mean, dataset.std) == ("none", (0.5,) * 3, (0.5,) * 3)
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0] * 4 + [1] * 4
    for position, path in enumerate(sorted((odd_photographs / "imagenet100" / "train").glob("*/*"))):
        expected = as_the_original_reads(Image.open(path))
        torch.testing.assert_close(dataset.train.image(position), expected, rtol=0, atol=1)
    assert len(dataset.train.parts) == 1 and torch.equal(dataset.train.parts[0].images, again.train.parts[0].images)
    files = load_dataset("imagenet100", odd_photographs)  # under their own name they stay large files
    assert not files.in_memory and files.train.image(2).shape == (1, 64, 101)


def test_photographs_that_are_stored_small_are_seen_in_the_same_way(tmp_path):
    write_folders(tmp_path / "imagenet100", images=[("RGB", (40, 40))], splits=["train", "val"])
    photograph(40, 40).save(tmp_path / "imagenet100" / "train" / "cat" / "0.png")
    shown = load_dataset("imagenet100_64", tmp_path).train.image(0)
    torch.testing.assert_close(shown, as_the_original_reads(photograph(40, 40)), rtol=0, atol=1)


def test_a_photograph_that_is_cut_off_is_named_while_it_is_read_into_memory(odd_photographs):
    path = odd_photographs / "imagenet100" / "val" / "n02" / "b.JPG"
    path.write_bytes(path.read_bytes()[:700])  # the header is whole
    with pytest.raises(DataError, match=r"cannot read the image .*n02/b\.JPG"):
        load_dataset("imagenet100_64", odd_photographs)


def write_cub(data_dir, split="1001", labels="1122", names=("001.Albatross", "002.Auklet")):
    """CUB-200-2011 as published, with two classes of two images."""
    folder, paths = data_dir / "CUB_200_2011", ["001.A/0.jpg", "001.A/1.jpg", "002.A/0.jpg", "002.A/1.jpg"]
    for i, path in enumerate(paths):
        write_image(folder / "images" / path, size=(70, 80), level=50 * i)
    tables = {"images": paths, "train_test_split": split, "image_class_labels": labels, "classes": names}
    for table, values in tables.items():
        lines = [f"{i} {value}" for i, value in enumerate(values, 1)]
        (folder / f"{table}.txt").write_text("\n".join(lines) + "\n")


def test_cub_is_read_with_its_official_split_as_published(tmp_path):
    write_cub(tmp_path)
    dataset = load_dataset("cub_official", tmp_path)
    assert dataset.class_names == ["001.Albatross", "002.Auklet"]
    assert (dataset.train.labels.tolist(), dataset.test.labels.tolist()) == ([0, 1], [0, 1])
    images = [split.image(i) for split in (dataset.train, dataset.test) for i in (0, 1)]
    assert [round(image.float().mean().item(), -1) for image in images] == [0, 150, 50, 100]
    assert (dataset.image_size, dataset.augmentation, dataset.mean) == (224, "vit_crop", (0,) * 3)
    assert "official split" in dataset.source and "2 training and 2 test images" in dataset.source


LISTS = {
    "imagenet_lt": ("imagenet", "ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
    "inaturalist2018": ("iNaturalist18", "iNaturalist18_train.txt", "iNaturalist18_val.txt"),
}


def write_lists(data_dir, name, train="b/0 1\na/0 0\nb/1 1\n", test="a/2 0\nb/2 1\n"):
    """Two classes, of which the second comes first in the list."""
    folder, *lists = (data_dir / LISTS[name][0], *LISTS[name][1:])
    for split, (path, text) in zip(("train", "val"), zip(lists, (train, test))):
        for line in (lines := [f"{split}/{line}".replace(" ", ".jpg ") for line in text.split("\n") if line]):
            write_image(folder / line.partition(" ")[0], size=(70, 80), level=100 if "/a/" in line else 200)
        (folder / path).write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", LISTS)
def test_long_tails_are_read_by_their_published_lists(name, tmp_path):
    folder = write_lists(tmp_path, name)
    if name == "imagenet_lt":  # listed as in one folder, but sorted into those of the classes
        (folder / LISTS[name][2]).write_text("val/2.jpg 0\nval/3.jpg 1\n")
        (folder / "val" / "b" / "2.jpg").rename(folder / "val" / "b" / "3.jpg")
    write_image(folder / "train" / "a" / "9.jpg", size=(70, 80))  # balanced data has more than the list names
    dataset = load_dataset(name, tmp_path, offline=True)
    assert dataset.class_names == ["a", "b"] and dataset.train.labels.bincount().tolist() == [1, 2]
    assert [round(dataset.train.image(i).float().mean().item(), -1) for i in range(3)] == [100, 200, 200]
    assert dataset.test.labels.tolist() == [0, 1] and "published lists" in dataset.source


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": "a/0 0\nb/0 2\n"}, "do not number the same folders from 0 on"),
        ({"test": "a/2 0\n"}, "do not number the same folders from 0 on"),
        ({"train": "a/0 0\nb/0 1 1\n"}, r"ImageNet_LT_train\.txt, line 2: not an id and a value"),
    ],
)
def test_lists_that_leave_out_a_class_are_refused(changed, message, tmp_path):
    write_lists(tmp_path, "imagenet_lt", **changed)
    with pytest.raises(DataError, match=message):
        load_dataset("imagenet_lt", tmp_path)


def test_absent_lists_are_named_with_their_place(tmp_path):
    with pytest.raises(DataError, match=r"ImageNet_LT_train\.txt and ImageNet_LT_test\.txt beside the images"):
        load_dataset("imagenet_lt", tmp_path)


@pytest.mark.parametrize("name", ["food101", "Caltech256", "PLACES100", "imagenet100_autoaugment"])
def test_auto_augmented_data_sets_share_one_transform_and_find_the_folders_of_the_original(tmp_path, name):
    original = {"food101": "Food101", "PLACES100": "Places100", "imagenet100_autoaugment": "ImageNet100"}.get(
        name, name
    )
    write_folders(tmp_path / original, images=[("RGB", (80, 60)), ("L", (70, 90))])
    dataset = load_dataset(name, tmp_path, offline=True)
    assert dataset.name == name.lower() and not dataset.in_memory
    assert (dataset.augmentation, dataset.image_size) == ("auto_augment", 224)
    assert (dataset.mean, dataset.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("splits", [("train", "test"), ("train",), ("test",)])
def test_the_clutter_of_caltech256_is_left_out_in_either_split_and_the_source_says_so(tmp_path, splits):
    folder = write_folders(tmp_path / "Caltech256", classes=["001.ak47", "256.toad"])
    write_folders(folder, classes=["257.clutter"], splits=splits)
    dataset, found = load_dataset("caltech256", tmp_path), find_dataset("caltech256", tmp_path)
    assert dataset.class_names == ["001.ak47", "256.toad"] and len(dataset.train) == len(dataset.test) == 4
    said = f"class folders in {folder}" + " without 257.clutter" * ("train" in splits)
    assert dataset.source.startswith(f"{said} (4 training") and found.text == f"{said} (2 classes)"


def write_food(data_dir):
    """Food-101 as torchvision unpacks it, with two classes out of alphabetical order."""
    folder = data_dir / "food-101"
    splits = {"train": {"waffles": ["waffles/2", "waffles/1"], "apple_pie": ["apple_pie/7"]}}
    splits["test"] = {"waffles": ["waffles/3"], "apple_pie": ["apple_pie/8"]}
    (folder / "meta").mkdir(parents=True)
    for split, images in splits.items():
        (folder / "meta" / f"{split}.json").write_text(json.dumps(images))
        for image in itertools.chain(*images.values()):
            write_image(folder / "images" / f"{image}.jpg", size=(70, 80))
    return folder


def test_food101_is_read_with_its_official_split_as_torchvision_unpacks_it(tmp_path):
    folder = write_food(tmp_path)
    dataset = load_dataset("food101", tmp_path, offline=True)
    paths = [path.removeprefix(f"{folder}/images/") for path in (dataset.train + dataset.test).merged().parts[0].images]
    assert paths == [f"{name}.jpg" for name in ("apple_pie/7", "waffles/1", "waffles/2", "apple_pie/8", "waffles/3")]
    assert (dataset.class_names, dataset.train.labels.tolist()) == (["apple_pie", "waffles"], [0, 1, 1])
    assert "official split" in dataset.source and find_dataset("food101", tmp_path).present


@pytest.mark.parametrize("name", ["Food101", "cifar100"])
def test_class_folders_win_over_a_download(downloaded, tmp_path, name):
    write_food(tmp_path)
    write_folders(tmp_path / name, ["a", "b", "c"])
    assert load_dataset(name, tmp_path).class_names == ["a", "b", "c"]
    assert find_dataset(name, tmp_path).text.endswith("(3 classes)")


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("cub_official", partial(write_cub, split=["1"]), "no split or no class for image 2"),
        ("cub_official", partial(write_cub, labels="1113"), "for image 4"),
        ("cub_official", partial(write_cub, names=["001.Albatross", ""]),  # cut off
         r"classes\.txt, line 2: not an id and a value"),
        ("food101", lambda folder: (write_food(folder) / "images" / "waffles" / "2.jpg").unlink(),
         r"waffles/2\.jpg is missing; delete .*food-101 to unpack it anew"),
    ],
)  # fmt: skip
def test_what_a_published_archive_lacks_is_named(tmp_path, name, write, said):
    write(tmp_path)
    with pytest.raises(DataError, match=said):
        load_dataset(name, tmp_path)


def test_digits_are_scaled_to_bytes_and_split_by_class():
    dataset = load_dataset("digits")
    images = torch.cat([dataset.train.parts[0].images, dataset.test.parts[0].images])
    assert images.shape == (1797, 1, 8, 8) and (images.min(), images.max()) == (0, 255)
    shares = dataset.test.counts(10) / (dataset.train.counts(10) + dataset.test.counts(10))
    torch.testing.assert_close(shares, torch.full((10,), 0.25), atol=0.005, rtol=0)
    assert (dataset.channels, dataset.image_size, dataset.augmentation) == (1, 8, "none")
    assert torch.equal(dataset.test.labels, load_dataset("DIGITS").test.labels)  # one split for all runs


@pytest.fixture
def downloaded(monkeypatch):
    """torchvision as if CIFAR-100 were there: 4 training and 2 test images."""

    def dataset(root, train, download):
        count = 4 if train else 2
        data = np.arange(count * 32 * 32 * 3).reshape(count, 32, 32, 3).astype(np.uint8)
        return SimpleNamespace(data=data, targets=list(range(count // 2)) * 2, classes=["apple", "bear"])

    monkeypatch.setattr("torchvision.datasets.CIFAR100", dataset)


def test_torchvisions_arrays_become_one_tensor_of_the_border_format(downloaded, tmp_path):
    dataset, pilots = (load_dataset(name, tmp_path, offline=True) for name in ("cifar100", "cifar224"))
    assert dataset.train.parts[0].images[1, 2, 3, 4] == (1 * 3072 + 3 * 96 + 4 * 3 + 2) % 256
    assert (dataset.train.labels.tolist(), dataset.channels) == ([0, 1, 0, 1], 3)
    assert "torchvision's CIFAR100" in dataset.source and "4 training and 2 test" in dataset.source
    # PILOT's is stored at 32 and fed at 224 without normalisation.
    assert pilots.train.parts[0].images.shape[2:] == (32, 32)
    assert (pilots.image_size, pilots.augmentation, pilots.mean, pilots.std) == (224, "vit_crop", (0,) * 3, (1,) * 3)


def test_a_failed_download_says_what_to_put_where_and_why_it_failed(monkeypatch, tmp_path):
    def fail(*args, **settings):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST", fail)
    with pytest.raises(DataError, match=r"looked for .*mnist; put .*Downloading it failed: no route to host"):
        load_dataset("mnist", tmp_path)
    with pytest.raises(DataError, match="without --offline it would be downloaded"):
        load_dataset("mnist", tmp_path, offline=True)


def test_every_known_data_set_can_be_asked_for_without_reading_it(tmp_path):
    found = {name: find_dataset(name, tmp_path) for name in DATASETS.names()}
    assert [name for name in found if found[name].present] == ["digits"]
    cifar = ["cifar10", "cifar100", "cifar100_aa", "cifar10_aa", "cifar224"]
    readable = [*cifar, "digits", "fashion_mnist", "fashion_mnist12", "food101", "mnist"]
    assert [name for name in found if found[name].read] == readable  # or to be fetched
    assert all(str(tmp_path) in found[name].text for name in found if name != "digits")
    write_files(tmp_path / "pets", {"train/cat/broken.png": b"", "train/dog/broken.png": b""})
    pets = find_dataset("pets", tmp_path)
    assert pets.present and pets.text == f"class folders in {tmp_path / 'pets'} (2 classes)"


@pytest.mark.slow
def test_photographs_load_as_cifar100(photographs):
    dataset = load_dataset("cifar100", photographs, offline=True)
    assert dataset.train.counts(100).unique().tolist() == [100]
    assert dataset.test.counts(100).unique().tolist() == [25]
    assert dataset.train.parts[0].images.shape == (10_000, 3, 32, 32)
    assert (dataset.class_names[0], dataset.class_names[99]) == ("apple", "worm")
