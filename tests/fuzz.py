"""Gives main.py experiment files with mistakes in them, as users would, and counts what goes wrong.

`python -m tests.fuzz [SEED PLANS RUNS]` plans 600 mutations of the files in exps/, then learns 40 accepted ones on
digits. A mistake must get exit code 2 and one short message that names its key; the rest must make sense and train.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import main
from learners import LEARNERS
from learners.run.configure import build_config
from synth import SOURCES
from tests.support.toy import toy_raw
from utils.run.config import RunConfig
from utils.run.words import ALIASES, flat_keys, read_experiment

EXPERIMENTS = sorted((Path(__file__).parents[1] / "exps").glob("*.json"))
# Of other types, out of range, huge, in odd letters, empty, nested.
ODD = [
    None, True, False, "true", 0, 1, -1, -0.5, 0.5, 2.5, 7, 10**6, 10**12, 1e308, -1e308, math.nan, math.inf,
    "", " ", "a", "nan", "1e999", "1_000", "５", "²", "ddim²", "ddim0", "ddim5", "-3", "2,3", "../x", ".x", "a b", "é",
    "\0", "a\ud800", "x" * 300, "x" * 10_000, [], [[]], [1, 2], ["a", 1], [-1], [math.nan], [10**12] * 3, {}, {"a": 1},
    {"name": 2}, {"name": "ddpm", "lr": {}}, {"a": math.inf}, {"x" * 10_000: 1}, json.loads("[" * 50 + "]" * 50),
]  # fmt: skip
TINY = {"dataset": "digits", "init_cls": 5, "increment": 5, "limit_tasks": 2, "kshot": 0, "batch_size": 64, "seed": 1,
        "init_epoch": 1, "epochs": 1, "num_workers": 0, "log_with": None, "model_seed": None}  # fmt: skip
# What files say beside keys that tiny settings replace, and that does not go with these.
BESIDE = {"classifier_scale_max_new": None, "synth.attention_resolutions": None, "synth.real_per_class": None,
          "synth.start_step": None, "synth.init_weights": None}  # fmt: skip


class Mutation(NamedTuple):
    """Keys and values, or the bytes of a file; in ``keys`` it differs from a file of ours."""

    content: dict[str, Any] | bytes
    what: str
    keys: tuple[str, ...] = ()
    may_pass: bool = True


def places(raw: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return every key with the object that it stands in: the file itself, or its synth."""
    return [(part, key) for part in (raw, raw.get("synth") or {}) for key in part]


def drop(chance: random.Random, raw: dict[str, Any]) -> Mutation:
    part, key = chance.choice(places(raw))
    del part[key]
    return Mutation(raw, f"drop {key}", (key,))


def replace(chance: random.Random, raw: dict[str, Any]) -> Mutation:
    part, key = chance.choice(places(raw))
    names = {"model_name": LEARNERS.names(), "name": SOURCES.names()}.get(key, ODD)
    part[key] = chance.choice(chance.choice([names, ODD]))
    # Another learner may not know the backbone, as `memo_resnet32` is MEMO's word.
    return Mutation(raw, f"{key}={part[key]!a}", (key, "convnet_type") if key == "model_name" else (key,))


def add(chance: random.Random, raw: dict[str, Any]) -> Mutation:
    fields = chance.choice([kind[name].Config for kind in (LEARNERS, SOURCES) for name in kind.names()]).model_fields
    key = chance.choice(sorted(fields))
    part, default = raw if key in RunConfig.model_fields else raw.get("synth") or raw, fields[key].default
    part[key] = default if isinstance(default, (str, int, float)) and chance.random() < 0.3 else chance.choice(ODD)
    return Mutation(raw, f"add {key}={part[key]!a}", (key,))


def swap(chance: random.Random, raw: dict[str, Any]) -> Mutation:
    part = chance.choice(places(raw))[0]
    key, other = chance.choices(sorted(part), k=2)
    part[key], part[other] = part[other], part[key]
    return Mutation(raw, f"swap {key} and {other}", (key, other))


def misspell(chance: random.Random, raw: dict[str, Any]) -> Mutation:
    part, key = chance.choice(places(raw))
    wrong = chance.choice([key[1:], key + "_", key.swapcase(), key * 2, "", "a b", "ü", "\ud800", "x" * 10_000])
    part[wrong] = part.pop(key)
    return Mutation(raw, f"misspell {key} as {wrong[:50]!a}", (wrong[:50], key))


def double(chance: random.Random, raw: dict[str, Any]) -> Mutation:
    part, key = chance.choice(places(raw))
    twice = f"{json.dumps(part)[:-1]}, {json.dumps(key)}: {json.dumps(part[key])}}}"
    text = json.dumps(raw).replace(json.dumps(part), twice)
    return Mutation(text.encode(), f"double {key}", (key,), may_pass=False)


