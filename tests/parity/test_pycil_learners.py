"""PyCIL's learners by the numbers of the cards: PyCIL sections 7 and 10, ESCORT section 1.7 and check 10."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from learners import LEARNERS
from learners.expandable.network import ExpandableNet, split_last_stage
from learners.run.configure import build_config
from models.heads import LinearHead
from models.options import BackboneOptions
from models.timm_backbone import build_backbone
from tests.support.learned import count
from utils.data.manager import Task
from utils.run.words import read_experiment

EXPERIMENTS = Path(__file__).parents[2] / "exps"


STEP, COSINE = partial(MultiStepLR, gamma=0.1), CosineAnnealingLR


@pytest.mark.parametrize(("name", "keys", "first", "later"), [
    ("lwf", {}, (200, STEP, [60, 120, 160]), (250, STEP, [60, 120, 180, 220])),
    ("memo", {}, (200, STEP, [60, 120, 170]), (170, STEP, [80, 120, 150])),
    # Of a cosine, t_max is the length in later tasks alone.
    ("memo", {"scheduler": "cosine", "t_max": 170}, (200, COSINE, 200), (170, COSINE, 170)),
    ("memo", {"scheduler": "cosine", "t_max": 100, "init_epoch": 50}, (50, COSINE, 50), (170, COSINE, 100)),
])  # fmt: skip
def test_rates_of_every_epoch_are_those_of_pycils_schedulers(name, keys, first, later):
    config, _ = build_config({**read_experiment(EXPERIMENTS / f"{name}.json"), **keys})
    learner = object.__new__(LEARNERS[name])
    learner.config = config
    for index, (epochs, schedule, length) in enumerate((first, later)):
        ours = learner.train_config(Task(index, range(10 * index, 20), ()))
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        scheduler, rates = schedule(optimizer, length), []
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step(), scheduler.step()
        assert [ours.learning_rate(epoch, 1) for epoch in range(ours.epochs)] == pytest.approx(rates, abs=1e-9)


@pytest.mark.parametrize(("name", "epochs", "milestones"), [
    ("finetune", 80, (40, 70)), ("replay", 70, (30, 50)), ("icarl", 170, (80, 120)), ("wa", 170, (60, 100, 140)),
    ("der", 170, (80, 120, 150)), ("memo", 170, (80, 120, 150)),
])  # fmt: skip
def test_experiment_files_hold_the_settings_of_pycil(name, epochs, milestones):
    config, unused = build_config(read_experiment(EXPERIMENTS / f"{name}.json"))
    learner = object.__new__(LEARNERS[name])
    learner.config = config
    first, later = (learner.train_config(Task(index, range(10 * index, 20), ())) for index in (0, 1))
    assert unused == [] and config.convnet_type == "resnet32" and config.batch_size == 128
    assert (first.epochs, first.lr, first.milestones, first.weight_decay) == (200, 0.1, (60, 120, 170), 5e-4)
    assert (later.epochs, later.lr, later.milestones, later.weight_decay) == (epochs, 0.1, milestones, 2e-4)
    assert {(each.schedule, each.lr_decay, each.momentum) for each in (first, later)} == {("step", 0.1, 0.9)}


@pytest.mark.parametrize(("name", "stem", "trunk", "last_stage"), [
    ("resnet32", "cifar", 112_016, 351_488), ("resnet18", "imagenet", 2_782_784, 8_393_728),
])  # fmt: skip
def test_memo_shares_and_adds_the_published_number_of_parameters(name, stem, trunk, last_stage):
    with torch.device("meta"):
        parts = split_last_stage(build_backbone(name, BackboneOptions(stem=stem)))
    assert [count(part) for part in parts] == [trunk, last_stage]


def test_der_has_the_parameters_that_were_counted_in_the_reference():
    with torch.device("meta"):
        backbone = build_backbone("resnet18", BackboneOptions(stem="imagenet_small"))
    net = ExpandableNet(nn.Identity(), backbone, LinearHead(512), train_trunk=True, train_old=False)
    totals = []
    for num_classes in (6, 9, 12):
        net.grow(num_classes)
        totals.append(count(net))
    unused = 512 * 7 + 7  # the reference makes an auxiliary head in the first task, too, and leaves it idle
    assert totals == [11_175_501 - unused, 22_348_941, 33_526_992]
