"""DER and MEMO: their loss against the formula, and what of the network a run changes and keeps."""

import pytest
import torch

from learners import LEARNERS
from learners.run.configure import build_config
from learners.run.predict import load_learner
from tests.support.learned import count, learned_toy, snapshot
from tests.support.toy import toy_experiment, toy_raw
from utils.data.batches import Batch

BOTH = ["der", "memo"]
LABELS = torch.tensor([0, 3, 2, 1])


class FixedNetwork:
    """Answers four classes, two of them old, and the auxiliary head's three."""

    logits, auxiliary = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).split([4, 3], dim=1)

    def __call__(self, images):
        return self.logits

    def both_logits(self, images):
        return self.logits, self.auxiliary


def terms_of(name, folder, index, **keys):
    """The terms of a task where the network gives fixed logits."""
    experiment = toy_experiment(name, folder, **keys)
    learner = experiment.check()
    learner.network = FixedNetwork()
    batch = Batch(torch.zeros(4, 3, 8, 8), LABELS, LABELS < 0)
    return learner.compute_loss(batch, experiment.data.task(index))


@pytest.mark.parametrize(
    ("name", "keys", "weight"), [("der", {}, 1), ("memo", {}, 1), ("memo", {"alpha_aux": 0.3}, 0.3)]
)
def test_loss_is_cross_entropy_over_all_classes_and_over_the_new_ones_against_the_past(name, keys, weight, tmp_path):
    log_all, log_new = FixedNetwork.logits.log_softmax(1), FixedNetwork.auxiliary.log_softmax(1)
    expected = {"cross_entropy": -log_all[range(4), [0, 3, 2, 1]].mean()}
    torch.testing.assert_close(terms_of(name, tmp_path / "first", 0, **keys), expected)
    expected["auxiliary"] = -weight * log_new[range(4), [0, 2, 1, 0]].mean()
    torch.testing.assert_close(terms_of(name, tmp_path / "later", 1, **keys), expected)


@pytest.fixture(scope="module", params=BOTH)
def learned(request, tmp_path_factory):
    """A finished run, and its branches as they were after the training of every task."""
    seen, after_training = [], LEARNERS[request.param].after_training

    def remember(self, task):
        seen.append([snapshot(branch) for branch in self.network.backbone.branches])
        after_training(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LEARNERS[request.param], "after_training", remember)
        return learned_toy(request.param, tmp_path_factory.mktemp(request.param), epochs=1), seen


def test_old_branches_keep_every_bit_through_later_tasks_and_the_auxiliary_head_goes(learned):
    experiment, seen = learned
    assert [len(branches) for branches in seen] == [1, 2, 3]
    torch.testing.assert_close(seen[2][:2], [seen[0][0], seen[1][1]], rtol=0, atol=0)
    assert not experiment.learner.network.backbone.branches[0].training
    assert not [key for key in experiment.learner.network.state_dict() if "auxiliary" in key]


def test_a_finished_run_can_be_asked_about_other_images(learned):
    experiment, _ = learned
    loaded, names = load_learner(experiment.folder)
    images = experiment.data.test_images(range(6))
    expected = experiment.learner.predict(images)
    torch.testing.assert_close(loaded.predict(images), expected, rtol=0, atol=0)
    assert expected["nme"].shape == (24, 6) and len(names) == 6


@pytest.mark.parametrize(("keys", "learns"), [
    ({}, [True, False, True]),  # trunk, old and new last stage
    ({"train_base": False}, [False, False, True]),
    ({"train_adaptive": True}, [True, True, True]),
])  # fmt: skip
def test_memo_trains_what_its_keys_say(keys, learns, tmp_path):
    experiment = toy_experiment("memo", tmp_path, **keys)
    learner = experiment.check()
    for index in (0, 1):
        learner.grow_network(experiment.data.task(index))
    parts = (learner.network.backbone.trunk, *learner.network.backbone.branches)
    assert [all(p.requires_grad for p in part.parameters()) for part in parts] == learns


@pytest.mark.parametrize(("written", "name", "stem"), [
    *((written, "resnet32", "auto") for written in ("memo_resnet32", "MEMO_ResNet32", "resnet32", None)),
    *((written, "resnet18", "imagenet") for written in ("memo_resnet18", "resnet18")),  # ESCORT writes no prefix
    ("vit_base_patch16_224_memo", "vit_base_patch16_224", "auto"),  # PILOT
])  # fmt: skip
def test_the_word_memo_is_dropped_and_a_resnet18_has_the_stem_for_photographs(written, name, stem, tmp_path):
    config, _ = build_config(toy_raw("memo", tmp_path, convnet_type=written))
    assert (config.convnet_type.lower(), config.stem) == (name, stem)
    given, _ = build_config(toy_raw("memo", tmp_path, convnet_type=written, stem="cifar"))
    assert given.stem == "cifar"


def test_memos_resnet18_has_the_large_stem_on_small_images_as_in_pycil(tmp_path):
    trunk = toy_experiment("memo", tmp_path, convnet_type="memo_resnet18").check().network.backbone.trunk
    assert next(trunk.parameters()).shape == (64, 3, 7, 7)
    assert count(trunk) == 2_782_784  # ESCORT's card, check 10


def test_a_cosine_schedule_of_memo_ends_where_t_max_says(tmp_path):
    learner = toy_experiment("memo", tmp_path, scheduler="cosine", epochs=8, t_max=4).check()
    rates = [learner.train_config(learner.data.task(1)).learning_rate(epoch, 1) for epoch in range(8)]
    assert (rates[0], rates[2], rates[4]) == pytest.approx((0.05, 0.025, 0))
    assert rates[5:] == pytest.approx(rates[3:0:-1])  # and rises again


@pytest.mark.parametrize("name", [*BOTH, "icarl"])
def test_a_class_that_lost_its_exemplars_keeps_no_mean_of_an_older_network(name, tmp_path):
    experiment = toy_experiment(name, tmp_path, init_cls=3, increment=3, epochs=1)
    save = experiment._save

    def lose_class_zero(task):
        while experiment.learner.memory.counts().get(0):
            experiment.learner.memory.drop_last(0)
        save(task)

    experiment._save = lose_class_zero
    experiment.learn_all()
    assert experiment.learner.predict(experiment.data.test_images(range(6))).keys() == {"cnn"}
