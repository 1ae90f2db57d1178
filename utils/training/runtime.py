"""Devices, precision and processes: everything about the machine that a run needs to know."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from utils.run.errors import ConfigError
from utils.run.log import log
from utils.run.registry import shown


def choose_device(wanted: list[int | str], local_rank: int = 0) -> torch.device:
    """Choose the device of this process.

    Args:
        wanted: GPU ids as numbers or text, "cpu", -1 (the CPU) or "auto". Several ids are for several processes
            under torchrun; one process takes the first.
        local_rank: which of the ids this process takes.

    Raises:
        ConfigError: for a word that is no device, or an id that is missing among GPUs that are there.
    """
    names = [str(name).strip().lower().removeprefix("cuda:") for name in wanted]
    if names and not re.fullmatch("auto|cuda|cpu|-1|[0-9]{1,4}(,[0-9]{1,4})*", said := ",".join(names)):
        raise ConfigError(f'device={shown(said)}: use GPU ids such as ["0"], "cpu", -1 or "auto"')
    if not names or names[0] in ("cpu", "-1"):
        return torch.device("cpu")
    if names[0] in ("auto", "cuda"):
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if not torch.cuda.is_available():
        log.warning("device=%s, but this machine has no GPU: using the CPU", ",".join(names))
        return torch.device("cpu")
    if missing := [name for name in names if int(name) >= torch.cuda.device_count()]:
        raise ConfigError(f"device={missing[0]}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
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
    return any(getattr(torch.cpu, check, bool)() for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Runtime:
    """One process's device, precision and place among its siblings, served by Hugging Face Accelerate.

    Args:
        device: as the experiment file says it.
        precision: "auto", "fp32" or "bf16"; weights are fp32 in either case, bf16 is autocast.

    Attributes:
        device: of this process.
        bf16: whether autocast is on.
        is_main: whether this process writes what all share.
        shard: (rank, number of processes).
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
        self.is_main = self.accelerator.is_main_process
        self.shard = (self.accelerator.process_index, self.accelerator.num_processes)
        self.bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(self.device))

    def autocast(self) -> AbstractContextManager:
        """Use bf16 for matrix products and convolutions where the run wants it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def share_buffers(self, module: torch.nn.Module) -> None:
        """Give every process the first one's buffers (BatchNorm statistics), as DistributedDataParallel does."""
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
        """Do each item in one process and tell all the results, in the order of the items."""
        from accelerate.utils import gather_object

        rank, world = self.shard
        done = dict(gather_object([(place, work(items[place])) for place in range(rank, len(items), world)]))
        return [done[place] for place in range(len(items))]

    def workers(self, wanted: int) -> int:
        """Return the number of decoding processes: as wanted, or this process's share of the cores, eight at most."""
        if wanted >= 0:
            return wanted
        return min(8, max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
