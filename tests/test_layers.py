"""The shape of the house: which part may import which, one training loop, registries, short files."""

import ast
import re

import pytest

from learners.run.configure import build_config
from tests import structure
from tests.structure import FILES, ROOT
from utils.run.words import read_experiment

EXPERIMENTS = sorted((ROOT / "exps").rglob("*.json"))
# Words for things that a registry looks up.
LOOKED_UP = {"name", "model_name", "dataset", "dataset_name", "source", "learner", "backbone", "convnet_type"}


def named_factories(code: str) -> list[int]:
    """Lines of two or more `if name == "..."` in one file, over something that a registry should look up."""
    lines = [node.lineno for node in ast.walk(ast.parse(code)) if isinstance(node, ast.If) and _asks_name(node.test)]
    return lines if len(lines) > 1 else []


def _asks_name(test: ast.expr) -> bool:
    compares = [node for node in ast.walk(test) if isinstance(node, ast.Compare)]
    return any(_word(node.left) in LOOKED_UP and _holds_text(node.comparators[0]) for node in compares)


def _holds_text(node: ast.expr) -> bool:
    return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in ast.walk(node))


def _word(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _word(node.func.value) if isinstance(node.func, ast.Attribute) else ""  # name.lower()
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def test_no_rule_of_the_house_is_broken():
    assert list(structure.broken_rules()) == []


@pytest.mark.parametrize(
    ("layer", "code", "found"),
    [
        ("utils", "import models.heads", ["models.heads"]),
        ("models", "def late():\n    from synth.base import Requests", ["synth.base"]),
        ("synth", "from learners import LEARNERS\nimport main", ["learners", "main"]),
        ("learners", "from synth.base import Guide\nfrom utils import seeding\nimport torch", []),
        ("utils", "from utils.run.errors import ConfigError\nimport synthetic", []),
    ],
)
def test_an_import_of_an_upper_layer_is_found_wherever_it_stands(layer, code, found):
    assert structure.upward_imports(layer, code) == found


def test_the_project_has_one_training_loop():
    calls = [path.name for path in FILES for _ in re.findall(r"\.backward\(", path.read_text())]
    assert calls == ["fit.py"]


def test_names_are_looked_up_in_registries_and_not_in_chains_of_ifs():
    found = {str(path.relative_to(ROOT)): named_factories(path.read_text()) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ('if name == "der":\n    pass\nelif name == "wa":\n    pass', [1, 3]),
        ('if config.model_name.lower() == "der":\n    pass\nif dataset in ("cifar10", "cifar100"):\n    pass', [1, 3]),
        ('if name == "old":\n    pass', []),  # one exception is no factory
        ('if name in self.entries:\n    pass\nif name == other:\n    pass\nif mode == "train":\n    pass', []),
    ],
)
def test_a_chain_of_ifs_over_names_is_found(code, lines):
    assert named_factories(code) == lines


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("# as ESCORT does\nclass GuideSource: ...", ["ESCORT", "Guide"]),
        ("guidance, guided, guides, raspberry = grasp(imagenet100_autoaugment)", []),
        ('raise ConfigError("set dddr_keys")', ["dddr"]),
    ],
)
def test_a_method_that_is_named_is_found(code, words):
    assert structure.methods_named(code) == words


def test_only_lines_that_do_something_are_counted():
    code = '"""Doc."""\n\nimport os\n\n# why\ndef f(\n    x,\n):\n    """Doc\n    more."""\n    return x\n'
    assert structure.code_lines(code) == 4


def test_constructors_and_methods_of_the_class_count_as_methods():
    class Kind:
        def __init__(self): ...

        @classmethod
        def of(cls): ...

        @property
        def name(self): ...

    assert structure.num_methods(Kind) == 2


def test_long_public_signatures_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(structure, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("def f(self, a, b, c, d, e, f, g): ...\ndef g(a, b, c, d, e, f, g, *, h): ...\n")
    assert structure.long_signatures(tmp_path / "a.py") == ["a.py:2 g"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_valid_short_and_uses_all_its_keys(path):
    config, unused = build_config(read_experiment(path))
    assert unused == []
    assert config.dataset
    assert len(path.read_text().splitlines()) <= 40
