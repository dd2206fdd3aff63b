"""Properties of an optimizer's arithmetic: its forms, its signs, and the parameters it may meet."""

import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from netwright.testing._descent import Trial, distance, parameters, same, target_loss
from netwright.testing._property import expect

__all__ = ["FORMS"]

_RATES = (1.0, 10.0, 100.0, 1000.0)  # times the usual rate, until the way is longer than rounding


def _foreach(trial: Trial) -> None:
    settings = trial.settings()
    for form in ("foreach", "fused"):
        if not _has(trial, form):
            continue
        off = {name: False for name in settings if name in ("foreach", "fused")}
        on = {**off, form: True}
        gap = distance(_formed(trial, on), _formed(trial, off))
        expect(gap <= 1e-10, f"{form}=True differs from {form}=False by {gap:.3g} after 6 steps in float64.")
        gap = distance(_mixed(trial, on), _mixed(trial, off))
        expect(gap <= 1e-5, f"{form}=True differs by {gap:.3g} where dtypes are mixed and one parameter is empty.")


def _formed(trial: Trial, settings: dict[str, bool]) -> list[Tensor]:
    return trial.trajectory(lambda params: [{"params": params, **settings}])


def _mixed(trial: Trial, settings: dict[str, bool]) -> list[Tensor]:
    params = parameters(trial.seed) + parameters(trial.seed, torch.float32, [(3, 2), (0, 3)])
    return trial.run(trial.make([{"params": params, **settings}]), params, range(4))


def _has(trial: Trial, name: str) -> bool:
    """Whether the optimizer has the setting; as an argument it must be a default too, so that groups can set it."""
    optimizer = trial.make(parameters(trial.seed))
    expect(
        name in optimizer.defaults or name not in inspect.signature(type(optimizer)).parameters,
        f"{name} is an argument but not among the defaults, so a parameter group cannot set it.",
    )
    return name in optimizer.defaults


def _maximize(trial: Trial) -> None:
    if not _has(trial, "maximize"):
        return

    def negative(params: Sequence[Tensor], time: int) -> Tensor:
        return -target_loss(params, time)

    up = trial.trajectory(lambda p: [{"params": p, "maximize": True}], loss=negative)
    down = trial.trajectory(lambda p: [{"params": p, "maximize": False}])
    gap = distance(up, down)
    expect(gap <= 1e-12, f"maximizing the negative loss differs from minimizing the loss by {gap:.3g}.")


def _zero_size(trial: Trial) -> None:
    params = [*parameters(trial.seed), torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)]
    params[-1].grad = torch.zeros_like(params[-1])

    def loss(inner: Sequence[Tensor], time: int) -> Tensor:
        return target_loss(inner, time) + inner[-1].sum()

    after = trial.run(trial.make(params), params, range(6), loss)
    gap = distance(after[:-1], trial.trajectory(list))
    expect(gap <= 1e-12, f"an empty parameter changes the path of the others by {gap:.3g}.")


def _frozen(trial: Trial) -> None:
    for what, trainable in (("requires_grad=False", False), ("grad None", True)):
        still = torch.ones(3, 2, dtype=torch.float64, requires_grad=trainable)
        params = parameters(trial.seed)
        optimizer = trial.make([params[0], still, *params[1:]])
        after = trial.run(optimizer, params, range(6))
        moved = distance([still], [torch.ones_like(still)])
        expect(moved == 0.0, f"a parameter with {what} moved by {moved:.3g}.")
        gap = distance(after, trial.trajectory(list))
        expect(gap <= 1e-12, f"a parameter with {what} changes the path of the others by {gap:.3g}.")


def _sparse(trial: Trial) -> None:
    touched, rows = torch.tensor([0, 2, 2, 5]), [0, 2, 5]

    def loss(sparse: bool) -> Callable[[Sequence[Tensor], int], Tensor]:
        return lambda params, time: (functional.embedding(touched, params[0], sparse=sparse) ** 2).mean()

    def table() -> list[Tensor]:
        return parameters(trial.seed, shapes=[(6, 2)])

    params = table()
    try:
        after = trial.run(trial.make(params), params, range(1), loss(True))
    except Exception as error:  # which type is the method's own choice; the message is what a user sees
        expect(not trial.sparse, f"sparse gradients are claimed, but {type(error).__name__} was raised: {error}")
        expect("sparse" in str(error).lower(), f"the error for a sparse gradient does not say 'sparse': {error}")
        expect(same(params, table()), "the parameter changed although its sparse gradient was refused.")
        return
    expect(trial.sparse is not False, "sparse gradients are to be refused, but a step was taken.")
    dense = table()
    wanted = trial.run(trial.make(dense), dense, range(1), loss(False))
    gap = distance([after[0][rows]], [wanted[0][rows]])
    expect(gap <= 1e-10, f"a sparse gradient moves its rows differently from the same dense one, by {gap:.3g}.")


def _bf16(trial: Trial) -> None:
    if not trial.bf16:
        return
    params = parameters(trial.seed, torch.bfloat16)
    start = [param.detach().clone() for param in params]
    for rate in _RATES:
        full = [param.detach().float().requires_grad_() for param in start]
        wanted = trial.run(_faster(trial.make(full), rate), full, range(20))
        length = distance(start, wanted)
        rounding = 20 * 2.0**-8 * max(float(value.abs().max()) for value in wanted)
        if length > 2 * rounding:  # else standing still could not be told from rounding
            break
    after = trial.run(_faster(trial.make(params), rate), params, range(20))
    for value in after:
        expect(value.dtype == torch.bfloat16, f"a bfloat16 parameter became {value.dtype}.")
        expect(bool(value.isfinite().all()), "a bfloat16 parameter is not finite after 20 steps.")
    allowed = 0.25 * length + rounding
    gap = distance(after, wanted)
    expect(gap <= allowed, f"bfloat16 leaves the float32 path by {gap:.3g} where rounding explains {allowed:.3g}.")


def _faster(optimizer: Optimizer, rate: float) -> Optimizer:
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = rate * group["lr"]
    return optimizer


def _complex(trial: Trial) -> None:
    if not trial.complex:
        return
    params = parameters(trial.seed, torch.complex128)
    real = [torch.view_as_real(param.detach()).clone().requires_grad_() for param in params]
    after = [torch.view_as_real(value) for value in trial.run(trial.make(params), params, range(6))]
    wanted = trial.run(trial.make(real), real, range(6))
    gap = distance(after, wanted)
    expect(gap <= 1e-10, f"a complex parameter differs from its real and imaginary parts by {gap:.3g} after 6 steps.")


def _device(trial: Trial) -> None:
    if not torch.cuda.is_available():
        return
    wanted = trial.trajectory(list)
    params = parameters(trial.seed, device="cuda")
    optimizer = trial.make(params)
    trial.run(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = trial.make(params)
    resumed.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    gap = distance(trial.run(resumed, params, range(3, 6)), wanted)
    expect(gap <= 1e-8, f"on CUDA, resumed from a state read to the CPU, it leaves the CPU's path by {gap:.3g}.")


FORMS: Mapping[str, Callable[[Trial], Any]] = {
    "foreach": _foreach,
    "maximize": _maximize,
    "zero_size": _zero_size,
    "frozen": _frozen,
    "sparse": _sparse,
    "bf16": _bf16,
    "complex": _complex,
    "device": _device,
}
