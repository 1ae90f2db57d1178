"""Learners on a backbone that never changes: where it comes from, what is kept of it, and what stands on it."""

import re
from pkgutil import resolve_name

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from learners.run.configure import build_config
from learners.run.state import learner_state
from tests.support.learned import learned_toy, snapshot
from tests.support.tiny_asp import tiny_vit_file
from tests.support.toy import TINY_LEARNERS, TINY_SOURCES, Interrupted, toy_experiment, toy_raw
from utils.run.errors import ConfigError, RepriseError

EXACT = {"rtol": 0, "atol": 0}


def make_learner(folder, name="simplecil", **keys):
    return toy_experiment(name, folder, **keys).check()


@pytest.mark.parametrize(("pretrain_epochs", "changes"), [(2, True), (0, False)])
def test_pretraining_changes_the_backbone_in_the_first_task_alone(pretrain_epochs, changes, tmp_path):
    learner = make_learner(tmp_path, pretrain_epochs=pretrain_epochs)
    states = [snapshot(learner.frozen.network)]
    for task in learner.data.tasks():
        learner.learn_task(task)
        states.append(snapshot(learner.frozen.network))
    assert torch.equal(states[0]["conv.weight"], states[1]["conv.weight"]) != changes
    assert_close(states[changes:-1], states[changes + 1 :], **EXACT)
    assert not any(parameter.requires_grad for parameter in learner.frozen.network.parameters())


@pytest.mark.parametrize(("pretrain_epochs", "from_file", "saved"), [
    (0, True, False),  # the file has it
    (1, True, True),  # trained here
    (0, False, True),  # drawn at random: it is nowhere else
])  # fmt: skip
def test_a_backbone_is_saved_as_memory_or_counted_as_frozen(pretrain_epochs, from_file, saved, tmp_path):
    keys = TINY_LEARNERS["asp"]
    file = tiny_vit_file(tmp_path, keys["convnet_type"], **keys["backbone_args"]) if from_file else None
    learner = make_learner(tmp_path, "asp", pretrain_epochs=pretrain_epochs, backbone_weights=file)
    keys = learner.network.state_dict().keys()
    assert any(key.startswith("backbone.vit.") for key in keys) == saved
    assert (sum(line.nbytes for line in learner.carried() if line.frozen) == 0) == saved
    assert learner.frozen.learned == learner_state(learner)[1]["holds_backbone"] == saved


def test_features_of_an_earlier_block_are_its_class_token_behind_the_last_norm(tmp_path):
    whole = make_learner(tmp_path / "whole", **TINY_LEARNERS["asp"])
    cut = make_learner(tmp_path / "cut", **TINY_LEARNERS["asp"], features_from=0)
    images, vit = whole.data.test_images([0]), whole.frozen.network.network
    x = whole.transform.test(images.parts[0].images)
    tokens = vit.blocks[0](vit._pos_embed(vit.patch_embed(x)))
    assert_close(cut.extract_features(images), vit.norm(tokens)[:, 0])
    assert_close(whole.extract_features(images), vit.norm(vit.blocks[1](tokens))[:, 0])


@pytest.mark.parametrize(("keys", "message"), [
    ({**TINY_LEARNERS["asp"], "features_from": 2}, "features_from=2: this ViT has the blocks 0 to 1"),
    ({"features_from": 0}, "features_from=0 asks for a class token, which CifarResNet has not: leave it out, or"),
    ({"features_from": 0, "convnet_type": "mobilenetv3_small_050", "pretrained": False},
     "features_from=0 asks for a class token, which MobileNetV3 has not"),
])  # fmt: skip
def test_a_block_that_is_not_there_is_refused(keys, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_learner(tmp_path, **keys)


@pytest.mark.parametrize("name", ["simplecil", "finetune"])
def test_a_network_sees_images_in_the_size_that_the_config_says(name, tmp_path):
    learner = make_learner(tmp_path, name, image_size=12)
    images = learner.data.test_images([0]).parts[0].images
    assert learner.transform.test(images).shape == (4, 3, 12, 12)


def test_features_are_known_by_the_network_that_made_them_and_not_by_its_weights_alone(tmp_path):
    keys = TINY_LEARNERS["asp"]
    pooled = {**keys, "backbone_args": {**keys["backbone_args"], "global_pool": "avg", "fc_norm": False}}
    others = [keys, pooled, {**pooled, "features_from": 1}, {**keys, "normalize": "0.5"}]
    made_by = {make_learner(tmp_path / str(place), **other).features_made_by() for place, other in enumerate(others)}
    assert len(made_by | {make_learner(tmp_path / "asp", "asp", **keys).features_made_by()}) == 5


def test_where_features_are_kept_makes_no_other_run(tmp_path):
    kept = build_config(toy_raw("simplecil", tmp_path, feature_cache="somewhere"))[0]
    assert kept.identity() == build_config(toy_raw("simplecil", tmp_path))[0].identity()


def test_a_place_in_which_nothing_can_be_kept_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RepriseError, match=r"feature_cache='.*/file'"):
        make_learner(tmp_path, feature_cache=str(tmp_path / "file"))


