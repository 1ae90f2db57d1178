"""A checkpoint is there whole or not at all; a damaged one is named and the one before it used."""

import logging
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.support.disk import everything_in, no_space
from utils.run.errors import CheckpointError, RepriseError
from utils.training.checkpoint import Checkpoints

LOG = logging.getLogger("test")


def checkpoints(folder, count=2) -> Checkpoints:
    """``count`` checkpoints, numbered 10, 20, ..., each holding its number."""
    made = Checkpoints(folder, "task")
    for number in range(10, 10 * count + 1, 10):
        made.save(number, {"network": {"weight": torch.full((3,), float(number))}}, {"step": number})
    return made


def test_the_two_newest_come_back_with_their_tensors_and_state(tmp_path):
    made = checkpoints(tmp_path, 3)
    assert made.numbers() == [30, 20] and {path.name for path in tmp_path.iterdir()} == {"task_20", "task_30"}
    number, tensors, state = made.load_newest(LOG)
    assert (number, state) == (30, {"step": 30})
    assert_close(tensors, {"network": {"weight": torch.full((3,), 30.0)}})
    assert Checkpoints(tmp_path / "absent", "task").load_newest(LOG) is None


def test_numbers_are_ordered_as_numbers_and_saving_one_again_replaces_it(tmp_path):
    made = checkpoints(tmp_path, 11)
    made.save(110, {"network": {"weight": torch.zeros(3)}}, {"step": -1})
    assert made.numbers() == [110, 100] and made.load(110)[1] == {"step": -1}


def test_others_may_add_files_which_are_guarded_too(tmp_path):
    def fill(folder):
        (folder / "source").mkdir()
        (folder / "source" / "notes.txt").write_text("x")

    made = Checkpoints(tmp_path, "task")
    made.save(1, {}, {}, fill)
    (made.path(1) / "source" / "notes.txt").write_text("y")
    with pytest.raises(CheckpointError, match=r"source/notes\.txt is missing or damaged"):
        made.load(1)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("network.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01")),  # one bit
        ("network.safetensors", lambda path: path.write_bytes(b"")),  # a crash before the disk had it
        ("state.json", lambda path: path.write_text('{"step": 99}')),
        ("manifest.json", lambda path: path.write_text("{")),
        *((name, Path.unlink) for name in ("network.safetensors", "state.json", "manifest.json")),
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


@pytest.mark.parametrize(("step", "fill"), [("os.fsync", None), ("os.replace", None), (None, no_space)])
def test_a_full_disk_leaves_the_old_checkpoints_and_nothing_half_written(tmp_path, monkeypatch, step, fill):
    made = checkpoints(tmp_path)
    before = everything_in(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(RepriseError, match=r"cannot use .*task_30.*the disk is full"):
        if step is not None:
            patch.setattr(step, no_space)
        made.save(30, {"network": {"weight": torch.ones(3)}}, {"step": 30}, fill)
    assert everything_in(tmp_path) == before and made.load_newest(LOG)[0] == 20


def test_names_do_not_see_each_other_and_clear_takes_all_of_a_kind(tmp_path):
    for name in ("task", "fit_0_train", "fit_0_train_head", "fit_1_ddpm"):
        Checkpoints(tmp_path, name).save(5, {}, {})
    (tmp_path / ".fit_1_ddpm_6.tmp").mkdir()
    assert Checkpoints(tmp_path, "fit_0_train").numbers() == [5]
    Checkpoints(tmp_path, "fit").clear()
    assert {path.name for path in tmp_path.iterdir()} == {"task_5"}
