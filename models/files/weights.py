"""Published and local weight files: found, read without running code, and loaded whole or not at all."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from utils.run.errors import WeightsError
from utils.run.log import log

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training scripts put the weights
NAMED_AT_MOST = 5  # keys in an error
# What the readers of PyTorch, transformers and diffusers raise for files that are damaged.
UNREADABLE = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def is_weights_file(source: str | Path) -> bool:
    """Say whether a name is that of a file of weights, by its ending, and not of a folder or a model on the hub."""
    return Path(source).suffix in SUFFIXES


def check_weights_file(path: str | Path, key: str = "backbone_weights", hint: str = "") -> None:
    """See that a local weight file is there and of a kind that we read.

    Args:
        path: of the file.
        key: of the config that names it.
        hint: what the user may do if it is not there.

    Raises:
        WeightsError: if it is not, or holds something else than its ending says.
    """
    if not is_weights_file(path):
        raise WeightsError(f"{key}={str(path)!r}: use a file that ends in {', '.join(SUFFIXES)}")
    if not Path(path).is_file():
        raise WeightsError(f"{key}={str(path)!r}: there is no such file{hint}")
    try:
        check_content(Path(path))
    except WeightsError as error:
        raise WeightsError(f"{key}: {error}") from error


def check_content(path: Path) -> None:
    """See by its first bytes that a file holds what its ending says.

    Raises:
        WeightsError: if it does not; it says what the file is and what to do.
    """
    with open(path, "rb") as file:
        start, members = file.read(200), []
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        members = [name.rpartition("/")[2] for name in archive.namelist()]
    text, is_safetensors = " ".join(start.decode(errors="ignore").split()), path.suffix == SUFFIXES[0]
    for is_so, what, remedy in (
        (not start, "empty", "fetch it again"),
        (text.startswith("version https://git-lfs"), "a pointer of git-lfs", "run `git lfs pull` in its folder"),
        (text.isprintable(), f"a text, {text[:60]!r}", "fetch the file itself, and not the page about it"),
        ("constants.pkl" in members, "a TorchScript archive", "save the state_dict() of torch.jit.load(it) alone"),
        (members and "data.pkl" not in members, f"a zip archive of {first_names(members)}", "unpack it"),
        (not is_safetensors and start[8:9] == b"{", "a safetensors file", "let its name end in .safetensors"),
        (is_safetensors and members, "a PyTorch file", "let its name end in .pth"),
    ):  # fmt: skip
        if is_so:
            raise WeightsError(f"{path} is {what}: {remedy}")


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
    """Read a state dict from .safetensors, or from a pickle, of which nothing but tensors is built.

    Weights below a key "state_dict", "model" or "model_state_dict" are found there, also one in another; prefixes of
    DataParallel and torch.compile go.

    Raises:
        WeightsError: if the file is absent or broken, could run code, or holds no named tensors.
    """
    check_weights_file(path)
    weights = _read_file(path)
    given = weights if isinstance(weights, dict) else {}
    for _ in WRAPPERS:  # one may lie in another
        given = next((given[key] for key in WRAPPERS if isinstance(given.get(key), dict)), given)
    tensors = {key: value for key, value in given.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        kind = "pickled object" if isinstance(weights, PickledObject) else type(weights).__name__
        what = f"a {kind} {', '.join(map(str, given))[:80]}".strip()
        raise WeightsError(f"{path} holds {what}, not named tensors: where it was made, save a state_dict() alone")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in tensors.items()}


class PickledObject(list):
    """Stands for whatever a pickle wants to build that is no tensor; it does nothing but hold items."""

    __hash__ = object.__hash__

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_file(path: str | Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if Path(path).suffix == SUFFIXES[0]:
            return load_file(path)
        # Trainers put their own classes beside the weights, which need not be installed here, and are never looked up.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        with torch.serialization.safe_globals([(PickledObject, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        convert = "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pth')"
        remedy = f"fetch it again, or, if you trust it, convert it where it was made: {convert}"
        raise WeightsError(f"{path} is damaged, or reading it could run foreign code: {remedy}") from error
    except (SafetensorError, *UNREADABLE) as error:
        raise WeightsError(f"{path} is no whole file of weights ({first_line(error)}); fetch it again") from error


def renamed_in_order(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give weights of another implementation of the same network its names here, where nothing but names differs.

    So it is if both have tensors of the same kinds and shapes in the same order; a classifier at the end of the file is
    left out. Else the weights are returned as they are.
    """
    wanted = network.state_dict()
    here, there = ([(name.rpartition(".")[2], tensor.shape) for name, tensor in state.items()]
                   for state in (wanted, weights))  # fmt: skip
    rest = [(kind, len(shape)) for kind, shape in there[len(here) :]]
    is_classifier = rest in ([], [("weight", 2)], [("weight", 2), ("bias", 1)])
    if weights.keys() & wanted.keys() or here != there[: len(here)] or not is_classifier:
        return weights
    log.info("The weights have names of another implementation: taken in their order, in which kinds and shapes agree")
    return dict(zip(wanted, weights.values()))


def load_exactly(
    network: nn.Module, weights: dict[str, Tensor], path: str | Path, what: str, hint: str, assign: bool = False
) -> None:
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
            f"{key} {given[key]} instead of {shape}" for key, shape in wanted.items() if given.get(key, shape) != shape
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


def first_line(error: Exception) -> str:
    """Return what went wrong, without the pages that libraries add to it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch colours its advice
    return f"{type(error).__name__}: {plain.strip().partition(chr(10))[0]}"


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
    remedy = "copy the cache from a machine that has them, or name a local file with backbone_weights"
    absent = f"the weights {weights} are not in the cache {cache}, and {why}"
    return WeightsError(f"{absent}. Run once with a network, or {remedy}")
