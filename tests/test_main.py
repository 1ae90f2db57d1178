"""The command line: one message and exit code 2 for what the user can mend, and nothing half-written."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from learners.run.predict import main as predict
from utils.results import compare

TINY = [
    "--set", "init_epoch=1", "--set", "epochs=1", "--set", "init_cls=5", "--set", "increment=5", "--set",
    "synth.first_task_num_steps=2", "--set", "synth.timestep_respacing=ddim2", "--set", "synth.syn_per_class=2",
]  # fmt: skip


def run(tmp_path, *arguments) -> int:
    return main.main([*arguments, "--set", f"output_dir={tmp_path / 'outputs'}", "--set", "device=cpu"])


def make_folders(root: Path, classes=("cat", "dog"), count=2):
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(root / split / name / f"{index}.png")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("increment_=2", ["increment_", "did you mean 'increment'"]),  # misspelt key
        ("synth.num_step=2", ["synth.", "num_step", "did you mean 'num_steps'"]),
        ("init_epoch=many", ["init_epoch='many'", "integer"]),  # wrong type
        ("init_epoch=0", ["init_epoch=0", "greater than or equal to 1"]),  # wrong range
        ("init_epoch=true", ["init_epoch=True", "not a number"]),
        ("init_cls=11", ["init_cls=11", "1 to 10"]),  # more classes than there are
        ("model_name=icrl", ["icrl", "did you mean 'icarl'"]),
        ("synth.name=dpm", ["dpm", "did you mean 'ddpm'"]),
        ("dataset=digts", ["digts", "did you mean 'digits'"]),
        ("dataset=../digits", ["dataset", "data_dir"]),  # a path
        ("convnet_type=resnet33", ["resnet33", "did you mean"]),
        ("model_name=joint", ["'ddpm'", "'joint' cannot replay"]),  # a learner that cannot use the source
        ("synth=null", ["generative_replay", "needs a source"]),
        ("device=gpu", ["device='gpu'", '"cpu"']),
        ("synth.timestep_respacing=ddim60", ["ddim60"]),
        ("kshot=200", ["200"]),  # more shots than images
        ("seed=-1", ["seed"]),
    ],
)
def test_bad_input_gets_one_message_and_writes_nothing(override, words, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    code = main.main(["--set", f"output_dir={outputs}", "--set", "device=cpu", "--set", override])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not outputs.exists()


def test_absent_data_says_where_it_was_looked_for(tmp_path, capsys):
    assert run(tmp_path, "--set", "dataset=cub", "--set", f"data_dir={tmp_path}", "--offline") == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "cub") in error and "train/<class>/<image>" in error


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "train" / "cow").mkdir(), ["cow"]),  # an empty class
        (lambda root: (root / "test" / "dog").rename(root / "test" / "wolf"), ["dog", "wolf"]),  # other test classes
        (lambda root: (root / "train" / "cat" / "0.png").write_bytes(b"no image"), ["0.png"]),  # a broken image
    ],
)
def test_broken_folder_data_is_named(spoil, words, tmp_path, capsys):
    make_folders(tmp_path / "data" / "pets")
    spoil(tmp_path / "data" / "pets")
    keys = ["dataset=pets", f"data_dir={tmp_path / 'data'}", "init_cls=1", "increment=1"]
    assert run(tmp_path, *(word for key in keys for word in ("--set", key))) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert not (tmp_path / "outputs").exists()


def test_a_missing_gpu_id_among_gpus_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main.main(["--set", f"output_dir={tmp_path}", "--set", 'device=["7"]']) == 2
    assert "device=7" in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(tmp_path, *TINY) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]


def test_an_absent_experiment_file_is_named(capsys):
    assert main.main(["--config", "exps/nothing.json"]) == 2
    assert "exps/nothing.json" in capsys.readouterr().err


def test_another_setting_under_the_same_name_is_refused(tmp_path, capsys):
    assert run(tmp_path, *TINY, "--name", "one") == 0
    assert run(tmp_path, *TINY, "--name", "one", "--set", "batch_size=32") == 2
    assert "batch_size is 64 there, 32 here" in capsys.readouterr().err


def test_a_run_leaves_everything_that_the_readme_promises(tmp_path, capsys):
    assert run(tmp_path, *TINY, "--name", "one", "--set", "seed=1,2") == 0
    root = tmp_path / "outputs" / "one"
    for name in ("config.json", "environment.json", "summary.json"):
        assert (root / name).exists()
    for name in ("log.txt", "metrics.jsonl", "results.json", "report.html", "checkpoints"):
        assert (root / "seed_2" / name).exists()
    assert (tmp_path / "outputs" / "syn_image_one_seed1" / "task_0" / "preview.png").exists()
    curves = re.findall(r"CNN top1 curve: \[(.*)\]", (root / "seed_1" / "log.txt").read_text())  # as PyCIL's are read
    assert len([float(value) for value in curves[-1].split(", ")]) == 2
    assert json.loads((root / "summary.json").read_text())["seeds"] == [1, 2]


def test_a_finished_run_is_classified_with_and_compared(tmp_path, capsys):
    make_folders(tmp_path / "mine")
    assert run(tmp_path, *TINY, "--name", "one") == 0
    capsys.readouterr()
    assert (
        predict(["--run", str(tmp_path / "outputs" / "one"), "--images", str(tmp_path / "mine"), "--device", "cpu"])
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert compare.main([str(tmp_path / "outputs" / "one")]) == 0
    assert "generative_replay" in capsys.readouterr().out


def test_overrides_get_a_folder_of_their_own_and_seeds_do_not():
    from learners.run.configure import build_config
    from utils.run.words import apply_overrides, read_experiment

    raw = read_experiment("exps/digits.json")
    names = []
    for overrides in ([], ["seed=5"], ["batch_size=32"], ["batch_size=33"]):
        config, _ = build_config(apply_overrides(raw, overrides))
        names.append(main.run_name("exps/digits.json", config, overrides))
    assert names[0] == names[1] == "digits" and len(set(names)) == 3


def test_plan_and_list_write_nothing(tmp_path, capsys):
    assert run(tmp_path, "--plan") == 0 and run(tmp_path, "--list") == 0
    printed = capsys.readouterr().out
    assert "task 4: classes 8-9" in printed and "generative_replay" in printed
    assert not (tmp_path / "outputs").exists()


def test_help_answers_in_under_two_seconds():
    start = time.monotonic()
    subprocess.run([sys.executable, "main.py", "--help"], check=True, capture_output=True)
    assert time.monotonic() - start < 2
