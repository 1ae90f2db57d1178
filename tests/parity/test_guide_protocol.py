"""Numbers of GUIDE's card: shares of the batch (1b), P8 counts, P9 learning rates, P11 moving average, P12 sampling.

Its commands (section 5) are read as they are, with the defaults of its argument parser.
"""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import main
from learners.guide.learner import GUIDE
from learners.guide.replay import Guided
from learners.run.configure import build_config
from synth import build_source_config, train
from synth.command import build_fit_config, command_parser
from synth.ddpm.rehearsal import rehearse
from synth.ddpm.words import FLAGS
from synth.drawing import ImageFolder
from synth.requests import draw_labels
from tests.support.learned import learned_toy, snapshot
from tests.support.sources import write_folders
from tests.support.toy import toy_experiment, toy_images
from utils.run.errors import ConfigError
from utils.run.words import read_experiment
from utils.training.run import Run
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig

# GUIDE's published commands (card, section 5): data, number of tasks, what differs in the diffusion model's run A and
# what in the classifier's run B. What a command leaves out is the parser's default: an interval of 1.
PUBLISHED = {
    "guide_cifar10_2": ("CIFAR10", 2, (256, 100_000, 25_000), (256, "ddim50", 0.2, 0.01, 5000, 2000, None, True)),
    "guide_cifar10_5": ("CIFAR10", 5, (256, 50_000, 10_000), (256, "ddim50", 0.5, 0.01, 5000, 2000, 5, True)),
    "guide_cifar100_5": ("CIFAR100", 5, (256, 50_000, 10_000), (256, "ddim100", 0.5, 0.05, 10_000, 2000, 10, True)),
    "guide_cifar100_10": ("CIFAR100", 10, (256, 100_000, 5000), (256, "ddim100", 1.0, 0.05, 10_000, 2000, 10, True)),
    "guide_imagenet100_5": ("ImageNet100", 5, (100, 50_000, 26_000),
                            (100, "ddim50", 1.0, 0.001, 20_000, 20_000, 15, False)),
}  # fmt: skip


def settings(name):
    """What our file has to hold of the diffusion model's run and of the classifier's."""
    data, _, (batch, later, per_task), of_run_b = PUBLISHED[name]
    sampler, respacing, lr = ("ddim", "ddim250", 1e-4) if data == "ImageNet100" else ("ddpm", "1000", 2e-4)
    diffusion = {
        "batch_size": batch, "first_task_num_steps": 100_000, "num_steps": later, "sampler": sampler, "lr": lr,
        "gr_n_generated_examples_per_task": per_task, "timestep_respacing": respacing, "ema_rate": 0.9999,
    }  # fmt: skip
    batch, respacing, scale, lr, first, later, interval, augmentation = of_run_b
    return diffusion, {
        "batch_size": batch, "timestep_respacing": respacing, "scale": (scale, scale), "classifier_lr": lr,
        "disjoint_classifier_init_num_steps": first, "disjoint_classifier_num_steps": later,
        "guid_generation_interval": interval or 1, "classifier_augmentation": augmentation,
    }  # fmt: skip


def published(name):
    """The config of one of our files."""
    return build_config(read_experiment(Path(__file__).parents[2] / "exps" / f"{name}.json"))[0]


@pytest.mark.parametrize(("lr", "steps", "hold", "expected", "count"), [
    (0.01, 2000, 39, {1: 0.01, 38: 0.01, 39: 0.009805, 77: 0.009805, 78: 0.00961, 1989: 5.5e-5, 2000: 5.5e-5}, 51),
    (0.1, 5000, 39, {38: 0.1, 39: 0.09922, 4992: 1.6e-4, 5000: 1.6e-4}, 128),
    (0.05, 2000, 19, {18: 0.05, 19: 0.049525}, 105),
    (0.1, 5000, 97, {96: 0.1, 97: 0.09806}, 51),
])  # fmt: skip
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


