"""Measures the house: `python -m tests.structure` prints its size per floor and every rule that is broken."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from inspect import isfunction
from pathlib import Path

from learners.base import Learner
from synth.base import ReplaySource

ROOT = Path(__file__).parents[1]
LAYERS = ("utils", "models", "synth", "learners", "main")  # from the ground up
FILES = [ROOT / "main.py", *sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))]
# A method may be named in its own room and in its own file; general files serve them all.
ROOMS = re.compile(
    r"(learners|synth)/(asp|cbdm|d4m|dddr|ddpm|escort|expandable|guide|features|inversion|tdfa)/|learners/[^/]+\.py"
)
GENERAL_LEARNERS = {"base", "frozen_backbone", "kept_features", "losses", "memory", "predict", "pycil", "__init__"}
METHODS = re.compile(r"escort|guide(?!d|s\b)|dddr|(?<![a-z])asp(?![a-z])|cbdm|tdfa|d4m", re.IGNORECASE)
# Names that users write: of data, of a split, of an experiment file.
ALLOWED = re.compile(r"asp80|ldm_dddr")
MOST_CODE, MOST_LINES, MOST_PARAMETERS = 10_300, 300, 7  # of code: three systems took 7,300, five 9,300
MOST_METHODS = {Learner: 20, ReplaySource: 12}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    return name_of(path).split("/")[0].removesuffix(".py")


def is_general(path: Path) -> bool:
    """Whether a file serves every method."""
    if path.parent == ROOT / "learners":
        return path.stem in GENERAL_LEARNERS
    return not ROOMS.match(name_of(path))


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


def imports(nodes: Iterable[ast.AST]) -> list[str]:
    """Return the modules that these statements import."""
    found: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module)
    return found


def upward_imports(layer: str, code: str) -> list[str]:
    """Return imports of an upper layer."""
    above = LAYERS[LAYERS.index(layer) + 1 :]
    return [name for name in imports(ast.walk(ast.parse(code))) if name.split(".")[0] in above]


def circles() -> list[list[str]]:
    """Return a chain of modules that import each other when they are loaded, if there is one."""
    modules = {name_of(path).removesuffix(".py").replace("/", "."): path for path in FILES}
    loaded = {name: imports(ast.parse(path.read_text()).body) for name, path in modules.items()}
    try:
        TopologicalSorter({name: modules.keys() & others for name, others in loaded.items()}).prepare()
    except CycleError as error:
        return [error.args[1][::-1]]
    return []


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


def num_methods(kind: type) -> int:
    """Count the methods that a class defines itself, its constructor among them."""
    return sum(isfunction(getattr(value, "__func__", value)) for value in vars(kind).values())


def broken_rules() -> Iterator[str]:
    """Say in a line each which rule is broken where."""
    if (count := sum(lines_per_floor().values())) > MOST_CODE:
        yield f"the house has {count:,} lines of code, {MOST_CODE:,} are allowed"
    for kind, most in MOST_METHODS.items():
        if num_methods(kind) > most:
            yield f"{kind.__name__} has {num_methods(kind)} methods, {most} are allowed"
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
    floors = lines_per_floor()
    for floor, count in sorted(floors.items()):
        print(f"{count:6,} {floor}")
    print(f"{sum(floors.values()):6,} lines of code in all, {MOST_CODE:,} at most")
    for kind, most in MOST_METHODS.items():
        print(f"{num_methods(kind):6} methods of {kind.__name__}, {most} at most")
    print(f"{max(len(path.read_text().splitlines()) for path in FILES):6} lines in the longest module")
    print(*list(broken_rules()) or ["no rule is broken"], sep="\n")


if __name__ == "__main__":
    main()
