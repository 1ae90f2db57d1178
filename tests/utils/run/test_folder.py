"""Who owns the folder of a run, and the small files that describe it."""

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from tests.support.toy import toy_dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split
from utils.run.config import RunConfig
from utils.run.errors import CheckpointError, ConfigError
from utils.run.folder import (
    claim_data,
    claim_folder,
    claim_machine,
    finished_results,
    follow_machine,
    read_data,
    read_results,
    replay_folder,
    run_manifest,
)
from utils.run.lock import locked, require_free
from utils.training import threads as threads_of
from utils.training.runtime import Runtime


@pytest.fixture(autouse=True)
def threads():
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def config(folder, **changes) -> RunConfig:
    keys = {"dataset": "digits", "init_cls": 2, "increment": 2, "model_name": "finetune", "output_dir": str(folder)}
    return RunConfig.parse({**keys, "synth": {"name": "any"}, **changes})


def data(per_class=10, shuffle=False, **changes) -> DataManager:
    dataset = dataclasses.replace(toy_dataset(per_class=per_class), **changes)
    return DataManager(dataset, Split(init_cls=2, increment=2, shuffle=shuffle))


MANIFEST = b'{"written_by": "reprise", "kind": "%s", "files": {}%s}'
BANK = MANIFEST % (b"bank", b"")
OWN = """
import sys, time
from pathlib import Path
from utils.run.lock import locked
with locked(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", OWN, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match="run belongs to a process that is running now"), locked(folder):
            pass
        with pytest.raises(ConfigError, match="run belongs to a process that is running now"):
            require_free(folder)
        with locked(folder, is_main=False):  # a sibling of the process that owns it
            pass
    finally:
        first.kill()  # as kill -9
        first.wait()
        first.stdout.close()
    for _ in range(2):
        with locked(folder):
            pass


def test_the_same_settings_own_their_folder_again_and_others_are_told_the_first_difference(tmp_path):
    folder = claim_folder(config(tmp_path), "run", overwrite=False)
    (folder / "kept").write_text("x")
    claim_folder(config(tmp_path, seed=[5], device="cpu"), "run", overwrite=False)
    with pytest.raises(ConfigError, match=r"identity\.increment is 2 there, 3 here\. Give another --name, or --over"):
        claim_folder(config(tmp_path, increment=3), "run", overwrite=False)
    assert (folder / "kept").exists()
    claim_folder(config(tmp_path, increment=3), "run", overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert run_manifest(folder, None).read()["identity"]["increment"] == 3


@pytest.mark.parametrize("content", [None, b"{}", b"", BANK])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_without_our_manifest_is_never_deleted(tmp_path, overwrite, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("x")
    if content is not None:
        (tmp_path / "run" / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="run"):
        claim_folder(config(tmp_path), "run", overwrite)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "x"


def test_a_folder_in_which_a_kill_left_a_temporary_file_alone_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.17.tmp").write_text("{")
    assert run_manifest(claim_folder(config(tmp_path), "run", overwrite=False), None).exists


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("nowhere")])
def test_a_file_or_a_dead_link_in_the_place_of_the_folder_is_a_config_error(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(ConfigError, match="run holds files, but is no run of Reprise"):
        claim_folder(config(tmp_path), "run", overwrite=True)


@pytest.mark.parametrize(
    ("synth", "manifest", "stays"),
    [
        ({}, BANK, False),
        ({}, None, True),  # images that somebody else put there
        ({}, b'{"name": "an application of somebody else"}', True),
        ({"syn_image_path": "mine"}, BANK, True),  # the user's
    ],
)
def test_overwriting_takes_the_images_that_the_run_drew_alone(tmp_path, monkeypatch, synth, manifest, stays):
    monkeypatch.chdir(tmp_path)
    settings = config(tmp_path, seed=[1], synth={"name": "any", **synth})
    folder, drawn = claim_folder(settings, "run", overwrite=False), replay_folder(settings, "run", 1)
    (folder / "kept").write_text("x")
    drawn.mkdir()
    (drawn / "0.png").write_text("x")
    if manifest is not None:
        (drawn / "manifest.json").write_bytes(manifest)
    foreign = manifest is not None and b"reprise" not in manifest
    refused = pytest.raises(CheckpointError, match=r"manifest\.json is no bank manifest of this project")
    with refused if foreign else nullcontext():
        claim_folder(settings, "run", overwrite=True)
    assert drawn.exists() is stays and (folder / "kept").exists() is foreign


def test_a_later_start_takes_threads_and_precision_of_the_first_and_warns_of_what_changed(tmp_path, warnings):
    threads, path = torch.get_num_threads(), tmp_path / "environment.json"
    claim_machine(tmp_path, Runtime(["cpu"], "bf16"))
    torch.set_num_threads(threads + 1)
    runtime = Runtime(["cpu"], "fp32")
    claim_machine(tmp_path, runtime)
    assert (torch.get_num_threads(), runtime.bf16, warnings.text) == (threads, True, "")
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "0.1", "cpu": "abacus"}))
    claim_machine(tmp_path, runtime)
    assert "torch was 0.1, is " in warnings.text and "cpu was abacus, is " in warnings.text


def test_the_first_start_takes_the_threads_that_its_networks_feed(tmp_path, monkeypatch):
    monkeypatch.setattr(threads_of, "AVAILABLE", 8)
    monkeypatch.setattr(threads_of, "_standing", torch.get_num_threads())
    for name in threads_of.OF_USER:
        monkeypatch.delenv(name, raising=False)
    claim_machine(tmp_path, Runtime(["cpu"]), lambda: 3 * threads_of.FLOPS_PER_THREAD)
    assert json.loads((tmp_path / "environment.json").read_text())["threads"] == torch.get_num_threads() == 3
    claim_machine(tmp_path, Runtime(["cpu"]), lambda: pytest.fail("chosen already"))
    torch.set_num_threads(1)
    follow_machine(tmp_path / "seed_1" / "checkpoints")
    assert torch.get_num_threads() == 3


def test_data_are_described_for_whoever_reads_the_folder(tmp_path):
    claim_data(tmp_path, data())
    dataset, names, order = read_data(tmp_path)
    assert (dataset.name, dataset.image_size, dataset.mean, len(dataset.train)) == ("toy", 8, [0.2] * 3, 0)
    assert (names, order) == ([f"row {label}" for label in range(6)], list(range(6)))


def brighter() -> ImageSet:
    """The toy's images, one bit of one pixel apart."""
    pixels = toy_dataset().train.parts[0].images.clone()
    pixels[0, 0, 0, 0] ^= 1
    return ImageSet.of(pixels, toy_dataset().train.labels)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shuffle": True}, "class_order is"), ({"name": "other"}, "dataset is"), ({"per_class": 9}, "counts is"),
        ({"class_names": list("abcdef")}, "class_names is"), ({"train": brighter()}, "images is"),
    ],
)  # fmt: skip
def test_a_seed_begun_with_other_data_is_refused(tmp_path, changes, said):
    for _ in range(2):
        claim_data(tmp_path, data())
    with pytest.raises(CheckpointError, match=f"{said}.*there.*Put the data back as it was"):
        claim_data(tmp_path, data(**changes))


