"""The small problem on which optimizers are tried: a loss that is known, moving, and cheap."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["SHAPES", "MakeOptimizer", "Trial", "call_step", "distance", "parameters", "same", "target_loss"]

MakeOptimizer: TypeAlias = Callable[..., Optimizer]
Groups: TypeAlias = list[dict[str, Any]]
Loss: TypeAlias = Callable[[Sequence[Tensor], int], Tensor]

SHAPES: tuple[tuple[int, ...], ...] = ((4, 3), (3,), (), (2, 3, 2))


@dataclass(frozen=True)
class Trial:
    """How one optimizer is to be driven.

    Args:
        make: builds the optimizer from parameters or from a list of groups.
        needs_closure: every step is given a closure.
        create_graph: the backward pass keeps its graph, for methods that differentiate twice.
        coupled: the step of one parameter depends on the gradients of the others.
        sparse, complex, bf16: what is claimed (see ``check_optimizer``).
        steps: iterations of the memory check.
        seed: source of parameters and targets.
    """

    make: MakeOptimizer
    needs_closure: bool = False
    create_graph: bool = False
    coupled: bool = False
    sparse: bool | None = None
    complex: bool = False
    bf16: bool = True
    steps: int = 1000
    seed: int = 0

    def step(self, optimizer: Optimizer, params: Sequence[Tensor], time: int, loss: Loss | None = None) -> Any:
        """One step at time ``time``; what ``optimizer.step`` returned.

        The global random state is set from ``time``, so that a stochastic method repeats itself.
        """
        loss = target_loss if loss is None else loss

        closure = self.closure(optimizer, params, lambda inner: loss(inner, time))
        before = torch.get_rng_state()
        # torch.manual_seed would also queue work, with a stack trace, for devices that are not in use.
        torch.default_generator.manual_seed(1_000_003 * (self.seed + 1) + time)
        try:
            if self.kind(optimizer) != "optional":
                return call_step(optimizer, closure)
            closure()
            return optimizer.step()
        finally:
            torch.set_rng_state(before)

    def kind(self, optimizer: Optimizer) -> str:
        """What closure the optimizer asks for (see ``check_optimizer``)."""
        return str(getattr(optimizer, "closure_kind", "loss" if self.needs_closure else "optional"))

    def closure(
        self, optimizer: Optimizer, params: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor]
    ) -> Callable[[], Any]:
        """A closure of the kind that the optimizer asks for; the model of ``outputs`` is the identity."""
        kind = self.kind(optimizer)

        def through_outputs() -> tuple[Tensor, Tensor]:
            live = [param for param in params if param.requires_grad and param.numel() and not param.is_complex()]
            outputs = torch.cat([param.double().flatten() for param in live])[None]
            pieces = iter(torch.split(outputs[0], [param.numel() for param in live]))
            kept = {id(param) for param in live}
            views = [next(pieces).view_as(param) if id(param) in kept else param for param in params]
            return loss(views), outputs

        def backward() -> Tensor:
            optimizer.zero_grad()
            value = loss(params)
            if value.requires_grad:
                torch.autograd.backward(value, create_graph=self.create_graph)
            return value.detach()

        return {"graph": lambda: loss(params), "outputs": through_outputs}.get(kind, backward)

    def run(
        self,
        optimizer: Optimizer,
        params: Sequence[Tensor],
        times: Iterable[int],
        loss: Loss | None = None,
    ) -> list[Tensor]:
        """Step through ``times``; copies of the parameters at the end."""
        for time in times:
            self.step(optimizer, params, time, loss)
        return [param.detach().clone() for param in params]

    def trajectory(
        self, groups: Callable[[list[Tensor]], Any], count: int = 6, loss: Loss | None = None
    ) -> list[Tensor]:
        """Fresh parameters after ``count`` steps of the optimizer made from ``groups(parameters)``."""
        params = parameters(self.seed)
        return self.run(self.make(groups(params)), params, range(count), loss)

    def settings(self) -> dict[str, Any]:
        """The optimizer's own defaults."""
        return dict(self.make(parameters(self.seed)).defaults)

    def replace(self, **changes: Any) -> "Trial":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def call_step(optimizer: Optimizer, closure: Callable[[], Tensor]) -> Any:
    """``optimizer.step(closure)``; torch's annotation asks for a float, its documentation for a tensor."""
    step: Any = optimizer.step
    return step(closure)


def parameters(
    seed: int,
    dtype: torch.dtype = torch.float64,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    device: str = "cpu",
) -> list[Tensor]:
    """Leaf tensors with entries from the standard normal, drawn in float64 on the CPU and rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    drawn = [torch.randn(shape, generator=generator, dtype=wide) for shape in shapes]
    return [value.to(device, dtype).requires_grad_() for value in drawn]


def target_loss(params: Sequence[Tensor], time: int) -> Tensor:
    """Sum over parameters ``p`` of ``mean(c (p - t)^2) / 2 + mean(cos p) / 10``.

    ``c`` grows from 1/2 to 2 along the entries, ``t`` moves with ``time``: curvature differs between entries and
    no two steps see the same gradient. Complex parameters enter as their real and imaginary parts.
    """
    total = torch.zeros((), dtype=torch.float64)
    for position, param in enumerate(params):
        if not param.requires_grad or param.numel() == 0:
            continue
        real = (torch.view_as_real(param) if param.is_complex() else param).double().flatten()
        scale = torch.linspace(0.5, 2.0, real.numel(), dtype=torch.float64).to(real.device)
        place = torch.sin(torch.arange(real.numel(), dtype=torch.float64) * 1.7 + position + 0.3 * time)
        total = total + (scale * (real - place.to(real.device)) ** 2).mean() / 2 + real.cos().mean() / 10
    return total


def distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest absolute difference between two lists of tensors; infinite where one is not finite."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a.numel():
            left_values, right_values = (value.detach().cpu().to(torch.complex128) for value in (a, b))
            gap = (left_values - right_values).abs().max().item()
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors agree to the last bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
