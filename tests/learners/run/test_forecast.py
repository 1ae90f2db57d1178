"""What `--plan` says of the cost of a run, beside what the run then counts."""

import re

import pytest

from learners import LEARNERS
from learners.run.configure import build_config
from learners.run.experiment import Experiment
from learners.run.forecast import num_shown
from learners.run.plan import describe_run
from tests.support.toy import TINY_SOURCES, toy_experiment
from utils.data.datasets import load_dataset
from utils.run.folder import claim_folder, claim_machine
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig

TINY = {**TINY_SOURCES["ddpm"], "first_task_num_steps": 6, "num_steps": 9, "batch_size": 32, "sample_batch": 64}
SHORT = {"init_epoch": 1, "epochs": 1, "batch_size": 64, "w_kd": 1.0}
GUIDED = {"disjoint_classifier_init_num_steps": 5, "disjoint_classifier_num_steps": 6, "guid_generation_interval": 2,
          "classifier_scale_min_new": 0.2, "timestep_respacing": "ddim2", "batch_size": 32}  # fmt: skip
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def foreseen(lines):
    """Evaluations and FLOPs by part."""
    pattern = r"  (\w+): ([\d.e+]+) ?(\w?) evaluations, ([\d.e+]+) ?(\w?) FLOPs"
    found = filter(None, (re.fullmatch(pattern, line) for line in lines))
    return {part: (float(n) * UNITS[u], float(f) * UNITS[v]) for part, n, u, f, v in (one.groups() for one in found)}


@pytest.mark.parametrize(
    ("learner", "keys", "synth", "parts"),
    [
        ("generative_replay", SHORT, {"syn_per_class": 20, "guidance": 2.0}, {"train", "fit", "draw"}),
        ("generative_replay", SHORT, {"rehearsal": "distil", "prediction": "v"}, {"train", "fit", "rehearse", "draw"}),
        ("generative_replay", SHORT, {"rehearsal": "trajectory", "teacher_steps": 4}, {"train", "fit", "draw"}),
        ("guide", {**GUIDED, "guide_gradient": "x0"}, {"rehearsal": "distil", "teacher_draws": "step"},
         {"train", "fit", "draw"}),
        ("guide", GUIDED, {"rehearsal": "own", "gr_n_generated_examples_per_task": 40},
         {"train", "fit", "rehearse", "draw"}),
    ],
)  # fmt: skip
def test_the_plan_foresees_what_a_run_on_digits_counts_within_a_fifth(learner, keys, synth, parts, tmp_path):
    raw = {"dataset": "digits", "init_cls": 4, "increment": 3, "convnet_type": "resnet20"}
    raw |= {**keys, "model_name": learner, "device": "cpu", "precision": "fp32", "output_dir": str(tmp_path)}
    config, _ = build_config({**raw, "synth": {"name": "ddpm", **TINY, **synth}})
    plan = foreseen(describe_run(config, "tiny"))
    assert plan.keys() == parts and not any(tmp_path.iterdir())
    runtime = Runtime(config.device, config.precision)
    claim_machine(claim_folder(config, "tiny", overwrite=False), runtime)
    run = Experiment(config, "tiny", config.seed[0], load_dataset("digits", "data", offline=True), runtime)
    cost = run.learn_all()["cost"]["total"]
    for part in parts:
        assert plan[part] == pytest.approx((cost[part]["evaluations"], cost[part]["flops"]), rel=0.2), part


@pytest.mark.parametrize("name", LEARNERS.names())
def test_every_learner_has_a_plan_of_its_cost_or_a_reason_for_having_none(name, tmp_path):
    experiment = toy_experiment(name, tmp_path)
    lines = list(describe_run_of(experiment))
    line = next(line for line in lines if line.startswith("  train: "))
    foreign = name in (
        "agem",
        "asp",
        "dddr",
        "er",
        "guide_joint",
        "logit_adjustment",
        "tdfa",
    )  # batches or a loss of their own
    assert ("not foreseen" in line) == foreign


def describe_run_of(experiment):
    from learners.run.forecast import describe_cost

    return describe_cost(experiment.check())


def test_a_source_that_cannot_be_foreseen_is_named(tmp_path):
    lines = list(describe_run_of(toy_experiment("finetune", tmp_path, "small_ldm")))
    assert lines[-1] == "  fit, draw: not foreseen of small_ldm" and "train" in foreseen(lines)


@pytest.mark.parametrize(
    ("length", "samples", "whole", "shown"),
    [
        ({"epochs": 2}, 50, False, 100),
        ({"steps": 6}, 50, False, 6 * 25),  # in batches of 32 and 18
        ({"steps": 6}, 50, True, 6 * 32),
        ({"steps": 6}, 20, False, 6 * 20),
    ],
)
def test_images_are_counted_as_often_as_they_are_shown(length, samples, whole, shown):
    assert num_shown(TrainConfig(0.1, **length), samples, 32, whole) == shown
