"""GUIDE's published commands (card, section 5) as our files should hold them."""

from pathlib import Path

from learners.run.configure import build_config
from utils.run.words import read_experiment

EXPERIMENTS = Path(__file__).parents[2] / "exps"


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


PUBLISHED = {
    "guide_cifar10_2": {
        "classifier": classifier(256, "ddim50", 0.2, 0.01, 5000, 2000, 1),
        "diffusion": diffusion(256, 100_000, 25_000),
    },
    "guide_cifar10_5": {
        "classifier": classifier(256, "ddim50", 0.5, 0.01, 5000, 2000, 5),
        "diffusion": diffusion(256, 50_000, 10_000),
    },
    "guide_cifar100_5": {
        "classifier": classifier(256, "ddim100", 0.5, 0.05, 10_000, 2000, 10),
        "diffusion": diffusion(256, 50_000, 10_000),
    },
    "guide_cifar100_10": {
        "classifier": classifier(256, "ddim100", 1.0, 0.05, 10_000, 2000, 10),
        "diffusion": diffusion(256, 100_000, 5000),
    },
    "guide_imagenet100_5": {
        "classifier": classifier(100, "ddim50", 1.0, 0.001, 20_000, 20_000, 15, augmentation=False),
        "diffusion": diffusion(100, 50_000, 26_000, "ddim", "ddim250", 1e-4),
    },
}


def published(name):
    """The config of one of our files."""
    return build_config(read_experiment(EXPERIMENTS / f"{name}.json"))[0]
