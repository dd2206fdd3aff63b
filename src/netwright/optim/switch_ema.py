"""Switch EMA: the moving average of the weights becomes the weights at the end of every epoch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from netwright.core.errors import SettingError, StateDictError
from netwright.optim._base import check_number

__all__ = ["SwitchEMA"]

_HALF = (torch.float16, torch.bfloat16)


class SwitchEMA:
    r"""Moving average of a model's state that is put back into the model once per epoch.

    Reach for it in place of an ordinary moving average when the last percents count: every epoch starts from the
    averaged weights, and no second model has to be evaluated at the end. With weights :math:`w_t` after iteration
    :math:`t = 1, 2, \dots`, and :math:`a_0 = w_0`,

    .. math:: a_t = d_t a_{t-1} + (1 - d_t) w_t, \qquad d_t = \min\bigl(d, \tfrac{1 + t}{10 + t}\bigr),
              \qquad w_t \leftarrow a_t \text{ at the end of an epoch},

    where :math:`d_t = d` without ``warmup``. The optimizer's state stays as it is. The average should forget within an
    epoch or so: :math:`1/(1-d)` iterations are its memory.

    Everything floating-point in the model's state takes part, and the running means and variances of batch norms with
    the same weights :math:`d_t`, so that they change over together with the weights; integer buffers are copied.
    Give ``data`` to :meth:`end_epoch` to compute these statistics anew for the averaged weights, with one pass.

    Cost: one copy of the model's state, and a read of the weights and a read and write of the average per iteration,
    by one foreach call for each device and type. Averages of half-precision weights are kept in single
    precision, where steps of :math:`1 - d` do not vanish.

    It has the interface of :class:`netwright.core.average.MovingAverage`, with :meth:`end_epoch` in addition.

    Args:
        model: whose state is averaged. Tensors are followed by their names: they may be replaced or moved later.
        decay: :math:`d`, in (0, 1).
        warmup: whether short averages come first.
        every: also put the average into the model after every so many iterations, for loops without epochs; None
            leaves it to :meth:`end_epoch`.

    Raises:
        SettingError: a setting outside its range.
        StateDictError: on a call, a model whose tensors have other names or shapes.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average = SwitchEMA(model, decay=0.5, warmup=False)
        >>> for _ in range(2):
        ...     _ = nn.init.ones_(model.weight)
        ...     average.update(model)
        >>> average.end_epoch(model)
        >>> model.weight.item()
        0.75

    Source: paper 20, S. Li, Z. Liu, J. Tian et al., "Switch EMA: A Free Lunch for Better Flatness and Sharpness",
    2024, arXiv:2402.09240.

    Differs: the paper's code has a warm-up of :math:`d` that is linear over a number of iterations to be set, and off
    by default; here it is the one of ``MovingAverage``, without a setting. Its default leaves the running statistics of
    batch norms out of the average; here they take part.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.999, *, warmup: bool = True, every: int | None = None
    ) -> None:
        self.decay = check_number(self, "decay", decay, high=1.0, above=True, below=True)
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise SettingError(f"SwitchEMA: every must be a positive number of iterations or None, got {every!r}.")
        self.warmup = bool(warmup)
        self.every = every
        self._steps = 0
        self._average = {name: _copy(value) for name, value in _state(model).items()}
        self._follow(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an iteration."""
        self._steps += 1
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps)) if self.warmup else self.decay
        if not self._current(model):
            self._follow(model)
        for average, own in self._moving:
            same = own if own[0].dtype == average[0].dtype else [value.to(average[0].dtype) for value in own]
            torch._foreach_lerp_(average, same, 1 - decay)
        for count, own_count in self._counting:
            count.copy_(own_count)
        if self.every is not None and self._steps % self.every == 0:
            self.put_into(model)

    def end_epoch(self, model: nn.Module, data: Iterable[Any] | None = None) -> None:
        """Put the average into the model, which goes on from there.

        Args:
            model: what is trained.
            data: batches of inputs, or of tuples that begin with them. The statistics of batch norms are then computed
                over them, in the model and in the average, as ``torch.optim.swa_utils.update_bn`` does.
        """
        self.put_into(model)
        if data is not None:
            update_bn(data, model)
            with torch.no_grad():
                for name, value in _buffers(model):
                    self._average[name].copy_(value)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the average."""
        own = self._matched(_state(model))
        torch._foreach_copy_(list(own.values()), [self._average[name] for name in own])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model holds the averaged weights; afterwards its own again."""
        own = _state(model)
        kept = [value.detach().clone() for value in own.values()]
        self.put_into(model)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(own.values()), kept)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {"steps": self._steps, "average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            StateDictError: the state of another model, or of something else.
        """
        if not {"steps", "average"} <= set(state):
            raise StateDictError("This state was not saved by SwitchEMA: it needs 'steps' and 'average'.")
        saved = self._matched(state["average"])
        for name, value in self._average.items():
            value.copy_(saved[name])
        self._steps = int(state["steps"])

    def _matched(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """``own`` where its names and shapes are those of the average."""
        for name in sorted(set(own) ^ set(self._average)):
            where = "the average" if name in self._average else "the model"
            raise StateDictError(f"SwitchEMA: only {where} has {name!r}. Give the model that it was made for.")
        for name, value in own.items():
            if value.shape != self._average[name].shape:
                raise StateDictError(
                    f"SwitchEMA: {name!r} has the shape {tuple(value.shape)}, its average has "
                    f"{tuple(self._average[name].shape)}. Give the model that it was made for."
                )
        return own

    def _current(self, model: nn.Module) -> bool:
        """Whether the model still consists of the tensors that were sorted last, where and as they were."""
        links, sizes, kinds = self._seen
        return (
            model is links[0][2]
            and all(slots.get(key) is value for slots, key, value in links[1:])
            and all(len(slots) == size for slots, size in sizes)
            and all(value.dtype is dtype and value.device == device for value, dtype, device in kinds)
        )

    def _follow(self, model: nn.Module) -> None:
        """Sort the model's tensors by device and type, so that an update needs few calls."""
        own = self._matched(_state(model))
        moving: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        self._counting: list[tuple[Tensor, Tensor]] = []
        for name, value in reversed(own.items()):  # what an optimizer wrote last is still in the caches
            if self._average[name].device != value.device:
                self._average[name] = self._average[name].to(value.device)
            if value.is_floating_point() or value.is_complex():
                averages, values = moving.setdefault((value.device, value.dtype), ([], []))
                averages.append(self._average[name])
                values.append(value)
            else:
                self._counting.append((self._average[name], value))
        self._moving = list(moving.values())
        self._seen = _look(model, own)


def _look(model: nn.Module, own: dict[str, Tensor]) -> tuple[list[Any], list[Any], list[Any]]:
    """What tells cheaply that nothing of the model was exchanged: its slots and their contents."""
    links: list[tuple[dict[str, Any], str, Any]] = [({}, "", model)]
    sizes: list[tuple[dict[str, Any], int]] = []
    for module in model.modules():
        for slots in (module._modules, module._parameters, module._buffers):
            links += [(slots, key, value) for key, value in slots.items()]
            sizes.append((slots, len(slots)))
    return links, sizes, [(value, value.dtype, value.device) for value in own.values()]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under their first names."""
    return {**dict(model.named_parameters()), **dict(_buffers(model))}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, value in module._buffers.items():
            if value is not None and key not in module._non_persistent_buffers_set and id(value) not in seen:
                seen.add(id(value))
                yield f"{prefix}.{key}" if prefix else key, value


def _copy(value: Tensor) -> Tensor:
    """A copy to average in, wide enough for small steps."""
    return value.detach().to(torch.float32 if value.dtype in _HALF else value.dtype, copy=True)
