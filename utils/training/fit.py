"""The one training loop of the project: classifiers and generators, one step at a time, resumable at any step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.data.batches import Batch, Batches
from utils.data.manager import Task
from utils.run.errors import TrainingError
from utils.run.files import flatten, nest
from utils.run.log import log
from utils.training import seeding
from utils.training.run import Run
from utils.training.schedule import TrainConfig

LossFunction = Callable[[Batch], dict[str, Tensor]]  # named scalar terms
LOG_EVERY = 50  # steps between two looks at the loss; looking synchronises a GPU


@dataclass(frozen=True)
class Training:
    """Names one training: it must be the only one of its task and purpose in the run.

    Attributes:
        run: device, log, checkpoints, random keys.
        task: that is learned.
        purpose: what is trained, such as "train" or "ddpm".
    """

    run: Run
    task: Task
    purpose: str


@dataclass(frozen=True)
class Step(Training):
    """Where a training stands, for hooks inside it.

    Attributes:
        epoch: that the step belongs to, from 0.
        number: of steps that are done.
        parameters: that are trained.
        batch: of this step; None before the first step of an epoch.
        optimizer: whose state a hook may clear.
    """

    epoch: int
    number: int
    parameters: list[nn.Parameter]
    batch: Batch | None = None
    optimizer: torch.optim.Optimizer | None = None

    def gradient(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """Compute the gradient of another loss, one tensor per parameter, mean over processes.

        Args:
            loss: gives a scalar; it is called under the training's autocast.
        """
        with self.run.runtime.autocast():
            value = loss()
        # Where the loss does not reach, the gradient is 0.
        return self.run.runtime.average(list(torch.autograd.grad(value, self.parameters, materialize_grads=True)))


def nothing(step: Step) -> None:
    """Do nothing: the hook of whoever brings none."""


def never() -> bool:
    """Let a training go to its end."""
    return False


@dataclass(frozen=True)
class Hooks:
    """What is called inside a training.

    Attributes:
        before_epoch: before the first step of an epoch, not again when resumed inside it.
        after_backward: with gradients that are reduced over processes and not yet clipped.
        after_step: once the parameters have moved.
        stateful: further things with state_dict / load_state_dict that a checkpoint must hold.
        stop: asked before every step; True ends the training. What it looks at belongs to ``stateful``.
    """

    before_epoch: Callable[[Step], None] = nothing
    after_backward: Callable[[Step], None] = nothing
    after_step: Callable[[Step], None] = nothing
    stateful: dict[str, object] = field(default_factory=dict)
    stop: Callable[[], bool] = never


class Progress:
    """Where a training stands: everything that a checkpoint inside it must hold, and how it takes a step."""

    def __init__(self, module: nn.Module, config: TrainConfig, training: Training, stateful: dict[str, object]):
        self.module, self.config, self.training, self.stateful = module, config, training, stateful
        self.step = 0
        self.optimizer = config.make_optimizer([value for value in module.parameters() if value.requires_grad])
        self.parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        self.ema = copy.deepcopy(module).eval().requires_grad_(False) if config.ema_decay else None
        self.networks = {"module": module} if self.ema is None else {"module": module, "ema": self.ema}
        self.unseen: list[tuple[int, float, dict[str, Tensor]]] = []  # steps, rates and losses, kept on the device
        self.checkpoints = training.run.checkpoints(f"fit_{training.task.index}_{training.purpose}")
        self.counts = training.run.ledger.counts()  # before it

    def at(self, epoch: int, batch: Batch | None = None) -> Step:
        """Tell a hook where the training stands."""
        return Step(**vars(self.training), epoch=epoch, number=self.step, parameters=self.parameters, batch=batch,
                    optimizer=self.optimizer)  # fmt: skip

    def take(self, step: Step, loss_fn: LossFunction, rate: float, after_backward: Callable[[Step], None]) -> None:
        """Run forward, backward, clip, step, average; keep the named terms of the loss."""
        runtime = self.training.run.runtime
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        runtime.share_buffers(self.module)
        with runtime.autocast():
            terms = loss_fn(step.batch)
        self.optimizer.zero_grad(set_to_none=True)
        runtime.accelerator.backward(sum(terms.values()))
        runtime.average_gradients(self.parameters)
        after_backward(step)
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            move = get_ema_multi_avg_fn(self.config.ema_decay)
            move(list(self.ema.parameters()), list(self.module.parameters()), None)
            for average, value in zip(self.ema.buffers(), self.module.buffers()):
                average.copy_(value)
        self.unseen.append((self.step, rate, {name: term.detach() for name, term in terms.items()}))
        self.step += 1

    def look(self) -> str:
        """Write the means of the unseen losses to metrics.jsonl; return them in words, "" where there are none.

        Raises:
            TrainingError: if a term is not finite; names step, terms and learning rate.
        """
        if not self.unseen:
            return ""
        run, task, purpose = self.training.run, self.training.task.index, self.training.purpose
        # A step may lack a term, such as distillation where a batch holds no replay: it then adds nothing.
        names = list(dict.fromkeys(name for _, _, terms in self.unseen for name in terms))
        zero = torch.zeros((), device=run.device)
        rows = [torch.stack([terms.get(name, zero).float() for name in names]) for _, _, terms in self.unseen]
        values = torch.stack(rows).cpu()
        for (step, rate, _), row in zip(self.unseen, values):
            if not row.isfinite().all():
                terms = ", ".join(f"{name}={value:g}" for name, value in zip(names, row.tolist()))
                place = f"in {purpose} of task {task}, step {step}: {terms}, learning rate {rate:g}"
                raise TrainingError(f"the loss is not finite {place}. Try a smaller rate, clip_norm, or precision=fp32")
        step, rate, _ = self.unseen[-1]
        means = dict(zip(names, values.mean(0).tolist()))
        run.metrics.write(task=task, purpose=purpose, step=step + 1, lr=rate, **{"loss": sum(means.values()), **means})
        self.unseen = []
        return ", ".join(f"{name} {value:.3f}" for name, value in means.items())

    def save(self) -> None:
        """Write a checkpoint, after a look at the losses: one that is not finite must not be kept."""
        self.look()
        if not self.training.run.runtime.is_main:
            return
        tensors = {name: network.state_dict() for name, network in self.networks.items()}
        state = {"step": self.step, "json": {}, "counts": self.training.run.ledger.since(self.counts)}
        tensors["optimizer"], state["optimizer"] = _split(flatten(self.optimizer.state_dict()["state"]))
        for name, thing in self.stateful.items():
            tensors[f"of_{name}"], state["json"][name] = _split(thing.state_dict())
        self.checkpoints.save(self.step, tensors, state)

    def load(self) -> None:
        """Continue from the newest checkpoint that is whole, if there is one."""
        if (found := self.checkpoints.load_newest(log)) is None:
            return
        self.step, tensors, state = found
        self.training.run.ledger.add(state.get("counts", {}))
        for name, network in self.networks.items():
            network.load_state_dict(tensors[name])
        moments = {int(i): values for i, values in nest({**tensors["optimizer"], **state["optimizer"]}).items()}
        for index, values in moments.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == self.parameters[index].shape:
                    # In the parameter's own memory order: another takes another kernel, and so other last bits.
                    values[name] = torch.empty_like(self.parameters[index], requires_grad=False).copy_(value)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for name, thing in self.stateful.items():
            thing.load_state_dict({**tensors[f"of_{name}"], **state["json"][name]})


def _split(values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part tensors from what JSON holds."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def fit(module: nn.Module, batches: Batches, loss_fn: LossFunction, config: TrainConfig, training: Training,
        hooks: Hooks = Hooks()) -> nn.Module | None:  # fmt: skip
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
    run, task, purpose = training.run, training.task.index, training.purpose
    progress = Progress(module, config, training, {"batches": batches, **hooks.stateful})
    per_epoch = len(batches)
    total = config.num_steps(per_epoch)
    if run.ledger.foresees:
        return _foresee(progress, batches, loss_fn, hooks, total)
    progress.load()
    if progress.step:
        log.info("Task %d: %s continues at step %d of %d", task, purpose, progress.step, total)
    run.metrics.rewind(task, purpose, progress.step)  # also of a training that was cut off before its first checkpoint
    rank = run.runtime.shard[0]
    with run.bar(total, f"task {task} {purpose}", progress.step) as bar:
        while progress.step < total and not hooks.stop():
            epoch, start = divmod(progress.step, per_epoch)
            if start == 0:
                hooks.before_epoch(progress.at(epoch))
            module.train()
            for batch in islice(batches.epoch(epoch, start), total - progress.step):
                rate = config.learning_rate(progress.step, per_epoch)
                seeding.seed_everything(run.seed, task, purpose, progress.step, *([rank] if rank else []))  # own noise
                progress.take(progress.at(epoch, batch), loss_fn, rate, hooks.after_backward)
                bar.update()
                hooks.after_step(progress.at(epoch, batch))
                if progress.step % LOG_EVERY == 0:
                    bar.set_postfix_str(progress.look(), refresh=False)
                if progress.step % run.checkpoint_every == 0:
                    progress.save()
                if hooks.stop():
                    break
    run.runtime.share_buffers(module)
    if progress.checkpoints.numbers()[:1] != [progress.step]:
        progress.save()
    module.eval()
    return progress.ema


def _foresee(progress: Progress, batches: Batches, loss_fn: LossFunction, hooks: Hooks, total: int) -> nn.Module | None:
    """Take the first steps in the place of all, and count them as often; see `fit`."""
    ledger = progress.training.run.ledger
    epochs, tried = -(-total // len(batches)), min(ledger.steps, total, len(batches))
    ledger.times(epochs, lambda: hooks.before_epoch(progress.at(0)))
    progress.module.train()
    for batch in islice(batches.epoch(0), tried):
        step, rate = progress.at(0, batch), progress.config.lr
        ledger.times(total / tried, partial(progress.take, step, loss_fn, rate, hooks.after_backward))
    progress.module.eval()
    return progress.ema
