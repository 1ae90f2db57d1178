"""The command line: one message and exit code 2 for what the user can mend, and nothing half-written."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from learners.run.configure import build_config
from learners.run.predict import main as predict
from tests.support.disk import no_space
from tests.support.sources import write_folders
from tests.support.toy import toy_images
from utils.results import compare
from utils.run.lock import locked
from utils.run.words import read_experiment


def keys(*settings) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


TINY = keys(
    "init_epoch=1", "epochs=1", "init_cls=5", "increment=5", "seed=1,2", "synth.block_out_channels=[8,8]",
    "synth.attention_head_dim=8", "synth.first_task_num_steps=2", "synth.timestep_respacing=ddim2",
    "synth.syn_per_class=2",
)  # fmt: skip


def run(folder, *arguments) -> int:
    return main.main([*arguments, *keys(f"output_dir={folder / 'outputs'}", "device=cpu")])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of two seeds, which lies in `outputs`; tests read it."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder, *TINY, "--name", "one") == 0
    return folder / "outputs" / "one"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--set increment_=2", ["unknown key 'increment_'; did you mean 'increment'"]),  # misspelt key
        ("--set synth.num_step=2", ["unknown key 'synth.num_step'; did you mean 'num_steps'"]),
        ("--set init_epoch=many", ["init_epoch='many'", "integer"]),  # wrong type
        ("--set init_epoch=0", ["init_epoch=0", "greater than or equal to 1"]),  # wrong range
        ("--set init_epoch=true", ["init_epoch=True", "not a number"]),
        ("--set init_cls=11", ["init_cls=11", "1 to 10"]),  # more classes than there are
        ("--set model_name=icrl", ["unknown learner 'icrl'; did you mean 'icarl'"]),
        ("--set synth.name=dpm", ["unknown source 'dpm'; did you mean 'ddpm'"]),
        ("--set dataset=digts", ["digts", "did you mean 'digits'"]),
        ("--set dataset=../digits", ["dataset", "data_dir"]),  # a path
        ("--set convnet_type=resnet33", ["resnet33", "did you mean"]),
        ("--plan --set dataset=cub --set data_dir=nowhere --set convnet_type=1e308", ["convnet_type", "1e+308"]),
        ("--set model_name=joint", ["'ddpm' makes images, which the learner 'joint' cannot replay"]),
        ("--set synth=null", ["generative_replay", "needs a source"]),
        ("--set device=gpu", ["device='gpu'", '"cpu"']),
        ("--set synth.timestep_respacing=ddim60", ["ddim60"]),
        ("--set kshot=200", ["200"]),  # more shots than images
        ("--set seed=-1", ["seed"]),
        ("--config exps/nothing.json", ["exps/nothing.json"]),
        ("--set dataset=cub --set data_dir=nowhere --offline", ["nowhere/cub", "train/<class>/<image>"]),
        ("--jobs 0", ["--jobs '0'", "from 1 to 9999"]),
        ("--jobs -2", ["--jobs '-2'", "from 1 to 9999"]),
        ("--jobs two --plan", ["--jobs 'two'", "how many seeds"]),
        ("--name a/b", ["'a/b'", "--name"]),  # --overwrite might delete what is there
        (f"--name {'n' * 201}", ["'nnn", "up to 200 bytes"]),
        ("--set output_dir=README.md", ["output_dir='README.md/", "is a file: choose another place"]),
        ("--plan --set output_dir=README.md/below", ["output_dir=", "a part of this path is a file"]),
        (f"--plan --set output_dir={'x' * 300}", ["output_dir=", "too long"]),
        ("--set synth.syn_image_path=README.md", ["synth.syn_image_path='README.md'", "is a file"]),
        ("--plan --set synth.syn_image_path=README.md/x", ["synth.syn_image_path=", "a part of this path is a file"]),
        ("--set output_dir=/proc/x", ["output_dir='/proc/x", "choose another place"]),  # where root may do everything
        ("--plan --set synth.syn_image_path=/proc/x", ["synth.syn_image_path='/proc/x'", "choose another place"]),
    ],
)
def test_bad_input_gets_one_message_and_writes_nothing(arguments, words, tmp_path, capsys):
    code = main.main([*keys(f"output_dir={tmp_path / 'outputs'}", "device=cpu"), *arguments.split()])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "outputs").exists()


def test_a_plan_names_all_that_is_missing_at_once(tmp_path, capsys):
    absent = keys(f"data_dir={tmp_path}", "synth.ldm_ckpt=nobody/no-such-model")
    assert run(tmp_path, "--config", "exps/cifar.json", "--plan", *absent) == 0
    printed = capsys.readouterr().out
    assert "Data, not on this machine yet" in printed and "Weights: ldm_ckpt='nobody/no-such-model'" in printed


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "train" / "cow").mkdir(), ["cow"]),  # an empty class
        (lambda root: (root / "test" / "dog").rename(root / "test" / "wolf"), ["dog", "wolf"]),  # other test classes
        (lambda root: (root / "train" / "cat" / "0.png").write_bytes(b"no image"), ["0.png"]),  # a broken image
    ],
)
def test_broken_folder_data_is_named(spoil, words, tmp_path, capsys):
    write_folders(tmp_path / "data" / "pets", toy_images(2, 2, "pets"), ["cat", "dog"])
    spoil(tmp_path / "data" / "pets")
    assert run(tmp_path, *keys("dataset=pets", f"data_dir={tmp_path / 'data'}", "init_cls=1", "increment=1")) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("error", "code", "words"), [(KeyboardInterrupt, 130, "the same command goes on"), (BrokenPipeError, 141, "")]
)
def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(error, code, words, tmp_path, capfd, monkeypatch):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("learners.run.experiment.load_dataset", stop)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # pytest needs its output
    assert run(tmp_path, *TINY) == code
    said = capfd.readouterr().err
    assert words in said and said.count("\n") == 2 * bool(words)


def test_jobs_are_refused_under_a_launcher(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert run(tmp_path, "--jobs", "2") == 2
    assert "--jobs 2: processes of torchrun share every seed" in capsys.readouterr().err


def test_the_default_experiment_is_found_from_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--plan"]) == 0
    assert capsys.readouterr().out.startswith("Run digits: generative_replay")


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    assert run(tmp_path, *TINY) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]


def test_another_setting_under_the_same_name_is_refused(finished, capsys):
    assert run(finished.parents[1], *TINY, "--name", "one", *keys("batch_size=32")) == 2
    assert "batch_size is 64 there, 32 here" in capsys.readouterr().err


def test_a_run_leaves_everything_that_the_readme_promises(finished):
    for name in ("config.json", "environment.json", "summary.json"):
        assert (finished / name).exists()
    for name in ("log.txt", "metrics.jsonl", "results.json", "report.html", "checkpoints"):
        assert (finished / "seed_2" / name).exists()
    assert (finished.parent / "syn_image_one_seed1" / "task_0" / "preview.png").exists()
    curves = re.findall(r"CNN top1 curve: \[(.*)\]", (finished / "seed_1" / "log.txt").read_text())  # as PyCIL's are
    assert len([float(value) for value in curves[-1].split(", ")]) == 2
    assert json.loads((finished / "summary.json").read_text())["seeds"] == [1, 2]


def test_a_finished_run_is_classified_with_and_compared(finished, tmp_path, capsys):
    write_folders(tmp_path / "mine", toy_images(2, 2, "pets"), ["cat", "dog"])
    (tmp_path / "mine" / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "mine" / "train" / ".ipynb_checkpoints" / "0.png").write_bytes(b"hidden")
    assert predict(["--run", str(finished / "seed_1"), "--images", str(tmp_path / "mine"), "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert compare.main([str(finished)]) == 0
    assert "generative_replay" in capsys.readouterr().out


@pytest.mark.parametrize("named", [[], ["--name", "digits"], keys("seed=3", "device=cpu")])
def test_a_second_process_is_refused_before_the_packages_are_loaded(named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("learners.run.configure.build_config", lambda *_: pytest.fail("too late"))
    with locked(tmp_path / "digits"):
        assert main.main([*named, *keys(f"output_dir={tmp_path}")]) == 2
    assert "digits belongs to a process that is running now" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_overrides_get_a_folder_of_their_own_and_seeds_do_not():
    raw = read_experiment("exps/digits.json")
    given = ([], ["seed=5"], ["batch_size=32"], ["batch_size=33"])
    names = [main.run_name("exps/digits.json", build_config(raw, overrides)[0], overrides) for overrides in given]
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


def test_a_prefix_that_begins_no_name_is_named(capsys):
    assert main.main([*keys("prefix=-1"), "--plan"]) == 2
    assert "give --name (or the key prefix) letters" in capsys.readouterr().err
