"""The one training loop: schedules, optimisers and averages against torch's own, and resuming bit for bit."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.testing import assert_close

from utils.data.batches import Batch
from utils.data.manager import Task
from utils.run.errors import TrainingError
from utils.training import seeding
from utils.training.fit import Hooks, Progress, Training, fit, nothing
from utils.training.run import Run
from utils.training.runtime import Runtime
from utils.training.schedule import TrainConfig

TASK = Task(2, range(4, 6), ("e", "f"))
STEPS = 12  # three epochs of four batches
PIXELS = (8, 3, 6, 6)


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


class Killed(Exception):
    """The process ends."""


def kill_at(number):
    def kill(step):
        if step.number == number:
            raise Killed

    return kill


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
    loss_fn, batches = loss_fn or cross_entropy(module), batches or RandomBatches()
    return fit(module, batches, loss_fn, config, Training(run, TASK, "train"), Hooks(**hooks))


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in run.metrics.path.read_text().splitlines()]


def rates_of_torch(make_scheduler, length, lr=0.1) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler, rates = make_scheduler(optimizer), []
    for _ in range(length):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "settings", "make_scheduler"),
    [
        ("step", {"milestones": (3, 5), "lr_decay": 0.2}, lambda opt: lr_scheduler.MultiStepLR(opt, [3, 5], 0.2)),
        ("step", {"milestones": ()}, lambda opt: lr_scheduler.MultiStepLR(opt, [])),
        ("cosine", {"min_lr": 0.01}, lambda opt: lr_scheduler.CosineAnnealingLR(opt, 8, 0.01)),
        ("cosine", {"cosine_length": 5}, lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5)),
        ("linear", {"min_lr": 0.02}, lambda opt: lr_scheduler.LinearLR(opt, 1.0, 0.2, 8)),
        ("constant", {}, lambda opt: lr_scheduler.ConstantLR(opt, 1.0)),
    ],
)
def test_schedules_equal_torchs_per_epoch_and_per_step(schedule, settings, make_scheduler):
    expected = rates_of_torch(make_scheduler, 8)
    by_epoch = TrainConfig(lr=0.1, epochs=8, schedule=schedule, **settings)
    by_step = TrainConfig(lr=0.1, steps=8, schedule=schedule, **settings)
    held = [rate for rate in expected for _ in range(3)]  # three steps per epoch
    assert [by_step.learning_rate(step, 3) for step in range(8)] == pytest.approx(expected)
    assert [by_epoch.learning_rate(step, 3) for step in range(24)] == pytest.approx(held)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"lr": 0.01, "steps": 2000, "schedule": "linear"}, {0: 0.01, 1000: 0.005, 1999: 5e-6}),  # ends above its floor
        # From 0 in equal parts, and then as the schedule has it.
        ({"lr": 0.8, "steps": 8, "warmup_steps": 4, "schedule": "step", "milestones": (6,)},
         dict(enumerate([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.08, 0.08]))),
    ],
)  # fmt: skip
def test_linear_decay_and_warmup_are_those_worked_by_hand(settings, rates):
    assert {step: TrainConfig(**settings).learning_rate(step, 1) for step in rates} == pytest.approx(rates)


@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 12}])
def test_the_length_is_given_in_epochs_or_in_steps(run, length):
    steps = []
    train(linear(), run, TrainConfig(lr=0.1, **length), after_step=lambda step: steps.append(step.number))
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("length", [{}, {"epochs": 1, "steps": 1}])
def test_epochs_and_steps_exclude_each_other(length):
    with pytest.raises(AssertionError):
        TrainConfig(lr=0.1, **length)


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("sgd", SGD, {"momentum": 0.9, "weight_decay": 0.01}),
        ("sgd", SGD, {"momentum": 0.0}),
        ("adam", Adam, {"weight_decay": 0.1}),
        ("adamw", AdamW, {"weight_decay": 0.1}),
    ],
)
def test_a_training_equals_a_plain_loop_with_torchs_optimiser(run, name, kind, settings):
    ours, plain = linear(), linear()
    assert train(ours, run, TrainConfig(lr=0.1, epochs=3, optimizer=name, **settings)) is None  # no average is kept
    optimizer = kind(plain.parameters(), 0.1, **settings)
    for epoch in range(3):
        for batch in RandomBatches().epoch(epoch):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(plain(batch.images), batch.labels))
            optimizer.step()
    assert_close(ours.state_dict(), plain.state_dict())


def test_least_squares_reaches_its_solution(run):
    truth, module = torch.tensor([[1.0, -2.0, 0.5]]), nn.Linear(3, 1, bias=False)
    config = TrainConfig(lr=0.03, steps=300)
    train(module, run, config, loss_fn=lambda batch: {"mse": F.mse_loss(module(batch.images), batch.images @ truth.T)})
    assert_close(module.weight.detach(), truth, rtol=0, atol=1e-5)


def test_named_terms_are_summed_and_logged_as_means(run):
    module, start, config = linear(), linear(), TrainConfig(lr=1.0, steps=2, momentum=0.0)
    train(module, run, config, loss_fn=lambda batch: {"weight": module.weight.sum(), "bias": 3 * module.bias.sum()})
    assert_close(module.weight, start.weight - 2)
    assert_close(module.bias, start.bias - 6)
    (line,) = metrics(run)
    weight = start.weight.sum().item() - 3  # the mean of the values before step 0 and before step 1
    bias = 3 * (start.bias.sum().item() - 3)
    place = {"task": 2, "purpose": "train", "step": 2, "lr": 1.0}
    assert {key: line[key] for key in place} == place
    assert [line[key] for key in ("weight", "bias", "loss")] == pytest.approx([weight, bias, weight + bias], rel=1e-5)


def test_a_term_may_be_absent_from_some_steps_where_it_adds_nothing_and_may_be_called_loss(run):
    module, count = linear(), iter(range(4))

    def loss_fn(batch):
        terms = {"loss": cross_entropy(module)(batch)["cross_entropy"]}
        return terms | {"distill": module.bias.sum() * 0 + 8.0} if next(count) in (0, 2) else terms

    train(module, run, TrainConfig(lr=0.1, steps=4), loss_fn=loss_fn)
    (line,) = metrics(run)
    assert line["distill"] == pytest.approx(4.0) and line["loss"] > 0


def test_clipping_bounds_the_norm_of_the_whole_gradient(run):
    module, gradients = linear(), []
    train(
        module, run, TrainConfig(lr=1.0, steps=1, momentum=0.0, clip_norm=0.5),
        loss_fn=lambda batch: {"large": 100 * cross_entropy(module)(batch)["cross_entropy"]},
        after_backward=lambda step: gradients.extend(value.grad.flatten().clone() for value in step.parameters),
    )  # fmt: skip
    before, after = (parameters_to_vector(net.parameters()).detach() for net in (linear(), module))
    unclipped = torch.cat(gradients)
    assert unclipped.norm() > 5  # the hook sees gradients before they are cut
    assert_close(before - after, 0.5 * unclipped / unclipped.norm(), rtol=1e-4, atol=1e-6)


def test_hooks_may_change_the_gradient_and_frozen_parameters_stay(run, tmp_path):
    changed, frozen = linear(), linear()
    train(changed, run, TrainConfig(lr=1.0, steps=3), after_backward=lambda step: changed.weight.grad.zero_())
    frozen.bias.requires_grad_(False)
    train(frozen, make_run(tmp_path / "frozen"), TrainConfig(lr=1.0, steps=3, weight_decay=0.1))
    assert torch.equal(changed.weight, linear().weight) and not torch.equal(changed.bias, linear().bias)
    assert torch.equal(frozen.bias, linear().bias) and not torch.equal(frozen.weight, linear().weight)


def test_the_module_trains_in_train_mode_and_is_left_in_eval_mode(run):
    module, modes, config = linear(), [], TrainConfig(lr=0.1, steps=5)
    train(
        module, run, config, loss_fn=lambda batch: modes.append(module.training) or cross_entropy(module)(batch),
        before_epoch=lambda step: module.eval(),  # between two epochs, as an evaluation would leave it
    )  # fmt: skip
    assert modes == [True] * 5 and not module.training


def test_random_draws_in_a_loss_depend_on_the_step_alone(tmp_path):
    module, draws = linear(), {1: [], 6: []}
    for disturb, drawn in draws.items():

        def loss_fn(batch, disturb=disturb, drawn=drawn):
            drawn.append(torch.rand(disturb)[0].item())
            return cross_entropy(module)(batch)

        train(module, make_run(tmp_path / str(disturb)), loss_fn=loss_fn)
    assert draws[1] == draws[6] and len(set(draws[1])) == STEPS


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_reaches_the_loss_and_the_gradient_of_another_loss(tmp_path, precision, dtype):
    module, seen, run, config = linear(), [], make_run(tmp_path, precision), TrainConfig(lr=0.1, steps=1)

    def loss():
        seen.append(module(torch.ones(1, 3)))
        return seen[-1].float().sum()

    train(module, run, config, loss_fn=lambda batch: {"sum": loss()}, after_backward=lambda step: step.gradient(loss))
    assert [output.dtype for output in seen] == [dtype, dtype] and module.weight.dtype == torch.float32


@pytest.mark.parametrize(("steps", "decay", "atol"), [(1, 0.9999, 1e-7), (6, 0.8, 1e-5)])  # no warm-up: GUIDE's P11
def test_the_average_is_the_closed_form_of_all_weights(run, steps, decay, atol):
    module, weights = linear(), []
    start = module.weight.detach().clone()
    config = TrainConfig(lr=0.5, steps=steps, ema_decay=decay)
    average = train(module, run, config, after_step=lambda step: weights.append(module.weight.detach().clone()))
    assert (weights[-1] - start).abs().max() > 0.01
    moved = sum(decay ** (steps - 1 - k) * weight for k, weight in enumerate(weights))
    assert_close(average.weight, decay**steps * start + (1 - decay) * moved, rtol=0, atol=atol)
    assert not average.weight.requires_grad and not average.training


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
    number, tensors, _ = run.checkpoints("fit_2_train").load_newest(None)
    assert number == 4 and tensors["module"]["weight"].isfinite().all()


def interrupted(make_module, folder, config, number, precision="fp32", shape=(8, 3)):
    """A training that dies after ``number`` steps, and the same command again: module and average."""
    for after_step in (kill_at(number), nothing):
        module, run = make_module(), make_run(folder, precision)
        try:
            return module, train(module, run, config, RandomBatches(shape), after_step=after_step)
        except Killed:
            torch.manual_seed(number)  # a new process has other global generators


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(lr=0.1, steps=STEPS, schedule="cosine", weight_decay=0.01),
        TrainConfig(lr=0.1, epochs=3, momentum=0.0, schedule="step", milestones=(1, 2)),
        TrainConfig(lr=0.01, epochs=3, optimizer="adamw", weight_decay=0.1, ema_decay=0.9, warmup_steps=3),
    ],
    ids=["sgd", "sgd without momentum", "adamw with average"],
)
def test_a_training_killed_at_any_step_ends_with_the_same_bits_and_metrics(tmp_path, config, monkeypatch):
    monkeypatch.setattr("utils.training.fit.LOG_EVERY", 2)
    module, average = interrupted(linear, tmp_path / "whole", config, None)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [2, 4, 5, 6, 8, 10, 12]
    for number in range(1, STEPS + 1):
        again, again_average = interrupted(linear, tmp_path / str(number), config, number)
        assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)
        if average is not None:
            assert_close(again_average.state_dict(), average.state_dict(), rtol=0, atol=0)
        assert (tmp_path / str(number) / "metrics.jsonl").read_text() == whole


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_optimisers_state_keeps_the_memory_order_of_the_weights(run, optimizer):
    config, batches = TrainConfig(lr=0.1, steps=2, optimizer=optimizer), RandomBatches(PIXELS)
    train(conv_net(), run, config, batches)
    progress = Progress(conv_net(), config, Training(run, TASK, "train"), {"batches": batches})
    progress.load()
    for parameter, state in progress.optimizer.state.items():
        tensors = [value for value in state.values() if value is not None and value.ndim]
        assert tensors and all(value.stride() == parameter.stride() for value in tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("number", [3, 7, 10])  # before the first checkpoint, between two, right at the second
def test_a_channels_last_network_with_dropout_resumes_with_the_same_bits(tmp_path, precision, optimizer, number):
    config = TrainConfig(lr=0.01, steps=STEPS, optimizer=optimizer, ema_decay=0.9, clip_norm=1.0)
    whole = interrupted(conv_net, tmp_path / "whole", config, None, precision, PIXELS)
    again = interrupted(conv_net, tmp_path / "again", config, number, precision, PIXELS)
    module, average = again
    assert_close(dict(average.named_buffers()), dict(module.named_buffers()), rtol=0, atol=0)  # taken over as they are
    for left, right in zip(again, whole):
        assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)
        assert left[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_damaged_checkpoint_costs_steps_but_no_bits(tmp_path):
    config = TrainConfig(lr=0.1, steps=STEPS)
    whole, _ = interrupted(linear, tmp_path / "whole", config, None)
    run, again = make_run(tmp_path / "again"), linear()
    with pytest.raises(Killed):
        train(linear(), run, config, after_step=kill_at(11))
    (run.checkpoints("fit_2_train").path(10) / "module.safetensors").write_bytes(b"")
    train(again, make_run(tmp_path / "again"), config)
    assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_epochs_that_have_begun_are_not_announced_again(tmp_path):
    epochs = []
    announce = {"before_epoch": lambda step: epochs.append(step.epoch)}
    with pytest.raises(Killed):  # in the middle of epoch 1; the newest checkpoint is of step 5
        train(linear(), make_run(tmp_path), **announce, after_step=kill_at(7))
    train(linear(), make_run(tmp_path), **announce)
    assert epochs == [0, 1, 2]


def test_a_finished_training_is_not_repeated_and_all_that_it_holds_is_restored(tmp_path):
    values, restored, steps = {"seen": torch.tensor([1.0, 2.0]), "words": ["a"]}, {}, []
    stateful = {"thing": SimpleNamespace(state_dict=lambda: values, load_state_dict=restored.update)}
    config, batches, module, again = TrainConfig(lr=0.1, steps=4, ema_decay=0.9), RandomBatches(), linear(), linear(1)
    average = train(module, make_run(tmp_path), config, stateful=stateful)
    again_average = train(again, make_run(tmp_path), config, batches, after_step=steps.append, stateful=stateful)
    assert steps == [] and batches.drawn == 4
    assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert_close(again_average.state_dict(), average.state_dict(), rtol=0, atol=0)
    assert_close(restored.pop("seen"), values["seen"])
    assert restored == {"words": ["a"]}


def test_a_training_that_was_told_to_stop_stays_where_it_ended(tmp_path):
    whole, again, steps, config = linear(), linear(), [], TrainConfig(lr=0.1, steps=7)
    train(whole, make_run(tmp_path / "whole"), config)
    for _ in range(2):  # the second time it is over
        reached = {"number": 0}
        thing = SimpleNamespace(state_dict=lambda reached=reached: reached, load_state_dict=reached.update)

        def note(step, reached=reached):
            steps.append(step.number)
            reached["number"] = step.number

        hooks = {"stop": lambda reached=reached: reached["number"] >= 7, "stateful": {"reached": thing}}
        train(again, make_run(tmp_path / "stopped"), after_step=note, **hooks)
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_trainings_of_two_purposes_do_not_meet(run):
    module, fired = linear(), []
    for purpose in ("train", "head"):
        hooks = Hooks(after_step=lambda step, purpose=purpose: fired.append((purpose, step.purpose, step.number)))
        config, training = TrainConfig(lr=0.1, steps=2), Training(run, TASK, purpose)
        fit(module, RandomBatches(), cross_entropy(module), config, training, hooks)
    assert fired == [(purpose, purpose, number) for purpose in ("train", "head") for number in (1, 2)]


def test_a_step_says_where_the_training_stands(run):
    seen = []

    def note(step):
        seen.append((step.task, step.purpose, step.epoch, step.number, step.batch is not None))

    train(linear(), run, TrainConfig(lr=0.1, steps=5), before_epoch=note, after_backward=note, after_step=note)
    inside = [(TASK, "train", step // 4, step + done, True) for step in range(5) for done in (0, 1)]
    assert seen == [(TASK, "train", 0, 0, False), *inside[:8], (TASK, "train", 1, 4, False), *inside[8:]]


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
