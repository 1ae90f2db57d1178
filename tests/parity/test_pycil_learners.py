"""PyCIL's learners by the numbers of the cards: PyCIL sections 7 and 10, ESCORT section 1.7 and check 10."""

from pathlib import Path

import pytest
import torch
from torch import nn

from learners import LEARNERS
from learners.expandable.network import ExpandableNet, split_last_stage
from learners.run.configure import build_config
from models.heads import LinearHead
from models.options import BackboneOptions
from models.timm_backbone import build_backbone
from utils.data.manager import Task
from utils.run.words import read_experiment

EXPERIMENTS = Path(__file__).parents[2] / "exps"


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "epochs", "milestones"),
    [
        ("finetune", 80, (40, 70)),
        ("replay", 70, (30, 50)),
        ("icarl", 170, (80, 120)),
        ("wa", 170, (60, 100, 140)),
        ("der", 170, (80, 120, 150)),
        ("memo", 170, (80, 120, 150)),
    ],
)
def test_experiment_files_hold_the_settings_of_pycil(name, epochs, milestones):
    config, unused = build_config(read_experiment(EXPERIMENTS / f"{name}.json"))
    learner = object.__new__(LEARNERS[name])
    learner.config = config
    first, later = (learner.train_config(Task(index, range(10 * index, 20), ())) for index in (0, 1))
    assert unused == [] and config.convnet_type == "resnet32" and config.batch_size == 128
    assert (first.epochs, first.lr, first.milestones, first.weight_decay) == (200, 0.1, (60, 120, 170), 5e-4)
    assert (later.epochs, later.lr, later.milestones, later.weight_decay) == (epochs, 0.1, milestones, 2e-4)
    assert {(each.schedule, each.lr_decay, each.momentum) for each in (first, later)} == {("step", 0.1, 0.9)}


def test_a_pycil_file_of_memo_runs_unchanged():
    pycil = {
        "prefix": "reproduce", "dataset": "cifar100", "memory_size": 2000, "memory_per_class": 20,
        "fixed_memory": False, "shuffle": True, "init_cls": 10, "increment": 10, "model_name": "memo",
        "convnet_type": "memo_resnet32", "train_base": True, "train_adaptive": False, "debug": False, "skip": False,
        "device": ["0"], "seed": [1993], "scheduler": "steplr", "init_epoch": 200, "t_max": None, "init_lr": 0.1,
        "init_weight_decay": 5e-4, "init_lr_decay": 0.1, "init_milestones": [60, 120, 170],
        "milestones": [80, 120, 150], "epochs": 170, "lrate": 0.1, "batch_size": 128, "weight_decay": 2e-4,
        "lrate_decay": 0.1, "alpha_aux": 1.0,
    }  # fmt: skip
    config, unused = build_config(pycil)
    assert unused == ["debug", "skip"]
    assert (config.convnet_type, config.t_max, config.train_base, config.alpha_aux) == ("resnet32", None, True, 1.0)


@pytest.mark.parametrize(
    ("name", "stem", "trunk", "last_stage"),
    [("resnet32", "cifar", 112_016, 351_488), ("resnet18", "imagenet", 2_782_784, 8_393_728)],
)
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
