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
from tests.support.toy import tiny_source, toy_experiment, toy_images, toy_raw
from utils.data.images import encode_image
from utils.run.errors import CheckpointError, ConfigError
from utils.run.files import load_tensors
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


@pytest.fixture(scope="module")
def kept(keeping) -> Path:
    """Its seed's folder."""
    return keeping.folder


@pytest.fixture
def copied(kept, tmp_path) -> Path:
    """The same, to be spoilt."""
    return shutil.copytree(kept / "sources", tmp_path / "copied" / "sources")


def taking(folder, source_dir, **keys):
    return experiment(folder / "taking", source_dir=str(source_dir), **keys)


def outcome(run):
    """Results without times, and the classifier's weights."""
    results = json.loads((run.folder / "results.json").read_text())
    network = load_tensors(run.folder / "checkpoints" / "task_2" / "network.safetensors")
    return {key: value for key, value in results.items() if key not in ("seconds", "command")}, network


def assert_same_outcome(one, other):
    assert outcome(one)[0] == outcome(other)[0]
    torch.testing.assert_close(outcome(one)[1], outcome(other)[1], rtol=0, atol=0)


def files(folder) -> dict[str, bytes]:
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def purposes(run) -> set[str]:
    """Of all trainings of a run."""
    return {json.loads(line)["purpose"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()}


@pytest.mark.parametrize(
    ("source", "replay"),
    [("ddpm", "keep"), ("ddpm", "redraw"), ("small_ldm", "keep")],  # small_ldm learns before the classifier
)
def test_a_run_on_stored_sources_has_the_bits_of_the_run_that_trained_them(source, replay, tmp_path):
    first = experiment(tmp_path / "first", source, replay=replay, keep_sources=True)
    first.learn_all()
    second = experiment(tmp_path / "second", source, replay=replay, source_dir=str(first.folder))
    second.check(), second.learn_all()
    assert_same_outcome(second, first)
    assert purposes(first) > purposes(second) == {"train"}


def test_another_learner_with_other_sampling_takes_the_same_sources(kept, tmp_path):
    drawn_otherwise = {"replay": "redraw", "timestep_respacing": "3", "sampler": "ddpm", "syn_per_class": 2}
    drawn_otherwise |= {"clip_x0": False}
    run = taking(tmp_path, kept, learner="finetune", **drawn_otherwise, sample_batch=8, image_format="jpg")
    assert run.learn_all()["finished"] and run.learner.replay.source.fitted_classes == {0, 1, 2, 3}
    stored = json.loads((kept / "sources" / "task_1" / "manifest.json").read_text())
    assert run.learner.replay.source.fingerprint() == stored["weights"]


@pytest.mark.parametrize("place", [".", "..", "sources"])
def test_a_source_dir_is_a_run_its_seed_or_their_sources(place, kept, tmp_path):
    learner = taking(tmp_path, kept / place).check()
    assert learner.replay.pupil.folder.resolve() == (kept / "sources").resolve()


def test_every_task_that_was_learned_is_kept_and_draws(kept, tmp_path):
    assert sorted(path.name for path in (kept / "sources").iterdir()) == ["task_0", "task_1"]
    command = ["--ckpt", str(kept / "sources" / "task_0"), "--num_samples", "2", "--output_dir", str(tmp_path)]
    assert sample.main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "1"]


@pytest.mark.parametrize("fit_after_last_task", [False, True])
def test_the_last_task_is_needed_only_where_the_source_learns_it(fit_after_last_task, kept, tmp_path):
    run = taking(tmp_path, kept, fit_after_last_task=fit_after_last_task)
    if not fit_after_last_task:
        assert run.learn_all()["finished"]
    else:
        with pytest.raises(CheckpointError, match=r"no source of task 2 .*sources/task_2/manifest.json is not there"):
            run.check()


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
def test_a_run_that_was_cut_off_ends_with_the_same_sources(owner, name, kept, tmp_path, monkeypatch):
    break_off(experiment(tmp_path, keep_sources=True), monkeypatch, owner, name, task=1)
    again = experiment(tmp_path, keep_sources=True)
    again.learn_all()
    assert files(again.folder / "sources") == files(kept / "sources")


def test_a_run_on_stored_sources_that_was_cut_off_ends_with_the_same_bits(keeping, kept, tmp_path, monkeypatch):
    break_off(taking(tmp_path, kept), monkeypatch, *STOPS[0], task=1)
    again = taking(tmp_path, kept)
    again.learn_all()
    assert_same_outcome(again, keeping)


def test_a_kept_source_that_is_whole_is_left_alone_and_a_damaged_one_is_written_again(keeping, copied):
    folder, task = copied / "task_1", keeping.data.task(1)
    before, inode = files(folder), folder.stat().st_ino
    keep_source(keeping.learner.replay.source, keeping.data, task, copied.parent)
    assert folder.stat().st_ino == inode
    (folder / "source" / "network.safetensors").write_bytes(b"")
    keep_source(keeping.learner.replay.source, keeping.data, task, copied.parent)
    assert files(folder) == before


# ---------------------------------------------------------------------- what is refused


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"synth.source_dir='nowhere/run': no such folder; name that of a run"):
        experiment(tmp_path, source_dir="nowhere/run").check()


def test_a_missing_task_is_missed_before_anything_is_learned(copied, tmp_path):
    shutil.rmtree(copied / "task_1")
    run = taking(tmp_path, copied.parent)
    with pytest.raises(CheckpointError, match=r"no source of task 1 .*sources/task_1/manifest.json is not there"):
        run.check()
    assert not (run.folder / "metrics.jsonl").exists()


