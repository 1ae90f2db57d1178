"""Published and local weight files: found, read without running code, and loaded whole or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from utils.run.errors import WeightsError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model")  # keys under which training scripts put the weights
NAMED_AT_MOST = 5  # keys in an error


def is_weights_file(source: str | Path) -> bool:
    """Say whether a name is that of a file of weights, by its ending, and not of a folder or a model on the hub."""
    return Path(source).suffix in SUFFIXES


def check_weights_file(path: str | Path, key: str = "backbone_weights") -> None:
    """See that a local weight file is there and of a kind that we read; ``key`` of the config names it.

    Raises:
        WeightsError: if it is not.
    """
    if not is_weights_file(path):
        raise WeightsError(f"{key}={str(path)!r}: use a file that ends in {', '.join(SUFFIXES)}")
    if not Path(path).is_file():
        raise WeightsError(f"{key}={str(path)!r}: there is no such file")


def what_is_missing(checks: Iterable[Callable[[], object]]) -> list[str]:
    """Return the messages of those checks that raise WeightsError, so that all can be said at once."""
    missing = []
    for check in checks:
        try:
            check()
        except WeightsError as error:
            missing.append(str(error))
    return missing


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from a pickle that holds nothing but tensors.

    Weights below a key "state_dict" or "model" are found there; prefixes of DataParallel and torch.compile go.

    Raises:
        WeightsError: if the file is absent, broken, or a pickle that would run code.
    """
    check_weights_file(path)
    weights = _read_file(path)
    for wrapper in WRAPPERS:
        if isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    return {key.removeprefix("_orig_mod.").removeprefix("module."): value for key, value in tensors.items()}


def _read_file(path: str | Path) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safe = Path(path).suffix == ".safetensors"
    try:
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is a pickle that holds more than tensors, and reading it could run foreign code. If you trust it, "
            "convert it once: safetensors.torch.save_file(torch.load(path, weights_only=False), 'out.safetensors'); "
            "a training checkpoint has them under ['state_dict']"
        ) from error
    except (SafetensorError, EOFError, RuntimeError) as error:
        kind = "safetensors" if safe else "PyTorch"
        raise WeightsError(f"{path} is no whole {kind} file ({error}); fetch it again") from error
    if not isinstance(weights, dict):
        raise WeightsError(f"{path} holds a {type(weights).__name__}, not a dictionary of named tensors")
    return weights


def load_exactly(
    network: nn.Module, weights: dict[str, Tensor], path: str | Path, what: str = "this backbone",
    hint: str = "Check convnet_type, stem and image size", assign: bool = False,
) -> None:  # fmt: skip
    """Load weights of which every key is wanted, present and of the right shape.

    Args:
        network: takes the weights.
        weights: by name.
        path: where they come from, for the message.
        what: the network's name in the message.
        hint: what the user may do.
        assign: take the very tensors instead of copying; for a network on the meta device.

    Raises:
        WeightsError: else; it counts missing, unexpected and misshapen keys and names the first.
    """
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    if problems := count_keys(
        # Files from before PyTorch 0.4.1 lack this counter, which nothing here uses.
        missing=[key for key in wanted if key not in given and not key.endswith("num_batches_tracked")],
        unexpected=[key for key in given if key not in wanted],
        misshapen=[
            f"{key} {given[key]} instead of {wanted[key]}"
            for key in wanted
            if given.get(key, wanted[key]) != wanted[key]
        ],
    ):
        fitting = len(wanted.items() & given.items())
        raise WeightsError(f"{path} does not fit {what} ({fitting} of {len(wanted)} keys do). {problems}. {hint}")
    network.load_state_dict(weights, assign=assign)


def count_keys(**problems: list[str]) -> str:
    """Return how many keys have each problem and the first few of them, for a message; nothing if there are none."""
    return "; ".join(f"{len(keys)} {kind}: {first_names(keys)}" for kind, keys in problems.items() if keys)


def first_names(keys: list[str]) -> str:
    """Return the first few names, for a message."""
    return ", ".join(keys[:NAMED_AT_MOST]) + (", ..." if len(keys) > NAMED_AT_MOST else "")


def published_weights(cfg, offline: bool) -> Path:
    """Return the file of a timm model's weights, fetched into the usual cache unless it is there.

    Args:
        cfg: timm's PretrainedCfg of the model and tag.
        offline: look into the cache only.

    Raises:
        WeightsError: if the file is neither in the cache nor within reach.
    """
    return _from_hub(cfg.hf_hub_id, cfg.hf_hub_filename, offline) if cfg.hf_hub_id else _from_url(cfg.url, offline)


def _from_hub(repository: str, filename: str | None, offline: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    reason: Exception | None = None
    for only_cached in (True, False):  # what is in the cache, under either name, needs no network at all
        if not only_cached and (offline or not hub_answers()):
            break
        for name in [filename] if filename else ["model.safetensors", "pytorch_model.bin"]:
            try:
                return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=only_cached))
            except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
                reason = None if only_cached else error
    raise _absent(repository, constants.HF_HUB_CACHE, offline, reason) from reason


def hub_answers() -> bool:
    """Say whether the hub can be reached: its own downloader repeats for most of a minute before it gives up."""
    import huggingface_hub
    from huggingface_hub import constants

    with suppress(Exception):  # which kind it is depends on the version of its client
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)  # seconds
        return True
    return False


def _from_url(url: str, offline: bool) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not target.is_file():
        if offline:
            raise _absent(url, target.parent, offline, None)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target))
        except OSError as error:
            raise _absent(url, target.parent, offline, error) from error
    return target


def _absent(weights: str, cache: str | Path, offline: bool, reason: Exception | None) -> WeightsError:
    what = "no answer from the hub" if reason is None else type(reason).__name__
    why = "nothing is fetched offline" if offline else f"they could not be fetched ({what})"
    return WeightsError(
        f"the weights {weights} are not in the cache {cache}, and {why}. Run once with a network, or copy the cache "
        "from a machine that has them, or name a local file with backbone_weights"
    )
