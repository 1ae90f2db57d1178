"""Which device, precision and number of workers a run gets, on machines with and without GPUs."""

import pytest
import torch
from torch import nn

from utils.run.errors import ConfigError
from utils.training.runtime import Runtime, choose_device, fast_bf16


def pretend_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("wanted", "rank", "device"),
    [
        (["auto"], 0, "cuda:0"), (["auto"], 1, "cuda:1"),  # torchrun gives every process its own
        (["0"], 0, "cuda:0"), ([1], 0, "cuda:1"), (["cuda:1"], 0, "cuda:1"), (["cuda"], 1, "cuda:1"),
        (["0", "1"], 0, "cuda:0"), (["0", "1"], 1, "cuda:1"), (["1", "0"], 1, "cuda:0"),
        ([" CPU "], 0, "cpu"), ([-1], 0, "cpu"), (["-1"], 0, "cpu"), ([], 0, "cpu"),
    ],
)  # fmt: skip
def test_devices_of_a_machine_with_two_gpus(monkeypatch, wanted, rank, device):
    pretend_gpus(monkeypatch, 2)
    assert choose_device(wanted, rank) == torch.device(device)


@pytest.mark.parametrize(("wanted", "warns"), [(["0"], True), ([0, 1, 2], True), (["auto"], False), (["cpu"], False)])
def test_without_any_gpu_ids_warn_and_the_cpu_is_used(monkeypatch, warnings, wanted, warns):
    pretend_gpus(monkeypatch, 0)
    assert choose_device(wanted) == torch.device("cpu")
    assert ("no GPU: using the CPU" in warnings.text) is warns


NO_WORDS = ("gpu", "cuda:x", "1.5", "", "-2", "true", "²", "５", "9" * 5)  # on every machine


@pytest.mark.parametrize(
    ("wanted", "count", "said"),
    [
        *((ids, 2, r"device=[257]: this machine has GPUs 0 to 1") for ids in (["2"], [0, 5], ["7", "0"])),
        *(([word], count, "use GPU ids such as") for word in NO_WORDS for count in (0, 2)),
    ],
)
def test_a_missing_id_and_a_word_that_is_no_device_are_errors(monkeypatch, wanted, count, said):
    pretend_gpus(monkeypatch, count)
    with pytest.raises(ConfigError, match=said):
        choose_device(wanted)


@pytest.mark.parametrize(("world", "warns"), [("1", True), ("2", False)])
def test_one_process_says_that_it_uses_one_of_several_gpus(monkeypatch, warnings, world, warns):
    pretend_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
    choose_device(["0", "1"])
    assert ("torchrun --nproc_per_node" in warnings.text) is warns


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_bf16_is_not_fast_at_it(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert fast_bf16(torch.device("cuda")) is native


@pytest.mark.parametrize(("amx", "avx512", "fast"), [(True, False, True), (False, True, True), (False, False, False)])
def test_a_cpu_with_bf16_instructions_is_fast_at_it(monkeypatch, amx, avx512, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert fast_bf16(torch.device("cpu")) is fast


@pytest.mark.parametrize(
    ("precision", "fast", "dtype"),
    [("fp32", True, torch.float32), ("bf16", False, torch.bfloat16),
     ("auto", True, torch.bfloat16), ("auto", False, torch.float32)],
)  # fmt: skip
def test_precision_is_autocast_of_fp32_weights(monkeypatch, precision, fast, dtype):
    monkeypatch.setattr("utils.training.runtime.fast_bf16", lambda device: fast)
    runtime, module = Runtime(["cpu"], precision), nn.Linear(2, 2)
    with runtime.autocast():
        assert module(torch.ones(1, 2)).dtype == dtype
    assert module.weight.dtype == torch.float32


def test_one_process_is_the_main_one_and_has_the_whole_work():
    runtime, parameter = Runtime(["cpu"]), nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    runtime.average_gradients([parameter])
    assert (runtime.is_main, runtime.shard, parameter.grad.tolist()) == (True, (0, 1), [1.0, 1.0])


@pytest.mark.parametrize(("wanted", "cores", "workers"), [(3, 2, 3), (0, 2, 0), (-1, 2, 2), (-1, 64, 8)])
def test_workers_are_as_many_as_asked_for_or_one_per_core(monkeypatch, wanted, cores, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert Runtime(["cpu"]).workers(wanted) == workers
