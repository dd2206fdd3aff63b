"""UBA: one schedule for every budget, shaped by one number."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from netwright.core.errors import SettingError
from netwright.optim._base import check_number

__all__ = ["UnifiedBudget"]


class UnifiedBudget(LRScheduler):
    r"""Learning rate that falls over a given number of iterations along a curve of adjustable shape.

    Reach for it when the number of iterations is fixed beforehand, in place of a choice between constant, linear and
    cosine schedules: ``phi`` runs through shapes like all of them. Step it once per iteration. With
    :math:`\eta_{\max}` the optimizer's learning rate, :math:`T` iterations of which :math:`W` warm up, :math:`K`
    periods, and :math:`s = (t - W) K / (T - W)` the periods done at iteration :math:`t`,

    .. math:: \eta_t = \eta_{\min} + (\eta_{\max} - \eta_{\min})
              \frac{2 (1 + \cos\theta_t)}{2\varphi + (2 - \varphi)(1 + \cos\theta_t)}, \qquad
              \theta_t = \pi (s - \lfloor s \rfloor),

    from :math:`t = W` on, before it :math:`\eta_t = \eta_{\max} (t + 1)/(W + 1)`, and :math:`\eta_{\min}` from
    :math:`t = T` on. :math:`\varphi = 2` is cosine annealing; :math:`\varphi \to 0` stays at :math:`\eta_{\max}` and
    falls at the end; large :math:`\varphi` falls at once, for ill-conditioned problems. The first step of the optimizer
    runs with :math:`\eta_0`, the last with :math:`\eta_{T-1}`.

    The rates are computed from the count of iterations and not from those before: nothing accumulates.

    Args:
        optimizer: whose learning rates move; each group falls from its own.
        total_steps: :math:`T`, iterations of the whole training.
        phi: :math:`\varphi > 0`.
        eta_min: :math:`\eta_{\min} \ge 0`, for all groups.
        warmup: :math:`W`, iterations, less than ``total_steps``.
        periods: :math:`K`, each of which starts from :math:`\eta_{\max}` again.
        last_epoch: iterations done minus one, to go on; -1 starts.

    Raises:
        SettingError: a setting outside its range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = UnifiedBudget(optimizer, total_steps=4, phi=1.0)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(round(schedule.get_last_lr()[0], 3))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 0.921, 0.667, 0.255]

    Source: paper 22, A. Tang, Y. Dong, Y. Zeng, X. Zhou, Z. Lin, "Stepsize anything: A unified learning rate schedule
    for budgeted-iteration training", 2025, arXiv:2505.24452.

    Differs: the formula was taken from descriptions and another implementation of the paper, which agree, and not from
    the paper itself. Periods are equally long and share one :math:`\eta_{\max}` and :math:`\eta_{\min}`. The paper's
    recommendations for :math:`\varphi` could not be read; the default lies midway between constant and cosine.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        phi: float = 1.0,
        eta_min: float = 0.0,
        warmup: int = 0,
        periods: int = 1,
        last_epoch: int = -1,
    ) -> None:
        self.total_steps = _count(self, "total_steps", total_steps, 1)
        self.phi = check_number(self, "phi", phi, above=True)
        self.eta_min = check_number(self, "eta_min", eta_min)
        self.warmup = _count(self, "warmup", warmup, 0)
        if self.warmup >= self.total_steps:
            raise SettingError(f"UnifiedBudget: warmup must be less than total_steps={total_steps}, got {warmup}.")
        self.periods = _count(self, "periods", periods, 1)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The learning rates of the groups for the iteration that comes next."""
        if self.last_epoch < self.warmup:
            return [base * ((self.last_epoch + 1) / (self.warmup + 1)) for base in self.base_lrs]
        share = 0.0
        if self.last_epoch < self.total_steps:
            done = (self.last_epoch - self.warmup) * self.periods / (self.total_steps - self.warmup)
            share = _shape(done % 1.0, self.phi)
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]

    def _get_closed_form_lr(self) -> list[Any]:
        return self.get_lr()


def _shape(done: float, phi: float) -> float:
    r"""The share of :math:`\eta_{\max} - \eta_{\min}` left when a share ``done`` of a period is over."""
    height = 1 + math.cos(math.pi * done)
    return 2 * height / (2 * phi + (2 - phi) * height)


def _count(owner: object, name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"{type(owner).__name__}: {name} must be an integer of at least {least}, got {value!r}.")
    return value
