"""Data that several tests share."""

import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: no run of a test then chooses its threads
import torch

ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "cifar100_mini.tar.xz"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A process for every core, but one for all long tests: some of them want the machine to themselves."""
    return 0 if config.option.markexpr == "slow" else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from a second thread, and lose tenfold where other programs share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Tests kill processes and never the machine, so what was written is there without a sync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def no_handler_outlives_its_test() -> Iterator[None]:
    """A handler keeps the standard output that it was made with, which pytest closes after the test.

    Nor must a command's silence outlive it: pytest hands a logger that does not propagate a handler of its own, and
    whoever lets it propagate again then reads every line twice.
    """
    yield
    log = logging.getLogger("reprise")
    log.handlers.clear()
    log.propagate = True


@pytest.fixture
def warnings(caplog, monkeypatch) -> pytest.LogCaptureFixture:
    """What our log says, also where a command has silenced it for others."""
    monkeypatch.setattr(logging.getLogger("reprise"), "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A data_dir with CIFAR-100 photographs in class folders: 100 training and 25 test images per class."""
    if "REPRISE_PHOTOGRAPHS" in os.environ:
        return Path(os.environ["REPRISE_PHOTOGRAPHS"])
    if not ARCHIVE.is_file():
        pytest.skip("no photographs: set REPRISE_PHOTOGRAPHS to a data_dir that holds cifar100/<train|test>/<class>")
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder
