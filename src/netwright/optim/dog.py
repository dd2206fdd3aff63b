"""DoG: gradient descent whose step is the distance travelled over the gradients seen."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.core.errors import StateDictError
from netwright.optim._base import BaseOptimizer, Group, Member, check_number
from netwright.optim._fused import check_form
from netwright.optim._points import restore_tensors
from netwright.optim._vectors import add, distance, lerp, squares

__all__ = ["DoG"]


class DoG(BaseOptimizer):
    r"""Stochastic gradient descent with a step size that finds itself, and an average of the iterates.

    Reach for it where SGD would do but its learning rate is not known. Take the average (:meth:`averaged`) for
    evaluation: the last iterate alone is noisy. The first step is small on purpose, and the start is slow for it.
    On smooth convex problems :class:`~netwright.optim.UDoG` is faster.

    With all parameters as one vector :math:`x_t`, its gradient :math:`g_t` and :math:`t = 0, 1, \dots`,

    .. math:: \bar r_t = \max\bigl(r_\epsilon, \max_{i \le t} \lVert x_i - x_0 \rVert\bigr), \qquad
              \eta_t = \frac{\bar r_t}{\sqrt{\sum_{i \le t} \lVert g_i \rVert^2 + \epsilon}}, \qquad
              x_{t+1} = x_t - \gamma\,\eta_t\,g_t,

    where :math:`r_\epsilon = \rho\,(1 + \lVert x_0 \rVert)`, the norm taken over the parameters that have a gradient
    in the first step, so that frozen ones change nothing. Later a parameter without a gradient counts where it is.
    The average weighs late iterates more:

    .. math:: a_{t} = a_{t-1} + \frac{1 + p}{t + p}\,(x_t - a_{t-1}), \qquad t = 1, 2, \dots

    Cost: two reductions and an update per step, and two words per parameter: :math:`x_0` and :math:`a` (one word with
    ``average=None``). For parameters in half precision both are kept in float32, and so is :math:`x_t`, as its first
    movements are smaller than half precision can tell. The two norms are read back from the device in each step.

    Args:
        params: parameters, or groups of them; all of them make one vector.
        lr: :math:`\gamma`, a factor on the step for schedules; leave it at 1.
        initial_movement: :math:`\rho > 0`, the first movement relative to the size of the parameters; 1e-4 with batch
            normalization.
        eps: :math:`\epsilon`, in units of the squared gradient.
        weight_decay: L2 penalty, added to the gradient.
        average: :math:`p`, the degree of the average; None keeps none.
        maximize: whether to ascend.
        foreach: whether to work on lists of tensors; by default off the CPU.
        fused: whether to use compiled kernels; by default wherever they can be.

    Raises:
        SettingError: a setting outside its range.
        GradientError: a sparse gradient.
        StateDictError: on loading, the state of another optimizer or of another setting of ``average``.

    Example:
        >>> weight = torch.tensor([3.0, -2.0], requires_grad=True)
        >>> optimizer = DoG([weight], initial_movement=1e-2)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> with optimizer.averaged():
        ...     print(bool(weight.norm() < 0.05))
        True

    Source: the step that paper 103 builds on. Ivgi, Hinder, Carmon, "DoG is SGD's Best Friend: A Parameter-Free
    Dynamic Step Size Schedule", 2023, arXiv 2302.12022; the average: Shamir, Zhang, "Stochastic Gradient Descent for
    Non-smooth Optimization", 2013, arXiv 1212.1824.

    Differs: parameter groups share one distance and one sum; the authors' code gives each group its own.
    """

    state_names = frozenset({"start", "average", "point", "step", "radius", "total"})
    takes_complex = True
    one_device = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        initial_movement: float = 1e-6,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        average: float | None = 8.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self.initial_movement = check_number(self, "initial_movement", initial_movement, above=True)
        self.eps = check_number(self, "eps", eps)
        self.average = None if average is None else check_number(self, "average", average)
        forms = {"maximize": maximize, "foreach": foreach, "fused": fused}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **forms})

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting outside its range."""
        check_number(self, "lr", group["lr"])
        check_number(self, "weight_decay", group["weight_decay"])
        check_form(self, group)

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise ``StateDictError`` where one of the state and this keeps an average and the other does not."""
        for state in state_dict["state"].values():
            if "start" in state and ("average" in state) != (self.average is not None):
                found = "an average of the iterates" if "average" in state else "no average of the iterates"
                raise StateDictError(
                    f"The state holds {found}, and this DoG has average={self.average}. Set average as it was when the "
                    "state was saved."
                )
        super().check_state(state_dict)

    def take_state(self, state_dict: dict[str, Any]) -> None:
        """Go on to the last bit."""
        restore_tensors(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the model anew, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = self.evaluate(closure)
        self.refuse_sparse()
        parts = [(group, members) for group in self.param_groups if (members := self.members(group))]
        if not parts:
            return loss
        points = [[_point(member.param, member.state) for member in members] for _, members in parts]
        gradients = [_gradients(group, members, at) for (group, members), at in zip(parts, points, strict=True)]
        total = 0.0
        for (group, members), at, grads in zip(parts, points, gradients, strict=True):
            for member, point in zip(members, at, strict=True):
                if "start" not in member.state:
                    member.state["start"] = point.clone()
                    if self.average is not None:
                        member.state["average"] = point.clone()
            total += squares(self, group, grads)
        begun = [(group, *self._begun(group)) for group in self.param_groups]
        moved = sum(distance(self, group, there, [s["start"] for s in states]) for group, there, states in begun)
        own = self._own(parts)
        own["step"] += 1
        own["total"] += total
        own["radius"] = max(own["radius"], math.sqrt(moved))
        size = _step_size(own["radius"], own["total"], self.eps)
        for (group, members), at, grads in zip(parts, points, gradients, strict=True):
            add(self, group, at, grads, -float(group["lr"]) * size)
            for member in members:
                if "point" in member.state:
                    member.param.copy_(member.state["point"])
        if self.average is not None:
            weight = (1 + self.average) / (own["step"] + self.average)
            for group, there, states in begun:
                lerp(self, group, [state["average"] for state in states], there, weight)
        return loss

    def _begun(self, group: Group) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Where the parameters of a group are that move or have moved before, and their state."""
        known = [param for param in group["params"] if "start" in self.state.get(param, {})]
        return [_point(_real(param), self.state[param]) for param in known], [self.state[param] for param in known]

    def _own(self, parts: list[tuple[Group, list[Member]]]) -> dict[str, Any]:
        """What is kept for all parameters together, in the state of the first one."""
        own: dict[str, Any] = self.state[self.param_groups[0]["params"][0]]
        if "radius" not in own:
            start = math.sqrt(sum(squares(self, group, [m.state["start"] for m in part]) for group, part in parts))
            own.update(step=0, total=0.0, radius=self.initial_movement * (1 + start))
        return own

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are the average; afterwards they are the last iterate again.

        Batch normalization keeps the statistics of the iterates: pass data through the model in training mode inside.
        Before the first step, and with ``average=None``, nothing changes.

        Example:
            >>> weight = torch.ones(2, requires_grad=True)
            >>> optimizer = DoG([weight])
            >>> with optimizer.averaged():
            ...     print(weight.sum().item())
            2.0
        """
        known = [(_real(param), state) for param, state in self.state.items() if "average" in state]
        pairs = [(param, state["average"]) for param, state in known if "point" not in state]
        wide = [(param, _point(param, state), state["average"]) for param, state in known if "point" in state]
        _swap(pairs)
        _put([(param, average) for param, _, average in wide])
        try:
            yield
        finally:
            _swap(pairs)
            _put([(param, point) for param, point, _ in wide])


def _step_size(radius: float, total: float, eps: float) -> float:
    """Distance over gradients; 0 before there is any gradient."""
    return radius / math.sqrt(total + eps) if total > 0 else 0.0


def _gradients(group: Group, members: list[Member], points: list[Tensor]) -> list[Tensor]:
    decay = group["weight_decay"]
    return [
        torch.add(member.grad, point, alpha=decay) if decay else member.grad
        for member, point in zip(members, points, strict=True)
    ]


def _real(param: Tensor) -> Tensor:
    return torch.view_as_real(param) if param.is_complex() else param


@torch.no_grad()
def _point(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The parameter in at least float32: itself, or what is kept for it, wherever nobody else has moved it since."""
    kind = torch.promote_types(param.dtype, torch.float32)
    if kind == param.dtype:
        return param
    if "point" not in state:
        state["point"] = param.detach().to(kind)
    point: Tensor = state["point"]
    return point.copy_(torch.where(point.to(param.dtype) == param, point, param))


@torch.no_grad()
def _put(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for param, value in pairs:
        param.copy_(value)


@torch.no_grad()
def _swap(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for param, average in pairs:
        kept = param.detach().clone()
        param.copy_(average)
        average.copy_(kept)
