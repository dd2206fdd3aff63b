"""OptEx: several iterations of a first-order optimizer in the time of one, on predicted gradients."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from netwright.core.errors import SettingError, StateDictError
from netwright.optim._base import ClosureKind, Group, check_number, require_one_process
from netwright.optim._gradient_history import GradientHistory
from netwright.optim._points import Snapshot, flatten, flatten_grads, put, restore, snapshot, split
from netwright.optim._replicas import Evaluate, Replicas, Result
from netwright.optim._wrap import Wrapper, make_base

__all__ = ["OptEx", "Replicas"]

Select: TypeAlias = Literal["loss", "gradient", "last"]


def _best(losses: Sequence[float], norms: Sequence[float], select: Select) -> int:
    """The point to go on from: that of the least loss, of the least gradient, or the last, among the finite ones."""
    finite = [place for place, pair in enumerate(zip(losses, norms, strict=True)) if all(map(math.isfinite, pair))]
    if not finite:
        return 0
    if select == "last":
        return finite[-1] if finite[-1] == len(losses) - 1 else 0
    value = losses if select == "loss" else norms
    return min(finite, key=lambda place: value[place])


class OptEx(Wrapper):
    r"""Approximately parallel iterations: a kernel regression on past gradients runs ahead, true gradients follow.

    Reach for it when one evaluation of the gradient takes long and several can run at the same time: a simulation, a
    small network on a large machine, many devices. It trades ``parallelism`` evaluations at a time for fewer
    sequential iterations; on one device, where evaluations run one after the other, it saves nothing. It gains most
    where many small steps follow each other (SGD, moderate rates, gradients with little noise); an optimizer that is
    near its goal in some tens of aggressive steps (Adam at its best rate on a small problem) may even lose.

    From :math:`T` past points :math:`X` with gradients :math:`G` ``(T, d)``, the gradient anywhere is estimated by

    .. math:: \hat g(x) = k(x, X) (K + \sigma^2 I)^{-1} G, \qquad
              k(x, y) = \Big(1 + u + \frac{u^2}{3}\Big) e^{-u}, \quad u = \sqrt 5\, \lVert x - y \rVert / \ell

    with :math:`K = k(X, X)`. One ``step`` starts at :math:`x_0`, the parameters, and

    1. lets the inner optimizer take :math:`N - 1` steps on estimates: at :math:`x_{i-1}` on :math:`\hat g(x_{i-1})`,
    2. evaluates the true gradients at :math:`x_0, \dots, x_{N-1}` (this is what runs in parallel) and remembers them,
    3. goes back to the best of these points, with the inner optimizer's state there, and takes the true step from it.

    With ``parallelism=1`` it is the inner optimizer to the last digit, as is the first step, when nothing is known yet.

    The closure is called once for each point, one after the other, on the parameters themselves. To evaluate in
    parallel, pass ``evaluate=Replicas(model)`` (threads over copies of the model), or a function of your own
    (processes, a cluster): ``evaluate(parameters, points, closure)`` returns loss and gradients for each point. With
    mini-batches, let the closure draw one for each call and take ``select="last"``, or use one batch for all points.

    Cost: :math:`N` evaluations at a time. Beside them, for :math:`m` coordinates in the kernel, about
    :math:`2 N T (d + m)` multiplications for predictions, as many for the new distances and products, and some tens of
    :math:`T \times T` factorizations. Memory beside the inner optimizer's: :math:`T (d + m)` for the history
    (100 words per parameter by default: lower ``history`` and ``dimensions`` where that is too much) and
    during a step :math:`N` copies of parameters, gradients and inner state (one of the state with ``select="last"``).

    Args:
        optimizer: takes the steps; anything that needs no closure.
        parallelism: points :math:`N` evaluated in each step.
        history: points :math:`T` remembered.
        select: which point to go on from: that of least "loss", of least "gradient" norm, or the "last".
        length_scale: :math:`\ell`, in the units of the parameters; None tries multiples of the median distance in every
            step and takes the one by which older points predict the newest ``parallelism`` gradients best.
        noise: :math:`\sigma^2`, relative to the kernel at distance zero; None takes 1e-6, 1e-3 or 0.1 likewise.
        dimensions: coordinates :math:`m` that enter distances, drawn once with a fixed seed; None is all of them.
        evaluate: evaluates gradients at several points; None calls the closure for each.

    Raises:
        SettingError: a setting outside its range, an inner optimizer that needs a closure, or several processes without
            a function that evaluates for all of them.
        ClosureError: a step without closure, unless ``evaluate`` is given.
        StateDictError: a state of another history or other parameters.

    Example:
        >>> x = torch.tensor([4.0, 1.0], requires_grad=True)
        >>> optimizer = OptEx(torch.optim.SGD([x], lr=0.02), parallelism=4)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (torch.tensor([1.0, 10.0]) * x * x).sum() / 2
        ...     loss.backward()
        ...     return loss.detach()
        >>> losses = [float(optimizer.step(closure)) for _ in range(26)]
        >>> losses[-1] < 0.2 < 2.9 < 8 * 0.98**50  # 25 plain steps leave 2.91
        True

    Source: paper 67, Yao Shu, Jiongfeng Fang, Ying Tiffany He and Fei Richard Yu, OptEx: Expediting First-Order
    Optimization with Approximately Parallelized Iterations, 2024, arXiv 2402.11427.

    Differs: the authors' pseudocode goes on from the last point (``select="last"``), their code for torch from that of
    least loss, which is the default here because it cannot run away. Their length-scale comes from a fixed list, by the
    error on a random fifth of the history, and their noise is 1e-3; here both are chosen by predicting forward.
    Points are not scaled to unit norm.
    """

    closure_kind: ClosureKind = "loss"
    takes_complex: ClassVar[bool] = True
    one_device: ClassVar[bool] = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        parallelism: int = 4,
        history: int = 50,
        select: Select = "loss",
        length_scale: float | None = None,
        noise: float | None = None,
        dimensions: int | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        if evaluate is None or isinstance(evaluate, Replicas):
            require_one_process(self, "each would go on from the point that is best on its own batch")
        super().__init__(optimizer)
        wanted: list[tuple[str, Any, int]] = [("parallelism", parallelism, 1), ("history", history, 1)]
        for name, value, least in [*wanted, *([] if dimensions is None else [("dimensions", dimensions, 1)])]:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(f"OptEx: {name} must be an integer of at least {least}, got {value!r}.")
        if select not in get_args(Select):
            raise SettingError(f"OptEx: select must be 'loss', 'gradient' or 'last', got {select!r}.")
        if evaluate is not None and not callable(evaluate):
            raise SettingError(f"OptEx: evaluate must be a function or Replicas(model), got {evaluate!r}.")
        if length_scale is not None:
            length_scale = check_number(self, "length_scale", length_scale, above=True)
        if noise is not None:
            noise = check_number(self, "noise", noise)
        self.length_scale, self.noise = length_scale, noise
        self.parallelism, self.select, self.dimensions = parallelism, select, dimensions
        self._evaluate = evaluate
        if evaluate is not None:
            self.closure_kind = "optional"
        self._require_one_device()
        self._history = GradientHistory(history)
        self._width = 0
        self._present: list[bool] = []

    @classmethod
    def over(
        cls,
        params: ParamsT,
        base: str | Callable[..., Optimizer] = "torch.optim:Adam",
        base_settings: Mapping[str, Any] | None = None,
        *,
        lr: float | Tensor | None = None,
        **settings: Any,
    ) -> "OptEx":
        """OptEx over an optimizer that is made here; ``create("optex")``, ``netwright.optim:OptEx.over`` in a recipe.

        Args:
            params: parameters, or groups of them.
            base: makes the inner optimizer: a class, its import path, or its short name.
            base_settings: its keyword arguments.
            lr: its learning rate; None leaves it to ``base_settings`` and its own default.
            settings: those of :class:`OptEx`.
        """
        return cls(make_base(base, params, base_settings, lr), **settings)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the inner optimizer; the history starts anew."""
        super().add_param_group(param_group)
        self._require_one_device()

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """One sequential iteration.

        Args:
            closure: clears the gradients, runs backward and returns the loss; where ``evaluate`` is given, what that
                function takes.

        Returns:
            The loss at the parameters before the step.
        """
        if self.parallelism == 1 and self._evaluate is None:
            returned = self.evaluate(closure)
            self.optimizer.step()
            return returned
        params = [param for group in self.param_groups for param in group["params"] if param.requires_grad]
        self._fit_history(params)
        start = [param.clone() for param in params]
        inner = snapshot(self.optimizer)
        try:
            points, states = self._run_ahead(params, inner)
            results = self._results(params, points, closure)
        except BaseException:  # an interrupt, too, must leave the parameters where they were
            put(params, start)
            restore(self.optimizer, inner)
            raise
        grads = [flatten_grads(found, params, points[0].dtype) for _, found in results]
        sign = -1.0 if all(group.get("maximize", False) for group in self.param_groups) else 1.0
        chosen = _best([sign * float(loss) for loss, _ in results], [float(grad.norm()) for grad in grads], self.select)
        put(params, split(points[chosen], params))
        kept = states[chosen]
        if kept is not None:
            restore(self.optimizer, kept)
        self._present = [part is not None for part in results[chosen][1]]
        self._set_grads(params, grads[chosen])
        for point, grad in zip(points, grads, strict=True):
            self._history.add(point, grad)
        self.optimizer.step()
        return results[0][0]

    def _fit_history(self, params: list[Tensor]) -> None:
        """Start anew where other parameters than before are trained."""
        width = sum(param.numel() * (2 if param.is_complex() else 1) for param in params)
        if width != self._width or len(params) != len(self._present):
            self._history.clear()
            self._resize(width, [True] * len(params))

    def _resize(self, width: int, present: list[bool]) -> None:
        self._width, self._present = width, present
        self._history.coordinates = None
        if self.dimensions is not None and self.dimensions < width:
            drawn = torch.randperm(width, generator=torch.Generator().manual_seed(0))
            self._history.coordinates = drawn[: self.dimensions].sort().values

    def _run_ahead(self, params: list[Tensor], start: Snapshot) -> tuple[list[Tensor], list[Snapshot | None]]:
        """The points of this step, and the inner state at each (None where it is the present one)."""
        dtype = torch.float32
        for param in params:
            dtype = torch.promote_types(dtype, param.dtype.to_real())
        points = [flatten(params, dtype)]
        states: list[Snapshot | None] = [start]
        if len(self._history) == 0:
            return points, states
        predict = self._history.predictor(self.parallelism, self.length_scale, self.noise)
        for _ in range(self.parallelism - 1):
            self._set_grads(params, predict(self._history.select(points[-1])))
            self.optimizer.step()
            point = flatten(params, dtype)
            if not bool(point.isfinite().all()):
                break
            points.append(point)
            states.append(None if self.select == "last" else snapshot(self.optimizer))
        return points, states

    def _results(self, params: list[Tensor], points: list[Tensor], closure: Any) -> Sequence[Result]:
        """Losses and gradients at the points."""
        values = [split(point, params) for point in points]
        if self._evaluate is not None:
            return self._evaluate(params, values, closure)
        found: list[Result] = []
        for value in values:
            put(params, value)
            loss = self.loss_of(self.evaluate(closure)).detach()
            self.refuse_sparse()
            found.append((loss, [None if param.grad is None else param.grad.clone() for param in params]))
        return found

    def _set_grads(self, params: list[Tensor], grad: Tensor) -> None:
        for param, piece, present in zip(params, split(grad, params), self._present, strict=True):
            param.grad = piece if present else None

    def own_state(self) -> dict[str, Any]:
        """The history."""
        present = list(self._present)
        return {"width": self._width, "capacity": self._history.capacity, "present": present, **self._history.state()}

    def load_own_state(self, own: dict[str, Any]) -> None:
        """Go on with a saved history.

        Raises:
            StateDictError: a history of another length, of other parameters, or in other coordinates.
        """
        if own["capacity"] != self._history.capacity:
            raise StateDictError(
                f"The state remembers {own['capacity']} points, this OptEx {self._history.capacity}. "
                f"Set history={own['capacity']}."
            )
        params = [param for group in self.param_groups for param in group["params"] if param.requires_grad]
        self._resize(int(own["width"]), [bool(entry) for entry in own["present"]])
        wanted = self._width if self._history.coordinates is None else len(self._history.coordinates)
        if own["count"] and own["points"].shape[1] != wanted:
            raise StateDictError(
                f"The state's points have {own['points'].shape[1]} coordinates, this OptEx takes {wanted}. "
                "Set dimensions as it was."
            )
        self._history.load(own, params[0].device)
