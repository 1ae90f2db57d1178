"""Numbers of DDDR's card, section 8, about class inversion and the sampler, on a small model of random weights."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn import ParameterDict
from torch.testing import assert_close

from synth.inversion.federated import split_clients
from synth.inversion.latents import LatentBatches, encode, noise_scheduler
from synth.prompts import TRAIN_TEMPLATES
from synth.requests import Requests
from synth.samplers import sample_scheduled, sample_scheduler
from tests.support.tiny_inversion import fitted, make_inversion, tiny_model, toy_task
from utils.data.batches import Batch, Loading
from utils.training import seeding

LDM_NOISE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}  # fmt: skip
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def batch_of(labels, seed=0):
    z0 = torch.randn(len(labels), 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor(labels)
    return Batch(z0, labels, labels < 0)


def loss_of(source, module, batch, classes=(0, 1, 2), seed=0):
    torch.manual_seed(seed)
    scheduler = noise_scheduler(source.model.schedule)
    return source.loss(batch, module=module, classes=torch.tensor(classes), scheduler=scheduler)["mse"]


# checks 1 to 3
def test_only_the_vectors_are_trained(tmp_path):
    source = make_inversion(tmp_path, g_local_train_steps=3)
    module, before = ParameterDict({"vectors": torch.randn(3, 8)}), source.model.fingerprint()
    loss_of(source, module, batch_of([0, 2])).backward()
    trained = [name for part in (module, source.model) for name, p in part.named_parameters() if p.grad is not None]
    source.fit_before(*toy_task())
    assert trained == ["vectors"]
    assert source.model.fingerprint() == before


def test_a_class_that_is_absent_from_the_batch_only_decays(tmp_path):
    source, start = make_inversion(tmp_path), torch.randn(3, 8)
    module = ParameterDict({"vectors": start.clone()})
    optimizer = torch.optim.AdamW(module.parameters(), source.config.inversion_lr, weight_decay=0.01)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(source, module, batch_of([0, 2, 0]), seed=step).backward()
        assert torch.count_nonzero(module.vectors.grad[1]) == 0
        optimizer.step()
    assert_close(module.vectors[1].detach(), start[1] * (1 - 0.02 * 0.01) ** 8)
    assert (module.vectors[1].norm() / start[1].norm()).item() == pytest.approx(0.9984, abs=1e-5)


def test_every_vector_starts_at_the_initial_one_and_goes_its_own_way(tmp_path):
    source = make_inversion(tmp_path, inversion_lr=1e-12, inversion_weight_decay=0, flip=False)
    source.fit_before(*toy_task())
    initial = source.model.initial_vector("sculpture")
    assert_close(torch.stack([source.vectors[0], source.vectors[1]]), initial.expand(2, -1))
    moved = fitted(tmp_path / "moved", samples_per_class=48)
    norms = [vector.norm().item() for vector in (initial, moved.vectors[0], moved.vectors[1])]
    assert len({round(norm, 4) for norm in norms}) == 3


# checks 5 and 6
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_hand_written_error_of_the_unet(tmp_path, prediction_type):
    source, batch = make_inversion(tmp_path), batch_of([0, 2])
    source.model.schedule["prediction_type"] = prediction_type
    vectors = torch.randn(3, 8)
    loss = loss_of(source, ParameterDict({"vectors": vectors}), batch)
    torch.manual_seed(0)
    torch.randint(81, (2,))  # the templates
    t, eps = torch.randint(1000, (2,)), torch.randn(2, 4, 4, 4)
    alpha_bar = ALPHA_BAR[t].float().view(2, 1, 1, 1)
    zt = alpha_bar.sqrt() * batch.images + (1 - alpha_bar).sqrt() * eps
    velocity = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * batch.images
    predicted = source.model.denoiser.unet(zt, t, vectors[[0, 2]].view(2, 2, 4)).sample
    assert_close(loss, F.mse_loss(predicted, velocity if prediction_type == "v_prediction" else eps))


def test_a_vector_lowers_the_loss_of_fixed_noise_at_every_step(tmp_path):
    source, module = make_inversion(tmp_path), ParameterDict({"vectors": torch.zeros(1, 8)})
    optimizer, losses = torch.optim.AdamW(module.parameters(), 0.02), []
    for _ in range(40):
        loss = loss_of(source, module, batch_of([0]), classes=(0,))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert max(after - before for before, after in pairwise(losses)) < 1e-4


# checks 7 and 11
def test_ddim_visits_981_to_1_ends_at_the_first_alpha_bar_and_has_a_closed_form_without_any_noise_predicted():
    scheduler = sample_scheduler("ddim", LDM_NOISE, 50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    assert scheduler.final_alpha_cumprod.item() == pytest.approx(0.99915, abs=1e-7)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = noise * (ALPHA_BAR[0] / ALPHA_BAR[981]).sqrt().float()
    assert_close(sample_scheduled(lambda zt, t: zt * 0, noise, scheduler), expected, rtol=1e-4, atol=1e-4)


# check 9; 8 and 14 are those of every source
def drawn_with(folder, guidance, size=9.0):
    source = make_inversion(folder / str(guidance), guidance=guidance, sample_steps=5)
    source.vectors, source.fitted_classes = {0: torch.full((8,), size), 1: torch.full((8,), -size)}, {0, 1}
    return source.generate(Requests.of_classes([0, 1], 2, (7, "tiny", 0))).parts[0].images.int()


def test_guidance_of_zero_draws_no_class_and_of_one_the_class_alone(tmp_path):
    nothing, plain = drawn_with(tmp_path, 0.0), drawn_with(tmp_path, 1.0)
    assert_close(drawn_with(tmp_path, 10.0, size=0.0), nothing, rtol=0, atol=1)
    assert_close(drawn_with(tmp_path, 1e-7), nothing, rtol=0, atol=1)  # both branches, one of weight nearly 0
    assert_close(drawn_with(tmp_path, 1 + 1e-6), plain, rtol=0, atol=1)
    assert (drawn_with(tmp_path, 10.0) - plain).abs().max() > 10 < (plain - nothing).abs().max()


# check 10
@pytest.mark.parametrize(("sizes", "weights"), [((20, 0), [1.0, 0.0]), ((5, 15), [0.5, 0.5]), ((15, 0, 5), [0.5, 0.5])])
def test_the_mean_of_clients_is_plain_and_one_without_images_is_skipped(sizes, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("synth.inversion.source.split_clients", lambda *_: torch.arange(20).split(sizes))
    source, found = make_inversion(tmp_path), torch.randn(2, 2, 8)
    returns = iter(found)
    monkeypatch.setattr(source, "_search", lambda *_: next(returns))
    source.fit_before(*toy_task())
    assert_close(torch.stack([source.vectors[0], source.vectors[1]]), weights[0] * found[0] + weights[1] * found[1])
    assert len(list(returns)) == weights.count(0)


def test_rounds_of_one_client_are_the_plain_loop_with_a_new_optimizer_every_round(tmp_path):
    source = fitted(tmp_path, com_round_gen=2, g_local_train_steps=3)
    _, real = toy_task()
    vectors = torch.nn.Parameter(source.model.initial_vector("").expand(2, -1).clone())
    moments = encode(source.model, real, source.flip, source.config.sample_batch, source.run, "")
    classes, scheduler = torch.tensor([0, 1]), noise_scheduler(LDM_NOISE)
    for round_ in range(2):
        key = (7, 0, f"invert_r{round_}_c0")
        optimizer = torch.optim.AdamW([vectors], 0.02, weight_decay=0.01, fused=True)
        batches = LatentBatches(moments, real.labels, Loading(None, 6, key, torch.device("cpu")))
        for step, batch in zip(range(3), batches.epoch(0)):
            seeding.seed_everything(*key, step)
            optimizer.zero_grad()
            source.loss(batch, SimpleNamespace(vectors=vectors), classes, scheduler)["mse"].backward()
            optimizer.step()
    assert torch.equal(torch.stack([source.vectors[0], source.vectors[1]]), vectors.detach())


def test_the_default_prompts_are_81_templates_of_which_57_differ():
    assert (len(TRAIN_TEMPLATES), len(set(TRAIN_TEMPLATES))) == (81, 57)
    assert all(template.count("*") == 1 and template.endswith(" *") for template in TRAIN_TEMPLATES)


# card, section 3: clients
@pytest.mark.parametrize(("beta", "count"), [(0.0, 100), (0.5, 100), (5.0, 100), (0.5, 2)])
def test_clients_share_all_images_and_each_has_one_if_there_are_enough(beta, count):
    parts = split_clients(torch.arange(20).repeat_interleave(5)[:count], 5, beta, 7, 0, "clients")
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(count))
    assert all(len(part) for part in parts) == (count == 100)
    assert beta > 0 or [len(part) for part in parts] == [20] * 5


def test_a_small_beta_gives_most_of_a_class_to_one_client():
    labels, shares = torch.arange(10).repeat_interleave(100), []
    for beta in (0.1, 100.0):
        counts = torch.stack([labels[part].bincount(minlength=10) for part in split_clients(labels, 5, beta, 7)])
        shares.append((counts.max(0).values / 100).mean().item())
    assert shares[0] > 0.6 and shares[1] < 0.35


def test_the_noise_of_the_small_model_is_that_of_latent_diffusion():
    assert tiny_model().schedule == LDM_NOISE
