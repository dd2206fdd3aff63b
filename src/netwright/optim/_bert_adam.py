"""Adam as the first BERT was fine-tuned with it: without correction of the moments' bias."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.optim._base import BaseOptimizer, Group, check_number, check_pair

__all__ = ["BertAdam"]


def _step(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """``m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr (m / (sqrt(v) + eps) + wd p)``."""
    first.lerp_(grad, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    param.mul_(1 - lr * weight_decay)
    param.addcdiv_(first, second.sqrt().add_(eps), value=-lr)


class BertAdam(BaseOptimizer):
    r"""Adam with decoupled weight decay and without bias correction, for comparison with what came after it.

    Reach for it only to reproduce results of the first fine-tuning recipes. With gradient :math:`g_t`,

    .. math:: m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
              w_t = w_{t-1} - \eta \Big(\frac{m_t}{\sqrt{v_t} + \epsilon} + \lambda w_{t-1}\Big)

    The moments start at zero and :math:`v` grows more slowly than :math:`m`: step :math:`t` is longer than Adam's by
    :math:`(1 - \beta_1^t) / \sqrt{1 - \beta_2^t}`, three times at first and six and a half times around step 15.

    Cost: one pass over parameters, gradients and moments; two words of state per parameter.

    Args:
        params: parameters, or groups of them.
        lr: learning rate :math:`\eta`.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: :math:`\lambda`.
        maximize: ascend.

    Raises:
        SettingError: a setting outside its range.
        GradientError: sparse gradients.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = BertAdam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> round(1 - weight.item(), 4)  # Adam's step is 0.1
        0.3162

    Source: paper 216, section on debiased Adam, where it is the practice to be abandoned.
    """

    state_names: ClassVar[frozenset[str]] = frozenset({"exp_avg", "exp_avg_sq"})
    takes_complex: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting of this group outside its range."""
        check_number(self, "lr", group["lr"])
        check_pair(self, "betas", group["betas"])
        check_number(self, "eps", group["eps"])
        check_number(self, "weight_decay", group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: clears the gradients, runs backward and returns the loss; optional.
        """
        returned = self.evaluate(closure)
        self.refuse_sparse()
        for group in self.param_groups:
            settings = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            for param, grad, state in self.members(group):
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                _step(param, grad, state["exp_avg"], state["exp_avg_sq"], lr=float(group["lr"]), **settings)
        return returned
