"""The iterations of a relaxed search: halves of the training data, the schedule, progress, checkpoints."""

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netwright.core.checkpoint import load_checkpoint, require_same, save_checkpoint
from netwright.core.data import Batch
from netwright.core.errors import NonFiniteLossError, RunDirectoryError, TaskError
from netwright.core.evaluate import device_of, evaluate
from netwright.core.losses import task_loss
from netwright.core.randomness import isolated, restore_states, save_states
from netwright.core.task import Task
from netwright.core.teacher import take
from netwright.core.transform import Progress
from netwright.search.relaxed import alphas, choices, derive, skip_share

__all__ = ["Loop", "Loss", "RelaxedResult", "Stepper", "batch_loss", "descend", "steady"]

Loss: TypeAlias = Callable[[], Tensor]
"""A scalar that is computed anew from the parameters as they are."""


@dataclass(frozen=True)
class RelaxedResult:
    """What a relaxed search came to.

    Attributes:
        network: the derived network, with the super-network's weights; train it before use.
        choices: the operation of each ``Mixed``, by path; ``derive`` takes it.
        alphas: of each decision, ``(epochs + 1, operations)``: at the start and after every epoch.
        scores: of the super-network on ``val`` after every epoch.
        skip_share: share of the edges that merely pass their input on.
        steps: iterations done.
        seconds: wall time, that before a resume included.
    """

    network: nn.Module
    choices: dict[str, str]
    alphas: dict[str, Tensor]
    scores: tuple[float, ...]
    skip_share: float
    steps: int
    seconds: float


class Stepper(ABC):
    """What one iteration of a search does, and what it keeps from one to the next.

    Attributes:
        networks: all that have weights; the first is scored and derived.
        movers: the optimizers of weights, whose learning rate follows the schedule.
        others: further optimizers.
    """

    networks: tuple[nn.Module, ...]
    movers: tuple[Optimizer, ...]
    others: tuple[Optimizer, ...] = ()

    @abstractmethod
    def step(self, train: Callable[[nn.Module], Loss], held: Callable[[nn.Module], Loss], epoch: int) -> float:
        """One iteration; ``train`` and ``held`` give the loss of a network on the batch of either half."""

    def scoring(self) -> AbstractContextManager[None]:
        """Entered while the network is scored."""
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """What else a checkpoint must hold."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` returned."""
        assert not state, "a stepper that keeps something restores it"


def batch_loss(model: nn.Module, task: Task, batch: Batch, where: str, seed: int) -> Loss:
    """The loss of a batch, with the same draws (dropout) whenever it is computed.

    Raises:
        NonFiniteLossError: when called, a loss that is NaN or infinite.
    """
    device = device_of(model)

    def loss() -> Tensor:
        with isolated(seed, device):
            value = task_loss(task, task.outputs(model, batch[0]), batch[1])
        if not bool(value.isfinite()):
            raise NonFiniteLossError(
                f"Task {task.name!r}: the loss is {float(value.detach())} at {where} of the search. Lower lr or "
                "alpha_lr, or look for values in the data that the loss cannot take, such as log(0)."
            )
        return value

    return loss


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Inside, buffers may change (running statistics); afterwards they are as before."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def descend(loss: Loss, weights: Sequence[nn.Parameter], mover: Optimizer, clip: float | None) -> float:
    """One step of ``mover`` down the gradient of ``loss``, clipped to the norm ``clip``; the loss before it.

    No weight moves where the loss depends on none, as on a path of operations without weights.
    """
    value = loss()
    if value.requires_grad:
        move(weights, torch.autograd.grad(value, weights, allow_unused=True), mover, clip)
    return float(value.detach())


def move(
    parameters: Iterable[nn.Parameter],
    gradients: Iterable[Tensor | None],
    mover: Optimizer,
    clip: float | None = None,
) -> None:
    """One step of ``mover`` with these gradients; a parameter without one stays."""
    chosen = list(parameters)
    for parameter, gradient in zip(chosen, gradients, strict=True):
        parameter.grad = gradient
    if clip is not None:
        nn.utils.clip_grad_norm_(chosen, clip)
    mover.step()
    for parameter in chosen:
        parameter.grad = None


