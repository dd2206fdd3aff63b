"""Properties of an optimizer inside a training loop: groups, resuming, closures, schedules, memory."""

import contextlib
import copy
import gc
import inspect
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from netwright.core.errors import NetwrightError
from netwright.testing._descent import Trial, call_step, distance, parameters, same, target_loss
from netwright.testing._property import expect

__all__ = ["LOOP"]

_WARM_UP = 200  # iterations in which caches and bounded histories may still fill
_SLACK_BLOCKS = 100  # of memory, that caches of Python and torch may take meanwhile


def _moves(trial: Trial) -> None:
    params = parameters(trial.seed)
    before = [param.detach().clone() for param in params]
    places = [param.data_ptr() for param in params]
    trial.run(trial.make(params), params, range(3))
    for param, old, place in zip(params, before, places, strict=True):
        shape = tuple(param.shape)
        expect(bool(param.isfinite().all()), f"the parameter of shape {shape} is not finite after 3 steps.")
        expect(not torch.equal(param, old), f"the parameter of shape {shape} is unchanged after 3 steps.")
        expect(param.data_ptr() == place, f"the parameter of shape {shape} was moved, not updated in place.")
        expect(param.is_leaf and param.requires_grad, f"the parameter of shape {shape} is no longer a trainable leaf.")


def _determinism(trial: Trial) -> None:
    first, second = trial.trajectory(list), trial.trajectory(list)
    expect(same(first, second), f"two runs from the same seed differ by {distance(first, second):.3g}.")


def _groups(trial: Trial) -> None:
    lr = trial.settings().get("lr")
    slower: dict[str, Any] = {} if lr is None else {"lr": lr / 4}
    split = trial.trajectory(lambda p: [{"params": p[:2], **slower}, {"params": p[2:]}])
    if trial.coupled:
        whole = trial.trajectory(list)
        expect(lr is None or not same(split[:2], whole[:2]), "a group's own lr changes nothing.")
        return
    alone = trial.trajectory(lambda p: [{"params": p[:2], **slower}])[:2] + trial.trajectory(lambda p: p[2:])[2:]
    gap = distance(split, alone)
    expect(gap <= 1e-12, f"two groups with settings of their own differ from two optimizers by {gap:.3g}.")


def _add_group(trial: Trial) -> None:
    def added(params: list[Tensor]) -> Optimizer:
        optimizer = trial.make(params[:2])
        optimizer.add_param_group({"params": params[2:]})
        return optimizer

    params = parameters(trial.seed)
    late = trial.run(added(params), params, range(6))
    early = trial.trajectory(lambda p: [{"params": p[:2]}, {"params": p[2:]}])
    gap = distance(late, early)
    expect(gap <= 1e-12, f"a group added before the first step differs from one given at the start by {gap:.3g}.")

    params = parameters(trial.seed)
    optimizer = trial.make(params[:2])
    trial.run(optimizer, params, range(3))
    optimizer.add_param_group({"params": params[2:]})
    before = [param.detach().clone() for param in params[2:]]
    after = trial.run(optimizer, params, range(3, 6))[2:]
    moved = all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    expect(moved, "a group added after three steps does not move.")


def _resume(trial: Trial) -> None:
    _resumes(trial, torch.float64)
    if trial.bf16:
        _resumes(trial, torch.bfloat16)


