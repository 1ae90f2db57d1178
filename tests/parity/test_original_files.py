"""The experiment files of PyCIL, PILOT, FSCIL-ASP and ESCORT for the learners that are here: read, and started."""

import json

import pytest
import torch

from learners.run.configure import build_config
from main import run_name
from models.options import BackboneOptions
from models.timm_backbone import build_backbone
from tests.support.toy import TINY_LEARNERS, experiment_of
from utils.run.words import read_experiment

HEAD = {
    "prefix": "reproduce", "dataset": "cifar100", "memory_size": 2000, "memory_per_class": 20, "fixed_memory": False,
    "shuffle": True, "init_cls": 10, "increment": 10, "convnet_type": "resnet32", "device": ["0", "1", "2", "3"],
    "seed": [1993],
}  # fmt: skip
SCHEDULE = {
    "init_epoch": 200, "init_lr": 0.1, "init_milestones": [60, 120, 170], "init_lr_decay": 0.1,
    "init_weight_decay": 5e-4, "epochs": 170, "lrate": 0.1, "milestones": [80, 120, 150], "lrate_decay": 0.1,
    "batch_size": 128, "weight_decay": 2e-4,
}  # fmt: skip
OF_MEMO = {"train_base": True, "train_adaptive": False, "debug": False, "skip": False, "scheduler": "steplr",
           "t_max": None, "alpha_aux": 1.0}  # fmt: skip
PYCIL = {
    **{name: HEAD for name in ("finetune", "replay", "icarl", "wa", "der", "lwf")},
    "memo": {**HEAD, **SCHEDULE, **OF_MEMO, "convnet_type": "memo_resnet32"},
    "simplecil": {
        **HEAD, "memory_size": 0, "memory_per_class": 0, "convnet_type": "cosine_resnet32", "init_epoch": 200,
        "init_lr": 0.1, "init_milestones": [60, 120, 170], "init_lr_decay": 0.1, "init_weight_decay": 5e-4,
        "batch_size": 128, "weight_decay": 2e-4, "min_lr": 0,
    },
}  # fmt: skip
VIT = {**HEAD, "dataset": "cifar224", "backbone_type": "pretrained_vit_b16_224", "device": ["0"]}
del VIT["convnet_type"]
TRAINED = {**VIT, **SCHEDULE, "num_workers": 8, "T": 2}
PILOT = {
    **{name: TRAINED for name in ("finetune", "icarl", "der")},
    "memo": {**TRAINED, **OF_MEMO, "backbone_type": "vit_base_patch16_224_memo"},
    "simplecil": {
        **VIT, "memory_size": 0, "memory_per_class": 0, "tuned_epoch": 20, "init_lr": 0.01, "batch_size": 128,
        "weight_decay": 0.0005, "min_lr": 1e-8, "ffn_num": 64, "optimizer": "sgd", "vpt_type": "shallow",
        "prompt_token_num": 5, "print_forget": True,
    },
}  # fmt: skip
ASP = {  # card, section 4
    "prefix": "asp", "model_prefix": "asp", "memory_size": 0, "memory_per_class": 0, "fixed_memory": False,
    "shuffle": False, "kshot": 5, "backbone_type": "pretrained_vit_b16_224_vpt", "device": ["0"], "vpt_type": "Deep",
    "TIP_init": "zero", "avg_alpha": 0.8, "EMA_beta": 0.99, "perturb_var": 1, "anchor_lambda": 0.1,
    "kl_weight": 0.001, "optimizer": "sgd", "init_lr": 0.01, "min_lr": 0, "tuned_epoch": 20, "fs_epoch": 0,
    "fs_lr": 0.001, "fs_batch_size": 16, "top_k": 5, "base_model_path": "none",
}  # fmt: skip
LARGE = {"init_cls": 100, "increment": 10, "weight_decay": 0.005, "batch_size": 24}
FSCIL = {
    "cifar224": {"init_cls": 60, "increment": 5, "weight_decay": 5e-4, "batch_size": 48, "prompt_token_num": 6},
    "cub": {**LARGE, "prompt_token_num": 6},
    "imagenetr": {**LARGE, "prompt_token_num": 20, "seed": [2025]},
}
ESCORT = {  # card, section 4: its method is off in the file as it comes
    "dataset": "Food101", "augmentation_prob": 0.0, "augmentations_per_image": 1, "memory_per_class": 20,
    "real_per_class": 20, "syn_per_class": 0, "init_cls": 51, "increment": 5, "memory_size": None,
    "fixed_memory": True, "shuffle": True, "convnet_type": "resnet18", "device": ["0", "1"], "seed": [1993],
    "model_seed": 1, "batch_size": 128, "num_workers": 8,
}  # fmt: skip
FILES = [
    *((f"pycil_{name}", {"model_name": name, **keys}) for name, keys in PYCIL.items()),
    *((f"pilot_{name}", {"model_name": name, **keys}) for name, keys in PILOT.items()),
    *((f"asp_{name}", {"model_name": "asp", "dataset": name, "seed": [2024], **ASP, **FSCIL[name]}) for name in FSCIL),
    *((f"escort_{name}", {"model_name": name, **ESCORT}) for name in ("der", "icarl", "wa", "memo")),
]
# What nothing here reads: dead there as well, of other learners, or of a network that a timm name says whole.
UNUSED = {
    "pycil_memo": ["debug", "skip"], "pycil_simplecil": ["min_lr", "weight_decay"],
    "pilot_finetune": ["T"], "pilot_der": ["T"], "pilot_memo": ["T", "debug", "skip"],
    "pilot_simplecil": ["ffn_num", "min_lr", "optimizer", "print_forget", "prompt_token_num", "tuned_epoch",
                        "vpt_type", "weight_decay"],
}  # fmt: skip
TINY = ("init_cls=2", "increment=2", "limit_tasks=2", "device=cpu", "precision=fp32", "num_workers=0", "init_epoch=1",
        "epochs=1", "tuned_epoch=1", "kshot=0", "memory_size=8", "memory_per_class=2", "real_per_class=2")  # fmt: skip


