"""Processes of `--jobs` end with the one that began them. Long: `python -m pytest -m slow tests/end_to_end`."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.toy import without_clock

ROOT = Path(__file__).parents[2]
SHORT = ["init_epoch=8", "epochs=8", "synth.first_task_num_steps=20", "synth.num_steps=20", "seed=[1,2,3]",
         "synth.timestep_respacing=ddim5", "init_cls=5", "increment=5"]  # fmt: skip


def start(folder: Path, *arguments: str, out: int = subprocess.DEVNULL) -> subprocess.Popen:
    settings = (part for key in [*SHORT, f"output_dir={folder}"] for part in ("--set", key))
    command = [sys.executable, "main.py", "--name", "run", *settings, *arguments]
    # What a shell starts with & would ignore it.
    heeds_ctrl_c = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, cwd=ROOT, stdout=out, text=True, preexec_fn=heeds_ctrl_c)


def children(process: subprocess.Popen) -> list[int]:
    """Processes that learn a seed, as Linux lists them."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in listed if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def lives(process: int) -> bool:
    """Whether it still runs, and is not only unburied."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def results(folder: Path) -> list[dict]:
    files = sorted(folder.glob("run/seed_*/results.json"))
    return [without_clock(json.loads(path.read_text())) for path in files]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder).wait(900) == 0
    return results(folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_whose_first_process_was_ended_ends_with_the_same_bits(how, whole, tmp_path):
    process = start(tmp_path, "--jobs", "2", out=subprocess.PIPE)
    said = ""
    while "Task 1" not in said:  # seeds are on their way, and the third has begun
        said += process.stdout.readline()
    learning = children(process)
    process.send_signal(how)
    process.wait(60)
    end = time.monotonic() + 120  # one that is loading its packages ends when it has them
    while any(map(lives, learning)) and time.monotonic() < end:
        time.sleep(0.1)
    assert len(learning) >= 2 and not any(map(lives, learning))
    assert start(tmp_path, "--jobs", "2").wait(900) == 0
    assert len(whole) == 3 and results(tmp_path) == whole
