"""Experiment files and `--set`: from JSON, in whichever project's words, to one object in ours.

The way is one: the file is read, overrides are put in, words are translated, a Config is built; each once. Overrides
come before the translation, because a switch among them may turn on what other keys of the file belong to.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from utils.run.config import SourceConfig
from utils.run.errors import ConfigError
from utils.run.registry import shown

ALIASES = {"backbone_type": "convnet_type"}  # PILOT's
# Keys that the files of PyCIL and its forks carry and nothing reads.
DEAD_KEYS = ("debug", "skip", "print_forget", "top_k", "model_prefix", "user_prefix", "base_model_path", "ffn_num")


@dataclass(frozen=True)
class Words:
    """The flat keys of an original project that stand inside `synth` here; its room registers them.

    Attributes:
        source: that these keys imply where one of them is on.
        keys: flat key -> key inside `synth`.
        relatives: sources that take these keys, beside ``source``.
        switches: keys that turn the source on; None: each of them does.
        off: what a file says without a source where none of these keys turns one on; None: they stay as they are.
        idle: keys that are accepted and do nothing.
        read: rewrites a whole file in the original's words, before anything else looks at it.
    """

    source: str
    keys: dict[str, str]
    relatives: tuple[str, ...] = ()
    switches: tuple[str, ...] | None = None
    off: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    idle: frozenset[str] = frozenset()
    read: Callable[[dict[str, Any]], dict[str, Any]] = dict


WORDS: list[Words] = []  # every room that has some appends its own


def flat_keys() -> dict[str, tuple[Words, str]]:
    """Return all flat keys with whose they are and what they are called inside `synth`."""
    return {key: (words, inner) for words in WORDS for key, inner in words.keys.items()}


def unread_keys() -> set[str]:
    """Return the keys that may stand in a file and that nothing reads."""
    return {*DEAD_KEYS, *flat_keys(), *(key for words in WORDS for key in words.idle)}


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, of whose keys Python would silently take the last one."""
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"the key {shown(twice[0])} stands twice in one object: keep one of them")
    return dict(pairs)


def _whole_number(digits: str) -> int | float:
    """Read a JSON integer; one that is too long for Python is infinite, which every key refuses by its name."""
    return int(digits) if len(digits) < 1000 else math.inf


# Text, or bytes in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.
parse_json = partial(json.loads, object_pairs_hook=_each_key_once, parse_int=_whole_number)