def _resumes(trial: Trial, dtype: torch.dtype) -> None:
    params = parameters(trial.seed, dtype)
    optimizer = trial.make(params)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = group["lr"] * 0.5
    saved = trial.run(optimizer, params, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    unbroken = trial.run(optimizer, params, range(4, 8))

    again = [value.clone().requires_grad_() for value in saved]
    resumed_optimizer = trial.make(again)
    for _ in range(2):  # twice: it must not refuse what it has restored before
        file.seek(0)
        resumed_optimizer.load_state_dict(torch.load(file, weights_only=True))
    resumed = trial.run(resumed_optimizer, again, range(4, 8))
    kind = str(dtype).removeprefix("torch.")
    gap = distance(unbroken, resumed)
    expect(same(unbroken, resumed), f"four {kind} steps after load_state_dict differ from unbroken ones by {gap:.3g}.")


def _copy(trial: Trial) -> None:
    params = parameters(trial.seed)
    optimizer = trial.make(params)
    if "lr" in optimizer.param_groups[0]:
        LambdaLR(optimizer, lambda time: 1.0)  # which puts a step of its own on the optimizer
    trial.run(optimizer, params, range(3))
    for param in params:
        param.grad = None  # which may hold a graph, and torch copies no graph
    start = [param.detach().clone() for param in params]
    twins, twin = copy.deepcopy((params, optimizer))
    alone = trial.run(twin, twins, range(3, 6))
    gap = distance(params, start)
    expect(same(params, start), f"steps of a copy moved the parameters of the original by {gap:.3g}.")
    unbroken = trial.run(optimizer, params, range(3, 6))
    gap = distance(alone, unbroken)
    expect(same(alone, unbroken), f"three steps of a copy differ from those of the original by {gap:.3g}.")


def _closure(trial: Trial) -> None:
    params = parameters(trial.seed)
    optimizer = trial.make(params)
    kind = trial.kind(optimizer)
    if kind != "optional":
        torch.autograd.backward(target_loss(params, 0))
        _refused(lambda: optimizer.step(), "closure", "a step without the closure that it needs")
    calls: list[float] = []

    def loss(inner: Sequence[Tensor]) -> Tensor:
        expect(torch.is_grad_enabled(), "the closure is called with gradients disabled.")
        value = target_loss(inner, 0)
        calls.append(value.item())
        return value

    closure = trial.closure(optimizer, params, loss)

    returned = call_step(optimizer, closure)
    expect(bool(calls), "step(closure) does not call the closure.")
    got = None if returned is None else float(torch.as_tensor(returned).detach())
    expect(got == calls[0], f"step(closure) must return the closure's first loss {calls[0]:.6g}, got {got}.")
    if kind != "optional":
        return
    plain = parameters(trial.seed)
    trial.run(trial.make(plain), plain, range(1))
    gap = distance(params, plain)
    expect(gap <= 1e-12, f"a step with a closure differs from backward() and step() by {gap:.3g}.")


def _zero_lr(trial: Trial) -> None:
    if "lr" not in trial.settings():
        return
    start = parameters(trial.seed)
    after = trial.trajectory(lambda p: [{"params": p, "lr": 0.0}], 3)
    expect(same(start, after), f"with lr = 0 parameters moved by {distance(start, after):.3g} in 3 steps.")


def _schedule(trial: Trial) -> None:
    lr = trial.settings().get("lr")
    if lr is None:
        return
    params = parameters(trial.seed)
    optimizer = trial.make(params)
    scheduler = LambdaLR(optimizer, lambda time: 0.5 if time < 3 else 0.0)
    for time in range(3):
        trial.step(optimizer, params, time)
        scheduler.step()
    halved = [param.detach().clone() for param in params]
    gap = distance(halved, trial.trajectory(lambda p: [{"params": p, "lr": lr / 2}], 3))
    expect(gap <= 1e-12, f"a scheduler that halves lr differs from a group with half the lr by {gap:.3g}.")
    stopped = trial.run(optimizer, params, range(3, 6))
    expect(same(halved, stopped), f"parameters moved by {distance(halved, stopped):.3g} after a scheduler set lr to 0.")


def _memory(trial: Trial) -> None:
    warm_up = min(_WARM_UP, trial.steps // 2)
    with _apart():
        params = parameters(trial.seed)
        optimizer = trial.make(params)
        trial.run(optimizer, params, range(warm_up))
        before = _live()
        trial.run(optimizer, params, range(warm_up, trial.steps))
        after = _live()
    counted = trial.steps - warm_up
    expect(
        after[0] <= before[0], f"live tensors grew from {before[0]} to {after[0]} elements over {counted} iterations."
    )
    grown = after[1] - before[1]
    expect(grown <= counted // 4 + _SLACK_BLOCKS, f"Python holds {grown} more blocks after {counted} iterations.")


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What lives already is neither collected nor counted within: a large program has millions of objects."""
    ours = gc.get_freeze_count() == 0
    gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def _live() -> tuple[int, int]:
    """Elements in all living tensors that are not apart, and blocks of memory that Python holds."""
    gc.collect()
    kinds = (Tensor, nn.Parameter)
    return sum(item.numel() for item in gc.get_objects() if type(item) in kinds), sys.getallocatedblocks()


def _settings(trial: Trial) -> None:
    _refused(lambda: trial.make([]), "", "an empty parameter list")
    _refuses_lr(trial, -1.0)


def _nan_lr(trial: Trial) -> None:
    _refuses_lr(trial, math.nan)


def _refuses_lr(trial: Trial, value: float) -> None:
    """Expect the class behind ``make`` to refuse this ``lr``, where it has one and needs no other argument."""
    kind: Callable[..., Optimizer] = type(trial.make(parameters(trial.seed)))
    signature = inspect.signature(kind)
    try:
        signature.bind([], lr=value)
    except TypeError:
        return
    if "lr" in signature.parameters:
        _refused(lambda: kind(parameters(trial.seed), lr=value), "", f"lr = {value}")


def _refused(call: Callable[[], Any], word: str, what: str) -> None:
    """Expect ``call`` to raise an error that is meant for a user and says ``word``."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError, NetwrightError) as error:
        expect(word in str(error).lower(), f"the error for {what} does not say {word!r}: {error}")
        return
    expect(False, f"{what} is accepted.")


LOOP: Mapping[str, Callable[[Trial], Any]] = {
    "moves": _moves,
    "determinism": _determinism,
    "groups": _groups,
    "add_group": _add_group,
    "resume": _resume,
    "copy": _copy,
    "closure": _closure,
    "zero_lr": _zero_lr,
    "schedule": _schedule,
    "memory": _memory,
    "settings": _settings,
    "nan_lr": _nan_lr,
}
