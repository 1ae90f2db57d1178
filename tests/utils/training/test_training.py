"""The one training loop: schedules, optimisers and averages against torch's own, and resuming bit for bit."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from utils.data.batches import Batch
from utils.run.errors import TrainingError
from utils.training import seeding
from utils.training.fit import Hooks, Progress, Training, fit
from utils.training.run import Run
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig

STEPS = 12  # three epochs of four batches


class RandomBatches:
    """Inputs drawn from the position; four batches per epoch."""

    def __init__(self, shape=(8, 3)):
        self.shape, self.drawn = shape, 0

    def __len__(self):
        return 4

    def epoch(self, epoch, start=0):
        for step in range(start, 4):
            inputs = torch.randn(self.shape, generator=seeding.generator("inputs", epoch, step))
            self.drawn += 1
            labels = torch.arange(len(inputs)) % 2
            yield Batch(inputs, labels, labels == 0)

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("utils.run.files.os.fsync", lambda _: None)


class Killed(Exception):
    """The process ends."""


def make_run(folder, precision="fp32", every=5) -> Run:
    return Run(folder, 7, Runtime(["cpu"], precision), checkpoint_every=every, progress=False)


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path)


def linear(seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 4, 3)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)


def cross_entropy(module):
    return lambda batch: {"cross_entropy": F.cross_entropy(module(batch.images), batch.labels)}


def train(module, run, config=None, batches=None, loss_fn=None, **hooks):
    config = config or TrainConfig(lr=0.1, steps=STEPS)
    batches = batches or RandomBatches()
    training = Training(run, 2, "train")
    return fit(module, batches, loss_fn or cross_entropy(module), config, training, Hooks(**hooks))


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in run.metrics.path.read_text().splitlines()]


# ---------------------------------------------------------------------- learning rates


SCHEDULERS = torch.optim.lr_scheduler


def rates_of_torch(make_scheduler, length, lr=0.1) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler, rates = make_scheduler(optimizer), []
    for _ in range(length):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("settings", "make_scheduler"),
    [
        (
            {"schedule": "step", "milestones": (3, 5), "lr_decay": 0.2},
            lambda opt: SCHEDULERS.MultiStepLR(opt, [3, 5], 0.2),
        ),
        ({"schedule": "step", "milestones": ()}, lambda opt: SCHEDULERS.MultiStepLR(opt, [])),
        ({"schedule": "cosine", "min_lr": 0.01}, lambda opt: SCHEDULERS.CosineAnnealingLR(opt, 8, 0.01)),
        ({"schedule": "cosine", "cosine_length": 5}, lambda opt: SCHEDULERS.CosineAnnealingLR(opt, 5)),
        ({"schedule": "linear", "min_lr": 0.02}, lambda opt: SCHEDULERS.LinearLR(opt, 1.0, 0.2, 8)),
        ({"schedule": "constant"}, lambda opt: SCHEDULERS.ConstantLR(opt, 1.0)),
    ],
)
def test_schedules_equal_torchs_per_epoch_and_per_step(settings, make_scheduler):
    expected = rates_of_torch(make_scheduler, 8)
    by_epoch, by_step = TrainConfig(lr=0.1, epochs=8, **settings), TrainConfig(lr=0.1, steps=8, **settings)
    held = [rate for rate in expected for _ in range(3)]  # three steps per epoch
    assert [by_step.learning_rate(step, 3) for step in range(8)] == pytest.approx(expected)
    assert [by_epoch.learning_rate(step, 3) for step in range(24)] == pytest.approx(held)


def test_linear_decay_ends_one_step_above_its_floor():
    config = TrainConfig(lr=0.01, steps=2000, schedule="linear")
    assert [config.learning_rate(step, 1) for step in (0, 1000, 1999)] == pytest.approx([0.01, 0.005, 5e-6])


def test_warmup_rises_from_0_in_equal_parts_and_then_leaves_the_schedule_alone():
    config = TrainConfig(lr=0.8, steps=8, warmup_steps=4, schedule="step", milestones=(6,))
    rates = [config.learning_rate(step, 1) for step in range(8)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.08, 0.08])


@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 12}])
def test_the_length_is_given_in_epochs_or_in_steps(run, length):
    steps = []
    train(linear(), run, TrainConfig(lr=0.1, **length), after_step=lambda step: steps.append(step.number))
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("length", [{}, {"epochs": 1, "steps": 1}])
def test_epochs_and_steps_exclude_each_other(length):
    with pytest.raises(AssertionError):
        TrainConfig(lr=0.1, **length)


# ---------------------------------------------------------------------- one step


@pytest.mark.parametrize(
    ("settings", "make_optimizer"),
    [
        (
            {"momentum": 0.9, "weight_decay": 0.01},
            lambda values: torch.optim.SGD(values, 0.1, momentum=0.9, weight_decay=0.01),
        ),
        ({"momentum": 0.0}, lambda values: torch.optim.SGD(values, 0.1)),
        ({"optimizer": "adam", "weight_decay": 0.1}, lambda values: torch.optim.Adam(values, 0.1, weight_decay=0.1)),
        ({"optimizer": "adamw", "weight_decay": 0.1}, lambda values: torch.optim.AdamW(values, 0.1, weight_decay=0.1)),
    ],
)
def test_a_training_equals_a_plain_loop_with_torchs_optimiser(run, settings, make_optimizer):
    ours, plain = linear(), linear()
    train(ours, run, TrainConfig(lr=0.1, epochs=3, **settings))
    optimizer = make_optimizer(plain.parameters())
    for epoch in range(3):
        for batch in RandomBatches().epoch(epoch):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(plain(batch.images), batch.labels))
            optimizer.step()
    assert_close(ours.state_dict(), plain.state_dict())


def test_least_squares_reaches_its_solution(run):
    truth, module = torch.tensor([[1.0, -2.0, 0.5]]), nn.Linear(3, 1, bias=False)
    train(
        module, run, TrainConfig(lr=0.03, steps=300),
        loss_fn=lambda batch: {"mse": F.mse_loss(module(batch.images), batch.images @ truth.T)},
    )  # fmt: skip
    assert_close(module.weight.detach(), truth, rtol=0, atol=1e-5)


def test_named_terms_are_summed_and_logged_as_means(run):
    module = linear()
    train(
        module, run, TrainConfig(lr=1.0, steps=2, momentum=0.0),
        loss_fn=lambda batch: {"weight": module.weight.sum(), "bias": 3 * module.bias.sum()},
    )  # fmt: skip
    start = linear()
    assert_close(module.weight, start.weight - 2)
    assert_close(module.bias, start.bias - 6)
    (line,) = metrics(run)
    weight = start.weight.sum().item() - 3  # the mean of the values before step 0 and before step 1
    bias = 3 * (start.bias.sum().item() - 3)
    place = {"task": 2, "purpose": "train", "step": 2, "lr": 1.0}
    assert {key: line[key] for key in place} == place
    assert [line[key] for key in ("weight", "bias", "loss")] == pytest.approx([weight, bias, weight + bias], rel=1e-5)


def test_a_term_may_be_absent_from_some_steps_and_then_adds_nothing(run):
    module, count = linear(), iter(range(4))

    def loss_fn(batch):
        terms = cross_entropy(module)(batch)
        return terms | {"distill": module.bias.sum() * 0 + 8.0} if next(count) in (0, 2) else terms

    train(module, run, TrainConfig(lr=0.1, steps=4), loss_fn=loss_fn)
    assert metrics(run)[0]["distill"] == pytest.approx(4.0)


def test_a_term_may_be_called_loss(run):
    module = linear()
    train(module, run, loss_fn=lambda batch: {"loss": cross_entropy(module)(batch)["cross_entropy"]})
    assert metrics(run)[0]["loss"] > 0


def test_clipping_bounds_the_norm_of_the_whole_gradient(run):
    module = linear()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = []
    train(
        module, run, TrainConfig(lr=1.0, steps=1, momentum=0.0, clip_norm=0.5),
        loss_fn=lambda batch: {"large": 100 * cross_entropy(module)(batch)["cross_entropy"]},
        after_backward=lambda step: gradients.append([value.grad.clone() for value in module.parameters()]),
    )  # fmt: skip
    moved = torch.cat([(before[name] - value).flatten() for name, value in module.state_dict().items()])
    unclipped = torch.cat([gradient.flatten() for gradient in gradients[0]])
    assert unclipped.norm() > 5  # the hook sees gradients before they are cut
    assert_close(moved, 0.5 * unclipped / unclipped.norm(), rtol=1e-4, atol=1e-6)


def test_hooks_may_change_the_gradient(run):
    module = linear()
    train(module, run, TrainConfig(lr=1.0, steps=3), after_backward=lambda step: module.weight.grad.zero_())
    assert_close(module.weight, linear().weight, rtol=0, atol=0)
    assert not torch.equal(module.bias, linear().bias)


def test_frozen_parameters_stay(run):
    module = linear()
    module.bias.requires_grad_(False)
    train(module, run, TrainConfig(lr=1.0, steps=3, weight_decay=0.1))
    assert_close(module.bias, linear().bias.requires_grad_(False), rtol=0, atol=0)
    assert not torch.equal(module.weight, linear().weight)


def test_the_module_trains_in_train_mode_and_is_left_in_eval_mode(run):
    module, modes = linear(), []

    def before_epoch(step):
        module.eval()  # as an evaluation between two epochs would

    def loss_fn(batch):
        modes.append(module.training)
        return cross_entropy(module)(batch)

    train(module, run, TrainConfig(lr=0.1, steps=5), loss_fn=loss_fn, before_epoch=before_epoch)
    assert modes == [True] * 5
    assert not module.training


def test_random_draws_in_a_loss_depend_on_the_step_alone(run, tmp_path):
    def draws(run, disturb):
        module, drawn = linear(), []

        def loss_fn(batch):
            drawn.append(torch.rand(()).item())
            torch.rand(disturb)
            return cross_entropy(module)(batch)

        train(module, run, loss_fn=loss_fn)
        return drawn

    first = draws(run, 0)
    assert first == draws(make_run(tmp_path / "other"), 5)
    assert len(set(first)) == STEPS


# ---------------------------------------------------------------------- moving average


def test_without_a_decay_there_is_no_average(run):
    assert train(linear(), run) is None


def test_the_average_moves_by_its_share_from_the_first_step_on(run):
    module = linear()  # GUIDE's P11: no warm-up
    start = module.weight.detach().clone()
    average = train(module, run, TrainConfig(lr=0.5, steps=1, ema_decay=0.9999))
    delta = module.weight.detach() - start
    assert delta.abs().max() > 0.01
    assert_close(average.weight, start + 1e-4 * delta, rtol=0, atol=1e-7)


def test_the_average_is_the_closed_form_of_all_weights(run):
    module, weights = linear(), []
    start = module.weight.detach().clone()
    average = train(
        module, run, TrainConfig(lr=0.5, steps=6, ema_decay=0.8),
        after_step=lambda step: weights.append(module.weight.detach().clone()),
    )  # fmt: skip
    expected = 0.8**6 * start + 0.2 * sum(0.8 ** (5 - k) * weight for k, weight in enumerate(weights))
    assert_close(average.weight, expected)
    assert not average.weight.requires_grad and not average.training


def test_the_average_takes_over_buffers_as_they_are(run):
    module = conv_net()
    average = train(module, run, TrainConfig(lr=0.1, steps=3, ema_decay=0.9), RandomBatches((8, 3, 6, 6)))
    assert_close(dict(average.named_buffers()), dict(module.named_buffers()), rtol=0, atol=0)


# ---------------------------------------------------------------------- losses that are no numbers


@pytest.mark.parametrize(("bad", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_no_number_stops_and_names_step_terms_and_rate(run, bad, shown):
    module, count = linear(), iter(range(STEPS))

    def loss_fn(batch):
        value = bad if next(count) == 7 else 0.5
        return {**cross_entropy(module)(batch), "extra": module.bias.sum() * 0 + value}

    with pytest.raises(TrainingError) as caught:
        train(module, run, TrainConfig(lr=0.125, steps=STEPS), loss_fn=loss_fn)
    wanted = rf"in train of task 2, step 7: cross_entropy=\S+, extra={shown}, learning rate 0\.125\."
    assert re.search(wanted, str(caught.value))


def test_weights_that_are_no_numbers_never_reach_a_checkpoint(tmp_path):
    run, module, count = make_run(tmp_path, every=4), linear(), iter(range(STEPS))
    with pytest.raises(TrainingError, match="step 6"):
        train(module, run, loss_fn=lambda batch: {"a": module.weight.sum() * (math.nan if next(count) == 6 else 1.0)})
    _, tensors, _ = run.fit_checkpoints(2, "train").load_newest(None)
    assert run.fit_checkpoints(2, "train").numbers() == [4]
    assert tensors["module"]["weight"].isfinite().all()


# ---------------------------------------------------------------------- resuming


def interrupted(make_module, folder, config, kill_at, precision="fp32", shape=(8, 3)):
    """A training that dies after ``kill_at`` steps, and the same command again: module and average."""

    def kill(step):
        if step.number == kill_at:
            raise Killed

    for after_step in (kill, None):
        module, run = make_module(), make_run(folder, precision)
        try:
            return module, train(module, run, config, RandomBatches(shape), after_step=after_step)
        except Killed:
            torch.manual_seed(kill_at)  # a new process has other global generators


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(lr=0.1, steps=STEPS, schedule="cosine", weight_decay=0.01),
        TrainConfig(lr=0.1, epochs=3, momentum=0.0, schedule="step", milestones=(1, 2)),
        TrainConfig(lr=0.01, epochs=3, optimizer="adamw", weight_decay=0.1, ema_decay=0.9, warmup_steps=3),
    ],
    ids=["sgd", "sgd without momentum", "adamw with average"],
)
def test_a_training_killed_at_any_step_ends_with_the_same_bits(tmp_path, config):
    module, average = interrupted(linear, tmp_path / "whole", config, None)
    for kill_at in range(1, STEPS + 1):
        again, again_average = interrupted(linear, tmp_path / str(kill_at), config, kill_at)
        assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)
        if average is not None:
            assert_close(again_average.state_dict(), average.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_optimisers_state_keeps_the_memory_order_of_the_weights(tmp_path, optimizer):
    config, batches = TrainConfig(lr=0.1, steps=2, optimizer=optimizer), RandomBatches((8, 3, 6, 6))
    run = make_run(tmp_path)
    train(conv_net(), run, config, batches)
    progress = Progress(conv_net(), config, {"batches": batches})
    progress.load(run.fit_checkpoints(2, "train"))
    for parameter, state in progress.optimizer.state.items():
        tensors = [value for value in state.values() if value is not None and value.ndim]
        assert tensors and all(value.stride() == parameter.stride() for value in tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kill_at", [3, 7, 10])  # before the first checkpoint, between two, right at the second
def test_a_channels_last_network_with_dropout_resumes_with_the_same_bits(tmp_path, precision, optimizer, kill_at):
    config = TrainConfig(lr=0.01, steps=STEPS, optimizer=optimizer, ema_decay=0.9, clip_norm=1.0)
    whole = interrupted(conv_net, tmp_path / "whole", config, None, precision, (8, 3, 6, 6))
    again = interrupted(conv_net, tmp_path / "again", config, kill_at, precision, (8, 3, 6, 6))
    for left, right in zip(again, whole):
        assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)
        assert left[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_precision_reaches_the_loss(tmp_path):
    def dtype(precision):
        module, seen = linear(), []

        def loss_fn(batch):
            seen.append(module(batch.images).dtype)
            return cross_entropy(module)(batch)

        train(module, make_run(tmp_path / precision, precision), TrainConfig(lr=0.1, steps=1), loss_fn=loss_fn)
        assert module.weight.dtype == torch.float32
        return seen[0]

    assert (dtype("fp32"), dtype("bf16")) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kill_at", range(1, STEPS + 1))
def test_the_metrics_hold_each_range_of_steps_once_after_a_resume(tmp_path, kill_at, monkeypatch):
    monkeypatch.setattr("utils.training.fit.LOG_EVERY", 2)
    config = TrainConfig(lr=0.1, steps=STEPS)
    interrupted(linear, tmp_path / "whole", config, None)
    interrupted(linear, tmp_path / "again", config, kill_at)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == whole
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [2, 4, 5, 6, 8, 10, 12]


def test_a_damaged_checkpoint_costs_steps_but_no_bits(tmp_path):
    config = TrainConfig(lr=0.1, steps=STEPS)
    whole, _ = interrupted(linear, tmp_path / "whole", config, None)
    module, run = linear(), make_run(tmp_path / "again")
    with pytest.raises(Killed):
        train(module, run, config, after_step=lambda step: (_ for _ in ()).throw(Killed) if step.number == 11 else None)
    (run.fit_checkpoints(2, "train").path(10) / "module.safetensors").write_bytes(b"")
    again = linear()
    train(again, make_run(tmp_path / "again"), config)
    assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_epochs_that_have_begun_are_not_announced_again(tmp_path):
    epochs = []

    def announce(step):
        epochs.append(step.epoch)

    def kill(step):
        if step.number == 7:  # in the middle of epoch 1; the newest checkpoint is of step 5
            raise Killed

    with pytest.raises(Killed):
        train(linear(), make_run(tmp_path), before_epoch=announce, after_step=kill)
    train(linear(), make_run(tmp_path), before_epoch=announce)
    assert epochs == [0, 1, 2]


class Counter:
    def __init__(self, values=None):
        self.values = values

    def state_dict(self):
        return self.values

    def load_state_dict(self, state):
        self.values = state


def test_batches_and_other_stateful_things_are_restored(tmp_path):
    counter = Counter({"seen": torch.tensor([1.0, 2.0]), "words": ["a"]})
    train(linear(), make_run(tmp_path), stateful={"counter": counter})
    batches, again = RandomBatches(), Counter()
    train(linear(), make_run(tmp_path), batches=batches, stateful={"counter": again})
    assert batches.drawn == STEPS
    assert_close(again.values["seen"], torch.tensor([1.0, 2.0]))
    assert again.values["words"] == ["a"]


def test_a_finished_training_is_not_repeated(tmp_path):
    config = TrainConfig(lr=0.1, steps=STEPS, ema_decay=0.9)
    module, again, steps = linear(), linear(1), []
    average = train(module, make_run(tmp_path), config)
    again_average = train(again, make_run(tmp_path), config, after_step=steps.append)
    assert steps == []
    assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert_close(again_average.state_dict(), average.state_dict(), rtol=0, atol=0)


def test_trainings_of_another_purpose_do_not_meet(tmp_path):
    run = make_run(tmp_path)
    for purpose in ("train", "head"):
        module, steps = linear(), []
        fit(
            module, RandomBatches(), cross_entropy(module), TrainConfig(lr=0.1, steps=3),
            Training(run, 0, purpose), Hooks(after_step=lambda step, steps=steps: steps.append(step.number)),
        )  # fmt: skip
        assert steps == [1, 2, 3]


# ---------------------------------------------------------------------- hooks


def test_a_step_says_where_the_training_stands(run):
    seen = []
    batches = RandomBatches()

    def note(step):
        seen.append((step.task, step.purpose, step.epoch, step.number, step.batch is not None))

    module = linear()
    train(module, run, TrainConfig(lr=0.1, steps=5), batches, before_epoch=note, after_backward=note, after_step=note)
    inside = [(2, "train", step // 4, step + done, True) for step in range(5) for done in (0, 1)]
    assert seen == [(2, "train", 0, 0, False), *inside[:8], (2, "train", 1, 4, False), *inside[8:]]


def test_the_gradient_of_another_loss_is_autograds_and_0_where_it_does_not_reach(run):
    module, found, wanted = linear(), [], []

    def loss():
        return module.weight.pow(3).sum()

    def note(step):
        kept = [parameter.grad.clone() for parameter in step.parameters]
        found.append(step.gradient(loss))
        wanted.append([*torch.autograd.grad(loss(), [module.weight]), torch.zeros(2)])
        assert_close([parameter.grad for parameter in step.parameters], kept)  # those of the step stay

    train(module, run, TrainConfig(lr=0.1, steps=2), after_backward=note)
    assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_gradient_of_another_loss_is_taken_in_the_precision_of_the_training(tmp_path, precision, dtype):
    module, seen = linear(), []

    def loss():
        seen.append(module(torch.ones(1, 3)))
        return seen[-1].float().sum()

    run = make_run(tmp_path, precision)
    train(module, run, TrainConfig(lr=0.1, steps=1), after_backward=lambda step: step.gradient(loss))
    assert seen[0].dtype == dtype


def test_a_second_training_fires_its_own_hooks_alone(run):
    module, fired = linear(), []
    for purpose in ("first", "second"):
        fit(
            module, RandomBatches(), cross_entropy(module), TrainConfig(lr=0.1, steps=2), Training(run, 2, purpose),
            Hooks(after_step=lambda step, purpose=purpose: fired.append((purpose, step.purpose))),
        )  # fmt: skip
    assert fired == [("first", "first")] * 2 + [("second", "second")] * 2
