"""Messages on the console and in a file of each seed."""

import pytest

from utils.run.log import TOLD, log, log_to_console, log_to_file


@pytest.fixture(autouse=True)
def talkative(caplog):
    caplog.set_level("INFO", "reprise")


def test_each_seed_has_its_own_log_file_in_pycils_format(tmp_path):
    for seed in (1, 2):
        with log_to_file(tmp_path / f"seed_{seed}" / "log.txt"):
            log.info("CNN top1 curve: [%d]", seed)
    log.info("to nobody")
    for seed in (1, 2):
        text = (tmp_path / f"seed_{seed}" / "log.txt").read_text()
        assert text.partition(" [test_log.py] => ")[2] == f"CNN top1 curve: [{seed}]\n"


def test_a_log_file_is_continued_by_a_resumed_run_and_closed_after_an_error(tmp_path):
    handlers = list(log.handlers)
    for word in ("one", "two"):
        with pytest.raises(KeyboardInterrupt), log_to_file(tmp_path / "log.txt"):
            log.info(word)
            raise KeyboardInterrupt
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]
    assert log.handlers == handlers


def test_of_a_seed_beside_others_the_console_gets_a_line_per_task_that_names_it(monkeypatch, capsys):
    monkeypatch.setattr(log, "handlers", [])
    log_to_console(seed="seed_7")
    log.info("CNN top1 curve: [1.0]")
    log.log(TOLD, "Task 0: learning")
    log.warning("careful")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("seed_7 ") and first.endswith("Task 0: learning")
    assert second.startswith("seed_7 ") and second.endswith("careful")


def test_the_console_gets_every_message_once(monkeypatch, capsys):
    monkeypatch.setattr(log, "handlers", [])
    for _ in range(2):
        log_to_console()
    log.info("hello")
    assert capsys.readouterr().out.count("hello") == 1
