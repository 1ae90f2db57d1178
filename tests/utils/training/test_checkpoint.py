"""Files are there whole or not at all, and a damaged checkpoint is named and replaced by the one before it."""

import errno
import json
import logging
import os

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from utils.run.errors import CheckpointError, RepriseError
from utils.training.checkpoint import (
    Checkpoints,
    atomic_write,
    file_hash,
    folder_bytes,
    load_tensors,
    save_tensors,
    write_json,
)

LOG = logging.getLogger("test")


def checkpoints(folder, count=2) -> Checkpoints:
    """``count`` checkpoints, numbered 10, 20, ..., each holding its number."""
    made = Checkpoints(folder, "task")
    for number in range(10, 10 * count + 1, 10):
        made.save(number, {"network": {"weight": torch.full((3,), float(number))}}, {"step": number})
    return made


def everything_in(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------------- single files


@pytest.mark.parametrize("content", ["grün\n", b"\x00\xff", ""])
def test_a_file_is_written_whole_and_leaves_no_temporary_one(tmp_path, content):
    atomic_write(tmp_path / "new" / "file", content)
    assert (tmp_path / "new" / "file").read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert everything_in(tmp_path) == {"new", "new/file"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path, monkeypatch, code):
    def full(_):
        raise OSError(code, "full")

    atomic_write(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RepriseError, match=r"the disk is full: cannot write .*file; make room"):
        atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert everything_in(tmp_path) == {"file"}


def test_a_disk_that_is_full_when_a_file_is_opened_says_so_too(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", no_space)
    with pytest.raises(RepriseError, match="the disk is full"):
        atomic_write(tmp_path / "file", "new")


def test_another_failure_of_the_disk_stays_what_it_is(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="broken"):
        atomic_write(tmp_path / "file", "new")
    assert everything_in(tmp_path) == set()


def test_only_what_cannot_be_made_again_waits_for_the_disk(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(os, "fsync", waited.append)
    atomic_write(tmp_path / "image", "x", sync=False)
    assert waited == []
    atomic_write(tmp_path / "state", "x")
    assert len(waited) == 1


def test_json_hash_and_size_of_files(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, None]}
    (tmp_path / "abc").write_text("abc")
    assert file_hash(tmp_path / "abc").startswith("ba7816bf8f01cfea")  # FIPS 180's example
    assert folder_bytes(tmp_path) == 3 + (tmp_path / "a.json").stat().st_size
    assert folder_bytes(tmp_path / "absent") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_every_kind_come_back_equal(tmp_path, dtype):
    tensor = torch.arange(24).view(2, 3, 2, 2).to(dtype)
    scattered = tensor.to(memory_format=torch.channels_last).requires_grad_(dtype == torch.float32)
    save_tensors(tmp_path / "t.safetensors", {"a": scattered, "scalar": torch.tensor(3), "none": torch.empty(0, 2)})
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert_close(loaded["a"], tensor, rtol=0, atol=0)
    assert (loaded["scalar"].item(), loaded["none"].shape) == (3, (0, 2))


@pytest.mark.parametrize("damage", ["absent", "cut off", "text"])
def test_a_tensor_file_that_cannot_be_read_is_named(tmp_path, damage):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.zeros(100)})
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200] if damage == "cut off" else b"hello")
    with pytest.raises(CheckpointError, match=r"cannot read .*t\.safetensors"):
        load_tensors(path)


def test_a_module_keeps_its_memory_format_when_its_weights_are_loaded(tmp_path):
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    save_tensors(tmp_path / "m.safetensors", module.state_dict())
    storage, values = module.weight.data_ptr(), module.weight.detach().clone()
    module.load_state_dict(load_tensors(tmp_path / "m.safetensors"))
    assert module.weight.data_ptr() == storage
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(module.weight.detach(), values, rtol=0, atol=0)


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_with_its_tensors_and_state(tmp_path):
    number, tensors, state = checkpoints(tmp_path).load_newest(LOG)
    assert (number, state) == (20, {"step": 20})
    assert_close(tensors, {"network": {"weight": torch.full((3,), 20.0)}})


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert Checkpoints(tmp_path / "absent", "task").load_newest(LOG) is None


def test_the_two_newest_are_kept(tmp_path):
    assert checkpoints(tmp_path, 11).numbers() == [110, 100]
    assert {path.name for path in tmp_path.iterdir()} == {"task_100", "task_110"}


def test_saving_a_number_again_replaces_it(tmp_path):
    made = checkpoints(tmp_path)
    made.save(20, {"network": {"weight": torch.zeros(3)}}, {"step": -1})
    assert made.load(20)[1] == {"step": -1}
    assert made.numbers() == [20, 10]


def test_others_may_add_files_which_are_guarded_too(tmp_path):
    def fill(folder):
        (folder / "source").mkdir()
        (folder / "source" / "notes.txt").write_text("x")

    made = Checkpoints(tmp_path, "task")
    made.save(1, {}, {}, fill)
    (made.path(1) / "source" / "notes.txt").write_text("y")
    with pytest.raises(CheckpointError, match=r"source/notes\.txt is damaged"):
        made.load(1)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("network.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01")),  # one bit
        ("network.safetensors", lambda path: path.write_bytes(b"")),  # a crash before the disk had it
        ("network.safetensors", lambda path: path.unlink()),
        ("state.json", lambda path: path.write_text('{"step": 99}')),
        ("state.json", lambda path: path.unlink()),
        ("index.json", lambda path: path.write_text("{")),
        ("index.json", lambda path: path.unlink()),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, caplog, name, damage):
    made = checkpoints(tmp_path)
    damage(made.path(20) / name)
    number, tensors, _ = made.load_newest(LOG)
    assert number == 10
    assert_close(tensors["network"]["weight"], torch.full((3,), 10.0))
    assert "task_20" in caplog.text and "damaged" in caplog.text
    assert made.numbers() == [10]


def test_a_half_written_checkpoint_is_none(tmp_path):
    made = checkpoints(tmp_path, 1)
    (tmp_path / ".task_20.tmp").mkdir()
    (tmp_path / ".task_20.tmp" / "state.json").write_text("{}")
    assert made.load_newest(LOG)[0] == 10
    made.save(20, {}, {"step": 20})
    assert made.load(20) == ({}, {"step": 20})


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoints_and_nothing_half_written(tmp_path, monkeypatch, step):
    made = checkpoints(tmp_path)
    before = everything_in(tmp_path)
    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(RepriseError, match="the disk is full"):
        made.save(30, {"network": {"weight": torch.ones(3)}}, {"step": 30})
    monkeypatch.undo()
    assert everything_in(tmp_path) == before
    assert made.load_newest(LOG)[0] == 20


def test_a_source_that_finds_the_disk_full_is_cleaned_up_after(tmp_path):
    with pytest.raises(RepriseError, match=r"the disk is full: cannot write .*task_1"):
        Checkpoints(tmp_path, "task").save(1, {}, {}, no_space)
    assert everything_in(tmp_path) == set()


def test_names_do_not_see_each_other_and_clear_takes_all_of_a_kind(tmp_path):
    for name in ("task", "fit_0_train", "fit_0_train_head", "fit_1_ddpm"):
        Checkpoints(tmp_path, name).save(5, {}, {})
    (tmp_path / ".fit_1_ddpm_6.tmp").mkdir()
    assert Checkpoints(tmp_path, "fit_0_train").numbers() == [5]
    Checkpoints(tmp_path, "fit").clear()
    assert {path.name for path in tmp_path.iterdir()} == {"task_5"}