def rehearsed(config, increment, num_tasks, folder, monkeypatch):
    """The labels that a diffusion model asks for of itself in every task but the first."""
    asked = []
    monkeypatch.setattr(ImageFolder, "draw", lambda folder, source, requests: asked.append(requests[0].labels))
    run, network = Run(folder, 0, Runtime(["cpu"])), torch.nn.Identity()
    source = SimpleNamespace(config=config, run=run, network=network, fingerprint=lambda: "")
    for task in range(1, num_tasks):
        source.fitted_classes = set(range(increment * task))
        rehearse(source, SimpleNamespace(index=task), num_images=1)
    return asked


@pytest.mark.parametrize(("name", "counts"), [
    ("guide_cifar10_5", [10240, 20224, 30208, 40192]), ("guide_cifar10_2", [25088]),
    ("guide_cifar100_10", [5120, 10240, 15104, 20224, 25088, 30208, 35072, 40192, 45056]),
    ("guide_imagenet100_5", [26000, 52000, 78000, 104000]),
])  # fmt: skip
def test_p8_self_rehearsal_keeps_its_surplus(name, counts, tmp_path, monkeypatch):
    config = published(name)
    asked = rehearsed(config.synth, config.increment, len(counts) + 1, tmp_path, monkeypatch)
    assert list(map(len, asked)) == counts
    assert [int(labels.max()) + 1 for labels in asked] == [config.increment * task for task in range(1, len(asked) + 1)]


@pytest.mark.parametrize(("per_task", "batch", "counts"), [(32, 64, [32, 64, 128, 128]), (64, 64, [64, 128])])
def test_p8_self_rehearsal_draws_less_than_a_batch_as_it_is(per_task, batch, counts, tmp_path, monkeypatch):
    """GUIDE draws min(n, B) images at once until it has n = per_task * task of them."""
    own = {"counts": "reference", "batch_size": batch, "gr_n_generated_examples_per_task": per_task}
    config = build_source_config({"name": "ddpm", **own})
    assert list(map(len, rehearsed(config, 2, len(counts) + 1, tmp_path, monkeypatch))) == counts


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
    experiment = learned_toy("guide", tmp_path, "ddpm", use_new_grad=bends, limit_tasks=2)
    learner, graphs = experiment.learner, []
    learner.network.train().zero_grad()
    before = snapshot(learner.network)
    learner.replay.source.generator.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    replay = learner.replay.draw_step(experiment.data.task(1), step=0)
    assert learner.network.training and all(value.requires_grad for value in learner.network.parameters())
    assert all(value.grad is None for value in learner.network.parameters())
    assert_close(learner.network.state_dict(), before, rtol=0, atol=0)
    assert len(replay) == 8 and set(replay.labels.tolist()) <= {0, 1}  # (16 // 2) * 1
    assert graphs and set(graphs) == {bends}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_the_readmes_settings(name):
    config, (diffusion, classifier) = published(name), settings(name)
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


# ---------------------------------------------------------------------- commands as they are


def flags(line):
    """`--flag value` of a command line as keys."""
    words = line.split()
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


RUN_A = """--cl_method generative_replay --train_with_disjoint_classifier False --embedding_kind concat_time_1hot
    --train_aug True --seed 0 --log_interval 1000 --wandb_experiment_name a"""
RUN_B = """--cl_method generative_replay_disjoint_classifier_guidance --train_with_disjoint_classifier True
    --use_old_grad False --use_new_grad True --guid_to_new_classes True --embedding_kind concat_time_1hot
    --use_ddim True --classifier_init_lr 0.1 --seed 0 --log_interval 200 --diffusion_pretrained_dir results/a"""
IMAGENET = """--attention_resolutions 32,16,8 --resblock_updown True --use_new_attention_order True
    --use_scale_shift_norm True --num_channels 192 --num_head_channels 64 --lr 1e-4"""


def diffusion_command(name):
    data, num_tasks, (batch, later, per_task), _ = PUBLISHED[name]
    respacing = "ddim250 --use_ddim True " + IMAGENET if data == "ImageNet100" else "1000 --use_ddim False"
    return flags(f"""{RUN_A} --dataset {data} --num_tasks {num_tasks} --batch_size {batch} --num_steps {later}
        --first_task_num_steps 100000 --save_interval {later} --timestep_respacing {respacing}
        --gr_n_generated_examples_per_task {per_task}""")


