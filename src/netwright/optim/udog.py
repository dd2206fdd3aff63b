"""U-DoG: accelerated gradient descent that finds its own step size."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.core.errors import SettingError
from netwright.optim._base import BaseOptimizer, Group, check_number
from netwright.optim._fused import check_form
from netwright.optim._points import restore_tensors
from netwright.optim._vectors import add_and_look, add_squares, approach, distance, squares, wide

__all__ = ["UDoG"]


class UDoG(BaseOptimizer):
    r"""Nesterov's rate on smooth convex problems without a step size: two gradients a step, nothing to tune.

    Reach for it on convex problems (linear and logistic models, last layers, matching a target), above all smooth ones
    with little noise. Its authors report mixed results on neural networks.

    ``step`` calls the closure twice, at two points, with gradients cleared before the second call. Afterwards the
    parameters *are* the weighted average :math:`\bar x` that the method returns: evaluate them as they are, at any
    time. ``step`` returns the loss of the first call; ``grad`` holds the gradient at :math:`\bar x` on the second
    call's batch.

    All parameters are one vector, started at :math:`x_0 = y_0`. With the gradients :math:`m_t, g_t` at
    :math:`z_t, \bar x_t`, for :math:`t = 0, 1, \dots`,

    .. math:: \bar r_t = \max\Bigl(r_\epsilon, \max_{i \le t} \lVert x_i - x_0 \rVert, \max_{i \le t} \lVert y_i - x_0
              \rVert\Bigr), \qquad \omega_t = \sum_{i \le t} \bar r_i, \qquad \alpha_t = \frac{\omega_t}{\bar r_t},
              \qquad \theta_t = \frac{\omega_t}{\sum_{i \le t} \omega_i}

    .. math:: z_t = (1 - \theta_t)\,\bar x_{t-1} + \theta_t\,y_t, \qquad
              x_{t+1} = y_t - \alpha_t \frac{\bar r_t}{\sqrt{G^x_t}} m_t, \qquad
              \bar x_t = (1 - \theta_t)\,\bar x_{t-1} + \theta_t\,x_{t+1}, \qquad
              y_{t+1} = y_t - \alpha_t \frac{\bar r_t}{\sqrt{G^y_t}} g_t

    .. math:: Q_t = \sum_{i \le t} \alpha_i^2 \lVert g_i - m_i \rVert^2, \qquad
              M_t = \max_{i \le t} \alpha_i^2 \lVert m_i \rVert^2, \qquad
              G^x_t = c(Q_{t-1} + M_t), \qquad G^y_t = c(Q_t + M_t),

    with :math:`r_\epsilon = \rho\,(1 + \lVert x_0 \rVert)`, the norm taken over the parameters that have a gradient
    in the first step, so that frozen ones change nothing. The sum :math:`Q` measures smoothness and noise by
    how far the gradient moves within a step; :math:`M` keeps one step from exceeding about :math:`\bar r_t`.
    :math:`c(s) = s`, or :math:`c(s) = s\,(1 + \ln (s / M_0))^2` with ``damped``, under which the sum of
    :math:`\lVert \alpha_i (g_i - m_i) \rVert^2 / G^y_i` is at most 1 over any run: noise can then no longer push the
    iterates ever further away, at the price of shorter steps.

    Cost: beside the two gradients, five passes over the parameters, and two words per parameter: :math:`x_0` and
    :math:`y - x_0` (one more in half precision, for :math:`\bar x`). Four sums are read back from the device in each
    step.

    Args:
        params: parameters, or groups of them; all of them make one vector.
        initial_movement: :math:`\rho > 0`, the first movement relative to the size of the parameters: small, as it
            grows by itself; 1e-4 with batch normalization.
        damped: whether to damp the steps logarithmically, where iterates run away.
        maximize: whether to ascend.
        foreach: whether to work on lists of tensors; by default off the CPU.
        fused: whether to use compiled kernels; by default wherever they can be.

    Raises:
        SettingError: a setting outside its range.
        ClosureError: no closure, or one that does not return a scalar loss.
        GradientError: a sparse gradient.

    Example:
        >>> weight = torch.tensor([3.0, -2.0], requires_grad=True)
        >>> optimizer = UDoG([weight], initial_movement=1e-2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (weight * torch.tensor([10.0, 1.0])).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(100):
        ...     loss = optimizer.step(closure)
        >>> bool(weight.norm() < 0.1)
        True

    Source: paper 103. Kreisler, Ivgi, Hinder, Carmon, "Accelerated Parameter-Free Stochastic Optimization", 2024,
    arXiv 2404.00666. It joins UniXGrad (Kavis, Levy, Bach, Cevher, 2019, arXiv 1910.13857) with DoG.

    Differs: the two sequences, their weights and the order :math:`G^x_t \le G^y_t` are the paper's, which could be read
    in summary only. :math:`G` itself is derived here: UniXGrad's sum of squared differences, with :math:`M` so that
    the first step is defined and none exceeds the distance found so far. Damping follows the logarithmic factor of
    T-DoG in place of the paper's constants, which need bounds on the noise and the number of steps.
    """

    closure_kind = "loss"
    state_names = frozenset({"start", "offset", "point", "radius", "radii", "weights", "spread", "largest", "first"})
    takes_complex = True
    one_device = True

    def __init__(
        self,
        params: ParamsT,
        *,
        initial_movement: float = 1e-6,
        damped: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self.initial_movement = check_number(self, "initial_movement", initial_movement, above=True)
        if not isinstance(damped, bool):
            raise SettingError(f"UDoG: damped must be True or False, got {damped!r}.")
        self.damped = damped
        super().__init__(params, {"maximize": maximize, "foreach": foreach, "fused": fused})

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting outside its range."""
        check_form(self, group)

    def take_state(self, state_dict: dict[str, Any]) -> None:
        """Go on to the last bit."""
        restore_tensors(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One step; the loss at the first point.

        Args:
            closure: clears the gradients, evaluates the model, calls ``backward`` and returns the loss. Called twice.
        """
        if closure is not None:
            self._approach()
        loss = self.loss_of(self.evaluate(closure)).detach()
        self.refuse_sparse()
        parts = [part for group in self.param_groups if (part := self._part(group)).params]
        if not parts:
            return loss
        own = self._own(parts)
        alpha, weight = own["radii"] / own["radius"], own["radii"] / own["weights"]

        norm = sum(squares(self, part.group, part.grads) for part in parts)
        own["largest"] = max(own["largest"], alpha**2 * norm)
        own["first"] = own["first"] or own["largest"]
        size = alpha * _step_size(own["spread"] + own["largest"], own, self.damped)
        far = 0.0
        for part in parts:
            rows = list(zip(part.points, part.grads, part.offsets, strict=True))
            far += add_and_look(self, part.group, rows, -weight * size, -size)
            part.publish()

        for part in parts:
            for param in part.params:  # the first gradients are kept, so the second ones need memory of their own
                param.grad = None
        self.loss_of(self.evaluate(closure))
        seconds = [[_gradient(param, part.group) for param in part.params] for part in parts]
        for part, grads in zip(parts, seconds, strict=True):
            own["spread"] += alpha**2 * distance(self, part.group, grads, part.grads)
        size = alpha * _step_size(own["spread"] + own["largest"], own, self.damped)
        moved = 0.0
        for part, grads in zip(parts, seconds, strict=True):
            moved += add_squares(self, part.group, part.offsets, grads, -size)
        still = self._still(parts)
        own["radius"] = max(own["radius"], math.sqrt(max(far, moved) + still))
        return loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are the weighted average, as they are between steps anyway.

        It stands here so that a loop can treat this optimizer like :class:`~netwright.optim.DoG`.
        """
        yield

    def _approach(self) -> None:
        """Move the parameters from the average towards y, where the first gradient is taken."""
        own = self.state.get(self.param_groups[0]["params"][0], {})
        if "radius" not in own:
            return
        own["radii"] += own["radius"]
        own["weights"] += own["radii"]
        weight = own["radii"] / own["weights"]
        for group in self.param_groups:
            part = _Part(
                group, [param for param in group["params"] if "start" in self.state.get(param, {})], self.state
            )
            starts = [state["start"] for state in part.states]
            approach(self, group, list(zip(part.points, starts, part.offsets, strict=True)), weight)
            part.publish()

    def _part(self, group: Group) -> "_Part":
        """What moves in a group: its parameters with a gradient, their state begun where there is none."""
        params = [param for param in group["params"] if param.grad is not None and param.numel()]
        for param in params:
            state = self.state[param]
            if "start" not in state:
                real = _real(param)
                state["start"] = real.clone()
                state["offset"] = wide(real)
                if state["offset"].dtype != real.dtype:
                    state["point"] = real.to(state["offset"].dtype)
        return _Part(group, params, self.state)

    def _own(self, parts: list["_Part"]) -> dict[str, Any]:
        """What is kept for all parameters together, in the state of the first one."""
        own: dict[str, Any] = self.state[self.param_groups[0]["params"][0]]
        if "radius" not in own:
            start = sum(squares(self, part.group, [state["start"] for state in part.states]) for part in parts)
            radius = self.initial_movement * (1 + math.sqrt(start))
            own.update(radius=radius, radii=radius, weights=radius, spread=0.0, largest=0.0, first=0.0)
        return own

    def _still(self, parts: list["_Part"]) -> float:
        """The squared distance of parameters that moved before and have no gradient in this step."""
        moving = {id(state) for part in parts for state in part.states}
        total = 0.0
        for group in self.param_groups:
            states = [self.state.get(param, {}) for param in group["params"]]
            still = [state["offset"] for state in states if "offset" in state and id(state) not in moving]
            total += squares(self, group, still)
        return total


class _Part:
    """Parameters of one group that move together, and their state.

    Args:
        group: the group.
        params: its parameters that move.
        state: the optimizer's.
    """

    def __init__(self, group: Group, params: list[Tensor], state: Any) -> None:
        self.group = group
        self.params = params
        self.states: list[dict[str, Any]] = [state[param] for param in params]
        self.offsets = [entry["offset"] for entry in self.states]
        self.points = [entry.get("point", _real(param)) for entry, param in zip(self.states, params, strict=True)]
        self.grads = [_gradient(param, group) for param in params]

    def publish(self) -> None:
        """Round points that are kept in more digits into their parameters."""
        for state, param in zip(self.states, self.params, strict=True):
            if "point" in state:
                _real(param).copy_(state["point"])


def _step_size(total: float, own: dict[str, Any], damped: bool) -> float:
    """Distance over gradients, for the sum ``Q + M``; 0 before there is any gradient."""
    if total <= 0:
        return 0.0
    damping = 1 + math.log(total / own["first"]) if damped and own["first"] > 0 else 1.0
    return float(own["radius"] / (math.sqrt(total) * damping))


def _real(param: Tensor) -> Tensor:
    return torch.view_as_real(param.detach()) if param.is_complex() else param.detach()


def _gradient(param: Tensor, group: Group) -> Tensor:
    """What is descended, as a real tensor; zeros where there is no gradient."""
    grad = torch.zeros_like(param) if param.grad is None else param.grad
    real = _real(grad.resolve_conj())
    return -real if group["maximize"] else real
