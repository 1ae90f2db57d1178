"""What is GUIDE's own: the errors of its flags, guidance that works, pictures, its bounds."""

import pytest
import torch
from torch.testing import assert_close

from synth.requests import Requests
from tests.support.learned import learned_toy
from tests.support.toy import toy_experiment
from utils.results.panels import Panels
from utils.run.errors import ConfigError


def learned(folder, **keys):
    """A learner that has learned its tasks, and the second of them."""
    experiment = learned_toy("guide", folder, "ddpm", **keys)
    return experiment.learner, experiment.data.task(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What several tests look at: images have factors of their own."""
    scales = {"classifier_scale_min_new": 0.5, "classifier_scale_max_new": 2.0}
    return learned(tmp_path_factory.mktemp("trained"), **scales)


def pixels(images):
    return torch.cat([part.images for part in images.parts]).int()


@pytest.mark.parametrize(("keys", "message"), [
    ({"use_old_grad": True}, "^use_old_grad and use_new_grad exclude each other"),
    ({"classifier_scale_min_new": None}, "use_new_grad needs classifier_scale_min_new or classifier_scale_max_new"),
    ({"classifier_scale_min_new": "fast"}, "classifier_scale_min_new='fast'.*number"),
    ({"classifier_scale_min_new": -1}, "classifier_scale_min_new=-1.*greater than or equal to 0"),
    ({"classifier_scale_max_new": 0.5}, "classifier_scale_min_new=1.0 is above its max, 0.5"),
    ({"depth": 34}, "depth=34: only 18"),
    ({"negate_old_grad": True}, "negate_old_grad=true acts with use_old_grad"),
    ({"num_res_blocks": 2.5}, "synth.num_res_blocks=2.5: use a whole number"),
    ({"cl_method": "other"}, "cl_method='other': only generative_replay and"),
    ({"num_tasks": 3}, "num_tasks=3: give init_cls and increment"),
    ({"synth": {"name": "ddpm", "use_ddim": "maybe"}}, "synth.use_ddim='maybe': use true or false"),
    ({"synth": {"name": "ddpm", "num_channels": 64}}, "num_channels and synth.channel_mult go together"),
    ({"synth": {"name": "ddpm", "use_ddim": True, "sampler": "ddpm"}}, "are one key: keep one of them"),
    ({"synth": {"name": "ddpm", "need_syn_imgs": False}}, "need_syn_imgs=false: replay of guide is drawn anew"),
    ({"synth": {"name": "ldm"}}, "'ldm' does not allow: choose synth.name=cbdm, ddpm"),  # it cannot be guided
    ({"synth": {"name": "small_ldm"}}, "'small_ldm' does not allow: choose synth.name=cbdm, ddpm"),
    ({"embedding_kind": "none"}, "embedding_kind='none': only concat_time_1hot"),
    ({"timestep_respacing": "ddim60"}, "^timestep_respacing='ddim60': no integer stride"),
    ({"synth": {"name": "ddpm", "timestep_respacing": "0"}}, "^synth.timestep_respacing='0': use 1 to 1000"),
    ({"synth": {"name": "ddpm", "train_respacing": "ddim60"}}, "^synth.train_respacing='ddim60': no integer"),
    ({"guide_gradient": "x1"}, "guide_gradient='x1'.*'xt' or 'x0'"),
    ({"batch_size": 2}, "batch_size=2: the last of 3 tasks gets no real image"),
])  # fmt: skip
def test_what_cannot_be_or_does_not_fit_is_refused_before_anything_is_learned(keys, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        toy_experiment("guide", tmp_path, "ddpm", **keys).check()


BY_OLD = {"use_new_grad": False, "use_old_grad": True, "classifier_scale_min_old": 30}


@pytest.mark.parametrize(("flags", "num_classes", "of_new", "sign"), [
    ({}, 6, True, 1),  # toward the likeliest of the new classes
    ({"guid_to_new_classes": False}, 6, False, -1),  # away from the image's own
    (BY_OLD, 2, False, 1),  # toward it, among the old ones
    ({**BY_OLD, "negate_old_grad": True}, 2, False, -1),
    ({"guide_gradient": "x0"}, 6, True, 1),
])  # fmt: skip
def test_guidance_moves_the_confidence_where_the_flags_say(flags, num_classes, of_new, sign, tmp_path):
    learner, task = learned(tmp_path, limit_tasks=2, **{"classifier_scale_min_new": 30, **flags})
    requests, confidence = Requests.of_labels(torch.arange(32) % 2, (0,)), []
    for guided in (False, True):
        logits = learner.predict(learner.replay.draw(task, requests, guided))["cnn"]
        chances = logits[:, :num_classes].softmax(1)
        own = chances.gather(1, requests.labels[:, None])[:, 0]
        confidence.append((chances[:, 2:4].max(1).values if of_new else own).mean())
    assert sign * (confidence[1] - confidence[0]) > 0


def test_at_the_clean_image_the_generator_has_no_backward_pass(tmp_path):
    learner, task = learned(tmp_path, guide_gradient="x0")
    tracked = []
    learner.replay.source.generator.register_forward_hook(lambda *_: tracked.append(torch.is_grad_enabled()))
    learner.replay.draw(task, Requests.of_labels(torch.arange(4) % 2, (0,)))
    assert tracked and not any(tracked)


def test_guided_images_depend_on_the_chunks_by_rounding_alone(trained, monkeypatch):
    learner, task = trained
    requests = Requests.of_labels(torch.arange(12) % 2, (0,))
    in_fours = pixels(learner.replay.draw(task, requests))
    monkeypatch.setattr(learner.replay.source, "chunk_size", 3)
    assert (pixels(learner.replay.draw(task, requests)) - in_fours).abs().max() <= 1


def test_a_checkpointed_network_guides_to_the_same_images(trained, monkeypatch):
    (learner, task), requests = trained, Requests.of_labels(torch.arange(4) % 2, (0,))
    plain = pixels(learner.replay.draw(task, requests))
    calls, original = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    learner.replay.source.generator.unet.enable_gradient_checkpointing()
    assert (pixels(learner.replay.draw(task, requests)) - plain).abs().max() <= 1 and calls
    learner.replay.source.generator.unet.disable_gradient_checkpointing()


def test_scales_lie_between_their_ends_and_belong_to_the_image(trained):
    learner, requests = trained[0], Requests.of_labels(torch.zeros(20, dtype=torch.int64), (0,))
    scales = learner.scales(requests)
    assert scales.min() >= 0.5 and scales.max() <= 2.0 and len(scales.unique()) == 20
    assert_close(learner.scales(requests.take(torch.tensor([7, 3]))), scales[[7, 3]])


def test_seen_classes_alone_compete_where_the_file_says_so(tmp_path):
    learner = toy_experiment("guide", tmp_path, "ddpm", eval_logits="seen", init_cls=3, increment=3).check()
    task = learner.data.task(0)
    learner.grow_network(task)
    assert learner.predict(learner.data.test_images(task.classes))["cnn"].shape[1] == 3


def test_the_last_replay_and_a_picture_of_guidance_are_left_to_look_at(trained):
    learner, _ = trained
    folder = learner.replay.folder
    assert len(list((folder / "task_2" / "drawn").glob("*/*.png"))) == len(learner.training_batches.replay)
    assert (folder / "task_1" / "drawn" / "preview.png").exists()
    panels = Panels(learner.run.folder / "panels").read()
    assert [panel.part for panel in panels] == ["Task 1", "Task 2"]
    assert panels[0].columns == ["unguided", "guided"] and "%" in panels[0].rows[0].cells[1].caption


def test_a_kill_while_the_last_replay_is_laid_out_leaves_what_the_next_start_replaces(trained, monkeypatch):
    learner, _ = trained
    task, images, folder = learner.data.task(2), learner.training_batches.replay, learner.replay.folder / "task_2"
    for killed in ("save_image", "preview"):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(f"learners.guide.replay.{killed}", lambda *_: 1 / 0)
            learner.replay.show(task, images)
    learner.replay.show(task, images)
    assert len(list((folder / "drawn").glob("*/*.png"))) == len(images)


def test_without_a_source_it_trains_on_full_batches_of_real_images(tmp_path):
    experiment = toy_experiment("guide", tmp_path)
    results = experiment.learn_all()
    assert results["source"] is None and results["eval_logits"] == "all"
    batches = experiment.learner.batches(experiment.data.task(2))
    assert batches.loading.batch_size == 16 and batches.draw is None


def test_the_joint_form_sees_all_real_images(tmp_path):
    experiment = toy_experiment("guide_joint", tmp_path)
    assert experiment.learn_all()["upper_bound"] is True
    assert len(experiment.learner.batches(experiment.data.task(2)).labels) == 60
