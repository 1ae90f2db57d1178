"""The class-balanced source in a run: its training, how its images fill a tail, its flags."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import main
from learners import LEARNERS
from learners.run.configure import build_config
from synth import SOURCES, train
from synth.cbdm.words import FLAGS
from synth.diffusion import noise_prediction_loss
from synth.requests import Requests
from tests.support.sources import fitted, make_source
from tests.support.toy import Interrupted, interrupt, tiny_source, toy_experiment
from utils.data.batches import Batch
from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.run.words import flat_keys, parse_flags, read_experiment

# ---------------------------------------------------------------------- learning


def batch(count=6):
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(count) % 6
    return Batch(images, labels, torch.zeros(count, dtype=torch.bool))


def source_with(folder, **keys):
    """A source in eval mode, so that dropout draws nothing."""
    return make_source("cbdm", folder, **keys)


def count_rows(source):
    """How many images each call of the network is given."""
    rows = []
    source.network.register_forward_hook(lambda network, given, out: rows.append(len(given[0])))
    return rows


def test_a_step_is_one_call_of_the_network_for_all_images_and_again_for_those_with_a_label(tmp_path):
    source = source_with(tmp_path, label_dropout=0.5)
    rows = count_rows(source)
    torch.manual_seed(1)
    terms = source.loss(batch())
    torch.manual_seed(1)
    torch.randint(1000, (6,)), torch.randn(6, 1, 8, 8)
    assert rows == [6 + int((torch.rand(6) >= 0.5).sum())] and set(terms) == {"mse", "balancing"}


def test_without_balancing_its_loss_is_that_of_a_ddpm(tmp_path):
    source = source_with(tmp_path, cb=False, label_dropout=0)
    rows, given = count_rows(source), batch()
    torch.manual_seed(1)
    terms = source.loss(given)
    torch.manual_seed(1)
    plain = noise_prediction_loss(lambda xt, t: source.network(xt, t, given.labels), source.process, given.images)
    assert set(terms) == {"mse"} and rows == [6, 6]
    assert_close(terms["mse"], plain)


def test_labels_are_hidden_one_by_one_or_a_whole_batch_at_once(tmp_path):
    torch.manual_seed(0)
    alone, together = (source_with(tmp_path, label_dropout=0.5, cfg_dropout=kind) for kind in ("sample", "batch"))
    assert {int(alone.hidden(8).sum()) for _ in range(20)} - {0, 8}
    counts = [int(together.hidden(8).sum()) for _ in range(200)]
    assert set(counts) == {0, 8} and 60 < counts.count(8) < 140


def test_its_prior_is_that_of_all_it_is_shown_and_uniform_when_it_is_tuned(tmp_path):
    labels, source = torch.tensor([0, 0, 0, 2]), source_with(tmp_path / "a")
    source.before_training(labels)
    assert source.prior.tolist() == [0.75, 0, 0.25, 0, 0, 0]
    fitted("cbdm", tmp_path / "b").save(tmp_path)
    tuned = source_with(tmp_path / "c", init_weights=str(tmp_path))
    tuned.before_training(labels)
    assert tuned.prior.tolist() == [0.5, 0, 0.5, 0, 0, 0]


def test_tuning_trains_the_steps_that_are_left_from_the_average_of_the_checkpoint(tmp_path):
    first = fitted("cbdm", tmp_path / "run")
    first.save(tmp_path)
    keys = {"init_weights": str(tmp_path), "start_step": 3, "first_task_num_steps": 7}
    tuned = source_with(tmp_path / "a", **keys)
    assert [tuned.train_config(index).steps for index in (0, 1)] == [4, 3] and "trained 4 steps" in tuned.describe()
    assert_close(tuned.network.state_dict(), first.generator.state_dict(), rtol=0, atol=0)
    assert fitted("cbdm", tmp_path / "b", **keys).fingerprint() != first.fingerprint()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        # The published command for tuning starts at 200,000 and ends at 100,001.
        ({"start_step": 200_000, "first_task_num_steps": 100_001, "init_weights": "x"},
         r"synth.first_task_num_steps=100001 is no step after synth.start_step=200000: .* give a larger"),
        ({"start_step": 2}, r"synth.start_step=2 .* synth.init_weights.* give both"),
        ({"omega": 1.5, "label_dropout": 0}, r"synth.omega=1.5 needs .* synth.label_dropout=0.1, or .* synth.omega=0"),
        ({"rehearsal": "distil"}, r"rehearsal='distil'.*'own'"),
        ({"prediction": "v"}, r"prediction='v'.*'epsilon'"),
        ({"guidance": 2.5}, r"unknown key 'guidance'"),  # omega = 1.5 says it
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        SOURCES["cbdm"].Config.parse({"name": "cbdm", **keys})


def test_augmented_images_come_with_their_numbers_and_drawn_ones_without(tmp_path):
    source = fitted("cbdm", tmp_path, augmentation_probability=0.5, flip=True)
    assert source.transform.flip is False  # the mirror is one of its numbers
    seen = []
    source.network.register_forward_hook(lambda network, given, out: seen.append(given[3:]))
    source.loss(batch())
    assert seen[0][0].shape[1] == 9 and seen[0][0][:, 1:].abs().max() > 0
    assert source.generate(Requests.of_classes([0], 2, (7, "cbdm", 0))).parts[0].images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "keys", [{"sampler": "ddim", "timestep_respacing": "ddim2"}, {"sampler": "dpmpp"}, {"sample_method": "uncond"}]
)
def test_every_sampler_draws_images_of_their_requests(keys, tmp_path):
    source = fitted("cbdm", tmp_path, omega=1.5, **keys)
    requests = Requests.of_classes([0, 1], 2, (7, "cbdm", 0))
    images = source.generate(requests).parts[0].images
    assert torch.equal(images, source.generate(requests).parts[0].images) and images.float().std() > 0


# ---------------------------------------------------------------------- filling the tail


def long_tail(folder, init_cls=6, learner="finetune", **synth):
    """Six classes with 10 to 1 images; the tail goes by original classes, which are shuffled."""
    synth = {**tiny_source("cbdm"), "fill": True, "fill_most": 4, **synth}
    keys = {"init_cls": init_cls, "increment": init_cls, "imb_factor": 0.1, "epochs": 1}
    return toy_experiment(learner, folder, synth=synth, **keys)


def lacking(counts):
    return [min(max(counts) - count, 4 * count) for count in counts]


def test_drawn_images_bring_every_class_up_to_the_largest_before_the_classifier_trains(tmp_path):
    experiment = long_tail(tmp_path)
    planned = experiment.check().replay.expected()
    results = experiment.learn_all()
    learner, counts = experiment.learner, experiment.data.class_counts
    assert sorted(counts, reverse=True) == [10, 6, 3, 2, 1, 1]
    shown = learner.present.counts(6).tolist()
    assert shown == [count + more for count, more in zip(counts, lacking(counts))]
    assert sorted(shown, reverse=True) == [10, 10, 10, 10, 5, 5]  # of one image at most four more
    folder = tmp_path / "outputs" / "syn_image_toy_seed7" / "task_0"
    drawn = [path for path in folder.rglob("*-*.png")]
    assert planned == len(drawn) == sum(lacking(counts)) and {path.parts[-3] for path in drawn} == {"fill"}
    assert (folder / "fill" / "manifest.json").exists() and (folder / "fill" / "preview.png").exists()
    assert results["memory_bytes"]["bank"] == 0  # nothing comes back to them
    assert len(learner.replay.newest(counts.index(3))) == 7


def test_old_classes_come_back_from_images_of_their_own(tmp_path):
    experiment = long_tail(tmp_path, init_cls=2)
    planned, results = experiment.check().replay.expected(), experiment.learn_all()
    counts, replay = experiment.data.class_counts, experiment.learner.replay
    assert experiment.learner.past.counts(6).tolist() == [3, 3, 3, 3, 0, 0]
    fills = [lacking(counts[start : start + 2]) for start in (0, 2, 4)]
    assert planned == sum(map(sum, fills)) + 4 * 3
    assert results["memory_bytes"]["bank"] == sum(
        path.stat().st_size for path in replay.folder.glob("task_[01]/[0-9]/*.png")
    )
    assert replay.source.fitted_classes == set(range(6)) and not replay.source.learns_after
    assert (experiment.folder / "rehearsal" / "task_1").exists()  # it learns before the classifier, so by itself


def test_a_run_that_was_killed_draws_nothing_twice_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole = long_tail(tmp_path / "whole")
    expected = whole.learn_all()["accuracy_matrix"]
    with monkeypatch.context() as patch:
        patch.setattr(LEARNERS["finetune"], "before_training", interrupt)
        with pytest.raises(Interrupted):
            long_tail(tmp_path / "killed").learn_all()
    monkeypatch.setattr(SOURCES["cbdm"], "generate", interrupt)
    killed = long_tail(tmp_path / "killed")
    assert killed.learn_all()["accuracy_matrix"] == expected
    for a, b in zip(whole.learner.network.state_dict().values(), killed.learner.network.state_dict().values()):
        assert torch.equal(a, b)


def test_sources_that_fill_can_be_kept_and_taken(tmp_path, monkeypatch):
    kept = long_tail(tmp_path / "a", keep_sources=True)
    accuracy = kept.learn_all()["accuracy_matrix"]
    monkeypatch.setattr(SOURCES["cbdm"], "learn", interrupt)
    taken = long_tail(tmp_path / "b", source_dir=str(kept.folder.parent))
    assert taken.learn_all()["accuracy_matrix"] == accuracy


@pytest.mark.parametrize(
    ("learner", "keys", "message"),
    [
        ("finetune", {"replay": "redraw"}, r"synth.replay='redraw': synth.fill=true .*leave one of the two out"),
        ("finetune", {"need_syn_imgs": False}, r"synth.need_syn_imgs=False: synth.fill=true"),
        ("finetune", {"fill": False, "sample_method": "uncond"}, r"synth.sample_method='uncond': .*use cfg or cond"),
        ("guide", {}, r"synth.name='cbdm'.*learner 'guide': choose another learner"),
    ],
)
def test_what_does_not_go_with_filling_is_refused(learner, keys, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        long_tail(tmp_path, learner=learner, **keys)


def test_without_filling_its_images_are_stored_or_redrawn_as_any_sources_are(tmp_path):
    for way in ("keep", "redraw"):
        experiment = long_tail(tmp_path / way, init_cls=2, fill=False, replay=way)
        assert type(experiment.check().replay).__name__ == {"keep": "Stored", "redraw": "Redrawn"}[way]


# ---------------------------------------------------------------------- its flags

BALANCED = {"data_type": "cifar100lt", "imb_factor": 0.01, "conditional": True, "cb": True, "tau": 1.0,
            "batch_size": 48, "total_steps": 300_001, "omega": 1.6, "num_images": 50_000, "weight": False}  # fmt: skip


def config_of(raw, overrides=()):
    config, unused = build_config(raw, list(overrides))
    assert unused == []
    return config


def test_flags_of_a_published_command_become_an_experiment():
    config = config_of(BALANCED)
    assert (config.dataset, config.imb_factor, config.init_cls, config.shuffle) == ("cifar100", 0.01, 100, False)
    defaults, given = SOURCES["cbdm"].Config(name="cbdm"), config.synth
    changed = {key: value for key, value in given if value != getattr(defaults, key)}
    assert changed == {
        "batch_size": 48, "first_task_num_steps": 300_001, "omega": 1.6, "fill": True, "counts": "reference",
        "cfg_dropout": "batch", "label_prior": "train",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ({"cfg": True, "cb": False}, "cb", False),
        ({"cfg": True, "cb": False}, "label_dropout", 0.1),
        ({"cb": False, "omega": 0}, "label_dropout", 0),  # then there is nothing to guide with
        ({"augm": "True"}, "augmentation_probability", 0.12),
        ({"ch": 64, "ch_mult": "1,2"}, "block_out_channels", [64, 128]),
        ({"ch_mult": [1, 3]}, "block_out_channels", [128, 384]),
        ({"attn": 2, "num_res_blocks": 3}, "attention_levels", [2]),
        ({"finetune": True, "ckpt_step": 200_000, "finetuned_logdir": "x"}, "label_prior", "uniform"),
        ({"finetune": True, "ckpt_step": 200_000, "finetuned_logdir": "x"}, "start_step", 200_000),
        ({"ckpt_step": 200_000}, "start_step", 0),  # it is of the evaluation
        ({"warmup": 10, "grad_clip": 2, "beta_T": 0.01}, "warmup_steps", 10),
    ],
)
def test_each_flag_has_its_key(flags, key, value):
    assert getattr(config_of({**BALANCED, **flags}).synth, key) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"conditional": False}, "conditional=False: only true is there"),
        ({"var_type": "fixedsmall"}, "var_type='fixedsmall': only fixedlarge is there"),
        ({"data_type": "cifar1000"}, "data_type='cifar1000': use cifar10, cifar10lt, cifar100, cifar100lt"),
        ({"cb": "perhaps"}, "cb='perhaps': use true or false"),
        ({"ch": "wide"}, "ch='wide': use a whole number"),
        ({"tau": "x"}, "synth.tau='x'"),
        ({"cb": False}, "synth.omega=1.6 needs a model that was trained without labels"),
        ({"total_stepss": 5}, "unknown key 'total_stepss'"),
        ({"dataset": "digits"}, "data_type='cifar100lt' and dataset='digits' are one key"),
        ({"synth": {"name": "ddpm"}}, "is of the source 'cbdm', and synth.name='ddpm'"),
        (
            {"finetune": True, "ckpt_step": 200_000, "finetuned_logdir": "x", "total_steps": 100_001},
            "synth.first_task_num_steps=100001 is no step after synth.start_step=200000",
        ),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        config_of({**BALANCED, **flags})


def test_overrides_win_in_either_spelling():
    ours = ["synth.first_task_num_steps=5", "synth.omega=0"]
    assert config_of(BALANCED, ours).synth.first_task_num_steps == 5
    assert config_of(BALANCED, ["total_steps=7", "data_type=cifar10lt"]).synth.first_task_num_steps == 7
    assert config_of(BALANCED, ["data_type=cifar10"]).imb_factor == 1


def test_no_key_of_ours_tells_of_these_flags():
    own = {key for name in LEARNERS.names() for key in LEARNERS[name].Config.model_fields} | {*RunConfig.model_fields}
    assert not own & {*FLAGS["telling"]}
    assert {flat_keys()[flag][0].source for flag in FLAGS["telling"]} == {"cbdm"}


FLAGFILE = """\
# A flagfile of absl
--T=1000
--attn=1

