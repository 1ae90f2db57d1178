"""Whose a folder is, and whether it is whole."""

import json
import os
import re

import pytest

from utils.run.errors import CheckpointError, ConfigError
from utils.run.manifest import Manifest

OURS = b'{"written_by": "reprise", "kind": "run"'


def manifest(folder, identity=None, **options) -> Manifest:
    return Manifest(folder, "run", {"seed": 1} if identity is None else identity, remedy="mend it", **options)


def sealed(folder) -> Manifest:
    """Two files, one of them in a folder below, listed with their hashes."""
    (folder / "below").mkdir(parents=True)
    (folder / "a").write_text("abc")
    (folder / "below" / "b").write_text("b")
    made = manifest(folder)
    made.claim()
    made.seal()
    return made


def test_a_new_folder_is_claimed_and_known_again_and_a_look_alone_writes_nothing(tmp_path):
    manifest(tmp_path / "new").claim(write=False)
    assert not (tmp_path / "new").exists()
    content = manifest(tmp_path / "new").claim(note=[1])
    assert content == {"written_by": "reprise", "kind": "run", "seed": 1, "note": [1], "files": {}}
    assert manifest(tmp_path / "new").claim() == manifest(tmp_path / "new").read() == content


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "c": 4}, "b is 2 there, 3 here"),  # the first one
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, "a.b.c is 1 there, 2 here"),
        ({"a": {"b": 1}}, {"a": {}}, "a.b is 1 there, null here"),  # absent here
        ({"a": {}}, {"a": {"b": 1}}, "a.b is null there, 1 here"),  # absent there
        ({"a": {"b": 1}}, {"a": None}, 'a is {"b": 1} there, null here'),
        ({"a": "x" * 99}, {"a": 0}, f'a is "{"x" * 76}... there, 0 here'),
    ],
)
def test_a_folder_of_something_else_is_refused_and_the_first_difference_named(tmp_path, there, here, said):
    manifest(tmp_path, there).claim()
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path} is of another run: {said}. mend it")):
        manifest(tmp_path, here).claim()


@pytest.mark.parametrize(
    ("there", "here", "fields"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ["a"]),  # b is not asked for
        ({"a": 1}, {"a": 1}, ["a", "b"]),
        ({"sizes": (1, 2)}, {"sizes": [1, 2]}, None),  # as JSON has them
    ],
)
def test_a_folder_is_ours_where_the_fields_that_are_asked_for_are_equal(tmp_path, there, here, fields):
    content = manifest(tmp_path, there).claim()
    assert manifest(tmp_path, here).claim(fields) == content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *((cut, "is damaged") for cut in (b"", OURS[:-5], b"[]", b'{"written_by": "\xff"}')),
        (b"{}", "is no run manifest of this project"),
        (OURS.replace(b"run", b"bank") + b', "files": {}}', "is no run manifest of this project"),
        (OURS.replace(b"reprise", b"someone") + b', "files": {}}', "is no run manifest of this project"),
        (b'{"kind": "run", "files": {}}', "is no run manifest of this project"),
        *((OURS + files + b"}", "no list of files") for files in (b"", b', "files": ["a"]', b', "files": {"a": 1}')),
        (OURS + b', "files": {"../a": "0"}}', "lists '../a'"),
    ],
)
@pytest.mark.parametrize("action", ["read", "claim", "files", "verify", "damaged", "seal", "delete"])
def test_a_foreign_or_damaged_manifest_is_one_error_and_the_folder_stays(tmp_path, action, content, said):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        getattr(manifest(tmp_path, error=ConfigError), action)()
    assert "manifest.json" in str(caught.value) and "mend it" in str(caught.value)
    assert (tmp_path / "manifest.json").read_bytes() == content


def test_a_sealed_folder_lists_every_file_but_its_own(tmp_path):
    made = sealed(tmp_path)
    assert set(made.files()) == {"a", "below/b"} and made.files()["a"].startswith("ba7816bf8f01cfea")  # FIPS 180
    assert made.damaged() == [] and made.verify() == made.read()
    made.seal(["a"], size=3)
    assert set(made.files()) == {"a"} and (made.read()["size"], made.read()["seed"]) == (3, 1)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("c")])
@pytest.mark.parametrize("name", ["a", "below/b"])
def test_a_file_that_is_missing_or_changed_is_named(tmp_path, name, damage):
    made = sealed(tmp_path)
    damage(tmp_path / name)
    assert made.damaged() == [name]
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged: mend it"):
        made.verify()


def test_a_folder_that_was_never_sealed_is_not_whole(tmp_path):
    assert manifest(tmp_path).files() == {} and manifest(tmp_path).damaged() == []
    manifest(tmp_path).claim()
    with pytest.raises(CheckpointError, match="was never finished"):
        manifest(tmp_path).verify()


def test_known_hashes_are_stored_and_notes_kept(tmp_path):
    made = manifest(tmp_path)
    made.claim(note="n")
    made.store({"x": "0"}, more=1)
    assert made.read().items() >= {"files": {"x": "0"}, "note": "n", "more": 1}.items() and made.damaged() == ["x"]


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/x", "a/../b", "a\\b", "./a", "a//b", "", ".", "..", "word.txt"],  # the last fits no pattern
)
def test_a_name_that_is_none_of_the_folders_files_is_refused(tmp_path, name):
    made = manifest(tmp_path, names=re.compile(r"[a-z/]*"))
    made.claim()
    with pytest.raises(AssertionError):
        made.store({name: "0"})
    made.path.write_text(json.dumps({**made.read(), "files": {name: "0"}}))
    with pytest.raises(CheckpointError, match=re.escape(f"lists {name!r}, which is none of this folder's files")):
        made.files()


@pytest.mark.parametrize("moment", [0, 1])
def test_a_folder_of_ours_is_deleted_whole_and_known_as_ours_after_a_kill(tmp_path, monkeypatch, moment):
    folder, unlink, left = sealed(tmp_path / "run"), os.unlink, iter(range(moment))

    def unlink_or_die(*place, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(*place, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", unlink_or_die)
        folder.delete()
    assert folder.exists
    folder.delete()
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_never_deleted_nor_a_folder_without_a_manifest(tmp_path):
    sealed(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for folder, said in ((tmp_path / "link", "link is a link, so it is left alone"), (tmp_path, r"\.json is missing")):
        with pytest.raises(CheckpointError, match=said):
            manifest(folder).delete()
    assert (tmp_path / "link" / "a").read_text() == "abc"
