"""Features drawn by diffusion and translated from large classes to small ones."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from learners.run.configure import build_config
from synth.command import build_fit_config, command_parser
from synth.features.network import FeatureDenoiser
from synth.features.translation import source_chances, translate
from synth.requests import Requests
from tests.support.sources import make_source, toy_encoder
from tests.support.toy import toy_dataset, toy_experiment, toy_raw
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split
from utils.run.errors import ConfigError, NotFittedError

# Two classes that one feature tells apart, under a head whose logits are -+4 of it.
SIDES = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])


def head(z):
    return z @ SIDES.T


def fit_tail(folder, counts=(10, 4), **keys):
    """A source that has learned two toy classes, of which it saw so many images."""
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2, shuffle=False))
    task = next(data.tasks())
    real = data.train_images(task)
    images = sum((real.select([label]).take(range(count)) for label, count in enumerate(counts)), ImageSet())
    source, encoder = make_source("feature_diffusion", folder, **keys), toy_encoder(2)
    source.fit_after(task, images, ImageSet(), ImageSet(), encoder)
    return source, encoder, images


def ask(label, count):
    return Requests.of_classes([label], count, (7, "test"))


# ---------------------------------------------------------------------- translation


def test_larger_classes_are_translated_more_often_and_no_larger_class_never():
    chances = source_chances(torch.tensor([1001, 501, 1, 1]), 2, beta=0.999)
    assert chances.tolist()[2:] == [0, 0]
    assert_close(chances[0] / chances[1], torch.tensor((1 - 0.999**1000) / (1 - 0.999**500), dtype=torch.float64))
    assert source_chances(torch.tensor([5, 5]), 0, beta=0.999).tolist() == [0, 0]


def test_a_translation_takes_steps_of_one_length_down_its_cost():
    z, sources = torch.tensor([[-1.0, 3.0], [-2.0, 0.0]]), torch.tensor([0, 0])
    moved = translate(head, z, sources, 1, (10, 0.25, 0.5))
    # The gradient has one direction everywhere, so ten steps of 0.25 are one of 2.5.
    assert_close(moved, z + torch.tensor([2.5, 0.0]))


def test_only_what_the_classifier_takes_for_the_small_class_is_kept(tmp_path):
    keys = {"diffusion": False, "walk_steps": 40, "translated_share": 1.0}
    source, encoder, _ = fit_tail(tmp_path / "kept", walk_length=0.5, **keys)
    kept = source.translated[1]
    assert 0 < len(kept) <= 6 and source.translated.keys() == source.fitted_classes == {1}
    assert encoder.head(kept).softmax(1)[:, 1].min() >= 0.9
    assert torch.equal(source.generate(ask(1, 2 * len(kept))).tensor(), kept.repeat(2, 1))  # round and round
    with pytest.raises(NotFittedError, match=r"\[0\].*learned \[1\]"):
        source.generate(ask(0, 1))


# ---------------------------------------------------------------------- diffusion


def test_features_are_standardised_and_come_back():
    network, features = FeatureDenoiser(3, 2, width=8, blocks=1), torch.randn(50, 3) * 4 + 7
    features[:, 2] = 5  # of a unit that is dead
    network.measure(features)
    z = network.standardise(features)
    assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(z.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    assert_close(network.restore(z), features)
    assert_close(network.restore(torch.randn(4, 3))[:, 2], torch.full((4,), 5.0))


def test_an_untrained_model_draws_a_gaussian_of_the_mean_and_deviation_of_the_features(tmp_path):
    keys = {"train_steps": 1, "lr": 1e-7, "timestep_respacing": "ddim20", "sample_batch": 400}
    source, _, _ = fit_tail(tmp_path, translation=False, **keys)
    drawn, network = source.generate(ask(0, 400)).tensor(), source.models[0]
    assert_close(network.standardise(drawn).std(0).mean(), torch.tensor(1.0), atol=0.1, rtol=0)
    assert network.standardise(drawn).mean(0).abs().max() < 0.25


def test_guidance_is_that_of_the_reference(tmp_path):
    """e_c + omega (e_c - e_u), so that omega 0 is the conditional alone; see CBDM's card, 9.4."""
    source, _, _ = fit_tail(tmp_path, translation=False, omega=1.5)
    network, xt, t = source.models[0], torch.randn(3, 64), torch.tensor([500, 500, 500])
    conditional, none = (source._model(network, torch.full((3,), label))(xt, t) for label in (1, -1))
    seen = []
    original, source._model = source._model, lambda *call: seen.append(original(*call)) or seen[-1]
    source.generate(ask(1, 1))
    expected = conditional + 1.5 * (conditional - none)
    assert_close(none + 2.5 * (conditional - none), expected) and len(seen) == 2