class Loop:
    """The state of one search, and the iterations over it."""

    def __init__(
        self, stepper: Stepper, task: Task, settings: Any, seed: int, progress: Sequence[Progress], device: torch.device
    ) -> None:
        self.stepper, self.task, self.seed, self.progress, self.device = stepper, task, seed, progress, device
        self.settings: dict[str, Any] = dataclasses.asdict(settings)
        count = len(task.data.train)
        if count < 2:
            raise TaskError(f"Task {task.name!r} has {count} training items; a search needs two, one for each half.")
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=self.generator)
        self.halves = order[: count // 2], order[count // 2 :]
        self.batch = min(settings.batch_size, count // 2)
        self.per_epoch = (count // 2) // self.batch
        self.epochs: int = settings.epochs
        self.base = [[group["lr"] for group in mover.param_groups] for mover in stepper.movers]
        self.epoch, self.before, self.start = 0, 0.0, time.monotonic()
        self.scores: list[float] = []
        self.history = {name: [alpha.detach().clone()] for name, alpha in alphas(stepper.networks[0]).items()}

    def run(self, checkpoint: Path | None) -> RelaxedResult:
        """Resume where there is something to resume from, and iterate to the end."""
        if checkpoint is not None and not checkpoint.parent.is_dir():
            raise RunDirectoryError(f"There is no folder {checkpoint.parent} for the checkpoint. Make it first.")
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        network = self.stepper.networks[0]
        while self.epoch < self.epochs:
            self._run_epoch()
            with self.stepper.scoring():
                self.scores.append(evaluate(network, self.task, "val"))
            for name, alpha in alphas(network).items():
                self.history[name].append(alpha.detach().clone())
            if checkpoint is not None:
                save_checkpoint(checkpoint, self._state())
        plain = derive(network).eval()
        history = {name: torch.stack(values).cpu() for name, values in self.history.items()}
        steps = self.epochs * self.per_epoch
        return RelaxedResult(
            plain, choices(network), history, tuple(self.scores), skip_share(network), steps, self._seconds()
        )

    def _run_epoch(self) -> None:
        for network in self.stepper.networks:
            network.train()
        orders = [half[torch.randperm(len(half), generator=self.generator)] for half in self.halves]
        total = self.epochs * self.per_epoch
        for place in range(self.per_epoch):
            step = self.epoch * self.per_epoch + place
            where = f"step {step + 1} of {total} (epoch {self.epoch + 1})"
            self._schedule(step / total)
            batches = [
                take(self.task.data.train, order[place * self.batch :][: self.batch], self.device) for order in orders
            ]
            seeds = torch.randint(2**31, (2,), generator=self.generator).tolist()
            train, held = (self._losses(batch, where, seed) for batch, seed in zip(batches, seeds, strict=True))
            loss = self.stepper.step(train, held, self.epoch)
            self._tell((step + 1) / total, f"epoch {step / self.per_epoch:.1f}/{self.epochs}  loss {loss:.4f}")
        self.epoch += 1

    def _losses(self, batch: Batch, where: str, seed: int) -> Callable[[nn.Module], Loss]:
        return lambda network: batch_loss(network, self.task, batch, where, seed)

    def _schedule(self, done: float) -> None:
        for mover, rates in zip(self.stepper.movers, self.base, strict=True):
            for group, rate in zip(mover.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2

    def _tell(self, fraction: float, text: str) -> None:
        shown = f"{text}  score {self.scores[-1]:.4f}" if self.scores else text
        for tell in self.progress:
            tell(fraction, shown)

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def _identity(self) -> dict[str, Any]:
        shapes = {name: str(tuple(value.shape)) for name, value in self.stepper.networks[0].state_dict().items()}
        search = {f"search's {name}": value for name, value in self.settings.items()}
        task = {"task": self.task.name, "seed": self.seed, "training items": len(self.task.data.train)}
        return {**task, **search, **{f"model's {name}": shape for name, shape in shapes.items()}}

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self._identity(),
            "networks": [network.state_dict() for network in self.stepper.networks],
            "optimizers": [mover.state_dict() for mover in (*self.stepper.movers, *self.stepper.others)],
            "stepper": self.stepper.state(),
            "generator": self.generator.get_state(),
            "random": save_states(self.device),
            "epoch": self.epoch,
            "scores": list(self.scores),
            "history": {name: list(values) for name, values in self.history.items()},
            "seconds": self._seconds(),
        }

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path, self.device)
        require_same(path, state["identity"], self._identity())
        for network, values in zip(self.stepper.networks, state["networks"], strict=True):
            network.load_state_dict(values)
        for mover, values in zip((*self.stepper.movers, *self.stepper.others), state["optimizers"], strict=True):
            mover.load_state_dict(values)
        self.stepper.restore(state["stepper"])
        self.generator.set_state(state["generator"].cpu())
        self.epoch, self.scores, self.history = state["epoch"], state["scores"], state["history"]
        self.before = state["seconds"]
        restore_states(state["random"], self.device)
