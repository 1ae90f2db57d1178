"""Sources that one run keeps task by task and others take instead of training their own."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import main
from learners.run.configure import build_config
from synth import sample, train
from synth.replay import Stored
from synth.stored import keep_source
from tests.support.disk import contents
from tests.support.sources import write_folders
from tests.support.toy import tiny_source, toy_experiment, toy_images, toy_raw, without_cost
from utils.run.errors import CheckpointError, ConfigError
from utils.run.files import load_tensors, read_json
from utils.training.checkpoint import Checkpoints


def experiment(folder, source="ddpm", learner="generative_replay", keys=None, **synth):
    """A toy run of three tasks of two classes."""
    keys = {"init_epoch": 1, "epochs": 1, **(keys or {})}
    return toy_experiment(learner, folder, synth={**tiny_source(source), **synth}, **keys)


@pytest.fixture(scope="module")
def keeping(tmp_path_factory):
    """A run that has kept its sources."""
    run = experiment(tmp_path_factory.mktemp("kept"), keep_sources=True)
    run.learn_all()
    return run


@pytest.fixture
def copied(keeping, tmp_path) -> Path:
    """Its sources, to be spoilt."""
    return shutil.copytree(keeping.folder / "sources", tmp_path / "copied" / "sources")


def taking(folder, source_dir, **keys):
    return experiment(folder / "taking", source_dir=str(source_dir), **keys)


def assert_same_outcome(*runs):
    """Of results without times, and the classifier's weights."""
    first, second = (without_cost(read_json(run.folder / "results.json", "")) for run in runs)
    ours, theirs = (load_tensors(run.folder / "checkpoints" / "task_2" / "network.safetensors") for run in runs)
    assert first == second
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def purposes(run) -> set[str]:
    """Of all trainings of a run."""
    return {json.loads(line)["purpose"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()}


@pytest.mark.parametrize(
    ("source", "replay"),
    [("ddpm", "redraw"), ("small_ldm", "keep")],  # small_ldm learns before the classifier
)
def test_a_run_on_stored_sources_has_the_bits_of_the_run_that_trained_them(source, replay, tmp_path):
    first = experiment(tmp_path / "first", source, replay=replay, keep_sources=True)
    first.learn_all()
    second = experiment(tmp_path / "second", source, replay=replay, source_dir=str(first.folder))
    second.check(), second.learn_all()
    assert_same_outcome(second, first)
    assert purposes(first) > purposes(second) == {"train"}


def test_another_learner_with_other_sampling_takes_the_same_sources(keeping, tmp_path):
    drawn_otherwise = {"replay": "redraw", "timestep_respacing": "3", "sampler": "ddpm", "syn_per_class": 2}
    drawn_otherwise |= {"clip_x0": False}
    run = taking(tmp_path, keeping.folder, learner="finetune", **drawn_otherwise, sample_batch=8, image_format="jpg")
    assert run.learn_all()["finished"] and run.learner.replay.source.fitted_classes == {0, 1, 2, 3}
    stored = json.loads((keeping.folder / "sources" / "task_1" / "manifest.json").read_text())
    assert run.learner.replay.source.fingerprint() == stored["weights"]


@pytest.mark.parametrize("place", [".", "..", "sources"])
def test_a_source_dir_is_a_run_its_seed_or_their_sources(place, keeping, tmp_path):
    learner = taking(tmp_path, keeping.folder / place).check()
    assert learner.replay.pupil.folder.resolve() == (keeping.folder / "sources").resolve()


def test_every_task_that_was_learned_is_kept_and_draws(keeping, tmp_path):
    sources = keeping.folder / "sources"
    assert sorted(path.name for path in sources.iterdir()) == ["task_0", "task_1"]
    assert sample.main(["--ckpt", f"{sources / 'task_0'}", "--num_samples", "2", "--output_dir", f"{tmp_path}"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "1"]


def test_the_last_task_is_needed_only_where_the_source_learns_it(keeping, tmp_path):
    taking(tmp_path, keeping.folder).check()
    with pytest.raises(CheckpointError, match=r"no source of task 2 .*sources/task_2/manifest.json is not there"):
        taking(tmp_path / "learns it", keeping.folder, fit_after_last_task=True).check()


def break_off(run, monkeypatch, owner, name, task):
    """Run until this method is called in or after this task, before it does anything."""
    original = getattr(owner, name)

    def leave(self, place, *arguments, **keys):
        if getattr(place, "index", place) == task:
            raise KeyboardInterrupt
        return original(self, place, *arguments, **keys)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, leave)
        run.learn_all()


# Before the classifier trains; and between the writing of a task's source and of its checkpoint.
STOPS = [(Stored, "past"), (Checkpoints, "save")]


@pytest.mark.parametrize(("owner", "name"), STOPS)
def test_a_run_that_was_cut_off_ends_with_the_same_sources(owner, name, keeping, tmp_path, monkeypatch):
    break_off(experiment(tmp_path, keep_sources=True), monkeypatch, owner, name, task=1)
    again = experiment(tmp_path, keep_sources=True)
    again.learn_all()
    assert contents(again.folder / "sources") == contents(keeping.folder / "sources")


def test_a_run_on_stored_sources_that_was_cut_off_ends_with_the_same_bits(keeping, tmp_path, monkeypatch):
    break_off(taking(tmp_path, keeping.folder), monkeypatch, *STOPS[0], task=1)
    again = taking(tmp_path, keeping.folder)
    again.learn_all()
    assert_same_outcome(again, keeping)
    assert purposes(keeping) > purposes(again) == {"train"}


def test_a_kept_source_that_is_whole_is_left_alone_and_a_damaged_one_is_written_again(keeping, copied):
    folder, task = copied / "task_1", keeping.data.task(1)
    before, inode = contents(folder), folder.stat().st_ino
    keep_source(keeping.learner.replay.source, keeping.data, task, copied.parent)
    assert folder.stat().st_ino == inode
    (folder / "source" / "network.safetensors").write_bytes(b"")
    keep_source(keeping.learner.replay.source, keeping.data, task, copied.parent)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda task: shutil.rmtree(task), r"no source of task 1 .*sources/task_1/manifest.json is not there"),
        (lambda task: edit(task / "manifest.json", "{", "["), r"task_1/manifest.json is damaged"),
        (lambda task: edit(task / "manifest.json", '"toy"', '"digits"'), 'dataset is "digits" there, "toy" here'),
        (lambda task: (task / "source" / "network.safetensors").unlink(), "network.safetensors is missing or damaged"),
    ],
)
def test_what_is_missing_or_of_other_data_is_said_before_anything_is_learned(spoil, said, copied, tmp_path):
    spoil(copied / "task_1")
    run = taking(tmp_path, copied.parent)
    with pytest.raises(CheckpointError, match=said):
        run.check()
    assert not (run.folder / "metrics.jsonl").exists()


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def test_a_damaged_file_is_named_when_it_is_loaded(copied, tmp_path):
    path = copied / "task_1" / "source" / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    run = taking(tmp_path, copied)
    run.check()
    with pytest.raises(CheckpointError, match=r"task_1/source/generator.safetensors is missing or damaged: Name"):
        run.learn_all()


