"""DiffGrad: Adam, braked where the gradient hardly changes."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.core.errors import StateDictError
from netwright.optim._base import BaseOptimizer, Group, check_number, check_pair
from netwright.optim._fused import DIFFGRAD, Row, check_form, run, split, update

__all__ = ["DiffGrad"]


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    previous: list[Tensor],
    step_size: float,
    root: float,
    eps: float,
    rest1: float,
    beta2: float,
    rest2: float,
    decay: float,
) -> None:
    """``p += step_size * friction * m / (sqrt(v) / root + eps)``, in the order of operations of ``torch.optim.Adam``.

    ``step_size`` is negative, and ``friction = sigmoid(|previous - g|)``. Where that is 1, this is Adam to the last
    digit.
    """
    if decay != 0:
        grads = list(torch._foreach_add(grads, params, alpha=decay))
    torch._foreach_lerp_(exp_avgs, grads, rest1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, rest2)
    moves = torch._foreach_sub(previous, grads)
    torch._foreach_abs_(moves)
    torch._foreach_sigmoid_(moves)
    torch._foreach_mul_(moves, exp_avgs)
    torch._foreach_copy_(previous, grads)
    del grads
    scales = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(scales, root)
    torch._foreach_add_(scales, eps)
    torch._foreach_addcdiv_(params, moves, scales, step_size)


class DiffGrad(BaseOptimizer):
    r"""Adam, with each entry of the step multiplied by a friction between 1/2 and 1.

    Reach for it to make Adam more careful near a minimum: an entry whose gradient changes from step to step moves at
    Adam's pace, an entry whose gradient stays the same moves at half of it.

    .. math:: m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
              v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
              \xi_t &= \frac{1}{1 + e^{-|g_{t-1} - g_t|}} \\
              \theta_t &= \theta_{t-1} - \eta\, \frac{\xi_t\, \hat m_t}{\sqrt{\hat v_t} + \epsilon}, \qquad
              \hat m_t = \frac{m_t}{1 - \beta_1^t}, \quad \hat v_t = \frac{v_t}{1 - \beta_2^t}

    with parameters :math:`\theta`, gradient :math:`g_t` (plus :math:`\lambda \theta_{t-1}` with weight decay
    :math:`\lambda`), friction :math:`\xi_t`, learning rate :math:`\eta`, and :math:`g_0 = m_0 = v_0 = 0`. The friction
    depends on the scale of the gradient: where gradients are small against 1, as they are with a mean loss over
    many parameters, it stays near 1/2, and DiffGrad is near Adam with half the learning rate.

    Cost: three words of state for a parameter (six for a complex one) and a step number; Adam keeps two. On a CPU,
    float32 and float64 parameters are moved by a compiled kernel in one pass over memory (nine words for a parameter,
    where Adam moves seven), which agrees with torch's operations to about one unit in the last place of each step;
    elsewhere those need two words more while they run, three with weight decay.

    Args:
        params: parameters, real or complex, or groups of them.
        lr: learning rate :math:`\eta`, at least 0.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\lambda`, at least 0, added to the gradient as in Adam.
        maximize: ascend instead of descend.
        foreach: True applies torch's operations to lists of parameters, False to one parameter after the other, None
            to lists where there is no kernel and parameters are not on the CPU.
        fused: True asks for the compiled kernel (float32 and float64 on the CPU; it is built once, in about a second,
            by the machine's C++ compiler, and kept in the user's cache folder), False forbids it, None uses it where it
            can be used unless ``foreach`` is given.

    Raises:
        SettingError: a setting outside its range, or ``fused=True`` where that is not possible.
        GradientError: on a step, a sparse gradient.
        StateDictError: on loading, the state of another optimizer.

    Example:
        >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = DiffGrad([weight], lr=0.1)
        >>> (weight * torch.tensor([100.0, 0.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.tolist()
        [0.8999999761581421, -2.0]

    Source: paper 3, Dubey, Chakraborty, Roy, Mukherjee, Singh and Chaudhuri, "diffGrad: An Optimization Method for
    Convolutional Neural Networks", 2019, arXiv:1909.11015.

    Differs: :math:`\epsilon` is added after the correction of :math:`v_t`, as in ``torch.optim.Adam``; the authors'
    program adds it before. Weight decay, of which the paper does not speak, is the
    program's: it enters the gradient, and so the friction. Where :math:`|g_{t-1} - g_t|` passes 87 (708 in float64),
    the kernel takes that value, which changes no digit of the friction. A complex parameter is moved as two real
    ones.
    """

    closure_kind = "optional"
    state_names: ClassVar[frozenset[str]] = frozenset({"step", "exp_avg", "exp_avg_sq", "previous_grad"})
    takes_complex = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
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
        check_number(self, "eps", group["eps"])
        check_number(self, "weight_decay", group["weight_decay"])
        check_form(self, group)

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise ``StateDictError`` for the state of another kind of optimizer, Adam's among them."""
        for state in state_dict["state"].values():
            missing = sorted(self.state_names - set(state))
            if missing:
                raise StateDictError(self._foreign(f"it lacks {', '.join(missing)}"))
        super().check_state(state_dict)

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
            for time, rows in self._rows(group):
                step_size = -(lr / (1 - beta1**time))
                root = math.sqrt(1 - beta2**time)
                scalars = (step_size, root, group["eps"], 1 - beta1, beta2, 1 - beta2, group["weight_decay"])
                fast, rest = split(self, group, rows, DIFFGRAD)
                run(DIFFGRAD, fast, *scalars)
                update(group, rest, _step, *scalars)
        return loss

    def _rows(self, group: Group) -> list[tuple[int, list[Row]]]:
        """Parameter, gradient and state of each parameter that moves, by the number of its step.

        Under ``torch.compile`` one by one: a comparison of step numbers would make it compile every step anew.
        """
        rows: list[tuple[int, Row]] = []
        for param, grad, state in self.members(group):
            if not state:
                state["step"] = 0
                for name in ("exp_avg", "exp_avg_sq", "previous_grad"):
                    state[name] = torch.zeros_like(param)
            state["step"] += 1
            rows.append((state["step"], (param, grad, state["exp_avg"], state["exp_avg_sq"], state["previous_grad"])))
        if torch.compiler.is_compiling():
            return [(time, [row]) for time, row in rows]
        found: dict[int, list[Row]] = {}
        for time, row in rows:
            found.setdefault(time, []).append(row)
        return list(found.items())