// its lists stand flag by flag
--ch=8
--ch_mult=1
--ch_mult=2
--data_type cifar10lt
--cb
--noparallel
--augm=False
--logdir=./logs/cifar10lt
--stderrthreshold=fatal
"""


def test_a_flagfile_is_read_as_it_is(tmp_path):
    flags = parse_flags(FLAGFILE)
    assert flags["ch_mult"] == [1, 2] and flags["data_type"] == "cifar10lt" and flags["T"] == 1000
    assert flags["cb"] is True and flags["parallel"] is False and flags["logdir"] == "./logs/cifar10lt"
    (tmp_path / "a.txt").write_text(FLAGFILE)
    config = config_of(read_experiment(tmp_path / "a.txt"))
    assert config.dataset == "cifar10" and config.synth.block_out_channels == [8, 16]


@pytest.mark.parametrize("line", ["total_steps=5", "--=5", "---x=5", "--total steps=5 = 6\n5", "--flagfile=b.txt"])
@pytest.mark.parametrize("command", [main.main, train.main])
def test_a_broken_flagfile_gets_one_message_and_exit_code_2(command, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(f"--cb\n{line}\n")
    assert command(["--flagfile", "a.txt"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a.txt" in said and ("write --key=value" in said or "flags of that file" in said)


def test_wrong_values_of_a_flagfile_are_named_with_a_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line, wanted in [("--batch_size=48\n--batch_size=64", "synth.batch_size"), ("--tau=-1", "synth.tau=-1")]:
        Path("a.txt").write_text(f"--cb\n{line}\n")
        for command in (main.main, train.main):
            assert command(["--flagfile", "a.txt"]) == 2
            assert wanted in capsys.readouterr().err


def test_both_commands_learn_from_a_flagfile(tmp_path, monkeypatch):
    """On digits: what our own keys say in the command wins over the flags."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(
        "--cb\n--ch=8\n--ch_mult=1\n--attn=0\n--num_res_blocks=1\n--total_steps=2\n--warmup=1\n--batch_size=16\n"
        "--dataset=digits\n--init_cls=10\n--increment=10\n--imb_factor=0.02\n--seed=3\n--T=2\n--img_size=8\n"
    )
    sets = [word for key in ("synth.norm_num_groups=4", "device=cpu") for word in ("--set", key)]
    assert train.main(["--flagfile", "a.txt", "--ckpt_save_dir", "fitted", *sets]) == 0
    assert json.loads(Path("fitted/source.json").read_text())["fitted_classes"] == list(range(10))
    short = ["init_epoch=1", "convnet_type=resnet20", "synth.fill_most=0.2"]
    assert main.main(["--flagfile", "a.txt", *sets, *(word for key in short for word in ("--set", key))]) == 0
    assert list(Path("outputs").glob("syn_image_a*/task_0/fill/*/*.png"))
