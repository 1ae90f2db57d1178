"""Whether the measures of `synth.evaluate` follow a generator as it learns: `python -m tests.benchmarks.evaluate`.

A class-conditional DDPM on digits, after 50, 150, 400 and 1,200 steps, seen by a classifier that was trained on all
real digits. The rate is constant, so a shorter training is the beginning of the longer ones. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import main
from synth import evaluate, train
from utils.run.files import read_json

STEPS = (50, 150, 400, 1200)
# Which learns slowly enough to be looked at on its way.
GENERATOR = {"block_out_channels": [32, 64], "batch_size": 64, "lr": 0.002, "lr_schedule": "constant", "ema_rate": 0.99,
             "prediction": "epsilon", "loss_weighting": "none", "timestep_respacing": "ddim50"}  # fmt: skip
SHOWN = ("FD", "KD", "precision", "recall", "F_8", "F_1/8", "IS", "nearest", "CAS")
ONE_TASK = ["--set", "init_cls=10", "--set", "increment=10"]
CONFIG = str(Path(__file__).parents[2] / "exps" / "digits.json")


def train_judge(folder: Path) -> None:
    """Train the classifier of all real digits that sees the images."""
    flags = ["--set", "model_name=finetune", "--set", "synth=null", "--set", f"output_dir={folder}"]
    require(main.main(["--config", CONFIG, "--name", "judge", *ONE_TASK, *flags]))


def train_generator(fitted: Path, **keys: Any) -> None:
    """Train a generator of all digits with these keys of `synth`."""
    require(train.main(["--config", CONFIG, *ONE_TASK, *overrides(keys), "--ckpt_save_dir", str(fitted)]))


def measure(folder: Path, fitted: Path, drawn: Path, cas_epochs: int, **keys: Any) -> dict[str, dict]:
    """Draw 70 images per class with these keys of `synth`, and measure them."""
    require(evaluate.main(["--ckpt", str(fitted), "--output_dir", str(drawn), "--num_samples", "70", "--extractor",
                           str(folder / "judge"), "--cas_epochs", str(cas_epochs), *overrides(keys)]))  # fmt: skip
    return read_json(drawn / evaluate.MEASURES, "")["overall"]


def overrides(keys: dict[str, Any]) -> list[str]:
    return [word for key, value in keys.items() for word in ("--set", f"synth.{key}={value}")]


def require(code: int) -> None:
    if code:
        sys.exit(code)


def run(folder: Path, cas_epochs: int) -> None:
    """Print a row per length of training."""
    train_judge(folder)
    found = {}
    for steps in STEPS:
        train_generator(folder / f"{steps}_steps", first_task_num_steps=steps, **GENERATOR)
        found[steps] = measure(folder, folder / f"{steps}_steps", folder / f"{steps}_images", cas_epochs)
    print("steps", *SHOWN, sep="\t")
    for steps, measures in found.items():
        print(steps, *(f"{measures[name]['value'] or float('nan'):.4g}" for name in SHOWN), sep="\t")
    print("real", *(f"{measures[name]['real'] or float('nan'):.4g}" for name in SHOWN), sep="\t")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/evaluate"))
    parser.add_argument("--cas_epochs", type=int, default=30)
    arguments = parser.parse_args()
    run(arguments.folder, arguments.cas_epochs)
