"""What a DDPM predicts, who teaches it, how it is drawn and guided: against formulas and against diffusers."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.testing import assert_close

from synth.ddpm.averages import Averages, hold_out
from synth.ddpm.config import DDPMConfig
from synth.ddpm.teacher import Noised, Teacher
from synth.diffusion import Objective, Process, autoguided, linear_process, respace, thin_at_random, within
from synth.requests import Requests
from synth.samplers import ADAMS_BASHFORTH, Bend, denoiser, sample_ddim, sample_scheduled, sample_scheduler
from tests.support.sources import fitted, make_source
from tests.support.toy import toy_dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split
from utils.run.errors import ConfigError

PROCESS = linear_process()
TIMES = torch.tensor([0, 10, 300, 999])
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-3, "beta_end": 2e-2, "beta_schedule": "linear"}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wavy(xt, t):
    return torch.sin(2 * xt + t.view(-1, 1, 1, 1) / 300)


# ---------------------------------------------------------------------- what is predicted


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_target_is_that_of_diffusers_and_implies_the_noise(prediction):
    scheduler, objective = DDPMScheduler(**SCHEDULE), Objective(prediction)
    x0, eps, alpha_bar = noise(4, 1, 3, 3), noise(4, 1, 3, 3, seed=1), PROCESS.alpha_bar[TIMES]
    target = objective.target(x0, eps, alpha_bar)
    theirs = {"epsilon": eps, "x0": x0, "v": scheduler.get_velocity(x0, eps, TIMES)}
    assert_close(target, theirs[prediction], rtol=0, atol=1e-5)
    implied = objective.noise(target, scheduler.add_noise(x0, eps, TIMES), alpha_bar)
    assert_close(implied, eps, rtol=0, atol=1e-4)


def test_min_snr_is_that_of_diffusers_for_noise_and_velocity():
    snr, error = compute_snr(DDPMScheduler(**SCHEDULE), TIMES), torch.ones(4, 1, 1, 1)
    for prediction, divided in (("epsilon", snr), ("v", snr + 1)):
        loss = Objective(prediction, "min_snr").loss(error, 0 * error, PROCESS.alpha_bar[TIMES])
        assert_close(loss, (snr.clamp(max=5) / divided).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prediction", "weighting", "weight"),  # of a time with SNR 3, alpha_bar 0.75
    [("x0", "min_snr", 3.0), ("epsilon", "min_snr", 1.0), ("v", "min_snr", 0.75), ("epsilon", "none", 1.0),
     ("x0", "soft_min_snr", 12 / 7), ("epsilon", "soft_min_snr", 4 / 7), ("v", "soft_min_snr", 3 / 7)],
)  # fmt: skip
def test_a_weighting_is_of_the_error_of_the_clean_image(prediction, weighting, weight):
    alpha_bar = torch.tensor([0.75], dtype=torch.float64)
    loss = Objective(prediction, weighting).loss(torch.full((1, 1, 2, 2), 3.0), torch.ones(1, 1, 2, 2), alpha_bar)
    assert_close(loss, torch.tensor(4 * weight), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------- how it is drawn


def test_the_first_four_steps_of_ipndm_are_those_of_adams_and_bashforth():
    process, xt, seen = respace(PROCESS, 5), noise(2, 1, 3, 3), []
    ours = sample_ddim(wavy, xt, process, clip=False, order=4)
    levels = process.alpha_bar.flip(0).tolist()
    for t, now, after in zip(process.timesteps.flip(0), levels, [*levels[1:], 1.0]):
        seen = [wavy(xt, t.expand(2)), *seen][:4]
        eps = sum(weight * past for weight, past in zip(ADAMS_BASHFORTH[len(seen) - 1], seen))
        xt = (after / now) ** 0.5 * (xt - (1 - now) ** 0.5 * eps) + (1 - after) ** 0.5 * eps
    assert_close(ours, xt, rtol=1e-5, atol=1e-5)
    assert [sum(weights) for weights in ADAMS_BASHFORTH] == pytest.approx([1] * 4)


@pytest.mark.parametrize("name", ["dpmpp", "unipc"])
def test_a_solver_of_diffusers_sees_the_clamped_noise(name):
    xt, seen = noise(2, 1, 3, 3), []

    def clamped(xt, t):
        alpha_bar = PROCESS.alpha_bar[t[0]].item()
        x0 = (xt - (1 - alpha_bar) ** 0.5 * wavy(xt, t)) / alpha_bar**0.5
        seen.append(1)
        return (xt - alpha_bar**0.5 * x0.clamp(-1, 1)) / (1 - alpha_bar) ** 0.5

    theirs = sample_scheduled(clamped, xt, sample_scheduler(name, SCHEDULE, 5))
    ours = sample_scheduled(denoiser(wavy, PROCESS, None, True), xt, sample_scheduler(name, SCHEDULE, 5))
    assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert len(seen) == 5


def test_the_gradient_at_the_clean_image_needs_no_backward_pass_and_moves_it_by_scale_and_variance():
    """x0 moves by (1 - alpha_bar) times the gradient, where the clamp lets it through."""
    alpha_bar, graphs = 0.5, []

    def model(xt, t):
        graphs.append(torch.is_grad_enabled())
        return xt * 0

    process = Process(torch.tensor([alpha_bar], dtype=torch.float64), torch.tensor([9]))
    xt, slope = torch.tensor([0.3, -3.0]).view(2, 1, 1, 1), 2.0
    bent = sample_ddim(model, xt, process, Bend(lambda x0: slope * x0.flatten(1).sum(1), "x0"))
    expected = [0.3 / alpha_bar**0.5 + (1 - alpha_bar) * slope, -1.0]
    assert_close(bent.flatten(), torch.tensor(expected), rtol=0, atol=1e-5)
    assert graphs == [False]


def test_both_gradients_are_one_for_gaussian_images_of_unit_variance():
    def model(xt, t):  # the best one for them: E[eps | xt] = sqrt(1 - alpha_bar) xt
        return (1 - PROCESS.alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1) * xt

    xt, process = noise(3, 1, 2, 2), respace(PROCESS, "ddim10")
    bends = [Bend(lambda x0: -(x0 - 0.5).square().flatten(1).sum(1), gradient) for gradient in ("xt", "x0")]
    through, at = (sample_ddim(model, xt, process, bend, clip=False) for bend in bends)
    assert_close(through, at, rtol=0, atol=1e-5)
    assert not torch.allclose(at, sample_ddim(model, xt, process, clip=False), atol=0.1)


# ---------------------------------------------------------------------- guidance


def test_guidance_is_on_between_two_noise_levels_alone():
    sigma = (1 / PROCESS.alpha_bar - 1).sqrt()
    model = within(PROCESS, (sigma[100].item(), sigma[500].item()), lambda xt, t: 1, lambda xt, t: 0)
    assert [model(None, torch.tensor([t])) for t in (99, 100, 101, 500, 501)] == [0, 0, 1, 1, 0]


def test_autoguidance_leaves_a_class_alone_that_the_weaker_model_does_not_know():
    known = torch.tensor([True, False, True])  # class 0, class 1, no class
    model = autoguided(lambda *_: torch.full((3, 1), 2.0), lambda *_: torch.full((3, 1), 0.5), known, 3.0)
    assert model(None, None, torch.tensor([0, 1, -1])).flatten().tolist() == [5.0, 2.0, 5.0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"guidance_interval": [2, 1]}, r"synth.guidance_interval=\[2.0, 1.0\] is empty: give the lower first"),
        ({"teacher_steps": 4}, "synth.teacher_steps=4: synth.rehearsal='replay' has no teacher, use distil"),
        ({"rehearsal": "distil", "teacher_steps": 21, "diffusion_steps": 20, "beta_start": 0.1, "beta_end": 0.5},
         "synth.teacher_steps=21: there are only synth.diffusion_steps=20"),
        ({"sampler": "euler"}, "sampler='euler'.*'ipndm', 'dpmpp' or 'unipc'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        DDPMConfig.parse({"name": "ddpm", **keys})


# ---------------------------------------------------------------------- who teaches


def teacher(count=0, steps=3, whole_chain=False):
    def network(xt, t, labels):
        return 0.5 * xt + labels.view(-1, 1, 1, 1)

    return Teacher(network, Objective(), PROCESS, PROCESS.alpha_bar, [2, 5], (1, 2, 2), steps, True, count, whole_chain)


def rows(size=4):
    labels = torch.arange(size)
    return Noised(noise(size, 1, 2, 2), TIMES[:size], labels, torch.zeros(size, 1, 2, 2))


def test_a_teacher_gives_the_target_of_replay_alone():
    given, is_replay = rows(), torch.tensor([False, True, False, True])
    taught = teacher().teach(given, is_replay)
    assert_close(taught.target[is_replay], (0.5 * given.xt + given.labels.view(-1, 1, 1, 1))[is_replay])
    assert not taught.target[~is_replay].any() and taught[:3] == given[:3]


def test_a_teacher_is_not_asked_about_a_batch_without_replay():
    silent = replace(teacher(), network=None)  # an attention layer, for one, takes no empty batch
    assert silent.teach(given := rows(), torch.zeros(4, dtype=torch.bool)) is given


@pytest.mark.parametrize("whole_chain", [False, True])
def test_a_teacher_adds_rows_of_old_classes_with_what_it_says_of_them(whole_chain):
    torch.manual_seed(0)
    taught = teacher(7, whole_chain=whole_chain).teach(rows(), torch.zeros(4, dtype=torch.bool))
    assert len(taught.xt) == len(taught.t) == len(taught.labels) == len(taught.target) == 11
    xt, t, labels, target = (part[4:] for part in taught)
    assert_close(target, 0.5 * xt + labels.view(-1, 1, 1, 1))
    assert set(labels.tolist()) == {2, 5}
    if whole_chain:  # three chains of three states, the last of them cut off
        assert t.tolist()[::3] == [999] * 3 and (t[1] < 999 and t[2] < t[1])


@pytest.mark.parametrize(("steps", "count"), [(1000, 1), (1000, 2), (1000, 10), (5, 5), (5, 9), (1, 3)])
def test_thinning_by_chance_keeps_the_noisiest_and_one_of_each_span(steps, count):
    process = linear_process(steps)
    thin = thin_at_random(process, count)
    assert len(thin) == min(count, steps) and thin.timesteps[-1] == steps - 1
    assert bool((thin.timesteps.diff() > 0).all())
    assert_close(thin.alpha_bar, process.alpha_bar[thin.timesteps])


DATA = DataManager(toy_dataset(), Split(init_cls=2, increment=2))
TWO_EACH = Requests.of_classes([0, 1, 2, 3], 2, (7, "ddpm", 0))


@pytest.mark.parametrize("keys", [
    {"rehearsal": "distil"}, {"rehearsal": "distil", "teacher_draws": "step", "prediction": "x0"},
    {"rehearsal": "trajectory", "teacher_steps": 3, "prediction": "v", "loss_weighting": "min_snr"},
])  # fmt: skip
def test_a_ddpm_learns_from_the_one_before_it_without_replay_of_the_learner(keys, tmp_path):
    source = fitted("ddpm", tmp_path, tasks=2, **keys)
    assert source.fitted_classes == {0, 1, 2, 3} and source.teacher is None and not source.wants_past
    assert source.generate(TWO_EACH).parts[0].images.shape == (8, 1, 8, 8)
    assert not (tmp_path / "rehearsal").exists()  # images that nobody would look at


def test_without_rehearsal_the_new_classes_alone_are_shown(tmp_path):
    source, shown = fitted("ddpm", tmp_path, rehearsal="none"), []
    task, source.before_training = DATA.task(1), lambda labels: shown.extend(labels.unique().tolist())
    DATA.advance(task)
    source.fit_after(task, DATA.train_images(task), ImageSet(), ImageSet(), None)
    assert shown == [2, 3] and not source.wants_past and not (tmp_path / "rehearsal").exists()
    assert source.generate(TWO_EACH).parts[0].images.shape == (8, 1, 8, 8)  # the old ones as far as it knows them


def test_of_several_averages_the_best_on_held_out_images_generates(tmp_path, caplog):
    caplog.set_level("INFO", "reprise")
    keys = {"ema_rate": 0.0, "ema_rates": [0.5, 0.999999], "ema_held_out": 0.2, "first_task_num_steps": 60, "lr": 0.01}
    source = fitted("ddpm", tmp_path / "a", **keys)
    raw, learned = fitted("ddpm", tmp_path / "b", **{**keys, "ema_rates": []}), source.generator.state_dict()
    assert source.generator is not source.network and not source.generator.training
    assert "that of decay 0.5 predicts 4 held-out images best" in caplog.text
    assert not torch.equal(learned["unet.conv_out.bias"], raw.generator.state_dict()["unet.conv_out.bias"])


def test_averages_go_on_where_a_training_was_cut_off():
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 2)
    one, other = Averages(network, [0.5, 0.9]), Averages(network, [0.5, 0.9])
    with torch.no_grad():
        network.weight += 1
    one.move(None)
    other.load_state_dict(one.state_dict())
    assert_close([part.weight for part in one.networks], [part.weight for part in other.networks], rtol=0, atol=0)
    assert_close(network.weight - one.networks[1].weight, torch.full((2, 2), 0.9))


def test_images_are_held_out_evenly():
    kept, held_out = hold_out(ImageSet.of(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.arange(10)), 0.3)
    assert held_out.labels.tolist() == [0, 3, 6, 9] and kept.labels.tolist() == [1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize("sampler", ["ipndm", "dpmpp", "unipc"])
def test_every_sampler_draws_images_that_depend_on_their_request_alone(sampler, tmp_path):
    source = fitted("ddpm", tmp_path, sampler=sampler, timestep_respacing="4")
    asked = TWO_EACH.take(torch.arange(4))
    alone = source.generate(asked.take(torch.tensor([2]))).parts[0].images
    assert (source.generate(asked).parts[0].images[2].int() - alone[0].int()).abs().max() <= 1


def test_autoguidance_keeps_the_model_before(tmp_path):
    source = fitted("ddpm", tmp_path / "a", tasks=2, autoguidance=2.0)
    (tmp_path / "saved").mkdir()
    source.save(tmp_path / "saved")
    again = make_source("ddpm", tmp_path / "b", autoguidance=2.0)
    again.load(tmp_path / "saved")
    drawn, plain = again.generate(TWO_EACH).parts[0].images, fitted("ddpm", tmp_path / "c", tasks=2).generate(TWO_EACH)
    assert torch.equal(drawn, source.generate(TWO_EACH).parts[0].images)
    moved = (drawn != plain.parts[0].images).flatten(1).any(1)
    assert moved[:4].any() and not moved[4:].any()  # the model before knows classes 0 and 1


def test_guidance_outside_its_interval_is_none(tmp_path):
    plain, never = ({"guidance": 300.0, "label_dropout": 0.5, "guidance_interval": ends} for ends in (None, [1e5, 1e6]))
    drawn = [fitted("ddpm", tmp_path / str(i), **keys).generate(TWO_EACH.take(torch.arange(4))).parts[0].images
             for i, keys in enumerate((plain, never, {**plain, "guidance": 1.0}))]  # fmt: skip
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])


def test_replay_of_the_learner_is_not_looked_at_where_a_teacher_stands(tmp_path):
    one, other = (fitted("ddpm", tmp_path / name, rehearsal="distil") for name in "ab")
    DATA.advance(DATA.task(1))
    for source, past in ((one, ImageSet()), (other, one.generate(TWO_EACH.take(torch.arange(4))))):
        source.fit_after(DATA.task(1), DATA.train_images(DATA.task(1)), past, ImageSet(), None)
    assert one.fingerprint() == other.fingerprint()
