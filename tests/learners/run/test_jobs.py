"""Seeds side by side: the bits of one after the other, and a failure that takes no other with it."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import main
from learners.run import jobs
from learners.run.jobs import SeedProcess, group, share_devices
from tests.support.toy import without_clock
from utils.run.errors import ConfigError
from utils.run.lock import require_free

TINY = ["model_name=finetune", "synth=null", "epochs=1", "init_epoch=1", "init_cls=5", "increment=5", "device=cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Children of a server that has loaded all packages, in place of new processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["learners.run.jobs", "learners.finetune", "sklearn.datasets", "accelerate"])
    monkeypatch.setattr(jobs, "get_context", lambda method: context)


def run(folder: Path, seeds: str, *arguments: str) -> int:
    keys = [*TINY, f"seed={seeds}", f"output_dir={folder}"]
    return main.main(["--name", "run", *arguments, *(word for key in keys for word in ("--set", key))])


def outcome(folder: Path, seed: int) -> tuple[dict, bytes]:
    """Results but for their times, and the weights."""
    place = folder / "run" / f"seed_{seed}"
    weights = (place / "checkpoints" / "task_1" / "network.safetensors").read_bytes()
    return without_clock(json.loads((place / "results.json").read_text())), weights


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory) -> Path:
    """Three seeds, one after the other; tests read them."""
    folder = tmp_path_factory.mktemp("in_turn")
    assert run(folder, "1,2,3") == 0
    return folder


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory) -> Path:
    """A folder for two seeds side by side, to which others come."""
    return tmp_path_factory.mktemp("side_by_side")


def test_seeds_side_by_side_end_with_the_bits_of_one_after_the_other(in_turn, side_by_side):
    assert run(side_by_side, "1,2", "--jobs", "2") == 0
    assert all(outcome(side_by_side, seed) == outcome(in_turn, seed) for seed in (1, 2))
    assert json.loads((side_by_side / "run" / "summary.json").read_text())["seeds"] == [1, 2]


def test_seeds_that_fail_are_told_at_the_end_and_the_others_finish(in_turn, side_by_side, capsys, monkeypatch):
    run(side_by_side, "1,2", "--jobs", "2")  # which are finished, if the test above has run
    (side_by_side / "run" / "seed_4").mkdir()
    (side_by_side / "run" / "seed_4" / "data.json").write_text("{")
    go_on = SeedProcess.go_on

    def kill_five(seed: SeedProcess) -> None:
        go_on(seed) if seed.name != "seed_5" else os.kill(seed.process.pid, signal.SIGKILL)

    monkeypatch.setattr(SeedProcess, "go_on", kill_five)
    assert run(side_by_side, "1,2,3,4,5", "--jobs", "2") == 2
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("error: seed_4: ") and "data.json" in first
    assert second.startswith("error: seed_5: its process was killed (SIGKILL)")
    assert outcome(side_by_side, 3) == outcome(in_turn, 3)


def test_ctrl_c_ends_every_process_and_frees_the_run(tmp_path, monkeypatch, capsys):
    def interrupted(pipes):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "wait", interrupted)
    assert run(tmp_path, "1,2", "--jobs", "2") == 130
    assert multiprocessing.active_children() == []
    assert capsys.readouterr().err.count("\n") == 2
    require_free(tmp_path / "run")


@pytest.mark.parametrize(
    ("count", "jobs", "waves"),
    [(3, 2, [0, 0, 0]), (4, 2, [0, 0, 1, 1]), (5, 2, [0, 0, 1, 1, 1]), (5, 3, [0, 0, 0, 0, 0]), (2, 2, [0, 0])],
)
def test_the_last_seeds_take_turns_and_those_before_them_end_first(count, jobs, waves):
    assert group(count, jobs) == waves


def machine(kind: str, *device) -> tuple[SimpleNamespace, SimpleNamespace]:
    return SimpleNamespace(device=list(device)), SimpleNamespace(device=SimpleNamespace(type=kind))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert share_devices(*machine("cuda", "1", "3", "4"), jobs=2) == [["1"], ["3"]]
    assert share_devices(*machine("cuda", "auto"), jobs=2) == [[0], [1]]
    with pytest.raises(ConfigError, match="--jobs 3: each process takes a GPU, and there are 2"):
        share_devices(*machine("cuda", "auto"), jobs=3)


def test_processes_of_several_threads_need_as_many_cores(monkeypatch):
    monkeypatch.setattr(jobs, "num_cores", lambda: 4)
    for threads, most in ((1, 9), (2, 2)):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023
        assert share_devices(*machine("cpu", "cpu"), jobs=most)[0] == ["cpu"]
    with pytest.raises(ConfigError, match="--jobs 3: each process of this run takes 2 threads"):
        share_devices(*machine("cpu", "cpu"), jobs=3)
