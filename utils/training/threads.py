"""How many threads a run takes on the CPU: as many as a step of it feeds.

The second thread of a small network waits more than it works. The choice looks at the network and never at a clock, so
one command on one machine takes one number, whatever else runs there.
"""

from __future__ import annotations

import os

import torch

from utils.run.log import log

FLOPS_PER_THREAD = 2e9  # of a forward pass of one batch; `python -m tests.benchmarks.threads` says what a thread gains
OF_USER = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
AVAILABLE = _standing = torch.get_num_threads()  # by the machine's cores, unless a user says otherwise


def take_threads(flops: int | None) -> None:
    """Give torch a thread for every `FLOPS_PER_THREAD`, one at least; a number that the user set stays.

    Args:
        flops: of a forward pass of one batch; None: so many that every core has its share.
    """
    if OF_USER.isdisjoint(os.environ) and torch.get_num_threads() == _standing:
        count = AVAILABLE if flops is None else min(AVAILABLE, max(1, int(flops // FLOPS_PER_THREAD)))
        if count < AVAILABLE:
            log.info("Threads: %d of %d, by the size of the networks; OMP_NUM_THREADS sets them", count, AVAILABLE)
        set_threads(count)


def set_threads(count: int) -> None:
    """Set torch's number; any other that is found later is the user's."""
    global _standing
    torch.set_num_threads(count)
    _standing = count
