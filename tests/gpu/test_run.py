"""The measurements of a GPU: a part that fails or hangs is a line of the table, and the others go on."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.gpu import run
from tests.gpu.full_size import PARTS, Bench
from tests.gpu.run import RATES, ROOT, Part


def python(folder, name: str, code: str, limit: float = 60) -> Part:
    return Part(name, limit, [sys.executable, "-c", code], folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What is written of a part that does well, one that fails, and one that hangs after its first row."""
    folder = tmp_path_factory.mktemp("found")
    row = json.dumps([{"what": "steps", "value": 2.0, "unit": "steps/s", "peak_gib": 1.5}])
    write = f"import time; open({str(folder / 'slow.json')!r}, 'w').write({row!r}); time.sleep(60)"
    groups = [
        [python(folder, "bad", "raise MemoryError('of 80 | GiB')"), python(folder, "slow", write, limit=4)],
        [python(folder, "good", "print('well')")],
    ]
    (out := folder / "out").mkdir()
    assert not run.run(groups, out, folder, narrow=True, most=60)
    return json.loads((out / "results.json").read_text()) | {"page": (out / "results.md").read_text(), "out": out}


def test_what_fails_or_hangs_says_so_and_the_others_go_on(found):
    outcomes = {part["part"]: part["outcome"] for part in found["parts"]}
    assert outcomes == {
        "bad": "exit code 1: MemoryError: of 80 | GiB", "slow": "stopped after 4 s: nothing was said", "good": "done",
    }  # fmt: skip


def test_what_a_stopped_part_has_measured_is_kept(found):
    (line,) = (line for line in found["page"].split("\n") if "steps/s" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["slow", "steps", "2.00 steps/s", "1.5 GiB"]


def test_few_files_come_back_with_every_log_in_one(found):
    assert sorted(path.name for path in found["out"].iterdir()) == ["log.txt", "results.json", "results.md"]
    assert "==== good\nwell" in (found["out"] / "log.txt").read_text()


def test_a_part_for_which_no_time_is_left_is_not_begun(tmp_path):
    result = python(tmp_path, "late", "raise SystemExit(1)").run(until=time.monotonic() - 1)
    assert result["outcome"] == "left out: no time is left"


def test_every_part_has_a_limit_and_the_shell_finds_them(tmp_path):
    assert PARTS.keys() == RATES.keys()
    command = ["bash", "tests/gpu/run.sh"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    assert (done.returncode, b"no GPU is seen" in done.stderr) == (2, True)


def test_the_classifier_is_measured_in_its_narrow_form(tmp_path):
    PARTS["classifier"](Bench(True, tmp_path, tmp_path / "rows.json"))
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["unit"] == "images/s"
    assert row["value"] > 0


@pytest.mark.slow
def test_everything_runs_in_its_narrow_form(tmp_path):
    command = ["bash", "tests/gpu/run.sh", "--narrow"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)}, check=True)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [part["part"] for part in found["parts"]] == [*RATES, *run.NARROW]
    assert all(part["rows"] for part in found["parts"])
