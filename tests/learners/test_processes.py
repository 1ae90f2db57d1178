"""Several processes share the chunks of a guided request and end with the bits of one process."""

import os
import subprocess
import sys

import torch

from tests.support.guided_request import draw

OWN = ("PATH", "HOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONPATH")  # not what other tests or a launcher left there


def test_two_processes_draw_what_one_draws(tmp_path):
    environment = {name: os.environ[name] for name in OWN if name in os.environ}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # with one thread each
    command = [sys.executable, *launcher, "-m", "tests.support.guided_request", str(tmp_path)]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = draw(tmp_path / "alone", 0)
    torch.set_num_threads(threads)
    assert alone.shape == (12, 1, 8, 8) and alone.float().std() > 10
    assert all(torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone) for rank in range(2))