@pytest.mark.parametrize(("name", "raw"), FILES)
def test_a_file_of_the_originals_is_read_with_all_its_values(name, raw, tmp_path):
    (tmp_path / f"{name}.json").write_text(json.dumps(raw))
    config, unused = build_config(read_experiment(tmp_path / f"{name}.json"))
    flat = {"augmentation_prob", "augmentations_per_image", "real_per_class", "syn_per_class"}  # ESCORT's, which is off
    expected = ["base_model_path", "model_prefix", "top_k"] if name.startswith("asp") else UNUSED.get(name, [])
    assert unused == expected and run_name(tmp_path / f"{name}.json", config, [])
    for key in raw.keys() - {*unused, *flat, "backbone_type", "convnet_type"}:
        assert raw[key] is None or getattr(config, key) == raw[key], key
    network = raw.get("convnet_type", raw.get("backbone_type"))
    assert config.convnet_type == network.removeprefix("memo_").removesuffix("_memo")


@pytest.mark.parametrize(("name", "raw"), [file for file in FILES if file[0] not in ("escort_icarl", "escort_wa")])
def test_a_file_of_the_originals_learns_two_tasks(name, raw, tmp_path):
    if "backbone_type" in raw:  # a tiny ViT for the published one
        network = ["pretrained=false", f"backbone_args={json.dumps(TINY_LEARNERS['asp']['backbone_args'])}"]
    else:  # a shallow network for a deep one
        network = [] if "cosine" in raw["convnet_type"] else ["convnet_type=resnet20"]
    overrides = [*TINY, f"output_dir={tmp_path}", *network]
    experiment = experiment_of(build_config(raw, overrides)[0])
    learner = experiment.check()
    for task in experiment.data.tasks():
        learner.learn_task(task)
    assert learner.predict(experiment.data.test_images(range(4)))["cnn"].shape == (16, 4)


def test_pycils_simplecil_trains_the_first_task_under_a_cosine_head_and_normalises(tmp_path, monkeypatch):
    config, _ = build_config({"model_name": "simplecil", **PYCIL["simplecil"]}, [*TINY, f"output_dir={tmp_path}"])
    learner, trained = experiment_of(config).check(), []
    original = learner.pretrain
    monkeypatch.setattr(learner, "pretrain", lambda *given: trained.append(given) or original(*given))
    first, later = (learner.train_config(learner.data.task(index)) for index in (0, 1))
    before = learner.frozen.network.conv.weight.clone()
    task = next(iter(learner.data.tasks()))
    learner.learn_task(task)
    assert (first.epochs, first.lr, first.milestones, first.weight_decay) == (1, 0.1, (60, 120, 170), 5e-4)
    assert later.epochs == 0 and config.normalize == "dataset" and config.batch_size == 128
    ((_, schedule, batch_size, head),) = trained
    assert (schedule, batch_size, head.__name__) == (first, 128, "CosineHead")
    assert not torch.equal(before, learner.frozen.network.conv.weight)


def test_pilots_simplecil_keeps_its_weights_whatever_epochs_the_file_has(tmp_path, caplog):
    caplog.set_level("INFO", "reprise")
    network = build_backbone("cosine_resnet32", BackboneOptions())
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    weights = f"backbone_weights={tmp_path / 'weights.pth'}"
    raw = {"model_name": "simplecil", **PYCIL["simplecil"]}
    learner = experiment_of(build_config(raw, [*TINY, f"output_dir={tmp_path}", weights])[0]).check()
    learner.learn_task(next(iter(learner.data.tasks())))
    assert torch.equal(learner.frozen.network.conv.weight, network.conv.weight)
    assert "init_epoch=1 trains nothing" in caplog.text
