"""A run killed at random moments ends with the same bits. Long: `python -m pytest -m slow tests/end_to_end`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch

from learners.run.experiment import Experiment
from synth import SOURCES
from tests.support.toy import TINY_SOURCES, tiny_source, toy_experiment, without_clock
from tests.support.toy_sources import Gaussians, MeanImages

ROOT = Path(__file__).parents[2]
# A configuration that takes about 20 seconds, generator and replay included.
SHORT = [
    "exps/digits.json", "init_epoch=3", "epochs=3", "synth.first_task_num_steps=40", "synth.num_steps=40",
    "synth.timestep_respacing=ddim10", "checkpoint_every=10",
]  # fmt: skip
ESCORT = [
    "exps/escort_digits.json", "init_epoch=3", "epochs=3", "synth.unet_steps=40", "synth.control_steps=40",
    "synth.sample_steps=4", "synth.augmentation_prob=0.3", "checkpoint_every=10",
]  # fmt: skip


def start(folder: Path, config: str, *keys: str) -> subprocess.Popen:
    settings = (part for key in [*keys, f"output_dir={folder / 'outputs'}"] for part in ("--set", key))
    command = [sys.executable, "main.py", "--name", "killed", "--config", config, *settings]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path, *experiment: str) -> float:
    """Run to the end; returns the seconds that it took."""
    begin, process = time.monotonic(), start(folder, *experiment)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return time.monotonic() - begin


def run_killed(folder: Path, experiment: list[str], moments: list[float]) -> int:
    """Start, kill -9 after so many seconds, start again, ...; the last start runs to the end. Returns the kills."""
    kills = 0
    for moment in moments:
        process = start(folder, *experiment)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    finish(folder, *experiment)
    return kills


def outcome(folder: Path) -> dict[str, object]:
    """Results without times, and every file of weights, exemplars and images that the run has left, by its bytes."""
    left = without_clock(json.loads(next(folder.glob("outputs/*/seed_*/results.json")).read_text()))
    for pattern in ("**/*.safetensors", "**/*.png", "outputs/*/task_*/manifest.json"):
        left |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob(pattern)}
    return left


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("short", [SHORT, ESCORT], ids=["digits", "escort"])
def test_ten_kills_of_a_short_run_change_no_bit(short, precision, tmp_path):
    experiment = [*short, f"precision={precision}"]
    seconds = finish(tmp_path / "whole", *experiment)
    expected, kills, attempt = outcome(tmp_path / "whole"), 0, 0
    rng = random.Random(precision)
    while kills < 10:
        attempt += 1
        moments = [rng.uniform(0.3, 1.0) * seconds / 2 for _ in range(5)]
        kills += run_killed(tmp_path / str(attempt), experiment, moments)
        assert outcome(tmp_path / str(attempt)) == expected
    print(f"{kills} kills in {attempt} runs of {seconds:.0f} s")


@pytest.mark.slow
def test_five_kills_of_the_digits_run_change_no_bit(tmp_path):
    seconds = finish(tmp_path / "whole", "exps/digits.json")
    rng = random.Random(5)
    moments = [rng.uniform(0.1, 0.19) * seconds for _ in range(5)]
    assert run_killed(tmp_path / "broken", ["exps/digits.json"], moments) == 5
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


# Each kind of `Replay`: learner, source, settings of the source.
KINDS = {
    "none": ("icarl", None, {}),
    "stored": ("icarl", "ddpm", {}),
    "redrawn": ("lwf", "ddpm", {"replay": "redraw"}),
    "given": ("finetune", "ddpm", {"need_syn_imgs": False}),
    "copied": ("icarl", "small_controlnet", {}),
    "guided": ("guide", "ddpm", {}),
    "features": ("finetune", "gaussians", {}),
    "distilled": ("finetune", "means", {}),
    "stream": ("er", "small_d4m", {"stream": "distilled", "memory": "stream"}),
    "vectors": ("task_arithmetic", "small_d4m", {"stream": "both"}),
    "labels": (
        "distilled", "small_d4m", {"stream": "distilled", "soft_labels": "stored", "teacher": "resnet20",
                                   "teacher_epochs": 2, "teacher_batch_size": 8},
    ),
}  # fmt: skip


KEYS = {"vectors": {"merge": "ties"}}  # of learners


def toy_run(kind: str, folder: Path, drawn: Path) -> Experiment:
    """A run of a few seconds with one kind of replay; `drawn` holds images for the one that only takes them."""
    learner, source, settings = KINDS[kind]
    keys = {"checkpoint_every": 2, "epochs": 6, **KEYS.get(kind, {})}
    if settings:
        keys["synth"] = {**tiny_source(source), **settings}
    if kind == "given":
        keys["synth"]["syn_image_path"] = str(drawn / "outputs" / "syn_image_toy_seed7")
    return toy_experiment(learner, folder, source, **keys)


def run_in_child(make, seconds: float | None = None) -> bool:
    """Run an experiment in a process of its own, which is killed after so many seconds; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            make().learn_all()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    killer = threading.Timer(seconds or 600, os.kill, (child, signal.SIGKILL))
    killer.start()
    status = os.waitpid(child, 0)[1]
    killer.cancel()
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_kills_with_each_kind_of_replay_change_no_bit(kind, tmp_path, monkeypatch):
    for name, source in {"gaussians": Gaussians, "means": MeanImages}.items():
        monkeypatch.setitem(SOURCES._load(), name, source)
        monkeypatch.setitem(TINY_SOURCES, name, {"syn_per_class": 3})
    drawn = tmp_path / "drawn"
    if kind == "given":
        run_in_child(partial(toy_run, "stored", drawn, drawn))
    # Every child gets all packages from here: importing them may take longer than a life that ends early.
    torch.set_num_threads(1)
    toy_run(kind, tmp_path / "loaded", drawn).check()
    begin = time.monotonic()
    assert run_in_child(partial(toy_run, kind, tmp_path / "whole", drawn))
    seconds, expected = time.monotonic() - begin, outcome(tmp_path / "whole")
    kills, attempt, rng = 0, 0, random.Random(kind)
    while kills < 30:
        attempt += 1
        folder = tmp_path / str(attempt)
        while not run_in_child(partial(toy_run, kind, folder, drawn), rng.uniform(0.02, 0.6) * seconds):
            kills += 1
        left = outcome(folder)
        if kind == "labels":  # those on the disk are not made, and not counted, again
            left["counts"] = expected["counts"]
        assert left == expected
    print(f"{kind}: {kills} kills in {attempt} runs of {seconds:.1f} s")