def test_a_run_without_the_seed_or_without_sources_says_where_it_looked(kept, tmp_path):
    run = taking(tmp_path, kept.parent, keys={"seed": 8, "class_order_seed": 7})
    with pytest.raises(CheckpointError, match=r"toy/seed_8/sources/task_0/manifest.json is not there.*keep_sources"):
        run.check()


def test_a_missing_file_is_missed_at_once_and_a_damaged_one_when_it_is_loaded(copied, tmp_path):
    path = copied / "task_1" / "source" / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    run = taking(tmp_path, copied)
    run.check()
    with pytest.raises(CheckpointError, match=r"task_1/source/generator.safetensors is missing or damaged: Name"):
        run.learn_all()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"task_1/source/generator.safetensors is missing or damaged: Name"):
        run.check()


def test_a_damaged_manifest_is_named(copied, tmp_path):
    (copied / "task_0" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"task_0/manifest.json is damaged"):
        taking(tmp_path, copied).check()


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
def test_a_source_of_something_else_is_refused_with_the_first_difference(keys, synth, said, kept, tmp_path):
    with pytest.raises(CheckpointError, match=f"sources/task_0 is of another run: {said}. Name another"):
        taking(tmp_path, kept, keys=keys, **synth).check()


def test_a_source_of_another_data_set_is_refused(copied, tmp_path):
    path = copied / "task_0" / "manifest.json"
    path.write_text(path.read_text().replace('"toy"', '"digits"'))
    with pytest.raises(CheckpointError, match='dataset is "digits" there, "toy" here'):
        taking(tmp_path, copied).check()


def test_stored_sources_and_given_images_exclude_each_other(tmp_path):
    synth = {**tiny_source("ddpm"), "source_dir": "kept", "need_syn_imgs": False}
    with pytest.raises(ConfigError, match=r"synth.source_dir='kept': with need_syn_imgs=false"):
        build_config(toy_raw("finetune", tmp_path, synth=synth))


# ---------------------------------------------------------------------- config, plan and command line


def test_keeping_sources_is_no_part_of_a_runs_identity_and_taking_them_is(tmp_path):
    def identity(**synth):
        return build_config(toy_raw("finetune", tmp_path, synth={**tiny_source("ddpm"), **synth}))[0].identity()

    assert identity(keep_sources=True) == identity() != identity(source_dir="kept")
    assert "keep_sources" not in identity()["synth"] and identity()["synth"]["num_steps"] == 3


@pytest.fixture
def on_disk(tmp_path, monkeypatch) -> Path:
    """A place with a data set of six classes in folders and an experiment on it."""
    monkeypatch.chdir(tmp_path)
    images = toy_images(4, 6, "stored")
    for position, label in enumerate(images.labels.tolist()):
        for split in ("train", "test"):
            path = tmp_path / "data" / "rows" / split / f"row {label}" / f"{position}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(images.image(position), ".png"))
    keys = {"dataset": "rows", "seed": [7, 8], "output_dir": "outputs", "init_epoch": 1, "epochs": 1, "shuffle": True}
    raw = toy_raw("finetune", tmp_path, synth=tiny_source("ddpm"), **keys)
    (tmp_path / "exp.json").write_text(json.dumps(raw))
    return tmp_path


def fit(folder, *overrides) -> int:
    command = ["--config", "exp.json", "--ckpt_save_dir", folder, "--seed", "7"]
    return train.main([*command, *(part for text in overrides for part in ("--set", text))])


def start(name, *overrides, flags=()) -> int:
    command = ["--config", "exp.json", "--name", name, *flags]
    return main.main([*command, *(part for text in overrides for part in ("--set", text))])


def test_a_folder_of_synth_train_serves_as_well_and_holds_the_same_sources(on_disk, capsys):
    assert fit("fitted", "synth.keep_sources=true") == 0
    assert start("first", "seed=7", "synth.keep_sources=true") == 0
    assert start("second", "seed=7", "synth.source_dir=fitted") == 0
    ours = {path: content for path, content in files("fitted/sources").items() if not path.startswith("task_2/")}
    assert ours == files("outputs/first/seed_7/sources")
    matrices = [json.loads(Path(f"outputs/{name}/seed_7/results.json").read_text()) for name in ("first", "second")]
    assert matrices[0]["accuracy_matrix"] == matrices[1]["accuracy_matrix"]


def test_every_seed_looks_for_its_own_sources_before_the_first_one_learns(on_disk, capsys):
    assert fit("first/seed_7", "synth.keep_sources=true") == 0
    assert start("second", "synth.source_dir=first") == 2
    assert "first/seed_8/sources/task_0/manifest.json is not there" in capsys.readouterr().err
    assert not Path("outputs/second").exists()


def test_a_training_without_the_key_keeps_none_and_the_remedy_is_named(on_disk, capsys):
    assert fit("fitted") == 0 and not Path("fitted/sources").exists()
    assert start("second", "seed=7", "synth.source_dir=fitted") == 2
    assert "fitted/sources/task_0/manifest.json is not there. Sources are kept by" in capsys.readouterr().err


def test_the_plan_says_where_sources_come_from(on_disk, capsys):
    assert fit("fitted", "synth.keep_sources=true") == 0
    capsys.readouterr()
    assert start("second", "seed=7", "synth.source_dir=fitted", flags=["--plan"]) == 0
    planned = capsys.readouterr().out
    assert "no source is trained: each task's comes from fitted/sources" in planned and "trained 3 steps" not in planned
