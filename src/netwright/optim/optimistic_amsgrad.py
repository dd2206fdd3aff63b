"""Optimistic AMSGrad: a second half-step along the gradient that is predicted to come next."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.core.errors import SettingError, StateDictError
from netwright.optim._base import BaseOptimizer, Group, Member, check_number, check_pair

__all__ = ["OptimisticAMSGrad"]


class OptimisticAMSGrad(BaseOptimizer):
    r"""AMSGrad that also goes where the next gradient is expected to point, and corrects itself afterwards.

    Reach for it in place of AMSGrad or Adam where consecutive gradients resemble each other: large batches, smooth
    losses, small models.

    ``step`` leaves the parameters at the optimistic point :math:`w`, where the next gradient is to be taken. Evaluate
    and save there, as the paper does, or inside :meth:`at_base`, where the parameters are the iterate
    :math:`\tilde w` that no prediction has touched; near the end of a run the two all but coincide. Where
    something else changes the parameters between steps (clipping, an average put into the model), :math:`\tilde w` goes
    along.

    With the gradient :math:`g_t` at :math:`w_t`, elementwise and for :math:`t = 1, 2, \dots`,

    .. math:: \theta_t = \beta_1 \theta_{t-1} + (1 - \beta_1) g_t, \qquad
              v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad \hat v_t = \max(\hat v_{t-1}, v_t)

    .. math:: \tilde w_{t+1} = \tilde w_t - \frac{\eta}{1 - \beta_1^t}\, \frac{\theta_t}{d_t}, \qquad
              w_{t+1} = \tilde w_{t+1} - \frac{\eta}{1 - \beta_1^{t+1}}\, \frac{h_{t+1}}{d_t}, \qquad
              d_t = \sqrt{\frac{\hat v_t}{1 - \beta_2^t}} + \epsilon

    .. math:: h_{t+1} = \beta_1 \theta_t + (1 - \beta_1) m_{t+1}

    with the predicted gradient :math:`m_{t+1}`. It is the limit that minimal polynomial extrapolation sees in the last
    :math:`r + 1` gradients, all parameters taken as one vector: with the differences
    :math:`U = [g_{t-r+1} - g_{t-r}, \dots, g_t - g_{t-1}]`,

    .. math:: (U^\top U + \lambda \lVert U^\top U \rVert_2 I)\, z = \mathbf 1, \qquad c = \frac{z}{\mathbf 1^\top z},
              \qquad m_{t+1} = \sum_{i=1}^{r} c_i\, g_{t-r+i-1}.

    Until there are :math:`r + 1` gradients, and with ``span=0``, there is no second half-step: :math:`w = \tilde w`, to
    the last bit that of ``torch.optim.Adam(amsgrad=True, foreach=False, fused=False)``.

    Cost: beside Adam's passes, two over the :math:`r` stored differences and an :math:`r \times r` system. Memory:
    ``5 + span`` words per parameter (:math:`w - \tilde w, \theta, v, \hat v, g`, and the differences).

    Args:
        params: parameters, or groups of them; all of them share the weights :math:`c`.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`, in [0, 1).
        eps: :math:`\epsilon`.
        weight_decay: L2 penalty, added to the gradient.
        span: :math:`r`, differences of gradients that the prediction sees, 0 for none.
        regularization: :math:`\lambda > 0`; the larger, the closer the prediction is to the plain mean.
        maximize: whether to ascend.

    Raises:
        SettingError: a setting outside its range.
        GradientError: a sparse gradient.
        StateDictError: on loading, the state of another optimizer or of another ``span``.

    Example:
        >>> weight = torch.tensor([3.0, -2.0], requires_grad=True)
        >>> optimizer = OptimisticAMSGrad([weight], lr=0.1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> bool(weight.norm() < 0.1)
        True

    Source: paper 65. Wang, Li, Karimi, Li, "An Optimistic Acceleration of AMSGrad for Nonconvex Optimization", 2021,
    arXiv 1903.01435; the extrapolation: Scieur, d'Aspremont, Bach, "Regularized Nonlinear Acceleration", 2016, arXiv
    1606.04133.

    Differs: the paper's listing could be read in summary only. :math:`h_{t+1}` continues :math:`\theta_t`, which is
    what its analysis compares with :math:`\theta_{t+1}`. The moments are corrected for their start at 0 and
    :math:`\epsilon` is added as in PyTorch, and :math:`\lambda` is relative to :math:`\lVert U^\top U \rVert`, so that
    a rescaled loss gives the same weights.
    """

    state_names = frozenset(
        {"step", "ahead", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "last", "differences", "seen", "gram"}
    )
    takes_complex = True
    one_device = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        span: int = 5,
        regularization: float = 1e-3,
        maximize: bool = False,
    ) -> None:
        if isinstance(span, bool) or not isinstance(span, int) or span < 0:
            raise SettingError(f"OptimisticAMSGrad: span must be an integer of at least 0, got {span!r}.")
        self.span = span
        self.regularization = check_number(self, "regularization", regularization, above=True)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting outside its range."""
        check_number(self, "lr", group["lr"])
        check_number(self, "eps", group["eps"])
        check_number(self, "weight_decay", group["weight_decay"])
        check_pair(self, "betas", group["betas"])

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise ``StateDictError`` for another kind of optimizer's state, Adam's among them, or another ``span``'s."""
        states = list(state_dict["state"].values())
        moved = [state for state in states if set(state) - {"seen", "gram"}]
        for state in moved:
            if missing := sorted({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} - set(state)):
                raise StateDictError(self._foreign(f"it lacks {', '.join(missing)}"))
        lengths = [len(state[name]) for state in states for name in ("differences", "gram") if name in state]
        if lengths != [self.span] * (len(moved) + 1 if moved and self.span else 0):  # one for each, and one for all
            raise StateDictError(f"The state was not saved with span={self.span}. Set span as it was.")
        super().check_state(state_dict)

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
        moved = [
            (member, group, _decayed(member, group)) for group in self.param_groups for member in self.members(group)
        ]
        if not moved:
            return loss
        mixture = self._observe([(member, grad) for member, _, grad in moved]) if self.span else None
        placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # a copy to a device for all, not for each
        for member, group, grad in moved:
            predicted = None
            if mixture is not None:
                stored: Tensor = member.state["differences"]
                where = stored.device, stored.dtype
                if where not in placed:
                    placed[where] = mixture.to(stored)
                predicted = _predict(member.state, placed[where])
            _step(member, grad, predicted, group)
        return loss

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Inside, the parameters are the iterate without the predicted half-step; afterwards what they were.

        Example:
            >>> weight = torch.ones(2, requires_grad=True)
            >>> optimizer = OptimisticAMSGrad([weight], lr=0.1, span=1)
            >>> for factor in (1.0, 2.0):
            ...     weight.grad = torch.full((2,), factor)
            ...     optimizer.step()
            >>> with optimizer.at_base():
            ...     base = weight.detach().clone()
            >>> bool((weight < base).all())
            True
        """
        swapped = [
            (_real(param), state["ahead"], _real(param).clone())
            for param, state in self.state.items()
            if "ahead" in state
        ]
        for param, ahead, _ in swapped:
            param.sub_(ahead)
        try:
            yield
        finally:
            for param, _, kept in swapped:
                param.copy_(kept)

    def _observe(self, moved: list[tuple[Member, Tensor]]) -> Tensor | None:
        """Take in the new gradients; the weights of the differences in the prediction, None while there are too few."""
        own: dict[str, Any] = self.state[self.param_groups[0]["params"][0]]
        seen = own.setdefault("seen", 0)
        gram: list[list[float]] = own.setdefault("gram", [[0.0] * self.span for _ in range(self.span)])
        own["seen"] += 1
        slot = (seen - 1) % self.span
        for state in self.state.values():
            if seen and "differences" in state:
                state["differences"][slot].zero_()  # stays so where there is no gradient in this step
        rows = [_difference(member.state, grad, slot if seen else None, self.span) for member, grad in moved]
        if seen:
            row = torch.stack(rows).sum(0).tolist()
            for place, value in enumerate(row):
                gram[slot][place] = gram[place][slot] = value
        if seen < self.span:
            return None
        order = [(slot + 1 + place) % self.span for place in range(self.span)]  # from the oldest to the newest
        weights = extrapolation_weights(torch.tensor(gram, dtype=torch.float64)[order][:, order], self.regularization)
        if weights is None:
            return None
        mixture = torch.empty_like(weights)
        mixture[order] = -weights.cumsum(0)  # g_{t-r+i-1} is g_t less the differences from the i-th on
        return mixture


def extrapolation_weights(gram: Tensor, regularization: float) -> Tensor | None:
    """Weights ``c`` of regularized minimal polynomial extrapolation, which sum to 1; None where some are not finite.

    Args:
        gram: products of the differences, oldest first, ``(r, r)``, float64.
        regularization: relative to the norm of ``gram``.
    """
    ones = torch.ones(len(gram), dtype=gram.dtype)
    norm = float(torch.linalg.matrix_norm(gram, 2)) if bool(gram.isfinite().all()) else math.nan
    if norm == 0:
        return ones / len(gram)
    if math.isnan(norm):
        return None
    solved: Tensor = torch.linalg.solve(gram / norm + regularization * torch.eye(len(gram), dtype=gram.dtype), ones)
    return solved / solved.sum()


def _difference(state: dict[str, Any], grad: Tensor, slot: int | None, span: int) -> Tensor:
    """Store how far ``grad`` is from the last one; its products with all stored differences, ``(span,)``, float64."""
    if "last" not in state:
        state["last"] = grad.clone()
        state["differences"] = grad.new_zeros((span, *grad.shape))
        return torch.zeros(span, dtype=torch.float64, device=grad.device)
    if slot is not None:
        torch.sub(grad, state["last"], out=state["differences"][slot])
    state["last"].copy_(grad)
    stored = state["differences"].view(span, -1)
    newest = stored[slot or 0]
    wide = torch.promote_types(grad.dtype, torch.float32)
    return torch.mv(stored.to(wide), newest.to(wide)).double()


def _predict(state: dict[str, Any], mixture: Tensor) -> Tensor:
    """The last gradient plus the mixture ``(span,)``, of its device and type, of its last differences."""
    stored: Tensor = state["differences"]
    predicted = torch.mv(stored.view(len(mixture), -1).mT, mixture)
    return predicted.view(stored.shape[1:]).add_(state["last"])


def _step(member: Member, grad: Tensor, predicted: Tensor | None, group: Group) -> None:
    """AMSGrad from the base, then the half-step along the prediction. The first part rounds as PyTorch's does.

    Kept is how far the parameters then are ahead of the base, by a subtraction, which is exact for a step of ordinary
    length: the way back leads to the very base.
    """
    param, state = member.param, member.state
    first, second = (float(beta) for beta in group["betas"])
    lr = float(group["lr"])
    if "exp_avg" not in state:
        state["step"] = 0
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            state[name] = torch.zeros_like(param)
    if "ahead" in state:
        param.sub_(state["ahead"])
    state["step"] += 1
    step, average = state["step"], state["exp_avg"]
    average.lerp_(grad, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
    torch.maximum(state["max_exp_avg_sq"], state["exp_avg_sq"], out=state["max_exp_avg_sq"])
    denominator = (state["max_exp_avg_sq"].sqrt() / (1 - second**step) ** 0.5).add_(group["eps"])
    param.addcdiv_(average, denominator, value=-lr / (1 - first**step))
    if predicted is not None:
        if "ahead" not in state:
            state["ahead"] = torch.empty_like(param)
        base = state["ahead"].copy_(param)
        expected = predicted.lerp_(average, first)
        param.addcdiv_(expected, denominator, value=-lr / (1 - first ** (step + 1)))
        torch.sub(param, base, out=base)
    elif "ahead" in state:
        state["ahead"].zero_()


def _decayed(member: Member, group: Group) -> Tensor:
    return member.grad.add(member.param, alpha=group["weight_decay"]) if group["weight_decay"] else member.grad


def _real(param: Tensor) -> Tensor:
    return torch.view_as_real(param.detach()) if param.is_complex() else param.detach()
