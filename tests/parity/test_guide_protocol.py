"""Numbers of GUIDE's card: shares of the batch (1b), P8 counts, P9 learning rates, P11 moving average, P12 sampling."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from learners.guide.learner import GUIDE
from learners.guide.replay import Guided
from learners.run.configure import build_config
from synth.ddpm.source import DDPM
from synth.drawing import ImageFolder
from synth.requests import draw_labels
from tests.support.toy import toy_experiment
from utils.run.words import read_experiment
from utils.training.run import Run
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig


# GUIDE's published commands (card, section 5) as our files should hold them.
def classifier(batch, respacing, scale, lr, first, later, interval, augmentation=True):
    return {
        "batch_size": batch, "timestep_respacing": respacing, "scale": (scale, scale), "classifier_lr": lr,
        "disjoint_classifier_init_num_steps": first, "disjoint_classifier_num_steps": later,
        "guid_generation_interval": interval, "classifier_augmentation": augmentation,
    }  # fmt: skip


def diffusion(batch, later, per_task, sampler="ddpm", respacing="1000", lr=2e-4):
    return {
        "batch_size": batch, "first_task_num_steps": 100_000, "num_steps": later, "sampler": sampler, "lr": lr,
        "gr_n_generated_examples_per_task": per_task, "timestep_respacing": respacing, "ema_rate": 0.9999,
    }  # fmt: skip


# The settings of the classifier's run and of the diffusion model's.
PUBLISHED = {
    "guide_cifar10_2": (classifier(256, "ddim50", 0.2, 0.01, 5000, 2000, 1), diffusion(256, 100_000, 25_000)),
    "guide_cifar10_5": (classifier(256, "ddim50", 0.5, 0.01, 5000, 2000, 5), diffusion(256, 50_000, 10_000)),
    "guide_cifar100_5": (classifier(256, "ddim100", 0.5, 0.05, 10_000, 2000, 10), diffusion(256, 50_000, 10_000)),
    "guide_cifar100_10": (classifier(256, "ddim100", 1.0, 0.05, 10_000, 2000, 10), diffusion(256, 100_000, 5000)),
    "guide_imagenet100_5": (classifier(100, "ddim50", 1.0, 0.001, 20_000, 20_000, 15, augmentation=False),
                            diffusion(100, 50_000, 26_000, "ddim", "ddim250", 1e-4)),
}  # fmt: skip


def published(name):
    """The config of one of our files."""
    return build_config(read_experiment(Path(__file__).parents[2] / "exps" / f"{name}.json"))[0]


@pytest.mark.parametrize(
    ("lr", "steps", "hold", "expected", "count"),
    [
        (0.01, 2000, 39, {1: 0.01, 38: 0.01, 39: 0.009805, 77: 0.009805, 78: 0.00961, 1989: 5.5e-5, 2000: 5.5e-5}, 51),
        (0.1, 5000, 39, {38: 0.1, 39: 0.09922, 4992: 1.6e-4, 5000: 1.6e-4}, 128),
        (0.05, 2000, 19, {18: 0.05, 19: 0.049525}, 105),
        (0.1, 5000, 97, {96: 0.1, 97: 0.09806}, 51),
    ],
)
def test_p9_the_rate_falls_at_the_ends_of_epochs_alone(lr, steps, hold, expected, count):
    config = TrainConfig(lr=lr, steps=steps, schedule="linear", hold=hold)
    rates = [config.learning_rate(step, steps_per_epoch=1) for step in range(steps)]
    assert {step: rates[step - 1] for step in expected} == pytest.approx(expected, rel=1e-9)
    assert sum(before != after for before, after in pairwise(rates)) == count


@pytest.mark.parametrize(("name", "images", "hold"), [("guide_cifar10_5", 10000, 39), ("guide_cifar100_10", 5000, 19),
                                                      ("guide_cifar10_2", 25000, 97)])  # fmt: skip
def test_p9_an_epoch_is_counted_in_full_batches(name, images, hold):
    config, classes = published(name), published(name).increment
    data = SimpleNamespace(class_counts=[images // classes] * 2 * classes)
    task = SimpleNamespace(index=1, num_old=classes, num_seen=2 * classes)
    training = GUIDE.train_config(SimpleNamespace(config=config, upper_bound=False, data=data), task)
    assert (training.hold, training.steps, training.lr) == (hold, 2000, config.classifier_lr)


@pytest.mark.parametrize(("name", "counts"), [
    ("guide_cifar10_5", [10240, 20224, 30208, 40192]), ("guide_cifar10_2", [25088]),
    ("guide_cifar100_10", [5120, 10240, 15104, 20224, 25088, 30208, 35072, 40192, 45056]),
    ("guide_imagenet100_5", [26000, 52000, 78000, 104000]),
])  # fmt: skip
def test_p8_self_rehearsal_keeps_its_surplus(name, counts, tmp_path, monkeypatch):
    config, asked = published(name), []
    monkeypatch.setattr(ImageFolder, "draw", lambda folder, source, requests: asked.append(requests[0].labels))
    run = Run(tmp_path, 0, Runtime(["cpu"]))
    source = SimpleNamespace(config=config.synth, run=run, network=torch.nn.Identity(), fingerprint=lambda: "")
    for task in range(1, len(counts) + 1):
        source.fitted_classes = set(range(config.increment * task))
        DDPM._rehearse(source, SimpleNamespace(index=task), num_images=1)
    assert list(map(len, asked)) == counts
    assert [int(labels.max()) + 1 for labels in asked] == [config.increment * task for task in range(1, len(asked) + 1)]


@pytest.mark.parametrize(("name", "draws"), [*zip(PUBLISHED, (2000, 400, 200, 200, 1334))])
def test_p8_replay_is_drawn_so_often_in_a_task(name, draws):
    config = published(name)
    replay = Guided(config, None, SimpleNamespace(num_tasks=2), None, "")
    assert replay.expected() == draws * (config.batch_size // 2)


def test_labels_are_drawn_one_by_one_or_in_equal_counts():
    generator = torch.Generator().manual_seed(0)
    by_chance = draw_labels([0, 1, 2], 3000, generator, balanced=False).bincount()
    assert by_chance.tolist() != [1000] * 3 and by_chance.min() > 900
    equal = draw_labels([4, 5, 6], 11, generator, balanced=True).bincount()[4:]
    assert equal.sum() == 11 and equal.min() == 3 and equal.max() == 4


@pytest.mark.parametrize("shares", [[(256, 0), (128, 128), (85, 170)], [(100, 0), (50, 50), (33, 66)]])
def test_the_real_share_of_a_batch_shrinks_with_the_task(shares, tmp_path):
    learner = toy_experiment("guide", tmp_path, "ddpm", batch_size=shares[0][0]).check()
    learner.replay.draw = lambda task, requests: requests.labels
    for task, share in zip(learner.data.tasks(), shares, strict=True):
        learner.present = learner.data.train_images(task)
        batches = learner.batches(task)
        assert (batches.loading.batch_size, len(batches.draw(0)) if task.index else 0) == share


@pytest.mark.parametrize("bends", [True, False])
def test_p12_a_graph_is_built_where_something_bends_alone_and_the_classifier_stays_as_it_was(bends, tmp_path):
    experiment = toy_experiment("guide", tmp_path, "ddpm", use_new_grad=bends, limit_tasks=2)
    experiment.learn_all()
    learner, graphs = experiment.learner, []
    learner.network.train().zero_grad()
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    learner.replay.source.generator.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    replay = learner.replay.draw_step(experiment.data.task(1), step=0)
    assert learner.network.training and all(value.requires_grad for value in learner.network.parameters())
    assert all(value.grad is None for value in learner.network.parameters())
    assert_close(learner.network.state_dict(), before, rtol=0, atol=0)
    assert len(replay) == 8 and set(replay.labels.tolist()) <= {0, 1}  # (16 // 2) * 1
    assert graphs and set(graphs) == {bends}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_the_readmes_settings(name):
    config, (classifier, diffusion) = published(name), PUBLISHED[name]
    assert {key: getattr(config, key) for key in classifier} == classifier
    assert {key: getattr(config.synth, key) for key in diffusion} == diffusion
    assert (config.classifier_init_lr, config.classifier_weight_decay, config.eval_logits) == (0.1, 5e-4, "all")


def test_guides_own_flags_are_read():
    flags = {
        "batch_size": 100, "timestep_respacing": "ddim50", "use_ddim": "True", "depth": 18, "log_interval": 200,
        "embedding_kind": "concat_time_1hot", "classifier_scale_min_new": "1.0", "classifier_scale_max_new": "1.0",
        "train_with_disjoint_classifier": "True", "num_res_blocks": 2, "diffusion_pretrained_dir": "somewhere",
        "use_scale_shift_norm": True, "attention_resolutions": "32,16,8", "lr": 0.1,
    }  # fmt: skip
    diffusion = {
        "name": "ddpm", "use_ddim": "False", "timestep_respacing": "1000", "num_channels": 192,
        "channel_mult": "1,2,3,4", "num_head_channels": 64, "resblock_updown": True, "save_interval": 50000,
    }  # fmt: skip
    data = {"model_name": "guide", "dataset": "cifar10", "init_cls": 2, "increment": 2}
    config, unused = build_config({**data, **flags, "synth": diffusion})
    assert unused == ["log_interval", "train_with_disjoint_classifier"]
    assert config.scale == (1.0, 1.0) and config.timestep_respacing == "ddim50"
    synth = config.synth
    assert (synth.sampler, synth.timestep_respacing, synth.resample) == ("ddpm", "1000", "resnet")
    assert synth.block_out_channels == [192, 384, 576, 768] and synth.attention_resolutions == [32, 16, 8]
    assert (synth.layers_per_block, synth.attention_head_dim, synth.source_dir) == (2, 64, "somewhere")
