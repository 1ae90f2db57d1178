"""What `--plan` says of the cost of a run, beside what the run then counts."""

import re

import pytest

from learners import LEARNERS
from learners.run.configure import build_config
from learners.run.experiment import Experiment
from learners.run.forecast import describe_cost
from learners.run.plan import describe_run
from tests.support.toy import TINY_LEARNERS, TINY_SOURCES, toy_experiment
from utils.data.datasets import load_dataset
from utils.run.folder import claim_folder, claim_machine
from utils.training.runtime import Runtime

TINY = {**TINY_SOURCES["ddpm"], "first_task_num_steps": 6, "num_steps": 9, "batch_size": 32, "sample_batch": 64}
SHORT = {"init_epoch": 1, "epochs": 1, "batch_size": 64, "w_kd": 1.0}
GUIDED = {"disjoint_classifier_init_num_steps": 5, "disjoint_classifier_num_steps": 6, "guid_generation_interval": 2,
          "classifier_scale_min_new": 0.2, "timestep_respacing": "ddim2", "batch_size": 32}  # fmt: skip
FEW_SHOT = {**TINY_LEARNERS["asp"], "batch_size": 16, "kshot": 5, "pretrain_epochs": 2, "tuned_epoch": 1}
EXEMPLARS = {"fixed_memory": True, "memory_per_class": 4, "init_epoch": 5, "epochs": 5}  # nearly all are shown
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def foreseen(lines):
    """Evaluations and FLOPs by part."""
    pattern = r"  (\w+): ([\d.e+]+) ?(\w?) evaluations, ([\d.e+]+) ?(\w?) FLOPs"
    found = filter(None, (re.fullmatch(pattern, line) for line in lines))
    return {part: (float(n) * UNITS[u], float(f) * UNITS[v]) for part, n, u, f, v in (one.groups() for one in found)}


def own(name, **keys):
    return {**TINY_SOURCES[name], "name": name, **keys}


@pytest.mark.parametrize(
    ("learner", "keys", "synth", "parts"),
    [
        ("asp", FEW_SHOT, own("small_ldm"), {"train", "fit", "draw"}),
        ("dddr", {"com_round": 2, "local_ep": 1}, {"syn_per_class": 20}, {"train", "fit", "draw"}),
        ("finetune", {**SHORT, "imb_factor": 0.5}, own("cbdm", fill=True), {"train", "fit", "rehearse", "draw"}),
        ("finetune", SHORT, own("small_d4m", stream="both", ipc=5, memory="distilled"), {"train", "fit", "draw"}),
        ("icarl", {**SHORT, **EXEMPLARS}, own("small_controlnet", augmentations_per_image=2), {"train", "fit", "draw"}),
        ("er", {**SHORT, "memory_size": 50}, own("small_d4m"), {"train", "fit", "draw"}),
        ("agem", {**SHORT, "memory_per_class": 10}, None, {"train"}),
        ("tdfa", SHORT, own("feature_diffusion"), {"train", "fit", "draw"}),
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
    if synth is not None:
        raw["synth"] = synth if "name" in synth else {"name": "ddpm", **TINY, **synth}
    config, _ = build_config(raw)
    plan = foreseen(describe_run(config, "tiny"))
    assert plan.keys() == parts and not any(tmp_path.iterdir())
    runtime = Runtime(config.device, config.precision)
    claim_machine(claim_folder(config, "tiny", overwrite=False), runtime)
    run = Experiment(config, "tiny", config.seed[0], load_dataset("digits", "data", offline=True), runtime)
    cost = run.learn_all()["cost"]["total"]
    for part in parts:
        assert plan[part] == pytest.approx((cost[part]["evaluations"], cost[part]["flops"]), rel=0.2), part


@pytest.mark.parametrize("name", LEARNERS.names())
def test_every_learner_has_a_plan_of_its_cost(name, tmp_path):
    lines = list(describe_cost(toy_experiment(name, tmp_path)))
    assert "not foreseen" not in "".join(lines)
    assert "train" in foreseen(lines)


@pytest.mark.parametrize("source", ["ldm", "controlnet", "d4m"])
def test_a_published_generator_is_not_built_for_a_plan(source, tmp_path):
    lines = list(describe_cost(toy_experiment("finetune", tmp_path, source)))
    assert lines[1:] == [f"  not foreseen of {source}, which is published and is not loaded for a plan"]


def test_a_generator_that_never_learns_draws_nothing(tmp_path):
    lines = list(describe_cost(toy_experiment("finetune", tmp_path, "ddpm", init_cls=6)))
    assert foreseen(lines).keys() == {"train"}


def test_a_plan_leaves_folders_alone_that_serve_other_runs(tmp_path):
    shared = {"feature_cache": str(tmp_path / "features"), "pretrain_epochs": 0}
    assert "not foreseen" not in "".join(describe_cost(toy_experiment("simplecil", tmp_path / "a", **shared)))
    synth = {**TINY_SOURCES["small_d4m"], "name": "small_d4m", "soft_labels": "stored", "teacher": "resnet20",
             "teacher_epochs": 1, "soft_labels_dir": str(tmp_path / "labels")}  # fmt: skip
    experiment = toy_experiment("distilled", tmp_path / "b", "small_d4m", synth=synth)
    assert "not foreseen" not in "".join(describe_cost(experiment))
    assert not (tmp_path / "features").exists() and not (tmp_path / "labels").exists()
