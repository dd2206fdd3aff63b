"""Exact Gauss-Newton: the damped Gauss-Newton step from a linear system as large as the batch, not as the network."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.core.errors import ClosureError, GradientError, SettingError
from netwright.core.randomness import restore_states, save_states
from netwright.optim._base import BaseOptimizer, ClosureKind, Group, check_number, require_one_process
from netwright.optim._item_jacobian import ItemJacobian, find_uses, is_coupled
from netwright.optim._output_curvature import Curvature, Head, head_of, loss_and_outputs, slopes_and_curvatures

__all__ = ["ExactGaussNewton"]

_ARMIJO, _SHORTER, _LONGER, _TRIALS = 0.1, 0.8, 1.5, 15  # line search
_POOR, _GOOD = 0.25, 0.75  # adaptive damping: shares of the expected change


def _solve(jacobian: ItemJacobian, head: Head, dampings: Sequence[float]) -> Tensor:
    r"""The coefficients ``(b, k)`` of the Jacobian's rows in the direction.

    With :math:`Q = S S^\top`, :math:`r = S w + r_\perp`, :math:`K = J \Lambda^{-1} J^\top` and the dampings
    :math:`\Lambda`, :math:`(Q K + b I) u = r` has the solution :math:`u = S a + r_\perp / b`,
    :math:`(S^\top K S + b I) a = w - S^\top K r_\perp / b`, and :math:`d = \Lambda^{-1} J^\top u`.

    Args:
        jacobian: rows :math:`s^\top J`, before ``head.scale``.
        head: seeds of these rows.
        dampings: for each parameter.

    Raises:
        GradientError: a system that is not finite.
    """
    items = len(head.weights)
    scale, weights, curved = head.scale.flatten(), head.weights.flatten(), head.curved.flatten()
    inner = jacobian.gram([1 / damping for damping in dampings]).double()
    inner.mul_(scale).mul_(scale[:, None])
    alone = (1 - curved) * weights / items
    goal = curved * (weights - inner @ alone)
    system = inner * curved * curved[:, None]
    diagonal = system.diagonal()
    diagonal += items
    for attempt in range(_TRIALS):
        factor, failed = torch.linalg.cholesky_ex(system)
        if not int(failed):
            solution = alone + torch.cholesky_solve(goal[:, None], factor)[:, 0]
            return (solution * scale).view_as(head.weights)
        diagonal += 1e-9 * 4**attempt * float(diagonal.mean())  # roundings of the inner products
    raise GradientError(
        "ExactGaussNewton: the curvature is not finite. Look for NaN or infinity in the parameters and outputs."
    )


def _model(jacobian: ItemJacobian, head: Head, moves: Sequence[Tensor | None]) -> tuple[float, float]:
    """Slope and second derivative of the loss's quadratic model along ``moves``."""
    parts = [jacobian.along(place, move) for place, move in enumerate(moves) if move is not None]
    along = head.scale * sum((part.double() for part in parts if part is not None), torch.zeros_like(head.scale))
    items = len(along)
    return float((head.weights * along).sum()) / items, float((head.curved * along.square()).sum()) / items


def _move(params: Sequence[Tensor], start: Sequence[Tensor], moves: Sequence[Tensor | None], length: float) -> None:
    for param, origin, move in zip(params, start, moves, strict=True):
        if move is not None:
            torch.add(origin, move, alpha=length, out=param)


class _Repeat:
    """A closure that sees the same random numbers each time.

    Args:
        call: the closure.
        device: whose generator counts beside those of the CPU.
        often: whether it is called again.
    """

    def __init__(self, call: Callable[[], tuple[Tensor, Tensor]], device: torch.device, often: bool) -> None:
        self._call, self._device = call, device
        self._before = save_states(device) if often else {}

    def first(self) -> tuple[Tensor, Tensor]:
        """What the closure returns."""
        return self._call()

    def again(self) -> float:
        """The loss at the parameters as they are now; the random state stays."""
        states = save_states(self._device)
        restore_states(self._before, self._device)
        try:
            return float(self._call()[0].detach())
        finally:
            restore_states(states, self._device)


