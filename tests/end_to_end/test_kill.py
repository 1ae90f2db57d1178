"""A run killed at random moments ends with the same bits. Long: `python -m pytest -m slow tests/end_to_end`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.run.files import load_tensors

ROOT = Path(__file__).parents[2]
# A configuration that takes about 20 seconds, generator and replay included.
SHORT = [
    "--set", "init_epoch=3", "--set", "epochs=3", "--set", "synth.first_task_num_steps=40", "--set",
    "synth.num_steps=40", "--set", "synth.timestep_respacing=ddim10", "--set", "checkpoint_every=10",
]  # fmt: skip
ESCORT = [
    "--config", "exps/escort_digits.json", "--set", "init_epoch=3", "--set", "epochs=3", "--set",
    "synth.unet_steps=40", "--set", "synth.control_steps=40", "--set", "synth.sample_steps=4", "--set",
    "synth.augmentation_prob=0.3", "--set", "checkpoint_every=10",
]  # fmt: skip


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "main.py", "--name", "killed", "--set", f"output_dir={folder}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path, arguments: list[str]) -> float:
    """Run to the end; returns the seconds that it took."""
    begin, process = time.monotonic(), start(folder, arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return time.monotonic() - begin


def run_killed(folder: Path, arguments: list[str], moments: list[float]) -> int:
    """Start, kill -9 after so many seconds, start again, ...; the last start runs to the end. Returns the kills."""
    kills = 0
    for moment in moments:
        process = start(folder, arguments)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, 9)
            process.wait()
            kills += 1
    finish(folder, arguments)
    return kills


def outcome(folder: Path) -> tuple[dict, dict]:
    """Results without times, and every tensor of the last checkpoint: classifier, exemplars, generator, edge maps."""
    seed = folder / "killed" / "seed_1993"
    results = json.loads((seed / "results.json").read_text())
    newest = seed / "checkpoints" / f"task_{len(results['task_sizes']) - 1}"
    files = {path.relative_to(newest).as_posix(): load_tensors(path) for path in newest.rglob("*.safetensors")}
    kept = {key: value for key, value in results.items() if key not in ("seconds", "command")}
    return kept, {f"{file}: {key}": value for file, tensors in files.items() for key, value in tensors.items()}


def assert_equal(one: tuple, other: tuple) -> None:
    (results, left), (other_results, right) = one, other
    assert results == other_results
    assert left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("short", [SHORT, ESCORT], ids=["digits", "escort"])
def test_ten_kills_of_a_short_run_change_no_bit(short, precision, tmp_path):
    arguments = [*short, "--set", f"precision={precision}"]
    seconds = finish(tmp_path / "whole", arguments)
    expected, kills, attempt = outcome(tmp_path / "whole"), 0, 0
    rng = random.Random(precision)
    while kills < 10:
        attempt += 1
        moments = [rng.uniform(0.3, 1.0) * seconds / 2 for _ in range(5)]
        kills += run_killed(tmp_path / str(attempt), arguments, moments)
        assert_equal(outcome(tmp_path / str(attempt)), expected)
    print(f"{kills} kills in {attempt} runs of {seconds:.0f} s")


@pytest.mark.slow
def test_five_kills_of_the_digits_run_change_no_bit(tmp_path):
    seconds = finish(tmp_path / "whole", [])
    rng = random.Random(5)
    moments = [rng.uniform(0.1, 0.19) * seconds for _ in range(5)]
    assert run_killed(tmp_path / "broken", [], moments) == 5
    assert_equal(outcome(tmp_path / "broken"), outcome(tmp_path / "whole"))