def classifier_command(name):
    data, num_tasks, _, (batch, respacing, scale, lr, first, later, interval, augmentation) = PUBLISHED[name]
    return flags(f"""{RUN_B} --dataset {data} --num_tasks {num_tasks} --batch_size {batch} --classifier_lr {lr}
        --timestep_respacing {respacing} --classifier_scale_min_new {scale} --classifier_scale_max_new {scale}
        --disjoint_classifier_init_num_steps {first} --disjoint_classifier_num_steps {later}
        --classifier_augmentation {augmentation} {f"--guid_generation_interval {interval}" if interval else ""}
        {IMAGENET if data == "ImageNet100" else ""}""")


def fit_config(raw, *overrides):
    """What `synth.train` makes of a file."""
    return build_fit_config(raw, command_parser("train", "").parse_args([*overrides]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_are_our_files(name):
    both = {**classifier_command(name), "synth": diffusion_command(name)}
    config, unused = build_config(both)
    assert set(unused) <= {"log_interval", "use_new_attention_order"}
    # They say themselves that they flip, and that 1000 time steps are all.
    said = {"flip": True, "source_dir": "results/a", "train_respacing": config.synth.train_respacing}
    expected = published(name).identity()
    assert config.identity() == {**expected, "synth": {**expected["synth"], **said}}
    assert config.synth.train_respacing == config.synth.timestep_respacing == settings(name)[0]["timestep_respacing"]
    alone = fit_config(diffusion_command(name))
    assert alone.synth.training_settings() == config.synth.training_settings()
    assert (alone.data_name, alone.init_cls, alone.increment, alone.shuffle, alone.seed) == (
        config.data_name, config.init_cls, config.increment, False, [0])  # fmt: skip


SMALL_A = RUN_A + " --dataset CIFAR10 --num_tasks 5 --first_task_num_steps 2 --num_steps 2"
SMALL_B = """--cl_method generative_replay_disjoint_classifier_guidance --classifier_init_lr 0.1 --dataset CIFAR10
    --num_tasks 5 --classifier_augmentation False --disjoint_classifier_init_num_steps 4
    --disjoint_classifier_num_steps 2"""


def test_flags_that_a_command_leaves_out_have_the_defaults_of_guides_parser_and_in_our_files_ours():
    config, _ = build_config({**flags(SMALL_B), "synth": flags(SMALL_A)})
    of_run_b = {
        "batch_size": 64, "classifier_lr": 0.05, "use_ddim": False, "timestep_respacing": "", "use_new_grad": False,
        "guid_to_new_classes": False, "use_old_grad": False, "trim_logits": True, "guid_generation_interval": 1,
        "classifier_weight_decay": 5e-4, "convnet_type": "preact_resnet18", "init_cls": 2, "increment": 2,
    }  # fmt: skip
    of_run_a = {
        "batch_size": 64, "gr_n_generated_examples_per_task": 32, "sampler": "ddpm", "timestep_respacing": "",
        "train_respacing": "", "lr": 2e-4, "weight_decay": 0, "ema_rate": 0.9999, "dropout": 0.1,
        "block_out_channels": [128, 256, 256, 256], "layers_per_block": 3, "attention_resolutions": [16, 8],
        "rehearsal": "own", "counts": "reference",
    }  # fmt: skip
    assert {key: getattr(config, key) for key in of_run_b} == of_run_b
    assert {key: getattr(config.synth, key) for key in of_run_a} == of_run_a
    ours = {"model_name": "guide", "dataset": "cifar10", "init_cls": 2, "increment": 2, "classifier_scale_min_new": 1}
    config, _ = build_config({**ours, "synth": {"name": "ddpm"}})
    assert (config.batch_size, config.classifier_lr, config.use_new_grad, config.use_ddim) == (256, 0.01, True, True)
    assert (config.synth.batch_size, config.synth.sampler, config.synth.rehearsal) == (256, "ddim", "replay")


@pytest.mark.parametrize("place", ["top", "synth"])
def test_every_other_flag_of_the_parser_is_idle_or_has_its_published_value_alone(place):
    def identity(flag, value):
        both = {**flags(SMALL_B), "synth": flags(SMALL_A)}
        (both if place == "top" else both["synth"])[flag] = value
        return build_config(both)[0].identity()

    plain = identity("seed", 0)
    for flag in {*FLAGS["idle"]} - {"train_with_disjoint_classifier"}:
        assert identity(flag, "False") == plain
    for flag, values in FLAGS["fixed"].items():
        if flag != "cl_method":
            assert identity(flag, str(values[0])) == plain
        with pytest.raises(ConfigError, match=f"{flag}='other': only .* is there, as published"):
            identity(flag, "other")
    program = FLAGS["classifier" if place == "top" else "diffusion"]
    for flag in program["idle"]:
        assert identity(flag, "False") == plain
    with pytest.raises(ConfigError, match=f"train_with_disjoint_classifier='{place == 'synth'}': only"):
        identity("train_with_disjoint_classifier", str(place == "synth"))


@pytest.mark.parametrize(("of_run_b", "of_run_a", "said"), [
    ("--num_tasks 3", "--num_tasks 3", "num_tasks='3': give init_cls and increment"),
    ("--num_tasks 2", "", "synth.num_tasks='5' and num_tasks='2' are one key"),
    ("--seed 0", "--seed 1", "synth.seed='1' and seed='0' are one key"),
    ("--dataset ImageNet100", "--dataset ImageNet100", "synth.num_head_channels is missing: GUIDE's num_heads=4"),
    ("", "--attention_resolutions 32", "synth.num_head_channels is missing"),
    ("--num_steps 3", "", "num_steps='3' and synth.num_steps='2' are one key"),
    ("", "--diffusion_steps 20", "synth.diffusion_steps=20: use 21 or more"),
    ("--use_new_grad True", "", "use_new_grad needs classifier_scale_min_new"),
])  # fmt: skip
def test_commands_that_cannot_be_meant_are_refused(of_run_b, of_run_a, said):
    with pytest.raises(ConfigError, match=said):
        build_config({**flags(SMALL_B + " " + of_run_b), "synth": flags(SMALL_A + " " + of_run_a)})


@pytest.mark.parametrize("left_out", ["classifier_init_lr", "disjoint_classifier_num_steps", "num_tasks"])
def test_what_has_no_known_default_has_to_be_said(left_out):
    command, message = flags(SMALL_B), "num_tasks='': give" if left_out == "num_tasks" else f"has to say {left_out}"
    del command[left_out]
    with pytest.raises(ConfigError, match=message):
        build_config({**command, "synth": {**flags(SMALL_A), left_out: None}})
    with pytest.raises(ConfigError, match=r"has to say synth.num_steps, synth.train_aug"):
        fit_config({**flags(SMALL_A), "num_steps": None, "train_aug": None})


def test_the_two_commands_run_one_after_the_other(tmp_path, monkeypatch):
    """The classifier's says how the network is built that it loads, and nothing of how that was trained."""
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "data" / "rows", toy_images(3, 4, "commands"), ["a", "b", "c", "d"])
    network = """ --num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --num_head_channels 32
        --attention_resolutions 4 --timestep_respacing ddim2 --batch_size 4 --dataset rows"""
    ours = {"init_cls": 2, "increment": 2, "device": "cpu", "num_tasks": None}
    run_a = {**flags(SMALL_A + network + " --gr_n_generated_examples_per_task 3"), **ours}
    run_b = {**flags(SMALL_B + network), **ours, "convnet_type": "resnet20", "diffusion_pretrained_dir": "results/a"}
    Path("a.json").write_text(json.dumps(run_a))
    Path("b.json").write_text(json.dumps(run_b))
    assert train.main(["--config", "a.json", "--ckpt_save_dir", "results/a"]) == 0
    assert main.main(["--config", "b.json"]) == 0
    assert len(list(Path("results/a/rehearsal/task_1").glob("*/*.png"))) == 3  # fewer than a batch
    config = json.loads(Path("outputs/b/config.json").read_text())["config"]
    assert config["synth"]["num_steps"] == 2 and config["synth"]["train_respacing"] == "ddim2"
    assert len(json.loads(Path("outputs/b/seed_1993/results.json").read_text())["accuracy_matrix"]) == 2