def test_another_run_takes_features_from_the_folder(tmp_path, monkeypatch):
    keys = {"pretrain_epochs": 0, "feature_cache": str(tmp_path / "features"), "precision": "fp32"}
    first = learned_toy("simplecil", tmp_path / "first", **keys)
    monkeypatch.setattr("learners.base.map_images", None)  # whoever computes fails
    second = learned_toy("fecam", tmp_path / "second", **keys, tukey=False)
    assert len(list((tmp_path / "features").iterdir())) == 12  # training and test images of six classes
    assert_close(*(each.learner.network.head.weight for each in (first, second)), **EXACT)


@pytest.mark.parametrize(("normalize", "black", "white"), [
    ("none", 0.0, 1.0), ("0.5", -1.0, 1.0), ("dataset", -0.2 / 0.3, 0.8 / 0.3),
])  # fmt: skip
def test_pixels_reach_the_backbone_as_normalize_says(normalize, black, white, tmp_path):
    transform = make_learner(tmp_path, normalize=normalize).transform
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    expected = torch.tensor([black, white]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert_close(transform.test(pixels), expected)
    assert_close(transform.train(pixels, torch.Generator()), expected)


def test_simplecil_decides_by_the_cosine_to_the_mean_feature(tmp_path):
    learner = make_learner(tmp_path, init_cls=6)
    task = next(iter(learner.data.tasks()))
    learner.learn_task(task)
    train, test = learner.data.train_images(task), learner.data.test_images(range(6))
    features = learner.extract_features(train)
    means = torch.stack([features[train.labels == label].mean(0) for label in range(6)])
    cosines = F.cosine_similarity(learner.extract_features(test)[:, None], means[None], dim=2)
    assert_close(learner.predict(test)["cnn"], cosines)


def test_simplecil_ends_the_same_however_classes_are_cut_into_tasks(tmp_path):
    weights = []
    for size in (1, 2, 6):
        keys = {"init_cls": size, "increment": size, "pretrain_epochs": 0, "precision": "fp32"}
        weights.append(learned_toy("simplecil", tmp_path / str(size), **keys).learner.network.head.weight.data)
    assert_close(weights[:2], [weights[2]] * 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("place", "steps"), [
    ("learners.frozen_backbone._classify", 3),  # pretraining
    ("learners.asp.learner.ASP.base_loss", 3),  # first epoch
    ("learners.asp.learner.ASP.base_loss", 9),  # second epoch, whose anchors were chosen by features that are gone
    ("learners.dddr.separate_replay.SeparateReplay.compute_loss", 3),
])  # fmt: skip
def test_asp_goes_on_in_the_middle_of_an_epoch_with_the_same_bits(place, steps, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "reprise")
    keys = {"pretrain_epochs": 2, "batch_size": 4, "increment": 4, "checkpoint_every": 2}
    whole = learned_toy("asp", tmp_path / "whole", **keys)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, place, steps)
        toy_experiment("asp", tmp_path / "broken", **keys).learn_all()
    broken = learned_toy("asp", tmp_path / "broken", **keys)
    assert "continues at step" in (broken.folder / "log.txt").read_text()
    assert_close(broken.learner.network.state_dict(), whole.learner.network.state_dict(), **EXACT)


def stop_after(patch, place, steps):
    """Let a loss be computed so many times, then raise."""
    module, _, name = place.rpartition(".")
    original, left = resolve_name(place), iter(range(steps))

    def limited(*args):
        if next(left, None) is None:
            raise Interrupted
        return original(*args)

    patch.setattr(resolve_name(module), name, limited)


@pytest.mark.parametrize(("fs_epoch", "warned"), [(0, True), (1, False)])
def test_asp_says_if_replay_has_nothing_to_act_on(fs_epoch, warned, tmp_path):
    experiment = learned_toy("asp", tmp_path, "ddpm", fs_epoch=fs_epoch, pretrain_epochs=0, increment=4)
    assert ("replay changes nothing" in (experiment.folder / "log.txt").read_text()) == warned


def test_asp_wants_a_source_to_refresh_old_prototypes_from(tmp_path):
    with pytest.raises(ConfigError, match=r"refresh_old_prototypes=True.*add a synth"):
        build_config(toy_raw("asp", tmp_path, refresh_old_prototypes=True))
    synth = {"name": "ddpm", **TINY_SOURCES["ddpm"]}
    assert build_config(toy_raw("asp", tmp_path, refresh_old_prototypes=True, synth=synth))[0].refresh_old_prototypes


def test_asp_refuses_a_backbone_without_tokens(tmp_path):
    with pytest.raises(ConfigError, match="prompts need a vision transformer"):
        make_learner(tmp_path, "asp", convnet_type="resnet20", backbone_args={})
