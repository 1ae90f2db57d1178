"""Files and folders are there whole or not at all, and a damaged one is named."""

import errno
import os

import pytest
import torch
from torch.testing import assert_close

from tests.support.disk import everything_in
from utils.run.errors import CheckpointError, ConfigError, RepriseError
from utils.run.files import atomic_write, load_tensors, read_json, save_tensors, whole_folder


@pytest.mark.parametrize("content", ["grün\n", b"\x00\xff", ""])
def test_a_file_is_written_whole_and_leaves_no_temporary_one(tmp_path, content):
    atomic_write(tmp_path / "new" / "file", content)
    assert (tmp_path / "new" / "file").read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert everything_in(tmp_path) == {"new", "new/file"}


@pytest.mark.parametrize("step", ["builtins.open", "os.fsync", "os.replace"])
@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (errno.ENOSPC, RepriseError, r"cannot use .*file \(broken\): the disk is full, so make room"),
        (errno.EDQUOT, RepriseError, r"cannot use .*file \(broken\): the disk is full, so make room"),
        (errno.EIO, OSError, "broken"),  # another failure stays what it is
    ],
)
def test_a_failing_disk_keeps_the_old_file_and_a_full_one_is_named(tmp_path, monkeypatch, step, code, kind, said):
    def fail(*_):
        raise OSError(code, "broken")

    atomic_write(tmp_path / "file", "old")
    with monkeypatch.context() as patch, pytest.raises(kind, match=said):
        patch.setattr(step, fail)
        atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old" and everything_in(tmp_path) == {"file"}


def test_only_what_cannot_be_made_again_waits_for_the_disk(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(os, "fsync", waited.append)
    atomic_write(tmp_path / "image", "x", sync=False)
    assert waited == []
    atomic_write(tmp_path / "state", "x")
    assert len(waited) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_every_kind_come_back_equal(tmp_path, dtype):
    tensor = torch.arange(24).view(2, 3, 2, 2).to(dtype)
    scattered = tensor.to(memory_format=torch.channels_last).requires_grad_(dtype == torch.float32)
    save_tensors(tmp_path / "t.safetensors", {"a": scattered, "scalar": torch.tensor(3), "none": torch.empty(0, 2)})
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert_close(loaded["a"], tensor, rtol=0, atol=0)
    assert (loaded["scalar"].item(), loaded["none"].shape) == (3, (0, 2))


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 200), lambda path: path.write_bytes(b"hello")]
)
def test_a_tensor_file_that_cannot_be_read_is_named(tmp_path, damage):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.zeros(100)})
    damage(path)
    with pytest.raises(CheckpointError, match=r"cannot read .*t\.safetensors"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing"),
        *((cut, "is damaged") for cut in (b"", b'{"a": ', b'{"a": "\xff"}', b"[" * 100_000)),  # the last is too deep
        (b"[1]", r"is damaged \(it holds a list, not an object\)"),
        (b"null", r"is damaged \(it holds a NoneType, not an object\)"),
    ],
)
def test_a_json_file_that_holds_no_object_is_one_error_with_its_remedy(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"(?s)a\.json {said}.*: mend it$"):
        read_json(tmp_path / "a.json", "mend it", ConfigError)


def test_a_folder_takes_its_place_once_all_is_in_it(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").write_text("x")
    with whole_folder(tmp_path / "made") as temporary:
        (temporary / "new").write_text("x")
        assert everything_in(tmp_path / "made") == {"old"}
    assert everything_in(tmp_path) == {"made", "made/new"}


@pytest.mark.parametrize("error", [ValueError("mine"), OSError(errno.ENOSPC, "full")])
def test_a_folder_that_failed_leaves_the_old_one_and_nothing_half_written(tmp_path, error):
    (tmp_path / "made").mkdir()
    wrong = pytest.raises((ValueError, RepriseError), match=r"mine|the disk is full")
    with wrong, whole_folder(tmp_path / "made") as temporary:
        (temporary / "new").write_text("x")
        raise error
    assert everything_in(tmp_path) == {"made"}