@pytest.mark.parametrize(
    ("keys", "synth", "said"),
    [
        ({"class_order_seed": 8}, {}, r"class_order\.\d is \d there, \d here"),
        ({"init_cls": 4}, {}, r"fitted_classes is \[0, 1\] there, \[0, 1, 2, 3\] here"),  # same order, cut otherwise
        ({"val_share": 0.5}, {}, r"class_counts is \[10, 10\] there, \[5, 5\] here"),  # it saw what is held out
        ({}, {"source": "small_ldm"}, r'source is "ddpm" there, "small_ldm" here'),
        ({}, {"block_out_channels": [8, 16]}, r"settings.block_out_channels is \[8, 8\] there, \[8, 16\] here"),
        ({}, {"num_steps": 4}, r"settings.num_steps is 3 there, 4 here"),
    ],
)
def test_a_source_of_something_else_is_refused_with_the_first_difference(keys, synth, said, keeping, tmp_path):
    with pytest.raises(CheckpointError, match=f"sources/task_0 is of another run: {said}. Name another"):
        taking(tmp_path, keeping.folder, keys=keys, **synth).check()


def test_stored_sources_and_given_images_exclude_each_other(tmp_path):
    synth = {**tiny_source("ddpm"), "source_dir": "kept", "need_syn_imgs": False}
    with pytest.raises(ConfigError, match=r"synth.source_dir='kept': no source is used where need_syn_imgs=false"):
        build_config(toy_raw("finetune", tmp_path, synth=synth))


