"""Fair timing on a shared machine: arms take turns, each segment is timed alone, and the median counts."""

from __future__ import annotations

import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from utils.training.runtime import fast_bf16

Arm = Callable[[], int]  # does one segment's work and returns how many images or steps that was
MakeArm = Callable[..., Arm]


def alternate(arms: dict[str, Arm], segments: int = 5) -> dict[str, float]:
    """Median rate per second of every arm over alternating segments, after one segment of warm-up each."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for segment in range(segments + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            done = arm()
            if segment:
                rates[name].append(done / (time.perf_counter() - start))
    for name, values in rates.items():
        print(f"  {name:<24} {', '.join(f'{value:.1f}' for value in values)}", flush=True)
    return {name: statistics.median(values) for name, values in rates.items()}


def peak_memory(work: Callable[[], None]) -> int:
    """Peak resident bytes of a process that does only this (Linux); ``work`` must be a function of a module."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(work, queue))
    process.start()
    process.join()
    assert process.exitcode == 0
    return queue.get()


def _measure(work: Callable[[], None], queue) -> None:
    work()
    # Not getrusage: its maximum begins with what the parent process held.
    status = Path("/proc/self/status").read_text()
    queue.put(1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1]))


def verdict(name: str, ratio: float, wanted: float) -> bool:
    """Print one ratio against what is wanted of it."""
    print(f"{name}: {ratio:.2f} times (wanted: at least {wanted})")
    return ratio >= wanted


def fast_precision() -> str:
    return "bf16" if fast_bf16(torch.device("cpu")) else "fp32"


def compare_all(*comparisons: tuple[str, MakeArm, MakeArm], wanted: float, **options: float) -> int:
    """Make each of these comparisons, of which all want the same ratio; return the exit code."""
    return 0 if all([compare(*each, wanted, **options) for each in comparisons]) else 1


def compare(title: str, plain: MakeArm, ours: MakeArm, wanted: float, rounds: int = 2, less_memory: float = 0) -> bool:
    """Time a plain arm in fp32 against ours and measure the peak memory of each; whether the ratios are as wanted.

    Args:
        title: with the unit that the arms count in.
        plain: a module's function, folder -> arm.
        ours: a module's function, folder and precision -> arm.
        wanted: the least ratio of the rates.
        rounds: segments while memory is watched.
        less_memory: the least ratio of plain memory to ours; 0: any.
    """
    print(title)
    precision = fast_precision()
    with tempfile.TemporaryDirectory() as name:
        arms = {"plain, fp32": plain(Path(name) / "p"), f"ours, {precision}": ours(Path(name) / "o", precision)}
        slow, fast = alternate(arms).values()
    print(f"plain, fp32: {slow:.2f}, ours, {precision}: {fast:.2f}")
    good = verdict(title, fast / slow, wanted)
    memory = [peak_memory(partial(segments, plain, rounds)), peak_memory(partial(segments, ours, rounds, precision))]
    print(f"peak memory of the process: plain {memory[0] / 1e6:.0f} MB, ours {memory[1] / 1e6:.0f} MB")
    return good and (not less_memory or verdict("peak memory", memory[0] / memory[1], less_memory))


def segments(make: MakeArm, rounds: int, *args: str) -> None:
    """Work through a new arm so many times, for whoever watches the process."""
    with tempfile.TemporaryDirectory() as name:
        arm = make(Path(name), *args)
        for _ in range(rounds):
            arm()
