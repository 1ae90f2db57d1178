"""Weight files are read without running code, and loaded whole or not at all."""

import io
import os
import sys
import zipfile
from collections import deque
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save, save_file
from torch import nn

from models.files.weights import load_exactly, published_weights, read_weights
from utils.run.errors import WeightsError

WEIGHTS = {"0.weight": torch.randn(2, 3), "0.bias": torch.randn(2)}


def source(hub=None, url=None):
    """Stands for timm's PretrainedCfg."""
    return SimpleNamespace(hf_hub_id=hub, hf_hub_filename=None, url=url)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_every_kind_of_file_gives_the_same_tensors(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(WEIGHTS, path) if suffix == ".safetensors" else torch.save(WEIGHTS, path)
    torch.testing.assert_close(read_weights(path), WEIGHTS)


@pytest.mark.parametrize(("outer", "prefix"), [
    (["state_dict"], "module."),
    (["model"], "_orig_mod."),
    (["model_state_dict"], "module._orig_mod."),  # as PyCIL writes it; a compiled network in DataParallel
    (["model", "state_dict"], ""),  # one in another
])  # fmt: skip
def test_weights_are_found_inside_a_training_checkpoint(tmp_path, outer, prefix):
    content = {f"{prefix}{key}": value for key, value in WEIGHTS.items()}
    for wrapper in outer:
        content = {wrapper: content, "epoch": 3}
    torch.save(content, tmp_path / "last.pth")
    torch.testing.assert_close(read_weights(tmp_path / "last.pth"), WEIGHTS)


class Scores(list):
    """Is filled as it is read."""


class Foreign(nn.Linear):
    """Is not there any more when its file is read, and would leave a trace if it were built."""

    def __setstate__(self, state):
        raise AssertionError("foreign code ran")


def test_classes_beside_the_weights_need_not_be_there_and_are_not_run(tmp_path, monkeypatch):
    module = ModuleType("pytorch_lightning")
    module.ModelCheckpoint = type("ModelCheckpoint", (Foreign,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    callbacks = {module.ModelCheckpoint: {"best": Path("last.ckpt")}, "early": module.ModelCheckpoint(1, 1)}
    scores = {"score": np.float64(0.5), "targets": np.arange(3), "last": deque([1, 2]), "best": Scores([3])}
    torch.save({"state_dict": WEIGHTS, "callbacks": callbacks, "scores": scores}, tmp_path / "model.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    torch.testing.assert_close(read_weights(tmp_path / "model.ckpt"), WEIGHTS)
    assert "PickledObject" not in str(torch.serialization.get_safe_globals())


class Shell:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(("thing", "message"), [
    (torch.zeros(3), "holds a Tensor, not named tensors"),
    ([WEIGHTS], "holds a list, not named tensors"),
    ({0: torch.zeros(1), 1: torch.zeros(1)}, "holds a dict 0, 1, not named tensors"),
    ({"epoch": 3}, "holds a dict epoch, not"),
    (Foreign(1, 1), r"holds a pickled object, not .* save a state_dict\(\) alone"),
    ({"state_dict": WEIGHTS, "code": Shell()}, r"could run foreign code.*torch.save\(torch.load.*'state_dict'"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused_with_what_it_holds(tmp_path, thing, message):
    torch.save(thing, tmp_path / "old.pth")
    with pytest.raises(WeightsError, match=f"old.pth .*{message}"):
        read_weights(tmp_path / "old.pth")


def test_a_pickle_of_old_form_with_foreign_classes_is_refused(tmp_path):
    torch.save(
        {"weights": WEIGHTS, "config": Foreign(1, 1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    with pytest.raises(WeightsError, match=r"old.pth is .*could run foreign code"):
        read_weights(tmp_path / "old.pth")


def bytes_of(write, *arguments):
    buffer = io.BytesIO()
    write(*arguments, buffer)
    return buffer.getvalue()


def archive(name, buffer):
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, b"")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 12345\n"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("cut.safetensors", b"\x08", "no whole file of weights"),
    ("cut.pth", b"PK\x03\x04", "no whole file of weights"),
    ("cut.pth", bytes_of(torch.save, WEIGHTS)[:-200], "no whole file of weights"),
    ("cut.safetensors", save(WEIGHTS)[:-4], "no whole file of weights"),
    ("noise.pth", b"\x01\xff\x00\x07" * 99, "is damaged, or reading it could run foreign code"),
    ("none.pth", b"", "none.pth is empty: fetch it again"),
    ("clone.pth", LFS, "is a pointer of git-lfs: run `git lfs pull` in its folder"),
    ("clone.safetensors", LFS, "is a pointer of git-lfs: run `git lfs pull` in its folder"),
    ("page.pth", b"\n<!DOCTYPE html>\n<html>", "is a text, '<!DOCTYPE html> <html>': fetch the file itself"),
    ("page.safetensors", b'{"error": "not found"}', "is a text, .*not found.*: fetch the file itself"),
    ("tensors.pth", save(WEIGHTS), "is a safetensors file: let its name end in .safetensors"),
    ("zip.safetensors", bytes_of(torch.save, WEIGHTS), "is a PyTorch file: let its name end in .pth"),
    ("zip.ckpt", bytes_of(archive, "model.ckpt"), "is a zip archive of model.ckpt: unpack it"),
    ("script.pt", bytes_of(archive, "net/constants.pkl"), "is a TorchScript archive: save the state_dict"),
    ("weights.ckpt2", b"", "use a file that ends in .safetensors, .pth"),
    ("absent.pth", None, "there is no such file"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_with_what_it_is(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}.*{message}" if content != b"" else message):
        read_weights(tmp_path / name)


def test_keys_that_do_not_fit_are_counted_and_named():
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    weights = {"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2), "other": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        load_exactly(network, weights, "file.pth", "this backbone", "Check it")
    assert "file.pth does not fit this backbone (1 of 4 keys do)" in str(caught.value)
    assert "2 missing: 1.weight, 1.bias; 1 unexpected: other" in str(caught.value)
    assert "1 misshapen: 0.weight (2, 4) instead of (2, 3)" in str(caught.value)
    with pytest.raises(WeightsError, match=r"8 unexpected: k0, k1, k2, k3, k4, \.\.\."):
        load_exactly(nn.Identity(), {f"k{i}": torch.zeros(1) for i in range(8)}, "file.pth", "this", "Check it")


def test_a_file_older_than_the_batch_counter_still_fits():
    network = nn.BatchNorm2d(3)
    weights = {key: value + 1 for key, value in network.state_dict().items() if key != "num_batches_tracked"}
    load_exactly(network, weights, "old.pth", "this backbone", "Check it")
    torch.testing.assert_close(network.running_mean, torch.ones(3))


# ---------------------------------------------------------------------- published weights of timm


@pytest.fixture
def caches(monkeypatch, tmp_path):
    """Empty caches of torch and of the hub, whose downloader finds nothing; the list of what it was asked."""
    asked = []

    def download(repository, filename, local_files_only):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not cached" if local_files_only else "no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=unreachable))
    return asked


def unreachable(*call, **keys):
    raise OSError("no route")


@pytest.mark.parametrize("names", [{"hub": "timm/none"}, {"url": "https://localhost/none.pth"}])
def test_absent_weights_offline_name_the_cache_and_the_remedy(caches, tmp_path, names):
    with pytest.raises(WeightsError) as caught:
        published_weights(source(**names), offline=True)
    for part in (*names.values(), str(tmp_path), "nothing is fetched offline", "backbone_weights"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("names", "answers", "message"), [
    ({"hub": "timm/none"}, True, r"timm/none .* could not be fetched \(LocalEntryNotFoundError\)"),
    ({"hub": "timm/none"}, False, r"timm/none .*{cache}.*no answer from the hub.*backbone_weights"),
    ({"url": "https://localhost/net.pth"}, False, "could not be fetched"),
])  # fmt: skip
def test_a_download_that_fails_is_told_from_offline(caches, monkeypatch, tmp_path, names, answers, message):
    if answers:
        monkeypatch.setattr("models.files.weights.hub_answers", lambda: True)
    with pytest.raises(WeightsError, match=message.format(cache=tmp_path)):
        published_weights(source(**names), offline=False)
    if not answers:
        assert all(caches)  # the hub's downloader was never let loose


def test_weights_in_the_caches_ask_no_network(caches, monkeypatch, tmp_path):
    monkeypatch.setattr("models.files.weights.hub_answers", None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, local_files_only: str(tmp_path / names[1]))
    assert published_weights(source(hub="timm/none"), offline=False) == tmp_path / "model.safetensors"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "net.pth").write_bytes(b"")
    found = published_weights(source(url="https://localhost/some/net.pth?raw=1"), offline=True)
    assert found == tmp_path / "checkpoints" / "net.pth"
