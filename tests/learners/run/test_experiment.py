"""A seed's run around its learner: replay that is there already, frozen weights, few-shot figures."""

import json

import pytest
from PIL import Image

from learners import LEARNERS
from learners.run.predict import _images
from synth import SOURCES
from tests.support.toy import TINY_SOURCES, Interrupted, interrupt, toy_experiment
from utils.results.panels import Panel
from utils.run.carried import Carried
from utils.run.errors import BankError
from utils.training.checkpoint import Checkpoints
from utils.training.run import Run


def given_images(bank, **keys):
    """A source whose images lie in this folder."""
    return {"name": "ddpm", **TINY_SOURCES["ddpm"], "need_syn_imgs": False, "syn_image_path": str(bank), **keys}


def test_a_run_on_given_images_fits_draws_and_keeps_no_source(tmp_path, monkeypatch):
    toy_experiment("finetune", tmp_path / "first", "ddpm", init_cls=4).learn_all()
    for method in ("fit_before", "fit_after", "generate", "save"):
        monkeypatch.setattr(SOURCES["ddpm"], method, interrupt)
    bank = tmp_path / "first" / "outputs" / "syn_image_toy_seed7"
    results = toy_experiment("finetune", tmp_path / "second", synth=given_images(bank), init_cls=4).learn_all()
    assert results["finished"] and results["memory_bytes"]["source"] == 0
    assert results["memory_bytes"]["bank"] > 0


def test_given_images_that_are_missing_are_missed_before_anything_is_learned(tmp_path):
    experiment = toy_experiment("finetune", tmp_path, synth=given_images(tmp_path / "nowhere"))
    with pytest.raises(BankError, match=r"need_syn_imgs=false, but .*nowhere/task_0 has"):
        experiment.check()


def test_frozen_weights_of_learner_and_source_stand_in_the_ledger_beside_the_memory(tmp_path, monkeypatch):
    for owner, nbytes in ((LEARNERS["finetune"], 1000), (SOURCES["ddpm"], 234)):
        lines = [Carried("frozen", nbytes=nbytes, frozen=True)]
        monkeypatch.setattr(owner, "carried", lambda self, own=owner.carried, lines=lines: own(self) + lines)
    results = toy_experiment("finetune", tmp_path, "ddpm", init_cls=4).learn_all()
    assert results["memory_bytes"]["frozen"] == 1234


@pytest.mark.parametrize(("learner", "source"), [("asp", None), ("finetune", "ddpm"), ("tdfa", "feature_diffusion")])
def test_a_runs_work_is_that_of_its_larger_network(learner, source, tmp_path):
    work = [toy_experiment(learner, tmp_path / str(i), source, batch_size=8 * i).count_work() for i in (1, 2)]
    assert 0 < work[1] == 2 * work[0]  # the classifier's, whose batch alone grew


def test_the_work_of_a_published_model_is_not_counted(tmp_path):
    assert toy_experiment("finetune", tmp_path, "ldm").count_work() is None


def test_a_few_shot_run_tells_base_and_novel_in_results_log_and_report(tmp_path, caplog):
    caplog.set_level("INFO", "reprise")
    experiment = toy_experiment("finetune", tmp_path, kshot=3)
    fscil = experiment.learn_all()["fscil"]
    assert len(fscil["base"]) == len(fscil["performance_drop"]) == 3 and fscil["novel"][0] is None
    assert json.loads((experiment.folder / "results.json").read_text())["fscil"] == fscil
    assert (experiment.folder / "log.txt").read_text().count("Few-shot session") == 3
    assert "Few-shot sessions" in (experiment.folder / "report.html").read_text()


def test_panels_that_a_learner_makes_are_shown_in_the_report(tmp_path, monkeypatch):
    def show(self, task):
        self.run.panels.write(f"shown_{task.index}", Panel("Shown", "", ["only"], [], part=f"part {task.index}"))

    monkeypatch.setattr(LEARNERS["finetune"], "after_training", show)
    experiment = toy_experiment("finetune", tmp_path, init_cls=4)
    assert experiment.learn_all()["class_forgetting"] >= 0
    page = (experiment.folder / "report.html").read_text()
    assert page.index("<h2>Shown</h2>") < page.index("part 0") < page.index("part 1")


def test_images_to_classify_are_seen_as_those_of_the_data_set_were(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("L", (100, 80), 90).save(path)
    assert _images("imagenet100_64", [path]).parts[0].images.shape == (1, 3, 64, 64)
    assert _images("digits", [path]).parts[0].images == (str(path),)


def test_a_run_killed_right_after_its_last_checkpoint_leaves_nothing_else_behind(tmp_path, monkeypatch):
    def left(folder):
        return {path.relative_to(folder) for path in folder.rglob("*")}

    toy_experiment("finetune", tmp_path / "whole").learn_all()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Run, "forget_fits", lambda run: run.checkpoints("task").numbers()[:1] == [2] and interrupt())
        patch.setattr(Checkpoints, "forget_old", lambda checkpoints: None)
        toy_experiment("finetune", tmp_path / "broken").learn_all()
    toy_experiment("finetune", tmp_path / "broken").learn_all()
    assert left(tmp_path / "broken") == left(tmp_path / "whole")
