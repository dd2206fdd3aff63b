"""An exponential moving average of a model's weights during training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]


class MovingAverage:
    r"""Average of everything in a model's state that is no integer, normalization statistics included.

    After iteration :math:`t = 1, 2, \dots` with weights :math:`w_t`, and with :math:`a_0 = w_0`,

    .. math:: a_t = d_t a_{t-1} + (1 - d_t) w_t, \qquad d_t = \min\bigl(d, \tfrac{1 + t}{10 + t}\bigr).

    The warm-up :math:`(1+t)/(10+t)` lets the average forget the initial weights in a short fit. The running means and
    variances of batch norms are averaged with the same weights rather than computed anew: they are themselves moving
    averages over the same iterations, and no further pass over the data is needed. Integer buffers are copied.

    Costs one copy of the model, in at least float32, and one multiply-add per weight and iteration.

    Args:
        model: whose state is averaged.
        decay: :math:`d`, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._steps = 0
        self._average = {name: _copy(value) for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an iteration."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, value in model.state_dict().items():
            average = self._average[name]
            if _continuous(value):
                average.lerp_(value.to(average.dtype), 1 - decay)
            else:
                average.copy_(value)

    def end_epoch(self, model: nn.Module) -> None:
        """Nothing: other averages act on the model here."""

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model holds the averaged weights; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self._average)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def put_into(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the average."""
        model.load_state_dict(self._average)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {"steps": self._steps, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._steps = int(state["steps"])
        average: dict[str, Tensor] = state["average"]
        for name, value in self._average.items():
            value.copy_(average[name])


def _continuous(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _copy(value: Tensor) -> Tensor:
    """A copy to average in, wide enough for small steps."""
    wide = torch.promote_types(value.dtype, torch.float32) if _continuous(value) else value.dtype
    return value.detach().to(wide, copy=True)
