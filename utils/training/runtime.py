"""Devices, precision and processes: everything about the machine that a run needs to know."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from utils.run.errors import ConfigError

log = logging.getLogger("reprise")


def choose_device(wanted: list[int | str], local_rank: int = 0) -> torch.device:
    """The device of this process.

    Args:
        wanted: GPU ids as numbers or text, "cpu", -1 (the CPU) or "auto". Several ids are for several processes
            under torchrun; one process takes the first.
        local_rank: which of the ids this process takes.

    Raises:
        ConfigError: for a word that is no device, or an id that is missing among GPUs that are there.
    """
    names = [str(name).strip().lower().removeprefix("cuda:") for name in wanted]
    if not names or names[0] in ("cpu", "-1"):
        return torch.device("cpu")
    if names[0] in ("auto", "cuda"):
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    for name in names:
        if not name.isdigit():
            raise ConfigError(f'device={name!r}: use GPU ids such as ["0"], "cpu", -1 or "auto"')
    if not torch.cuda.is_available():
        log.warning("device=%s, but this machine has no GPU: using the CPU", ",".join(names))
        return torch.device("cpu")
    for name in names:
        if int(name) >= torch.cuda.device_count():
            raise ConfigError(f"device={name}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > len(names):
        raise ConfigError(f'device={",".join(names)}: {processes} processes need as many GPU ids, or "auto"')
    if len(names) > 1 and processes == 1:
        log.warning("one process uses GPU %s alone; start %d with torchrun --nproc_per_node", names[0], len(names))
    return torch.device("cuda", int(names[local_rank % len(names)]))


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: CUDA since Ampere, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


class Runtime:
    """One process's device, precision and place among its siblings, served by Hugging Face Accelerate.

    Args:
        device: as the experiment file says it.
        precision: "auto", "fp32" or "bf16"; weights are fp32 in either case, bf16 is autocast.
    """

    def __init__(self, device: list[int | str], precision: str = "auto"):
        from accelerate import Accelerator

        self.device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        if self.device.type == "cuda":
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(self.device)
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self.bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(self.device))

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return self.accelerator.process_index, self.accelerator.num_processes

    def autocast(self) -> AbstractContextManager:
        """bf16 for matrix products and convolutions where the run wants it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def share_buffers(self, module: torch.nn.Module) -> None:
        """Every process takes the first one's buffers (BatchNorm statistics), as DistributedDataParallel does."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for buffer in module.buffers():
                buffer.copy_(broadcast(buffer))

    def average(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the mean of each tensor over processes; the tensors themselves when there is one."""
        if self.accelerator.num_processes == 1:
            return tensors
        return [self.accelerator.reduce(tensor, reduction="mean") for tensor in tensors]

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Give every process the mean gradient, so that all take the same step."""
        if self.accelerator.num_processes > 1:
            # Every process reduces every gradient: one that skipped its own would leave the others waiting.
            own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            for parameter, mean in zip(parameters, self.average(own)):
                parameter.grad = mean

    def share(self, items: list[Any], work: Callable[[Any], Any]) -> list[Any]:
        """``work`` on every item, each done by one process and its result known to all, in the order of the items."""
        rank, world = self.shard
        if world == 1:
            return [work(item) for item in items]
        from accelerate.utils import gather_object

        done = gather_object([work(item) for item in items[rank::world]])  # one process after the other
        order = [position for first in range(world) for position in range(first, len(items), world)]
        return [result for _, result in sorted(zip(order, done), key=lambda pair: pair[0])]

    def workers(self, wanted: int) -> int:
        """Decoding processes: what was asked for, or this process's share of the cores, eight at most."""
        if wanted >= 0:
            return wanted
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
