"""How many threads a run takes: by its networks, never by the load, and as the user says where he says it."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from utils.training import threads
from utils.training.flops import forward_flops
from utils.training.threads import set_threads, take_threads


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """A machine of which torch would take four threads, and a user who says nothing."""
    before = torch.get_num_threads()
    for name in threads.OF_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "AVAILABLE", 4)
    monkeypatch.setattr(threads, "_standing", before)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("gflops", "chosen"), [(0.1, 1), (1.96, 1), (3.9, 1), (4, 2), (7, 3), (100, 4), (None, 4)]
)  # the second is exps/digits.json
def test_a_thread_is_taken_for_every_two_billion_flops(gflops, chosen):
    take_threads(None if gflops is None else gflops * 1e9)
    assert torch.get_num_threads() == chosen


def test_a_number_of_the_users_stays(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    take_threads(None)
    assert torch.get_num_threads() == threads._standing
    monkeypatch.delenv("MKL_NUM_THREADS")
    torch.set_num_threads(3)
    take_threads(1)
    assert torch.get_num_threads() == 3


def test_a_run_chooses_anew_after_another_in_the_same_process():
    set_threads(1)
    take_threads(None)
    assert torch.get_num_threads() == 4


def test_flops_are_two_for_every_product_and_nothing_is_computed():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    assert forward_flops(layers, torch.zeros(2, 3, 4, 4, device="meta")) == 2 * 2 * (8 * 3 * 9 * 16 + 8 * 16 * 5)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


def test_a_network_that_looks_at_values_has_no_count():
    class Choosy(nn.Module):
        def forward(self, x):
            return x @ x if x.sum() > 0 else x

    assert forward_flops(Choosy(), torch.zeros(2, 2, device="meta")) is None


def test_waiting_threads_sleep_unless_the_user_wants_otherwise():
    said = "import sys, utils, os; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for set_by_user, shown in (({}, 1000), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "5"}, 5)):
        done = subprocess.run([sys.executable, "-c", said], env=own | set_by_user, capture_output=True, text=True)
        assert done.stdout == f"False {shown}\n"
