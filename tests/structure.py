"""Measures the house: `python -m tests.structure` prints its size per floor and every rule that is broken."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from inspect import isfunction
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ("utils", "models", "synth", "learners", "main")  # from the ground up
FILES = [ROOT / "main.py", *sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))]
# A method may be named in its own room and in its own file; general files serve them all.
ROOMS = re.compile(r"(learners|synth)/(asp|dddr|ddpm|escort|expandable|guide|inversion)/|learners/[^/]+\.py")
GENERAL_LEARNERS = {"backbones", "base", "frozen_backbone", "losses", "memory", "predict", "pycil", "__init__"}
METHODS = re.compile(r"escort|guide(?!d|s\b)|dddr|(?<![a-z])asp(?![a-z])|cbdm|tdfa|d4m", re.IGNORECASE)
# Names that users write: of data, of a split, of an experiment file.
ALLOWED = re.compile(r"imagenet100_escort|asp80|ldm_dddr")
MOST_LINES, MOST_PARAMETERS, MOST_HOOKS = 300, 7, {"Learner": 20, "ReplaySource": 12}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    return name_of(path).split("/")[0].removesuffix(".py")


def is_general(path: Path) -> bool:
    """Whether a file serves every method."""
    name = name_of(path)
    return path.stem in GENERAL_LEARNERS if name.count("/") == 1 and layer_of(path) == "learners" else (
        not ROOMS.match(name)
    )  # fmt: skip


def code_lines(code: str) -> int:
    """Count lines of code: without blank lines, comments, docstrings and imports."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            left_out.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(map(str.strip, code.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and number not in left_out for number, line in lines)


def lines_per_floor() -> dict[str, int]:
    """Count code lines per folder of each layer."""
    floors: dict[str, int] = {}
    for path in FILES:
        floor = "/".join(name_of(path).split("/")[:-1]) or "main.py"
        floors[floor] = floors.get(floor, 0) + code_lines(path.read_text())
    return floors


def imports(code: str) -> list[str]:
    """Return the modules that a file imports, wherever that stands."""
    found: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module)
    return found


def upward_imports(layer: str, code: str) -> list[str]:
    """Return imports of an upper layer."""
    above = LAYERS[LAYERS.index(layer) + 1 :]
    return [name for name in imports(code) if name.split(".")[0] in above]


def circles() -> list[list[str]]:
    """Return chains of modules that import each other when they are loaded."""
    modules = {name_of(path).removesuffix(".py").replace("/", "."): path for path in FILES}
    wanted = {name: _loaded_first(path.read_text(), modules) for name, path in modules.items()}
    found, done = [], set()

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in wanted[name]:
                walk(other, [*way, name])
            done.add(name)

    for name in modules:
        walk(name, [])
    return found


def _loaded_first(code: str, modules: dict[str, Path]) -> list[str]:
    top = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [name for node in top for name in imports(ast.unparse(node)) if name in modules]


def methods_named(code: str) -> list[str]:
    """Return the words in which a file names a method."""
    return sorted(set(METHODS.findall(ALLOWED.sub("", code))))


def long_signatures(path: Path) -> list[str]:
    """Return public functions of more than seven parameters, `self` left out."""
    functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    public = (node for node in functions if not node.name.startswith("_") or node.name == "__init__")
    return [f"{name_of(path)}:{node.lineno} {node.name}" for node in public if _count(node.args) > MOST_PARAMETERS]


def _count(arguments: ast.arguments) -> int:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def methods_of(kind: type) -> list[str]:
    """Return the methods that a class defines itself, its constructor left out."""
    own = {name: getattr(value, "__func__", value) for name, value in vars(kind).items()}
    return [name for name, value in own.items() if isfunction(value) and name != "__init__"]


def broken_rules() -> Iterator[str]:
    """Say in a line each which rule is broken where."""
    from learners.base import Learner
    from synth.base import ReplaySource

    for kind in (Learner, ReplaySource):
        if len(methods_of(kind)) > MOST_HOOKS[kind.__name__]:
            yield f"{kind.__name__} has {len(methods_of(kind))} methods, {MOST_HOOKS[kind.__name__]} are allowed"
    for path in FILES:
        code = path.read_text()
        if (length := len(code.splitlines())) > MOST_LINES:
            yield f"{name_of(path)} has {length} lines, {MOST_LINES} are allowed"
        yield from (f"{name_of(path)} imports {name} from above" for name in upward_imports(layer_of(path), code))
        yield from (f"{place} has more than {MOST_PARAMETERS} parameters" for place in long_signatures(path))
        if is_general(path):
            yield from (f"{name_of(path)} is general, but names {word!r}" for word in methods_named(code))
    yield from (f"modules import each other: {' -> '.join(circle)}" for circle in circles())


def main() -> None:
    from learners.base import Learner
    from synth.base import ReplaySource

    floors = lines_per_floor()
    for floor, count in sorted(floors.items()):
        print(f"{count:6,} {floor}")
    print(f"{sum(floors.values()):6,} lines of code in all")
    for kind in (Learner, ReplaySource):
        print(f"{len(methods_of(kind)):6} methods of {kind.__name__}, {MOST_HOOKS[kind.__name__]} at most")
    print(f"{max(len(path.read_text().splitlines()) for path in FILES):6} lines in the longest module")
    print(*list(broken_rules()) or ["no rule is broken"], sep="\n")


if __name__ == "__main__":
    main()
