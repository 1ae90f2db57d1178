"""Weight files are read without running code, and loaded whole or not at all."""

import pickle
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
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


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_weights_are_found_inside_a_training_checkpoint(tmp_path, wrapper):
    prefixed = {f"module.{key}": value for key, value in WEIGHTS.items()}
    torch.save({wrapper: prefixed, "epoch": 3}, tmp_path / "last.pth")
    torch.testing.assert_close(read_weights(tmp_path / "last.pth"), WEIGHTS)


class Foreign:
    pass


def test_a_file_without_names_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(WeightsError, match="holds a Tensor, not a dictionary"):
        read_weights(tmp_path / "tensor.pt")


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, 2))])
def test_a_pickle_that_could_run_code_is_refused_with_the_way_out(tmp_path, save):
    save({"weights": WEIGHTS, "config": Foreign()}, tmp_path / "old.pth")
    with pytest.raises(WeightsError, match=r"old.pth is .*could run foreign code.*torch.save_file.*state_dict"):
        read_weights(tmp_path / "old.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.safetensors", b"\x08", "no whole safetensors file"),
        ("cut.pth", b"", "no whole PyTorch file"),
        ("cut.pth", b"PK\x03\x04", "no whole PyTorch file"),
        ("weights.ckpt2", b"", "use a file that ends in .safetensors, .pth"),
        ("absent.pth", None, "there is no such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}.*{message}"):
        read_weights(tmp_path / name)


def test_keys_that_do_not_fit_are_counted_and_named():
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    weights = {"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2), "other": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        load_exactly(network, weights, "file.pth")
    assert "file.pth does not fit this backbone (1 of 4 keys do)" in str(caught.value)
    assert "2 missing: 1.weight, 1.bias; 1 unexpected: other" in str(caught.value)
    assert "1 misshapen: 0.weight (2, 4) instead of (2, 3)" in str(caught.value)
    with pytest.raises(WeightsError, match=r"8 unexpected: k0, k1, k2, k3, k4, \.\.\."):
        load_exactly(nn.Identity(), {f"k{i}": torch.zeros(1) for i in range(8)}, "file.pth")


def test_a_file_older_than_the_batch_counter_still_fits():
    network = nn.BatchNorm2d(3)
    weights = {key: value + 1 for key, value in network.state_dict().items() if key != "num_batches_tracked"}
    load_exactly(network, weights, "old.pth")
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


@pytest.mark.parametrize(
    ("names", "answers", "message"),
    [
        ({"hub": "timm/none"}, True, r"timm/none .* could not be fetched \(LocalEntryNotFoundError\)"),
        ({"hub": "timm/none"}, False, r"timm/none .*{cache}.*no answer from the hub.*backbone_weights"),
        ({"url": "https://localhost/net.pth"}, False, "could not be fetched"),
    ],
)
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
