"""Which image files there are in a folder: the same answer for training, prediction and replay."""

from __future__ import annotations

import os
from pathlib import Path

from utils.run.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
HIDDEN = (".", "__MACOSX", "@eaDir")  # names that begin so; archives and network disks leave what looks like images


def list_folder(folder: Path) -> list[Path]:
    """List what lies in a folder, sorted; what is hidden is passed over.

    Raises:
        DataError: if the folder cannot be read, or a name in it is not UTF-8.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith(HIDDEN))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    for path in paths:
        if path.name.encode(errors="ignore").decode() != path.name:
            raise DataError(f"the name of {os.fsencode(path)!r} is not UTF-8: rename it")
    return paths


def list_images(folder: Path, within: Path | None = None) -> list[str]:
    """List the paths of all images below a folder, at any depth, sorted, but for hidden ones.

    A link to a folder is followed where it leads out of the tree, and no folder is read twice. Links that lead up, in
    circles or from one class to another add nothing.

    Args:
        within: root of the tree; None: the folder itself.

    Raises:
        DataError: if a folder cannot be read, a name is not UTF-8, or what is called like an image is no file, such as
            a pipe or a broken link.
    """
    root, seen, found, waiting = within or folder, set(), [], [folder]
    top = root.resolve()
    while waiting:
        place = waiting.pop()
        real = place.resolve()
        leads_back = place.is_symlink() and (real.is_relative_to(top) or top.is_relative_to(real))
        known = real in seen or (leads_back and place != root)  # what lies there is listed at its own place
        seen.add(real)
        for path in () if known else list_folder(place):
            if path.is_dir():
                waiting.append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                if not path.is_file():
                    raise DataError(f"{path} is no file that could be read, or a broken link: remove it")
                found.append(str(path))
    return sorted(found)
