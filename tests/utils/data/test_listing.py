"""Which files of a folder are images: no hidden ones, none twice, and a message for what cannot be read."""

import os
from pathlib import Path

import pytest

from utils.data.listing import list_images
from utils.run.errors import DataError


def put(folder: Path, *names: str) -> Path:
    """Files of no bytes: a listing reads none."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def listed(folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in list_images(folder)]


def test_hidden_files_folders_of_the_system_and_other_files_are_passed_over_at_any_depth(tmp_path):
    shown = ["a.PNG", "cat/deep/er/b.jpeg", "cat/x.png/c.webp", "lowercase.tiff"]  # x.png is a folder
    hidden = [".ipynb_checkpoints/a.png", "cat/.ipynb_checkpoints/a.png", "cat/._a.png", "__MACOSX/cat/a.png",
              "cat/deep/@eaDir/a.png", "cat/Thumbs.db", "cat/a.txt", "png"]  # fmt: skip
    assert listed(put(tmp_path, *shown, *hidden)) == shown


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("cat/loop", "cat"),  # to itself
        ("cat/up", "."),  # to what holds it
        ("cat/high", ".."),  # above the folder
        ("cat/other", "dog"),  # to another class
        ("again", "cat"),  # a second name of a class
    ],
)
def test_a_link_that_stays_inside_adds_no_image(tmp_path, link, target):
    folder = put(tmp_path / "train", "cat/0.png", "dog/0.png")
    (folder / link).symlink_to(folder / target)
    assert listed(folder) == ["cat/0.png", "dog/0.png"]
    classes = {name: list_images(folder / name, folder) for name in ("cat", "dog", link.split("/")[0])}
    assert sum(map(len, classes.values())) == 2 == len(classes["cat"] + classes["dog"])  # also class by class


def test_a_link_out_of_the_folder_is_followed_once_and_one_to_a_file_is_that_file(tmp_path):
    away, folder = put(tmp_path / "away", "0.png", "deep/1.png"), put(tmp_path / "train", "cat/0.png")
    (folder / "dog").symlink_to(away)
    (folder / "emu").symlink_to(away / "deep")  # which was seen as dog/deep, or is not seen there
    (away / "back").symlink_to(folder)
    (folder / "cat" / "1.png").symlink_to(away / "0.png")
    names = listed(folder)
    assert names == ["cat/0.png", "cat/1.png", "dog/0.png", names[3]] and names[3] in ("dog/deep/1.png", "emu/1.png")
    (tmp_path / "test").symlink_to(folder)
    assert listed(tmp_path / "test") == names  # where the folder itself is a link, it is the same folder


@pytest.mark.parametrize("kind", ["pipe", "broken link", "link to itself"])
def test_what_is_called_like_an_image_and_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "x.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("x.png" if kind == "link to itself" else "nowhere.png")
    with pytest.raises(DataError, match=r"x\.png is no file that could be read, or a broken link: remove it"):
        list_images(tmp_path)


@pytest.mark.parametrize("name", [b"caf\xe9", b"caf\xe9.png"])
def test_a_name_that_is_not_utf8_is_named_by_its_bytes(tmp_path, name):
    try:
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    except OSError:
        pytest.skip("this disk takes only UTF-8")
    with pytest.raises(DataError, match=r"the name of b'.*caf\\xe9(\.png)?' is not UTF-8: rename it"):
        list_images(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the folder .*nowhere: No such file"):
        list_images(tmp_path / "nowhere")
