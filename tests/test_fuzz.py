"""A taste of `python -m tests.fuzz`, which takes minutes."""

from tests import fuzz


def test_mutated_experiment_files_get_one_message_or_make_sense(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failures, accepted = fuzz.plan(seed=7, count=20, folder=tmp_path)
    assert not failures and accepted
