"""Several processes share the chunks of a guided request and end with the bits of one process."""

import os
import subprocess
import sys

import torch

OWN = ("PATH", "HOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH")  # not what other tests or a launcher have left in there


def drawn(folder, processes):
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {name: os.environ[name] for name in OWN if name in os.environ}
    environment["OMP_NUM_THREADS"] = "1"  # which torchrun would set for two, and not for one
    command = [sys.executable, *launcher, "-m", "tests.support.guided_request", str(folder)]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def test_two_processes_draw_what_one_draws(tmp_path):
    (alone,) = drawn(tmp_path / "one", 1)
    first, second = drawn(tmp_path / "two", 2)
    assert alone.shape == (12, 1, 8, 8) and alone.float().std() > 10
    assert torch.equal(first, alone) and torch.equal(second, alone)
