"""Long tails: what happens to rare classes in the data, in the training and in the results."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from learners.run.configure import build_config
from tests.support.learned import learned_toy, snapshot
from tests.support.toy import toy_dataset, toy_experiment, toy_raw
from utils.data.batches import ImageBatches, Loading, class_shares
from utils.data.manager import DataManager, Split
from utils.data.transforms import classifier_transform
from utils.run.errors import ConfigError

TAIL = {"imb_factor": 0.1, "init_cls": 6, "increment": 6, "shuffle": False}  # 10, 6, 3, 2, 1 and 1 images
COUNTS = [10, 6, 3, 2, 1, 1]


def counts_seen(batches, epochs):
    labels = torch.cat([batch.labels for epoch in range(epochs) for batch in batches.epoch(epoch)])
    return torch.bincount(labels, minlength=6).double()


# ---------------------------------------------------------------------- data and results


def test_a_class_that_a_tail_leaves_empty_is_named_with_a_factor_that_works():
    data = toy_dataset()
    with pytest.raises(ConfigError, match=r"imb_factor=0.01 leaves class 'row 3' no image: use at least 0.1$") as error:
        DataManager(data, Split(6, 6, imb_factor=0.01))
    least = float(re.search(r"[\d.]+$", str(error.value))[0])
    assert min(DataManager(data, Split(6, 6, imb_factor=least)).class_counts) == 1


def test_a_long_tailed_stream_has_many_medium_and_few_over_all_its_tasks(tmp_path):
    data = toy_dataset(per_class=120)
    experiment = toy_experiment(
        "finetune", tmp_path, data=data, imb_factor=0.1, init_epoch=1, epochs=1, loss_over="all"
    )
    groups, counts = experiment.learn_all()["long_tail"], experiment.data.class_counts
    assert sorted(counts, reverse=True) == [120, 75, 47, 30, 19, 12]
    accuracies = experiment.results.class_accuracies[-1]
    of = {"many": [120], "medium": [75, 47, 30], "few": [19, 12]}
    for name, members in of.items():
        expected = [accuracy for accuracy, count in zip(accuracies, counts) if count in members]
        assert groups[name] == pytest.approx(sum(expected) / len(expected))


def test_a_balanced_draw_shows_every_class_equally_often_and_is_the_same_each_time():
    data = DataManager(toy_dataset(), Split(6, 6, shuffle=False, imb_factor=0.1))
    images = data.train_images(next(data.tasks()))
    loading = Loading(classifier_transform(toy_dataset()), 8, (7, 0, "head"), torch.device("cpu"), balanced=True)
    batches = ImageBatches(images, None, loading)
    seen = counts_seen(batches, epochs=200)
    assert seen.sum() == 200 * sum(COUNTS) and data.class_counts == COUNTS
    assert (seen / seen.mean() - 1).abs().max() < 0.15
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(batches.epoch(3), batches.epoch(3)))


def test_weights_share_out_what_a_class_has():
    shares = class_shares(torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 1.0, 0.5, 0.5]))
    assert_close(shares, torch.tensor([0.4, 0.4, 0.2, 1.0], dtype=torch.float64))


# ---------------------------------------------------------------------- crt


def test_crt_trains_as_finetune_and_then_moves_the_head_alone(tmp_path):
    plain = learned_toy("finetune", tmp_path / "plain", **TAIL).learner.network
    crt = learned_toy("crt", tmp_path / "crt", **TAIL).learner.network
    assert_close(snapshot(crt.backbone), snapshot(plain.backbone), rtol=0, atol=0)
    assert not torch.equal(crt.head.weight, plain.head.weight)


def test_crt_without_replay_leaves_old_rows_alone(tmp_path):
    experiment, rows = toy_experiment("crt", tmp_path, limit_tasks=2, weight_decay=0.0), []
    learner = experiment._make_learner()
    for task in experiment.data.tasks():
        learner.learn_task(task)
        rows.append(learner.network.head.weight.detach().clone())
    assert torch.equal(rows[1][:2], rows[0]) and not torch.equal(rows[1][2:], torch.zeros(2, 64))


# ---------------------------------------------------------------------- logit adjustment


@pytest.mark.parametrize("adjust", ["loss", "posthoc"])
def test_logits_are_adjusted_by_the_logarithm_of_the_prior(adjust, tmp_path):
    learner = learned_toy("logit_adjustment", tmp_path, adjust=adjust, tau=0.5, **TAIL).learner
    prior = 0.5 * (torch.tensor(COUNTS) / sum(COUNTS)).log()
    images, network = learner.present, learner.network
    logits = network.head(learner.extract_features(images)).detach()
    assert_close(learner.predict(images)["cnn"], logits - prior if adjust == "posthoc" else logits)
    batch = next(learner.batches(learner.data.task(0)).epoch(0))
    with torch.no_grad():
        added = prior if adjust == "loss" else torch.zeros(6)
        expected = F.cross_entropy(network(batch.images) + added, batch.labels)
        assert_close(learner.compute_loss(batch, learner.data.task(0))["cross_entropy"], expected)


def test_the_two_forms_of_logit_adjustment_are_one_on_a_softmax_that_fits():
    """Eq. 9 and 10: where the plain logits are log(p(x|y) p(y)), both forms answer with argmax p(x|y)."""
    likelihood, prior = torch.tensor([[0.2, 0.3]]), torch.tensor([0.9, 0.1])
    plain = (likelihood * prior).log()  # what plain cross-entropy learns
    balanced = likelihood.log()  # what learns under + log prior: then balanced + log prior is plain
    assert plain.argmax() == 0 and (plain - prior.log()).argmax() == balanced.argmax() == 1


def test_without_tau_logit_adjustment_is_finetune(tmp_path):
    own, plain = (learned_toy(name, tmp_path / name, **keys, **TAIL).learner.network
                  for name, keys in (("logit_adjustment", {"tau": 0}), ("finetune", {})))  # fmt: skip
    assert_close(snapshot(own), snapshot(plain), rtol=0, atol=0)


def test_priors_of_a_stream_remember_classes_that_are_not_replayed(tmp_path):
    keys = {"adjust": "posthoc", "imb_factor": 0.1, "shuffle": False}
    experiment = learned_toy("logit_adjustment", tmp_path, **keys)
    assert experiment.learner.counts.tolist() == COUNTS
    restored = toy_experiment("logit_adjustment", tmp_path / "b", **keys)._make_learner()
    restored.load_extra_state(experiment.learner.extra_state())
    assert torch.equal(restored.log_prior(), experiment.learner.log_prior())


# ---------------------------------------------------------------------- tdfa


def test_tdfa_wants_a_source_of_features(tmp_path):
    for source, message in ((None, "needs a source"), ("ddpm", r"makes images, .* \(it can use features\)")):
        with pytest.raises(ConfigError, match=message):
            build_config(toy_raw("tdfa", tmp_path, source))
    synth = {"name": "feature_diffusion", "fit_after_last_task": False}
    with pytest.raises(ConfigError, match="fit_after_last_task=false: the newest classes' features are made too"):
        toy_experiment("tdfa", tmp_path, synth=synth).check()


def test_tdfa_freezes_its_backbone_behind_the_first_task(tmp_path):
    experiment, states = toy_experiment("tdfa", tmp_path), []
    learner = experiment._make_learner()
    for task in experiment.data.tasks():
        learner.learn_task(task)
        states.append((snapshot(learner.network.backbone), learner.network.head.weight.detach().clone()))
    assert_close(states[0][0], states[2][0], rtol=0, atol=0)
    assert not torch.equal(states[0][1], states[2][1][:2])
    assert learner.present.classes == [4, 5] and learner.real.classes == [4, 5]


def test_tdfa_asks_for_what_a_class_lacks_to_the_largest(tmp_path, monkeypatch):
    asked = []
    experiment = toy_experiment("tdfa", tmp_path, **TAIL, most_per_real=4, filter="none", init_epoch=1)
    learner = experiment._make_learner()
    source = learner.replay.source
    original = source.generate
    monkeypatch.setattr(source, "generate", lambda requests: asked.append(requests) or original(requests))
    learner.learn_task(next(experiment.data.tasks()))
    numbers = {int(requests.labels[0]): len(requests) for requests in asked}
    assert numbers == {1: 4, 2: 7, 3: 8, 4: 4, 5: 4}  # 10 less what is there, 4 per real one at most


def test_tdfa_draws_classes_equally_and_made_features_half_as_often(tmp_path):
    experiment = toy_experiment("tdfa", tmp_path, **TAIL, init_epoch=1)
    learner = experiment._make_learner()
    task = next(experiment.data.tasks())
    learner.learn_task(task)
    made = learner.real.select([4]) + learner.real.select([4])
    chances = learner._balanced(made, task, "other").draw_weights
    totals = torch.zeros(6, dtype=torch.float64).index_add(0, torch.cat([learner.real.labels, made.labels]), chances)
    assert_close(totals, torch.ones(6, dtype=torch.float64))
    assert_close(chances[-1:] / chances[:-2][learner.real.labels == 4], torch.tensor([0.5], dtype=torch.float64))
