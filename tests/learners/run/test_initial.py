"""The weights after the first task: taken from another run, they change nothing; what does not fit is refused."""

import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from learners import LEARNERS
from learners.base import Learner
from learners.run.configure import build_config
from learners.run.initial import recipe_of
from learners.run.state import learner_state
from main import run_seeds
from models.incremental import IncrementalNet
from synth.replay import Stored
from tests.support.toy import toy_dataset, toy_experiment, toy_raw, without_cost
from utils.data.batches import Batch
from utils.run.errors import CheckpointError, ConfigError

SHARING = [name for name in LEARNERS.names() if getattr(LEARNERS[name], "shares_first_task", False)]


def run_of(learner, folder, **keys):
    """A run of the toy data's first two tasks, ended."""
    experiment = toy_experiment(learner, folder, init_cls=4, **keys)
    return experiment, experiment.learn_all()


def refusal(folder, first, learner="icarl", **keys):
    """What a run that would start from another's weights is told before anything is written."""
    experiment = toy_experiment(learner, folder, **{"init_cls": 4, "init_from": str(first.folder.parent), **keys})
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        experiment.check()
    return str(caught.value)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Gives a run that trained its first task, and its results, by the learner's name; it is run once."""
    return cache(lambda learner: run_of(learner, tmp_path_factory.mktemp(learner)))


@pytest.fixture(scope="module")
def trained(ended):
    """An iCaRL run that trained its first task."""
    return ended("icarl")[0]


@pytest.mark.parametrize(
    ("giver", "taker"),
    [
        *(("icarl", name) for name in ("icarl", "wa", "replay", "finetune", "joint")),
        ("icarl", "der"),  # the backbone is its first branch
        ("icarl", "memo"),  # ... cut in two
        ("der", "icarl"),
        ("memo", "der"),
    ],
)
def test_a_run_that_takes_the_first_task_ends_like_one_that_trained_it(giver, taker, ended, tmp_path, monkeypatch):
    (first, _), (trained, expected) = ended(giver), ended(taker)
    tasks, train = [], Learner.train
    monkeypatch.setattr(Learner, "train", lambda self, task: tasks.append(task.index) or train(self, task))
    taken, results = run_of(taker, tmp_path, init_from=str(first.folder.parent))
    assert tasks == [1] and without_cost(results) == without_cost(expected)
    torch.testing.assert_close(learner_state(taken.learner), learner_state(trained.learner), rtol=0, atol=0)


@pytest.mark.parametrize("backbone", ["resnet20", "resnet18"])
@pytest.mark.parametrize(("giver", "taker"), [("icarl", "memo"), ("memo", "icarl"), ("der", "memo")])
def test_weights_mean_the_same_however_the_backbone_is_cut(giver, taker, backbone, tmp_path):
    networks = []
    for name, seed in ((giver, 1), (taker, 2)):
        learner = toy_experiment(name, tmp_path / name, convnet_type=backbone, seed=seed, stem="imagenet").check()
        learner.grow_network(learner.data.task(0))
        networks.append(learner.network)
    networks[1].load_numbered_state(networks[0].numbered_state())
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(networks[1](images), networks[0](images), rtol=0, atol=0)


@pytest.mark.parametrize("name", SHARING)
def test_who_says_cross_entropy_trains_the_first_task_with_nothing_else(name, tmp_path):
    experiment = toy_experiment(name, tmp_path)
    learner, task = experiment.check(), experiment.data.task(0)
    experiment.data.advance(task)
    learner.grow_network(task)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.tensor([0, 1, 1, 0]), torch.zeros(4, dtype=torch.bool))
    loss = sum(learner.compute_loss(batch, task).values())
    assert isinstance(learner.network, IncrementalNet)
    torch.testing.assert_close(loss, F.cross_entropy(learner.network(images), batch.labels), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keys", "difference"),
    [
        ({"init_lr": 0.07}, r"training.lr is 0.05 there, 0.07 here"),
        ({"batch_size": 4}, r"batch_size is 16 there, 4 here"),
        ({"init_cls": 3}, r"init_cls is 4 there, 3 here"),
        ({"class_order_seed": 2}, r"classes.0 is \"row \d\" there, \"row \d\" here"),
        ({"class_order_seed": 7, "seed": 8}, r"seed is 7 there, 8 here"),
        ({"val_share": 0.2}, r"images is .* there"),
        ({"convnet_type": "resnet32"}, r"convnet_type is \"resnet20\" there, \"resnet32\" here"),
        ({"stem": "imagenet"}, r"backbone.stem is \"cifar\" there, \"imagenet\" here"),
    ],
)
def test_weights_that_something_else_made_are_refused_with_the_first_difference(keys, difference, trained, tmp_path):
    with pytest.raises(CheckpointError, match=difference):
        toy_experiment("icarl", tmp_path, **{"init_cls": 4, "init_from": str(trained.folder), **keys}).check()
    assert not (tmp_path / "outputs" / "toy" / "seed_7").exists()


