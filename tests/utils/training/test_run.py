"""What surrounds one seed: its metrics, tracker, clock and checkpoints."""

import json
from types import SimpleNamespace

import pytest

from utils.run.errors import ConfigError
from utils.training.run import Metrics, Run
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


def steps(metrics: Metrics) -> dict[tuple, list[int]]:
    found: dict[tuple, list[int]] = {}
    for line in metrics.path.read_text().splitlines():
        values = json.loads(line)
        found.setdefault((values["task"], values["purpose"]), []).append(values["step"])
    return found


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


@pytest.mark.parametrize(
    "line",
    [b"", b'{"task": 1, "purp', b"\xff\xfe{", b"[1, 2]", b"7", b"null", b'{"loss": 1}',
     b'{"task": 1, "purpose": "train", "step": "x"}', b'{"task": 1, "purpose": "train", "step": NaN}'],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 4])
def test_lines_that_are_none_of_ours_are_forgotten_and_cost_no_other(metrics, line, place):
    lines = metrics.path.read_bytes().splitlines()
    metrics.path.write_bytes(b"\n".join([*lines[:place], line, *lines[place:]]) + b"\n")
    metrics.rewind(1, "train", 30)
    assert metrics.path.read_bytes().splitlines() == lines


def test_rewinding_nothing_leaves_the_file_alone_and_needs_none_and_only_one_process_writes(metrics, tmp_path):
    before = metrics.path.stat().st_ino
    metrics.rewind(1, "train", 30)
    assert metrics.path.stat().st_ino == before
    Metrics(tmp_path / "absent.jsonl").rewind(0, "train", 0)
    silent = Metrics(tmp_path / "silent.jsonl", enabled=False)
    silent.write(task=0, purpose="train", step=1)
    silent.rewind(0, "train", 0)
    assert list(tmp_path.iterdir()) == [metrics.path]


def test_a_task_forgets_the_checkpoints_inside_its_trainings(run):
    run.checkpoints("fit_0_train").save(5, {}, {})
    run.checkpoints("fit_0_ddpm").save(7, {}, {})
    run.checkpoints("task").save(0, {}, {})
    run.forget_fits()
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["task_0"]


def test_times_of_one_name_add_up_without_what_is_timed_inside_even_when_something_fails(run, monkeypatch):
    clock = iter([0, 1, 3, 10, 20, 25])
    monkeypatch.setattr("utils.training.ledger.time.perf_counter", lambda: next(clock))
    with run.timed("train"), run.timed("generate"):
        pass
    with pytest.raises(ValueError), run.timed("train"):
        raise ValueError
    assert run.seconds == {"generate": 2, "train": 8 + 5}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_whose_package_is_missing_is_a_config_error(run, monkeypatch, name):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ConfigError, match=f"log_with={name} needs the package {name}"):
        run.track(name, "run", {})


def test_without_a_tracker_metrics_go_to_the_file_alone(run):
    run.track(None, "run", {})
    run.metrics.write(task=0, purpose="train", step=10, loss=1.0)
    assert [path.name for path in run.folder.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_every_metric_beside_the_file(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.track("tensorboard", "name", {"seed": 1, "order": [2, 1], "synth": None, "rate": 0.1})
    run.metrics.write(task=0, purpose="train", step=10, loss=1.5)
    run.metrics.close()
    (folder,) = {path.parent for path in run.folder.rglob("events.out.tfevents.*") if path.parent.name == "name"}
    events = EventAccumulator(str(folder)).Reload()
    (scalar,) = events.Scalars("task_0/train/loss")
    assert (scalar.step, scalar.value) == (10, 1.5)
    assert json.loads(run.metrics.path.read_text())["loss"] == 1.5


def test_a_tracker_whose_steps_may_only_rise_gets_them_as_values(run):
    logged = []
    log = lambda values, step: logged.append((values, step))  # noqa: E731
    run.metrics.tracker = SimpleNamespace(name="wandb", log=log, finish=lambda: logged.append("finished"))
    run.metrics.write(task=0, purpose="train", step=50, loss=1.0)
    run.metrics.close()
    assert logged == [({"task_0/train/step": 50, "task_0/train/loss": 1.0}, None), "finished"]
