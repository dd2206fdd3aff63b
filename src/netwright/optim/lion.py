"""Lion: steps of one size along the sign of a momentum."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.optim._base import BaseOptimizer, Group, check_number, check_pair
from netwright.optim._fused import LION, Row, check_form, run, split, update

__all__ = ["Lion"]


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    lr: float,
    keep: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
) -> None:
    """``p = keep p - lr sign(beta1 m + rest1 g)``, then ``m = beta2 m + rest2 g``.

    Every product and every sum is rounded by itself, never fused, so that no form of this step can see another sign.
    """
    directions = torch._foreach_mul(exp_avgs, beta1)
    torch._foreach_add_(directions, torch._foreach_mul(grads, rest1))
    torch._foreach_sign_(directions)
    if keep != 1:
        torch._foreach_mul_(params, keep)
    torch._foreach_add_(params, directions, alpha=-lr)
    del directions
    torch._foreach_mul_(exp_avgs, beta2)
    torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, rest2))


class Lion(BaseOptimizer):
    r"""Moves every parameter by the same amount, along the sign of an interpolated momentum.

    Reach for it where AdamW works and the memory of its second moment is missed, or where the step itself takes
    time: it keeps half of AdamW's state and moves five words of memory for a parameter instead of seven. It
    gains most with large batches. Since every entry of the update is 1 or -1, it needs a learning rate three to
    ten times smaller than AdamW's, and a weight decay larger by the same factor.

    .. math:: c_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
              \theta_t &= \theta_{t-1} - \eta\, (\operatorname{sign}(c_t) + \lambda\, \theta_{t-1}) \\
              m_t &= \beta_2 m_{t-1} + (1 - \beta_2)\, g_t

    with parameters :math:`\theta`, gradient :math:`g_t`, momentum :math:`m_t` (:math:`m_0 = 0`), learning rate
    :math:`\eta`, weight decay :math:`\lambda`, and :math:`\operatorname{sign}(0) = 0`.

    Cost: one word of state for a parameter (two for a complex one), and a few operations. On a CPU, float32 and
    float64 parameters are moved by a compiled kernel in one pass over memory, which gives the same result to the
    last digit; elsewhere the operations of torch need two words more while they run.

    Args:
        params: parameters, real or complex, or groups of them.
        lr: learning rate :math:`\eta`, the size of every step, at least 0.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        weight_decay: :math:`\lambda`, at least 0, decoupled as in AdamW.
        maximize: ascend instead of descend.
        foreach: True applies torch's operations to lists of parameters, False to one parameter after the other, None
            to lists where there is no kernel and parameters are not on the CPU.
        fused: True asks for the compiled kernel (float32 and float64 on the CPU; it is built once, in about a second,
            by the machine's C++ compiler, and kept in the user's cache folder), False forbids it, None uses it where it
            can be used unless ``foreach`` is given.

    Raises:
        SettingError: a setting outside its range, or ``fused=True`` where that is not possible.
        GradientError: on a step, a sparse gradient.

    Example:
        >>> weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        >>> optimizer = Lion([weight], lr=0.25)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.tolist()
        [0.75, -1.75, 2.75]

    Source: paper 114, Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu and Le, "Symbolic Discovery of
    Optimization Algorithms", 2023, arXiv:2302.06675.

    Differs: nothing in the equations. A complex parameter is moved as two real ones.
    """

    closure_kind = "optional"
    state_names: ClassVar[frozenset[str]] = frozenset({"exp_avg"})
    takes_complex = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting of this group outside its range."""
        check_number(self, "lr", group["lr"])
        check_pair(self, "betas", group["betas"])
        check_number(self, "weight_decay", group["weight_decay"])
        check_form(self, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient once.

        Args:
            closure: clears gradients, computes the loss, runs backward and returns the loss.

        Returns:
            What the closure returned, None without one.
        """
        loss = self.evaluate(closure)
        self.refuse_sparse()
        for group in self.param_groups:
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            keep = 1 - lr * group["weight_decay"]
            scalars = (lr, keep, beta1, 1 - beta1, beta2, 1 - beta2)
            fast, rest = split(self, group, self._rows(group), LION)
            run(LION, fast, *scalars)
            update(group, rest, _step, *scalars)
        return loss

    def _rows(self, group: Group) -> list[Row]:
        """Parameter, gradient and momentum of each parameter that moves."""
        rows: list[Row] = []
        for param, grad, state in self.members(group):
            if not state:
                state["exp_avg"] = torch.zeros_like(param)
            rows.append((param, grad, state["exp_avg"]))
        return rows
