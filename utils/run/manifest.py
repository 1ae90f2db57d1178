"""The only answer to "is this folder mine, and is it whole?": a manifest in every folder that this project fills."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from utils.run.errors import CheckpointError, RepriseError
from utils.run.files import file_hash, read_json, write_json

MANIFEST = "manifest.json"


class Manifest:
    """What a folder is and which files belong to it, each with its SHA-256.

    The folder is claimed for an identity; once its files are there they are sealed. Whoever reads the folder afterwards
    reads the files of this list and no others.

    Args:
        folder: that it describes.
        kind: of folder: "run", "images", "checkpoint", ...; part of the identity.
        identity: JSON that must be equal for the folder to be ours; None: whatever it is.
        remedy: what the user may do about a folder that is foreign or damaged.
        name: of its file.
        error: kind of error to raise.
        names: pattern of the files that may be listed; None: any below the folder.
    """

    def __init__(
        self, folder: str | Path, kind: str, identity: dict[str, Any] | None = None, *, remedy: str,
        name: str = MANIFEST, error: type[RepriseError] = CheckpointError, names: re.Pattern | None = None,
    ):  # fmt: skip
        self.folder, self.kind, self.remedy, self.error, self.names = Path(folder), kind, remedy, error, names
        self.identity = json.loads(json.dumps(identity))  # as it comes back from the disk
        self.path = self.folder / name

    @property
    def exists(self) -> bool:
        return self.path.exists()

    # ------------------------------------------------------------------ claiming

    def claim(self, fields: Iterable[str] | None = None, write: bool = True, **notes: Any) -> dict[str, Any]:
        """Make the folder this identity's own, or see that it is.

        Args:
            fields: compare these alone; None: the whole identity.
            write: lay the manifest where there is none; of several processes only one does.
            notes: JSON that a new manifest holds for its readers.

        Returns:
            What is written in the manifest.

        Raises:
            RepriseError: if the folder belongs to something else (the first difference is named) or is damaged.
        """
        if not self.exists:
            content = self._content({}, notes)
            if write:
                write_json(self.path, content)
            return content
        content = self.read()
        if difference := first_difference(content, self.identity, self.identity if fields is None else fields):
            raise self.error(f"{self.folder} is of another run: {difference}. {self.remedy}")
        return content

    def read(self) -> dict[str, Any]:
        """Read the manifest of a folder of this kind.

        Raises:
            RepriseError: if it is absent, damaged or of another kind, or lists a file that is not one of ours.
        """
        content = read_json(self.path, self.remedy, self.error)
        if content.get("written_by") != "reprise" or content.get("kind") != self.kind:
            raise self.error(f"{self.path} is no {self.kind} manifest of this project: {self.remedy}")
        files = content.get("files")
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            raise self.error(f"{self.path} is damaged (no list of files): {self.remedy}")
        if foreign := [name for name in files if not self._is_ours(name)]:
            raise self.error(f"{self.path} lists {foreign[0]!r}, which is none of this folder's files: {self.remedy}")
        return content

    # ------------------------------------------------------------------ files

    def files(self) -> dict[str, str]:
        """Return the files that belong to the folder, name -> SHA-256; none before they are sealed."""
        return self.read()["files"] if self.exists else {}

    def seal(self, names: Iterable[str] | None = None, **notes: Any) -> None:
        """List files with their hashes, in place of those listed before; the folder is then whole.

        Args:
            names: below the folder; None: every file there.
            notes: JSON for readers.
        """
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        names = (name for name in found if name != self.path.name) if names is None else names
        self.store({name: file_hash(self.folder / name) for name in sorted(names)}, **notes)

    def store(self, files: dict[str, str], **notes: Any) -> None:
        """Write the list of files with hashes that are known already; see ``seal``."""
        assert all(map(self._is_ours, files)), files
        stored = self.read() if self.exists else {}
        write_json(self.path, self._content(files, {**stored, **notes}))

    def damaged(self) -> list[str]:
        """Return the listed files that are missing or changed since they were sealed."""
        return [name for name, digest in self.files().items() if not self.holds(name, digest)]

    def verify(self) -> dict[str, Any]:
        """Read the manifest of a folder that is whole.

        Raises:
            RepriseError: if it lists nothing, or a file is missing or changed; names the first.
        """
        content = self.read()
        if not content["files"]:
            raise self.error(f"{self.folder} was never finished: {self.remedy}")
        if damaged := self.damaged():
            raise self.error(f"{self.folder / damaged[0]} is missing or damaged: {self.remedy}")
        return content

    def holds(self, name: str, digest: str) -> bool:
        """Whether a file is there and has this hash."""
        return (self.folder / name).is_file() and file_hash(self.folder / name) == digest

    def delete(self) -> None:
        """Delete the folder with all that is in it.

        Raises:
            RepriseError: if it is a link, or no manifest says that this project wrote it.
        """
        if self.folder.is_symlink():
            raise self.error(f"{self.folder} is a link, so it is left alone: {self.remedy}")
        self.read()
        for path in [other for other in self.folder.iterdir() if other != self.path]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(self.folder)  # the manifest last: what a kill leaves must be known as ours

    def _is_ours(self, name: str) -> bool:
        path = PurePosixPath(name)
        inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name and path.as_posix() == name
        return inside and (self.names is None or self.names.fullmatch(name) is not None)

    def _content(self, files: dict[str, str], notes: dict[str, Any]) -> dict[str, Any]:
        # Without the first of these a folder is never deleted.
        return {"written_by": "reprise", "kind": self.kind, **(self.identity or {}), **notes, "files": files}


def first_difference(stored: dict[str, Any], here: dict[str, Any], fields: Iterable[str]) -> str:
    """Say in words the first of these fields in which two manifests differ; "" if none does."""
    for field in fields:
        there, wanted = stored.get(field), here.get(field)
        if there != wanted:
            while isinstance(there, dict) and isinstance(wanted, dict):
                inner = next(key for key in {**there, **wanted} if there.get(key) != wanted.get(key))
                field, there, wanted = f"{field}.{inner}", there.get(inner), wanted.get(inner)
            return f"{field} is {shorten(there)} there, {shorten(wanted)} here"
    return ""


def shorten(value: Any) -> str:
    """Write JSON of at most 80 characters, for a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
