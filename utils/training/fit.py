"""The one training loop of the project: classifiers and generators, one step at a time, resumable at any step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from utils.data.batches import Batch, Batches
from utils.data.manager import Task
from utils.run.errors import TrainingError
from utils.training import seeding
from utils.training.checkpoint import Checkpoints
from utils.training.run import Run
from utils.training.schedule import TrainConfig

log = logging.getLogger("reprise")
LossFunction = Callable[[Batch], dict[str, Tensor]]  # named scalar terms
LOG_EVERY = 50  # steps between two looks at the loss; looking synchronises a GPU


@dataclass(frozen=True)
class Training:
    """Names one training: it must be the only one of its task and purpose in the run.

    Attributes:
        run: device, log, checkpoints, random keys.
        task: that is learned, or its number.
        purpose: what is trained, such as "train" or "ddpm".
    """

    run: Run
    task: Task | int
    purpose: str

    @property
    def index(self) -> int:
        """The number of the task."""
        return self.task if isinstance(self.task, int) else self.task.index


@dataclass
class Step:
    """Where a training stands, for hooks inside it.

    Attributes:
        training: its run, task and purpose.
        epoch: that the step belongs to, from 0.
        number: of steps that are done.
        parameters: that are trained.
        batch: of this step; None before the first step of an epoch.
    """

    training: Training
    epoch: int
    number: int
    parameters: list[nn.Parameter]
    batch: Batch | None = None

    @property
    def task(self) -> Task | int:
        return self.training.task

    @property
    def purpose(self) -> str:
        return self.training.purpose

    def gradient(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """Compute the gradient of another loss, one tensor per parameter, mean over processes.

        Args:
            loss: gives a scalar; it is called under the training's autocast.
        """
        runtime = self.training.run.runtime
        with runtime.autocast():
            value = loss()
        gradients = torch.autograd.grad(value, self.parameters, allow_unused=True)
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients)]
        return runtime.average(whole)


@dataclass(frozen=True)
class Hooks:
    """What is called inside a training; None: nothing.

    Attributes:
        before_epoch: before the first step of an epoch, not again when resumed inside it.
        after_backward: with gradients that are reduced over processes and not yet clipped.
        after_step: once the parameters have moved.
        stateful: further things with state_dict / load_state_dict that a checkpoint must hold.
    """

    before_epoch: Callable[[Step], None] | None = None
    after_backward: Callable[[Step], None] | None = None
    after_step: Callable[[Step], None] | None = None
    stateful: dict[str, object] = field(default_factory=dict)


class Progress:
    """Where a training stands: everything that a checkpoint inside it must hold."""

    def __init__(self, module: nn.Module, config: TrainConfig, stateful: dict[str, object]):
        self.module, self.stateful, self.step = module, stateful, 0
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = config.make_optimizer(self.parameters)
        self.ema = None
        if config.ema_decay:
            self.ema = copy.deepcopy(module).eval().requires_grad_(False)

    def update_ema(self, decay: float) -> None:
        averages, values = list(self.ema.parameters()), list(self.module.parameters())
        torch._foreach_lerp_(averages, [value.detach() for value in values], 1 - decay)
        for average, value in zip(self.ema.buffers(), self.module.buffers()):
            average.copy_(value)

    def save(self, checkpoints: Checkpoints, losses: LossLog, run: Run) -> None:
        """Write a checkpoint, after a look at the losses: one that is not finite must not be kept."""
        losses.flush()
        if not run.runtime.is_main:
            return
        optimizer, numbers = {}, {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    optimizer[f"{index}.{name}"] = value
                else:
                    numbers[f"{index}.{name}"] = value
        tensors = {"module": self.module.state_dict(), "optimizer": optimizer}
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        state = {"step": self.step, "optimizer": numbers, "json": {}}
        for name, thing in self.stateful.items():
            values = thing.state_dict()
            tensors[f"of_{name}"] = {key: value for key, value in values.items() if isinstance(value, Tensor)}
            state["json"][name] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        checkpoints.save(self.step, tensors, state)

    def load(self, checkpoints: Checkpoints) -> bool:
        """Continue from the newest checkpoint that is whole, if there is one."""
        found = checkpoints.load_newest(log)
        if found is None:
            return False
        _, tensors, state = found
        self.module.load_state_dict(tensors["module"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        values: dict[int, dict] = {}
        for name, value in [*tensors["optimizer"].items(), *state["optimizer"].items()]:
            index, key = name.split(".", 1)
            values.setdefault(int(index), {})[key] = self._like_parameter(int(index), value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": values, "param_groups": groups})
        for name, thing in self.stateful.items():
            thing.load_state_dict({**tensors[f"of_{name}"], **state["json"][name]})
        self.step = state["step"]
        return True

    def _like_parameter(self, index: int, value):
        # In the parameter's own memory order: another order takes another kernel, and so other last bits.
        parameter = self.parameters[index]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            return torch.empty_like(parameter, requires_grad=False).copy_(value)
        return value


class LossLog:
    """Keeps the last loss terms on the device and looks at them now and then."""

    def __init__(self, training: Training):
        self.training = training
        self.kept: list[tuple[int, float, dict[str, Tensor]]] = []
        self.latest = ""

    def add(self, step: int, rate: float, terms: dict[str, Tensor]) -> None:
        self.kept.append((step, rate, {name: term.detach() for name, term in terms.items()}))

    def flush(self) -> str:
        """Write the means of the kept terms to metrics.jsonl; return the newest in words.

        Raises:
            TrainingError: if a term is not finite; names step, terms and learning rate.
        """
        if not self.kept:
            return self.latest
        run, task, purpose = self.training.run, self.training.index, self.training.purpose
        # A step may lack a term, such as distillation where a batch holds no replay: it then adds nothing.
        names = list(dict.fromkeys(name for _, _, terms in self.kept for name in terms))
        zero = torch.zeros((), device=run.device)
        rows = [torch.stack([terms.get(name, zero).float() for name in names]) for _, _, terms in self.kept]
        values = torch.stack(rows).cpu()
        for (step, rate, _), row in zip(self.kept, values):
            if not row.isfinite().all():
                terms = ", ".join(f"{name}={value:g}" for name, value in zip(names, row.tolist()))
                raise TrainingError(
                    f"the loss is not finite in {purpose} of task {task}, step {step}: {terms}, "
                    f"learning rate {rate:g}. Try a smaller rate, clip_norm, or precision=fp32"
                )
        step, rate, _ = self.kept[-1]
        means = dict(zip(names, values.mean(0).tolist()))
        place = {"task": task, "purpose": purpose, "step": step + 1, "lr": rate}
        run.metrics.write(**place, **{"loss": sum(means.values()), **means})
        self.latest = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        self.kept = []
        return self.latest


def fit(
    module: nn.Module,
    batches: Batches,
    loss_fn: LossFunction,
    config: TrainConfig,
    training: Training,
    hooks: Hooks = Hooks(),
) -> nn.Module | None:
    """Train a module, from its newest checkpoint if this training was cut off.

    Every step reseeds the global random generators from (seed, task, purpose, step), so a loss may draw from them.

    Args:
        module: its parameters that require gradients are trained; it is in train mode at every step.
        batches: see `utils.data.batches.Batches`; saved with every checkpoint.
        loss_fn: one batch to named scalar terms, which are summed.
        config: optimiser, schedule, length.
        training: run, task and purpose.
        hooks: what is called inside.

    Returns:
        The exponential moving average of the module, or None without ``ema_decay``.

    Raises:
        TrainingError: if the loss is NaN or infinite.
    """
    run, task, purpose = training.run, training.index, training.purpose
    progress = Progress(module, config, {"batches": batches, **hooks.stateful})
    checkpoints, losses = run.fit_checkpoints(task, purpose), LossLog(training)
    per_epoch = len(batches)
    total = config.num_steps(per_epoch)
    if progress.load(checkpoints):
        log.info("Task %d: %s continues at step %d of %d", task, purpose, progress.step, total)
    run.metrics.rewind(task, purpose, progress.step)  # also of a training that was cut off before its first checkpoint
    rank = run.runtime.shard[0]
    bar = run.bar(total, f"task {task} {purpose}", progress.step)
    while progress.step < total:
        epoch, start = divmod(progress.step, per_epoch)
        if start == 0:
            _call(hooks.before_epoch, Step(training, epoch, progress.step, progress.parameters))
        module.train()
        for batch in islice(batches.epoch(epoch, start), total - progress.step):
            rate = config.learning_rate(progress.step, per_epoch)
            seeding.seed_everything(run.seed, task, purpose, progress.step, *([rank] if rank else []))  # own noise
            step = Step(training, epoch, progress.step, progress.parameters, batch)
            losses.add(progress.step, rate, train_step(progress, step, loss_fn, config, rate, hooks))
            progress.step = step.number = progress.step + 1
            bar.update()
            _call(hooks.after_step, step)
            if progress.step % LOG_EVERY == 0:
                bar.set_postfix_str(losses.flush(), refresh=False)
            if progress.step % run.checkpoint_every == 0:
                progress.save(checkpoints, losses, run)
    bar.close()
    run.runtime.share_buffers(module)
    if checkpoints.numbers()[:1] != [total]:
        progress.save(checkpoints, losses, run)
    module.eval()
    return progress.ema


def train_step(
    progress: Progress, step: Step, loss_fn: LossFunction, config: TrainConfig, rate: float, hooks: Hooks
) -> dict[str, Tensor]:
    """Run forward, backward, clip, step, average; return the named terms of the loss."""
    runtime = step.training.run.runtime
    for group in progress.optimizer.param_groups:
        group["lr"] = rate
    runtime.share_buffers(progress.module)
    with runtime.autocast():
        terms = loss_fn(step.batch)
    progress.optimizer.zero_grad(set_to_none=True)
    runtime.accelerator.backward(sum(terms.values()))
    runtime.average_gradients(progress.parameters)
    _call(hooks.after_backward, step)
    if config.clip_norm:
        torch.nn.utils.clip_grad_norm_(progress.parameters, config.clip_norm)
    progress.optimizer.step()
    if progress.ema is not None:
        progress.update_ema(config.ema_decay)
    return terms


def _call(hook: Callable[[Step], None] | None, step: Step) -> None:
    if hook is not None:
        hook(step)