def test_learned_features_are_nearer_to_their_class_than_to_the_other(tmp_path):
    keys = {"width": 64, "train_steps": 300, "lr": 0.003, "ema_rate": 0.9, "timestep_respacing": "ddim20", "omega": 0.0}
    keys |= {"sample_batch": 40}
    source, encoder, images = fit_tail(tmp_path, counts=(10, 10), translation=False, **keys)
    real = source._encode(images, encoder)
    centres = torch.stack([real[images.labels == label].mean(0) for label in (0, 1)])
    for label in (0, 1):
        drawn = source.generate(ask(label, 40)).tensor()
        assert (torch.cdist(drawn, centres).argmin(1) == label).float().mean() > 0.8


def test_translations_are_the_first_of_a_class_and_count_half_in_learning(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("synth.features.source.fit", lambda network, batches, *rest: seen.append(batches))
    source, _, _ = fit_tail(tmp_path, walk_steps=40, walk_length=0.5, translated_share=1.0)
    count = len(source.translated[1])
    assert seen[0].draw_weights.tolist() == [1.0] * 14 + [0.5] * count and count > 0
    assert seen[0].labels.tolist() == [0] * 10 + [1] * (4 + count)
    drawn = source.generate(ask(1, count + 2)).tensor()
    assert torch.equal(drawn[:count], source.translated[1])
    assert not any(torch.equal(row, other) for row in drawn[count:] for other in source.translated[1])


# ---------------------------------------------------------------------- as replay


def test_every_task_has_a_model_of_its_own_that_later_tasks_leave_alone(tmp_path):
    experiment = toy_experiment("finetune", tmp_path, "feature_diffusion")
    source, states = None, []
    for task in experiment.data.tasks():
        experiment.learner = experiment._make_learner() if task.index == 0 else experiment.learner
        experiment.learner.learn_task(task)
        source = experiment.learner.replay.source
        states.append({name: value.clone() for name, value in source.models[0].state_dict().items()})
    assert sorted(source.models) == [0, 2, 4]
    assert_close(states[0], states[2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"diffusion": False, "translation": False}, "both false: turn one on"),
        ({"source_dir": "there"}, "features are those of the run's own classifier"),
        ({"need_syn_imgs": False}, "features are those of the run's own classifier"),
    ],
)
def test_settings_that_make_no_features_are_refused(keys, message, tmp_path):
    synth = {**toy_raw("tdfa", tmp_path, "feature_diffusion")["synth"], **keys}
    with pytest.raises(ConfigError, match=message):
        build_config(toy_raw("tdfa", tmp_path, synth=synth))


def test_translation_alone_cannot_replay_the_first_of_several_tasks(tmp_path):
    synth = {**toy_raw("tdfa", tmp_path, "feature_diffusion")["synth"], "diffusion": False}
    with pytest.raises(ConfigError, match=r"synth.diffusion=false.*set it to true, or init_cls to 6"):
        toy_experiment("tdfa", tmp_path, synth=synth).check()


def test_features_need_a_classifier(tmp_path):
    keys = toy_raw("tdfa", tmp_path, "feature_diffusion", shuffle=True)
    with pytest.raises(ConfigError, match=r"learns what a classifier sees: use main\.py"):
        build_fit_config(keys, command_parser("train", "").parse_args([]))


def test_the_step_of_a_translation_is_along_the_unit_gradient_of_m2ms_cost():
    """Against the formula itself, on a head without symmetry."""
    torch.manual_seed(0)
    weight, z, sources = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 2, 0, 2])
    share = (z @ weight.T).softmax(1)
    gradient = (share - F.one_hot(torch.full((4,), 1), 3)) @ weight + 0.5 * weight[sources]
    expected = z - 0.1 * gradient / gradient.norm(dim=1, keepdim=True)
    assert_close(translate(lambda z: z @ weight.T, z, sources, 1, (1, 0.1, 0.5)), expected)