def test_results_count_once_the_seed_is_finished(tmp_path):
    for seed, finished in ((3, True), (1, True), (2, False)):
        (tmp_path / f"seed_{seed}").mkdir()
        (tmp_path / f"seed_{seed}" / "results.json").write_text(json.dumps({"seed": seed, "finished": finished}))
    (tmp_path / "seed_4").mkdir()
    assert read_results(tmp_path / "seed_4") is read_results(tmp_path / "seed_2") is None
    assert [results["seed"] for results in finished_results(tmp_path)] == [1, 3]


READERS = {
    "environment.json": lambda folder: claim_machine(folder, Runtime(["cpu"])), "data.json": read_data,
    "config.json": lambda folder: run_manifest(folder, None).read(), "results.json": read_results,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in READERS for content in (b"", b'{"thr', b"[]", b'"x"', b'{"a": "\xff"}')),
        ("results.json", None),  # a folder in its place
        ("data.json", None),
        *(("environment.json", b'{"threads": %s, "precision": "fp32"}' % value) for value in (b'"2"', b"true", b"0")),
        *(("environment.json", content) for content in (b"{}", b'{"threads": 2}')),
        ("config.json", b"{}"),
        ("config.json", MANIFEST % (b"seed", b"")),
        ("data.json", b"{}"),
        ("data.json", MANIFEST % (b"seed", b"")),  # nothing of its images
        ("data.json", MANIFEST % (b"seed", b', "view": []')),
        ("data.json", MANIFEST % (b"seed", b', "view": {"name": "x"}, "class_names": [], "class_order": []')),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, name, content):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError), match=name.replace(".", r"\.")):
        READERS[name](tmp_path)