@pytest.mark.parametrize("keys", [{"increment": 1}, {"epochs": 9}, {"memory_size": 3}, {"limit_tasks": 1}, {"T": 3.0}])
def test_what_comes_after_the_first_task_does_not_matter(keys, trained, tmp_path):
    experiment = toy_experiment("icarl", tmp_path, **{"init_cls": 4, "init_from": str(trained.folder.parent), **keys})
    assert recipe_of(experiment.check()) == recipe_of(trained.learner)


def test_another_seed_of_a_run_is_looked_for_in_its_own_folder(trained, tmp_path):
    message = refusal(tmp_path, trained, seed=8)
    assert "seed_8/initial is not there" in message and "repeated with --overwrite" in message


@pytest.mark.parametrize("name", ["network.safetensors", "manifest.json"])
def test_damaged_weights_are_refused(name, tmp_path):
    first, _ = run_of("finetune", tmp_path / "first")
    path = first.folder / "initial" / name
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    assert "damaged" in refusal(tmp_path / "second", first)


def test_a_learner_with_a_first_task_of_its_own_names_those_that_can_share(tmp_path):
    with pytest.raises(ConfigError, match=f"'dddr' trains.*model_name={', '.join(SHARING)}"):
        toy_experiment("dddr", tmp_path, init_from="anywhere")  # said before data is looked for


@pytest.mark.parametrize(("folder", "words"), [("nowhere", "no such folder"), ("outputs/toy", "is this very run")])
def test_a_folder_that_is_no_other_run_is_refused(folder, words, tmp_path):
    toy_experiment("icarl", tmp_path).folder.mkdir()
    with pytest.raises(ConfigError, match=words):
        toy_experiment("icarl", tmp_path, init_from=str(tmp_path / folder)).check()


def test_a_run_whose_weights_were_taken_hands_them_on(trained, tmp_path, caplog):
    caplog.set_level("INFO", "reprise")
    taken, _ = run_of("wa", tmp_path, init_from=str(trained.folder))
    written = [json.loads((run.folder / "initial" / "manifest.json").read_text()) for run in (trained, taken)]
    assert written[0] == written[1] and written[0]["made_on"]["precision"] == "fp32"
    assert f"the weights are those of {trained.folder}/initial" in caplog.text


def test_a_source_learns_as_ever_beside_weights_that_another_precision_made(trained, tmp_path, caplog):
    _, results = run_of("finetune", tmp_path, source="ddpm", init_from=str(trained.folder), precision="bf16")
    assert "may move their last bits" in caplog.text
    assert results["finished"] and results["seconds"]["fit_source"] > 0


def test_a_source_that_takes_part_in_the_first_task_is_part_of_the_recipe(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Stored, "first_task_settings", lambda replay: {"num_steps": replay.config.num_steps})
    assert "synth.num_steps is null there, 3 here" in refusal(tmp_path, trained, source="ddpm")


def test_a_backbone_file_is_known_by_its_content_not_by_its_place(tmp_path):
    learner = toy_experiment("icarl", tmp_path).check()
    recipes = []
    for place, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / place).write_bytes(content)
        learner.config = learner.config.model_copy(update={"backbone_weights": str(tmp_path / place)})
        recipes.append(recipe_of(learner))
    assert recipes[0] == recipes[1] != recipes[2]


def test_where_the_first_task_came_from_is_no_part_of_a_runs_identity(tmp_path):
    configs = [build_config(toy_raw("icarl", tmp_path, **keys))[0] for keys in ({}, {"init_from": "outputs/other"})]
    assert configs[0].identity() == configs[1].identity()


def test_every_seed_is_looked_up_before_the_first_one_learns(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("learners.run.experiment.find_needs", lambda config: toy_dataset())
    monkeypatch.setattr("utils.run.log.log_to_console", lambda is_main: None)
    keys = {"init_cls": 4, "init_from": str(trained.folder.parent), "seed": [7, 8]}
    config, _ = build_config(toy_raw("icarl", tmp_path, **keys))
    with pytest.raises(CheckpointError, match="seed_8"):
        run_seeds(config, "toy", [], overwrite=False)
    assert not (tmp_path / "outputs").exists()
