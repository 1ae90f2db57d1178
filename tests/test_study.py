"""The script of exps/study: every row once, whatever becomes of the others."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from tests.structure import ROOT

SPEC = importlib.util.spec_from_file_location("study", ROOT / "exps" / "study" / "run.py")
study = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(study)


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The commands that were given; of them, those of WA fail."""
    commands = []

    def run(command):
        commands.append(command)
        return SimpleNamespace(returncode=2 if "fashion_wa" in command[3] else 0)

    monkeypatch.setattr(study.subprocess, "run", run)
    return commands


def test_rows_run_in_order_and_a_failed_one_is_named_at_the_end(started, capsys):
    assert study.main(["--set", "data_dir=x", "--only", "fashion_"]) == 1
    rows = sorted((ROOT / "exps" / "study").glob("fashion_*.json"))
    assert started == [
        [
            sys.executable,
            str(ROOT / "main.py"),
            "--config",
            str(row),
            "--name",
            f"study_{row.stem}",
            "--set",
            "data_dir=x",
        ]
        for row in rows
    ]
    assert capsys.readouterr().err.startswith("failed: fashion_wa_")


def test_rows_are_picked_by_the_beginning_of_their_names(started, capsys):
    assert study.main(["--only", "fashion_icarl"]) == 0 and len(started) == 2
    with pytest.raises(SystemExit, match="2"):
        study.main(["--only", "nobody"])
    assert "'nobody'" in capsys.readouterr().err
