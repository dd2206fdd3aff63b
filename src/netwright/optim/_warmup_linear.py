"""A learning rate that rises linearly and then falls linearly to zero."""

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from netwright.core.errors import SettingError

__all__ = ["WarmupLinear"]


class WarmupLinear(LRScheduler):
    r"""Linear warm-up and linear decay, the schedule of nearly all fine-tuning of transformers.

    Iteration :math:`t = 0, \dots, T - 1` has the group's learning rate times

    .. math:: \frac{t + 1}{w} \text{ for } t < w, \qquad \frac{T - t}{T - w + 1} \text{ for } t \ge w > 0, \qquad
              \frac{T - t}{T} \text{ for } w = 0, \qquad w = \lfloor \rho\, T \rfloor

    so that no iteration is lost to a rate of zero, and 0 from :math:`T` on.

    Args:
        optimizer: whose learning rates move; groups keep their proportions.
        total_steps: iterations :math:`T`.
        warmup: share :math:`\rho` of them, in [0, 1).
        last_epoch: as for any scheduler of torch.

    Raises:
        SettingError: a setting outside its range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule, rates = WarmupLinear(optimizer, total_steps=5, warmup=0.4), []
        >>> for _ in range(5):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.5, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1, last_epoch: int = -1) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise SettingError(f"WarmupLinear: total_steps must be a positive integer, got {total_steps!r}.")
        if isinstance(warmup, bool) or not isinstance(warmup, int | float) or not 0 <= warmup < 1:
            raise SettingError(f"WarmupLinear: warmup must be a share in [0, 1), got {warmup!r}.")
        self.total_steps, self.warmup = total_steps, int(warmup * total_steps)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the coming iteration."""
        time, top, end = self.last_epoch, self.warmup, self.total_steps
        factor = (time + 1) / top if time < top else max(0, end - time) / (end - top + 1 if top else end)
        return [base * factor for base in self.base_lrs]