class ExactGaussNewton(BaseOptimizer):
    r"""Takes the damped Gauss-Newton step exactly, at the price of a linear system with a few rows for each item.

    Reach for it where steps are few and each should count: regression, physics, small classifiers, reinforcement
    learning with small networks, batches of tens to a few hundred items. With one output, or with
    ``curvature="residual"``, there is one row for each item, and a step costs two to four of Adam's.

    For outputs :math:`f_i \in \mathbb R^c` of the items :math:`i = 1 \dots b`, the loss
    :math:`L = \frac1b \sum_i \ell_i(f_i)`, residuals :math:`r_i = \ell_i'(f_i)`, curvatures
    :math:`Q_i = \ell_i''(f_i)`, the Jacobian :math:`J \in \mathbb R^{bc \times p}` of all outputs and the damping
    :math:`\lambda`,

    .. math:: d = \Big(\tfrac1b J^\top Q J + \lambda I\Big)^{-1} \tfrac1b J^\top r = J^\top u, \qquad
              (Q J J^\top + b \lambda I)\, u = r, \qquad \theta \leftarrow \theta - \alpha d

    by the Duncan-Guttman identity. The system is solved in the symmetric form
    :math:`S^\top J J^\top S + b \lambda I` with :math:`Q = S S^\top`, by Cholesky in float64. With momentum
    :math:`\mu` the step is :math:`m_t / (1 - \mu^t)`, :math:`m_t = \mu m_{t-1} + (1 - \mu) d_t`. The line search
    shortens :math:`\alpha` by 0.8 until the loss on the batch falls by a tenth of what its slope promises, starting
    from 1.5 times the last one and never beyond ``lr``. Adaptive damping compares the loss's change with that of its
    quadratic model: below a quarter of it :math:`\lambda` grows by ``adapt``, above three quarters it shrinks by it.

    ``curvature="exact"`` has the rank of :math:`Q_i` rows for each item: 1 for one output, :math:`c - 1` for softmax
    cross-entropy. ``curvature="residual"`` keeps of :math:`Q_i` the largest multiple of :math:`r_i r_i^\top` that is
    nowhere above it, :math:`r_i r_i^\top / (r_i^\top Q_i^+ r_i)`: one row for each item. For softmax cross-entropy with
    the probability :math:`p` of the right class that is :math:`\frac{p}{1 - p} r_i r_i^\top`, the curvature of the
    margin of the right class over all others. The gradient is exact in both.

    Where items are coupled, as by batch normalization in training, ``"residual"`` takes as row of an item what its own
    activations contribute to the gradient; rows still add up to the exact gradient.

    Cost: with :math:`n` rows for each item, one forward pass, :math:`n` backward passes, :math:`O(b^2 n^2 p)` for
    inner products (less where convolutions see few places) and :math:`O(b^3 n^3)` for the system. Memory: momentum, if
    any; while stepping, :math:`n` times the activations, and :math:`b n p` numbers for the parameters of layers other
    than linear, 2d convolution and normalization, for weights under parametrization, and for all where ``"exact"``
    meets coupled items: it then takes a backward pass for each row, about one per item and class (236 times Adam's
    step on a residual network of 78k parameters at batch 64). The line search and adaptive damping call the closure
    again, from the same random state.

    Args:
        params: parameters, or groups of them.
        lr: step size :math:`\alpha`; its upper limit with ``line_search``.
        damping: :math:`\lambda`, positive; a group may have its own.
        momentum: :math:`\mu`, in [0, 1).
        curvature: "exact" or "residual".
        line_search: whether the loss on the batch has to fall enough.
        adapt: factor of the adaptive damping, at least 1, which leaves it fixed. The source suggests 1.01.

    Raises:
        SettingError: a setting outside its range, complex parameters, several devices, or several processes.
        ClosureError: no closure; or, at a step, a loss that is not a mean over items of functions of their own
            outputs, or that depends on parameters other than through the outputs.
        GradientError: sparse gradients, or a curvature that is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> inputs, targets = torch.eye(2), torch.tensor([[1.0], [3.0]])
        >>> optimizer = ExactGaussNewton(model.parameters(), lr=1.0, damping=1e-6)
        >>> def closure():
        ...     outputs = model(inputs)
        ...     return torch.nn.functional.mse_loss(outputs, targets), outputs
        >>> loss = optimizer.step(closure)
        >>> bool(torch.allclose(model(inputs), targets, atol=1e-3))
        True

    Source: paper 101. Korbit, Adeyemi D. Adeoye, Bemporad, Zanon, "Exact Gauss-Newton Optimization for Training Deep
    Neural Networks", 2024, arXiv:2405.14402.

    Differs: any loss that separates over items, by autograd through the loss alone, where the paper treats squared
    error and cross-entropy; directions of :math:`Q_i` with negative curvature count as flat. ``curvature="residual"``
    is an addition (after "Fast Gauss-Newton for Multiclass Cross-Entropy", 2026, arXiv:2605.06081, here for any loss).
    The constants of line search and adaptive damping are those of the authors' code.
    """

    closure_kind: ClosureKind = "outputs"
    state_names: ClassVar[frozenset[str]] = frozenset({"step", "momentum_buffer", "damping_scale", "step_size"})
    one_device: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.5,
        damping: float = 0.1,
        momentum: float = 0.0,
        *,
        curvature: Curvature = "exact",
        line_search: bool = False,
        adapt: float = 1.0,
    ) -> None:
        require_one_process(self, "it takes derivatives of the batch of one process")
        if curvature not in get_args(Curvature):
            raise SettingError(f"ExactGaussNewton: curvature must be 'exact' or 'residual', got {curvature!r}.")
        if not isinstance(line_search, bool):
            raise SettingError(f"ExactGaussNewton: line_search must be True or False, got {line_search!r}.")
        self.curvature: Curvature = curvature
        self.line_search = line_search
        self.adapt = check_number(self, "adapt", adapt, low=1.0)
        self._known: tuple[tuple[Any, ...], bool] = ((), False)
        super().__init__(params, {"lr": lr, "damping": damping, "momentum": momentum})

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting of this group outside its range."""
        check_number(self, "lr", group["lr"])
        check_number(self, "damping", group["damping"], above=True)
        check_number(self, "momentum", group["momentum"], high=1.0, below=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]  # torch wants a float
        """Take one step.

        Args:
            closure: returns the mean loss and the outputs ``(b, ...)``, without calling ``backward``.

        Returns:
            The loss before the step.
        """
        self.refuse_sparse()
        first, judged = self.param_groups[0]["params"][0], self.line_search or self.adapt > 1.0
        evaluate = _Repeat(lambda: loss_and_outputs(self, self.evaluate(closure)), first.device, judged)
        loss, outputs = evaluate.first()
        shared = self.state[first]
        scale = shared.get("damping_scale", 1.0)
        owned = [(p, group) for group in self.param_groups for p in group["params"] if p.requires_grad and p.numel()]
        params = [param for param, _ in owned]
        dampings = [scale * float(group["damping"]) for _, group in owned]
        jacobian, head = self._linearize(loss, outputs, params)
        solution = _solve(jacobian, head, dampings)
        moves: list[Tensor | None] = []
        for place, (param, group) in enumerate(owned):
            direction = jacobian.combine(place, solution)
            if direction is not None:
                direction = torch.div(direction.view(param.shape), dampings[place], out=torch.empty_like(param))
                direction = self._smooth(param, direction, float(group["momentum"])) * -float(group["lr"])
            moves.append(direction)
        if judged:
            slope, bend = _model(jacobian, head, moves)
            self._judge(evaluate, float(loss), slope, bend, params, moves, shared)
        else:
            _move(params, params, moves, 1.0)
        return loss.detach()

    def _linearize(self, loss: Tensor, outputs: Tensor, params: Sequence[Tensor]) -> tuple[ItemJacobian, Head]:
        assert outputs.grad_fn is not None
        assert loss.grad_fn is not None
        wanted = {id(param): param for param in params}
        beside, above = find_uses(loss.grad_fn, wanted, outputs.grad_fn)
        if beside:
            shape = tuple(beside[0].param.shape)
            raise ClosureError(
                f"ExactGaussNewton: the loss depends on the parameter of shape {shape} other than through the "
                "outputs, as a penalty does. Leave the penalty out; damping takes its place."
            )
        uses, below = find_uses(outputs.grad_fn, wanted)
        signature = (outputs.shape, above, below)
        new = signature != self._known[0]
        residual, curvature = slopes_and_curvatures(loss, outputs, check=new)
        if new:
            self._known = signature, is_coupled(outputs, uses)
        normalized = any("BatchNorm" in name for name in below if isinstance(name, str))
        whole = self._known[1] and not (self.curvature == "residual" and normalized)
        head = head_of(residual, curvature, self.curvature, torch.finfo(outputs.dtype).eps)
        seeds = head.seeds.to(outputs.dtype).reshape(len(head.seeds), *outputs.shape)
        return ItemJacobian(outputs, params, uses, seeds, whole), head

    def _smooth(self, param: Tensor, direction: Tensor, momentum: float) -> Tensor:
        if momentum == 0.0:
            return direction
        state = self.state[param]
        kept: Tensor = state.setdefault("momentum_buffer", torch.zeros_like(param))
        time: int = state.get("step", 0) + 1
        state["step"] = time
        return kept.lerp_(direction, 1 - momentum) / (1 - momentum**time)

    def _judge(
        self,
        evaluate: _Repeat,
        loss: float,
        slope: float,
        bend: float,
        params: Sequence[Tensor],
        moves: Sequence[Tensor | None],
        shared: dict[str, Any],
    ) -> None:
        """Move as far as the loss allows, and set the damping by how well the quadratic model foretold it."""
        start = [param.clone() for param in params]
        length = min(1.0, _LONGER * shared.get("step_size", 1.0)) if self.line_search else 1.0
        for left in reversed(range(_TRIALS)):
            _move(params, start, moves, length)
            change = evaluate.again() - loss
            if not self.line_search or left == 0 or change <= _ARMIJO * length * slope:
                break
            length *= _SHORTER
        if self.line_search:
            shared["step_size"] = length
        expected = length * slope + length**2 * bend / 2
        if self.adapt > 1.0 and expected != 0.0:
            scale = shared.get("damping_scale", 1.0)
            share = change / expected
            shared["damping_scale"] = (
                scale / self.adapt if share > _GOOD else scale if share >= _POOR else scale * self.adapt
            )