class Sections(yaml.SafeLoader):
    """YAML whose keys stand once, and in which 85e-5 is a number, as OmegaConf has it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _each_key_once([(str(key.value), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


Sections.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "+-0123456789")
parse_yaml = partial(yaml.load, Loader=Sections)


# A flagfile of absl: its first line that is no comment is a flag. No JSON begins so.
FLAGFILE = re.compile(rb"(\xef\xbb\xbf)?(\s*(#|//)[^\n]*\n)*\s*--?[A-Za-z]")
FLAG = re.compile(r"--?(?P<key>[A-Za-z]\w*)(?:(?P<given>\s*=\s*|\s+)(?P<value>.*))?")


def parse_file(content: bytes) -> Any:
    """Read JSON, or a flagfile of absl."""
    return parse_flags(content.decode("utf-8-sig")) if FLAGFILE.match(content) else parse_json(content)


def parse_flags(text: str) -> dict[str, Any]:
    """Read a flagfile: --key=value, --key value, --switch and --noswitch, one on a line; # or // begins a comment.

    Values are JSON where they parse as such. A flag that stands several times is the list of its values.

    Raises:
        ValueError: for any other line, which is named.
    """
    flags: dict[str, list[Any]] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith(("#", "//")):
            continue
        found, rule = FLAG.fullmatch(line), "write --key=value, --key value, --switch or --noswitch, one on a line"
        if found is None or found["key"] == "flagfile":
            remedy = rule if found is None else "put the flags of that file here"
            raise ValueError(f"line {number}, {shown(line)}: {remedy}")
        key, value = found["key"], _read_value(found["value"]) if found["given"] else True
        if not found["given"] and key.startswith("no"):
            key, value = key[2:], False
        flags.setdefault(key, []).append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in flags.items()}


def _read_value(text: str) -> Any:
    """Read JSON or, where it is none, the text."""
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return text


def read_experiment(path: str | Path, parse: Callable[[bytes], Any] = parse_file) -> dict[str, Any]:
    """Read the object in an experiment file: of JSON, a flagfile, or whatever else ``parse`` takes.

    Raises:
        ConfigError: if the file is absent, is not JSON (line and column named), or holds no object.
    """
    try:
        raw = parse(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"no experiment file {path}; the ones that come with Reprise lie in exps/") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # JSON's and YAML's name line and column
        remedy = "; save it as UTF-8" * isinstance(error, UnicodeError)
        remedy += "; leave lists and objects out that lie so deep" * isinstance(error, RecursionError)
        raise ConfigError(f"cannot read the experiment file {path}: {' '.join(str(error).split())}{remedy}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values as one object, not a {type(raw).__name__}")
    return raw


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Put every `key=value` in; dots reach into `synth`, values are JSON where they parse as such.

    An override wins over the file in whichever spelling the file has the key.

    Args:
        raw: keys of a file, which stay as they are.
        overrides: one after the other.

    Returns:
        The keys, with the source named that flat keys of the file imply.

    Raises:
        ConfigError: if an override is no `key=value`.
    """
    result = _rename(raw)
    if overrides and result.get("synth") is None and (implied := _implied(result)):
        result["synth"] = {"name": implied}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {shown(override)}: write --set key=value")
        try:
            value = _read_value(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--set {shown(override)}: {error}") from error
        _put(result, path.strip().split("."), value)
    return result


def _put(result: dict[str, Any], path: list[str], value: Any) -> None:
    flat, synth = flat_keys(), result.get("synth")
    if path == ["synth"]:
        for key in flat:
            result.pop(key, None)
    elif len(path) == 1:
        key = ALIASES.get(path[0], path[0])
        inner = flat[key][1] if key in flat else None
        path = ["synth", inner] if isinstance(synth, dict) and inner in synth else [key]
    elif path[0] == "synth":
        path = next(([key] for key, (_, inner) in flat.items() if key in result and [inner] == path[1:]), path)
    *parents, last = path
    for parent in parents:
        # A copy: the file's keys stay as they are.
        result[parent] = dict(inside) if isinstance(inside := result.get(parent), dict) else {}
        result = result[parent]
    result[last] = value


def translate(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace the words of the originals by ours; two spellings with different values are an error.

    Raises:
        ConfigError: for keys that contradict each other, or that belong to another source than the one named.
    """
    raw = _rename(raw)
    for words in WORDS:
        raw = words.read(raw)
    synth = raw.get("synth")
    for words in WORDS:
        given = [key for key in words.keys if key in raw]
        named = isinstance(synth, dict) and str(synth.get("name")).lower() in (words.source, *words.relatives)
        if given and words.off is not None and not named and not any(_is_on(words, key, raw[key]) for key in given):
            raw = words.off(raw)
    return _move(raw)


def _rename(raw: dict[str, Any]) -> dict[str, Any]:
    result = dict(raw)
    for alias, key in ALIASES.items():
        if (value := result.pop(alias, None)) is not None:
            if result.get(key) not in (None, value):
                both = f"{alias}={shown(value)} and {key}={shown(result[key])}"
                raise ConfigError(f"{both} are one key: keep one of them")
            result[key] = value
    return result


def _implied(raw: dict[str, Any]) -> str | None:
    """Return the source that the first flat key which is on belongs to."""
    flat = flat_keys()
    return next((flat[key][0].source for key in raw if key in flat and _is_on(flat[key][0], key, raw[key])), None)


def _move(raw: dict[str, Any]) -> dict[str, Any]:
    """Move flat keys into `synth`; where all of them are off and there is no source, they stay."""
    known = flat_keys()
    result = {key: value for key, value in raw.items() if key not in known}
    flat = {key: value for key, value in raw.items() if key in known and value is not None}
    implied, given = _implied(flat), raw.get("synth")
    if not flat or (given is None and implied is None) or not isinstance(given or {}, dict):
        return {**result, **flat}
    synth = {} if implied is None else {"name": implied}
    synth |= {key: value for key, value in (given or {}).items() if value is not None}
    for key, value in flat.items():
        (words, inner), said = known[key], f"{key}={shown(value)}"
        # Keys that every source has, such as syn_image_path, name none; the others belong to theirs alone.
        named = str(synth.get("name", words.source)).lower()
        if inner not in SourceConfig.model_fields and named not in (words.source, *words.relatives):
            raise ConfigError(f"{said} is of the source {words.source!r}, and synth.name={shown(named)}: keep one")
        put_once(synth, inner, value, said, f"synth.{inner}")
    return {**result, "synth": synth}


def put_once(keys: dict[str, Any], key: str, value: Any, said: str, ours: str) -> None:
    """Set a key that may be there already, under our name for it.

    Raises:
        ConfigError: if it has another value there; ``said`` is the new one with its name, ``ours`` the name there.
    """
    if keys.get(key) is not None and str(keys[key]).lower() != str(value).lower():  # "true" is true
        raise ConfigError(f"{said} and {ours}={shown(keys[key])} are one key: keep one of them")
    keys[key] = value


def _is_on(words: Words, key: str, value: Any) -> bool:
    return key in (words.switches or words.keys) and bool(value) and str(value).lower() != "false"
