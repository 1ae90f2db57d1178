"""What surrounds one seed: its log file, metrics, clock and checkpoints."""

import json
import logging

import pytest

from utils.training.run import Metrics, Run, log, log_to_console, log_to_file
from utils.training.runtime import Runtime


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "seed_1", 1, Runtime(["cpu"]), progress=False)


@pytest.fixture
def metrics(tmp_path) -> Metrics:
    """Two trainings of task 0 and one of task 1, a line every ten steps."""
    made = Metrics(tmp_path / "metrics.jsonl")
    for task, purpose in [(0, "train"), (0, "ddpm"), (1, "train")]:
        for step in (10, 20, 30):
            made.write(task=task, purpose=purpose, step=step)
    return made


@pytest.fixture
def talkative():
    level = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(level)


def steps(metrics: Metrics) -> dict[tuple, list[int]]:
    found: dict[tuple, list[int]] = {}
    for line in metrics.path.read_text().splitlines():
        values = json.loads(line)
        found.setdefault((values["task"], values["purpose"]), []).append(values["step"])
    return found


def test_metrics_are_one_json_object_per_line(metrics):
    assert steps(metrics) == {key: [10, 20, 30] for key in [(0, "train"), (0, "ddpm"), (1, "train")]}


@pytest.mark.parametrize(("step", "kept"), [(0, None), (10, [10]), (15, [10]), (30, [10, 20, 30])])
def test_rewinding_forgets_later_lines_of_this_training_alone(metrics, step, kept):
    metrics.rewind(1, "train", step)
    assert steps(metrics).get((1, "train")) == kept
    assert steps(metrics)[0, "train"] == steps(metrics)[0, "ddpm"] == [10, 20, 30]


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ('{"task": 1, "purpose": "tra', [10, 20, 30, 50]),
        ('{"task": 1, "purpose": "train", "step": 40}', [10, 20, 30, 40, 50]),  # only the end of line is missing
    ],
)
def test_a_last_line_that_a_crash_cut_off_does_not_spoil_the_next(metrics, cut, kept):
    with open(metrics.path, "a") as file:
        file.write(cut)
    metrics.rewind(1, "train", 40)
    metrics.write(task=1, purpose="train", step=50)
    assert steps(metrics)[1, "train"] == kept


def test_rewinding_nothing_leaves_the_file_alone(metrics):
    before = metrics.path.stat().st_ino
    metrics.rewind(1, "train", 30)
    assert metrics.path.stat().st_ino == before


def test_rewinding_needs_no_file_and_only_one_process_writes(tmp_path):
    Metrics(tmp_path / "absent.jsonl").rewind(0, "train", 0)
    silent = Metrics(tmp_path / "silent.jsonl", enabled=False)
    silent.write(task=0, purpose="train", step=1)
    silent.rewind(0, "train", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("talkative")
def test_each_seed_has_its_own_log_file_in_pycils_format(tmp_path):
    for seed in (1, 2):
        with log_to_file(tmp_path / f"seed_{seed}" / "log.txt"):
            log.info("CNN top1 curve: [%d]", seed)
    log.info("to nobody")
    for seed in (1, 2):
        text = (tmp_path / f"seed_{seed}" / "log.txt").read_text()
        assert text.partition(" [test_run.py] => ")[2] == f"CNN top1 curve: [{seed}]\n"


@pytest.mark.usefixtures("talkative")
def test_a_log_file_is_continued_by_a_resumed_run_and_closed_after_an_error(tmp_path):
    handlers = list(log.handlers)
    for word in ("one", "two"):
        with pytest.raises(KeyboardInterrupt), log_to_file(tmp_path / "log.txt"):
            log.info(word)
            raise KeyboardInterrupt
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]
    assert log.handlers == handlers


@pytest.mark.usefixtures("talkative")
def test_the_console_gets_every_message_once(monkeypatch, capsys):
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    log_to_console()
    log_to_console()
    log.info("hello")
    assert capsys.readouterr().out.count("hello") == 1


def test_times_of_one_name_add_up_even_when_something_fails(run, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("utils.training.run.time.perf_counter", lambda: next(clock))
    with run.timed("train"):
        pass
    with pytest.raises(ValueError), run.timed("train"):
        raise ValueError
    assert run.seconds == {"train": 5.0}


def test_a_task_forgets_the_checkpoints_inside_its_trainings(run):
    run.fit_checkpoints(0, "train").save(5, {}, {})
    run.fit_checkpoints(0, "ddpm").save(7, {}, {})
    run.checkpoints("task").save(0, {}, {})
    run.forget_fits()
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["task_0"]


def test_time_inside_a_timed_block_counts_there_alone(run, monkeypatch):
    clock = iter([0, 1, 3, 10])
    monkeypatch.setattr("utils.training.run.time.perf_counter", lambda: next(clock))
    with run.timed("train"), run.timed("generate"):
        pass
    assert run.seconds == {"generate": 2, "train": 8}