def corrupt(chance: random.Random, raw: dict[str, Any]) -> Mutation:
    """Break the text, or write it in an encoding that is as good as UTF-8."""
    text = json.dumps(raw, indent=2)
    if encoding := chance.choice([None, None, "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]):
        return Mutation(text.encode(encoding), encoding)
    at = chance.randrange(1, len(text) - 1)
    broken = chance.choice([
        text[:at], text[:-2] + ",\n}", f"// {text}", text.replace("\n", " # why\n", 1), text.replace('"', "'"), "null",
        f"[{text}]", "", text * 2, text.replace(":", "=", 1), text[:at] + "\0" + text[at:], "[" * 100_000,
        text.replace("{", '{"seed": ' + "9" * 5000 + ",", 1), text.replace('"', '"\udce4', 1),
    ])  # fmt: skip
    return Mutation(broken.encode(errors="surrogateescape"), f"broken text {broken[:40]!a}", may_pass=False)


KINDS = {drop: 2, replace: 5, add: 5, swap: 2, misspell: 2, double: 2, corrupt: 3}  # with their weights


def call(*arguments: str) -> tuple[int | None, str]:
    """Run main.py; return its exit code and what it said of a mistake, or no code and what has escaped."""
    said = io.StringIO()
    os.environ.pop("HF_HUB_OFFLINE", None)  # a file that says offline sets it for good
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            return main.main(list(arguments)), said.getvalue()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def judge(mutation: Mutation, path: Path) -> tuple[bool, str | None]:
    """Plan a mutated file; return whether it was accepted and what is wrong with the answer, None where nothing is."""
    path.write_bytes(content if isinstance(content := mutation.content, bytes) else json.dumps(content).encode())
    code, said = call("--config", str(path), "--plan")
    if code == 0:
        return True, nonsense(path) if mutation.may_pass else "accepted"
    ours = ALIASES | {key: inner for key, (_, inner) in flat_keys().items()}
    names = {name for key in mutation.keys for name in (key, ours.get(key, key))}
    named = any(ascii(name)[1:-1] in ascii(said) for name in names or {path.name})
    right = code == 2 and "error: " in said and named and len(said) <= 1000
    return False, None if right else f"code {code}, {len(said)} characters: {said[:300]}"


def nonsense(path: Path) -> str | None:
    """Return what of an accepted file makes no sense, judged by what it says and by what the run takes from it."""
    given, (config, unused) = read_experiment(path), build_config(read_experiment(path))
    resolved = config.model_dump(mode="json", exclude_none=True)
    taken = {**resolved.get("synth", {}), **resolved}
    for key, value in leaves({key: value for key, value in given.items() if key not in unused}):
        if isinstance(value, bool) and type(taken.get(key)) in (int, float, str):
            return f"{key}={value}, read as {taken[key]!r}"
    for key, value in [*leaves(resolved), *leaves({key: given[key] for key in given.keys() & resolved.keys()})]:
        if isinstance(value, (int, float)) and not abs(value) < 2**32:
            return f"{key}={value} is beyond reason"
        never_empty = bool(re.search("dir|path|_from|weights|name|dataset|device", key))
        if isinstance(value, str) and re.search(r"^\s+$|[\0\ud800-\udfff]", value or " " * never_empty):
            return f"{key}={value!a}"
    return "beta_start is above beta_end" if taken.get("beta_start", 0) > taken.get("beta_end", 1) else None


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield everything in lists and objects with the innermost key above it."""
    for inner, item in value.items() if isinstance(value, dict) else [(key, item) for item in value]:
        yield from leaves(item, inner) if isinstance(item, (dict, list)) else [(inner, item)]


def plan(seed: int, count: int, folder: Path) -> tuple[list[str], list[Path]]:
    """Plan mutations inside a folder, the current one; return what went wrong, and the files that were accepted."""
    chance, failures, accepted = random.Random(seed), [], []
    for path in (folder / f"m{number}.json" for number in range(count)):
        ours, kind = chance.choice(EXPERIMENTS), chance.choices(list(KINDS), weights=KINDS.values())[0]
        passed, wrong = judge(mutation := kind(chance, json.loads(ours.read_text())), path)
        accepted += [path] if passed and not wrong else []
        failures += [f"{ours.name}, {mutation.what[:100]}: {wrong}"] if wrong else []
    written = [f"a plan has written {path}" for path in folder.iterdir() if path.suffix != ".json"]
    return failures + written, accepted


def learn(paths: list[Path]) -> Iterator[str]:
    """Learn accepted files with tiny settings on digits, but those of foreign models; yield "" or how each failed."""
    for path in paths:
        config, _ = build_config(read_experiment(path))
        if config.synth is None or config.synth.name not in ("ldm", "d4m", "controlnet"):
            tiny = toy_raw(config.model_name, path.parent, config.synth and config.synth.name, **TINY)
            tiny |= {f"synth.{key}": value for key, value in tiny.pop("synth", {}).items()}
            tiny |= BESIDE if config.synth else {}
            settings = [word for key, value in tiny.items() for word in ("--set", f"{key}={json.dumps(value)}")]
            code, said = call("--config", str(path), *settings)
            yield "" if code == 0 else f"{said[-500:]} in {path.read_bytes()[:1500]!r}"


def run() -> int:
    seed, plans, runs = map(int, sys.argv[1:] or (0, 600, 40))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        failures, accepted = plan(seed, plans, Path(folder))
        print(f"{len(failures)} of {plans} mutations got a wrong answer", *failures, sep="\n  ", flush=True)
        broken = list(filter(None, learned := list(islice(learn(accepted), runs))))
        print(f"{len(broken)} of {len(learned)} accepted mutations failed in training", *broken, sep="\n  ")
    return int(bool(failures or broken))


if __name__ == "__main__":
    sys.exit(run())