def test_keeping_sources_is_no_part_of_a_runs_identity_and_taking_them_is(tmp_path):
    def identity(**synth):
        return build_config(toy_raw("finetune", tmp_path, synth={**tiny_source("ddpm"), **synth}))[0].identity()

    assert identity(keep_sources=True) == identity() != identity(source_dir="kept")
    assert "keep_sources" not in identity()["synth"] and identity()["synth"]["num_steps"] == 3


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> Path:
    """A place with a data set in folders, and sources that `synth.train` and a run have kept."""
    place = tmp_path_factory.mktemp("on_disk")
    write_folders(place / "data" / "rows", toy_images(4, 6, "stored"), [f"row {label}" for label in range(6)])
    keys = {"dataset": "rows", "seed": [7, 8], "output_dir": "outputs", "init_epoch": 1, "epochs": 1, "shuffle": True}
    (place / "exp.json").write_text(json.dumps(toy_raw("finetune", place, synth=tiny_source("ddpm"), **keys)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        fit = ["--config", "exp.json", "--ckpt_save_dir", "fitted", "--seed", "7"]
        assert train.main([*fit, "--set", "synth.keep_sources=true"]) == 0
        assert start("first", "seed=7", "synth.keep_sources=true") == 0
    return place


def start(name, *overrides, flags=()) -> int:
    command = ["--config", "exp.json", "--name", name, *flags]
    return main.main([*command, *(part for text in overrides for part in ("--set", text))])


def test_a_folder_of_synth_train_serves_as_well_and_holds_the_same_sources(on_disk, monkeypatch, capsys):
    monkeypatch.chdir(on_disk)
    assert start("second", "seed=7", "synth.source_dir=fitted", flags=["--plan"]) == 0
    planned = capsys.readouterr().out
    assert "no source is trained: each task's comes from fitted/sources" in planned and "trained 3 steps" not in planned
    assert start("second", "seed=7", "synth.source_dir=fitted") == 0
    ours = {path: content for path, content in contents("fitted/sources").items() if not path.startswith("task_2/")}
    assert ours == contents("outputs/first/seed_7/sources")
    matrices = [json.loads(Path(f"outputs/{name}/seed_7/results.json").read_text()) for name in ("first", "second")]
    assert matrices[0]["accuracy_matrix"] == matrices[1]["accuracy_matrix"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["synth.source_dir=nowhere/run"], "synth.source_dir='nowhere/run': no such folder; name that of a run"),
        (["synth.source_dir=outputs/first"], "first/seed_8/sources/task_0/manifest.json is not there"),  # of 7 and 8
        (["seed=7", "synth.source_dir=data"], "data/sources/task_0/manifest.json is not there. Sources are kept by"),
    ],
)
def test_every_seed_looks_for_its_sources_before_the_first_one_learns(overrides, said, on_disk, monkeypatch, capsys):
    monkeypatch.chdir(on_disk)
    assert start("third", *overrides) == 2
    assert said in capsys.readouterr().err and not Path("outputs/third").exists()
