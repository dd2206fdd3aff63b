"""What the optimizers here share: checked settings, gathered gradients, closures, and a record of what each can do."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, distributed
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from netwright.core.errors import ClosureError, GradientError, SettingError, StateDictError

__all__ = ["BaseOptimizer", "ClosureKind", "Group", "Member", "check_number", "check_pair", "require_one_process"]

ClosureKind: TypeAlias = Literal["optional", "loss", "graph", "outputs"]
"""What ``step`` wants as closure; see :class:`BaseOptimizer`."""

Group: TypeAlias = dict[str, Any]

_LATE = {"differentiable"}  # what torch adds to the defaults once it has restored something
_PATCHED = {"step", "_opt_called"}  # what a scheduler puts on an instance; it is about that instance alone

_CLOSURES: Mapping[str, str] = {
    "loss": """def closure():
    optimizer.zero_grad()
    loss = loss_function(model(inputs), targets)
    loss.backward()
    return loss
optimizer.step(closure)""",
    "graph": """def closure():  # no backward(): the optimizer differentiates twice
    return loss_function(model(inputs), targets)
optimizer.step(closure)""",
    "outputs": """def closure():  # no backward(): the optimizer needs the Jacobian of the outputs
    outputs = model(inputs)
    return loss_function(outputs, targets), outputs
optimizer.step(closure)""",
}


class Member(NamedTuple):
    """A parameter of a group that has a gradient in this step.

    Args:
        param: what is moved, as a real tensor: a complex parameter is seen as ``(..., 2)`` real ones.
        grad: what is descended, of the same shape: negated where the group maximizes.
        state: what is kept for the parameter between steps.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]


class BaseOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` that checks what it is given.

    Subclasses set the class variables and implement :meth:`check` and ``step``. Those that keep more than torch
    restores extend :meth:`check_state` and :meth:`take_state`. All leave everything else alone.

    ============= ========================================================================================
    closure_kind  what ``step`` wants
    ============= ========================================================================================
    ``optional``  nothing, or the usual closure that calls ``backward`` and returns the loss
    ``loss``      that usual closure, always
    ``graph``     a closure that returns the loss with its graph and does not call ``backward``
    ``outputs``   a closure that returns the mean loss and the outputs ``(batch, ...)``, and does not call ``backward``
    ============= ========================================================================================

    Args:
        params: parameters, or groups of them.
        defaults: settings of groups that do not give their own.

    Raises:
        SettingError: a setting outside its range, or complex parameters where they have no meaning.
        ValueError: no parameters.
    """

    closure_kind: ClosureKind = "optional"
    state_names: ClassVar[frozenset[str]] = frozenset()
    takes_complex: ClassVar[bool] = False
    one_device: ClassVar[bool] = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    @abstractmethod
    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting of this group outside its range."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, checked as at construction."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update({name: value.item() for name, value in group.items() if isinstance(value, np.generic)})
        try:
            self.check(group)
            if not self.takes_complex and any(param.is_complex() for param in group["params"]):
                raise SettingError(
                    f"{type(self).__name__} has no meaning for complex parameters. Pass torch.view_as_real."
                )
            if self.one_device:
                self._require_one_device()
        except SettingError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """What ``copy`` and ``pickle`` take along: everything but hooks, where torch takes groups and state alone."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if not name.startswith("_optimizer_") and name not in _PATCHED
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, as the hooks that are registered for loading hand it over.

        Raises:
            StateDictError: the state of another kind of optimizer.
        """
        handed: list[dict[str, Any]] = []

        def check(_: Optimizer, state: dict[str, Any]) -> None:
            self.check_state(state)
            handed.append(state)

        last = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        self.take_state(handed[0])

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise ``StateDictError`` for a state that this kind of optimizer did not save."""
        for group in state_dict["param_groups"]:
            missing = sorted(set(self.defaults) - _LATE - set(group))
            if missing:
                raise StateDictError(self._foreign(f"its groups have no {', '.join(missing)}"))
        for state in state_dict["state"].values():
            unknown = sorted(set(map(str, state)) - self.state_names)
            if unknown:
                raise StateDictError(self._foreign(f"it keeps {', '.join(unknown)}"))

    def take_state(self, state_dict: dict[str, Any]) -> None:
        """Take from a checked state what torch, which has loaded it, does not restore by itself."""

    def _foreign(self, why: str) -> str:
        kept = ", ".join(sorted(self.state_names)) or "nothing"
        return (
            f"This state was not saved by {type(self).__name__}: {why}, while {type(self).__name__} keeps {kept}. "
            "Load it into the optimizer that saved it."
        )

    def _require_one_device(self) -> None:
        devices = sorted({str(param.device) for group in self.param_groups for param in group["params"]})
        if len(devices) > 1:
            raise SettingError(
                f"{type(self).__name__} couples all parameters and needs them on one device, got {', '.join(devices)}."
            )

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """What the closure returns, called with gradients enabled; None where none is given.

        Raises:
            ClosureError: no closure where one is needed.
        """
        if closure is None:
            if self.closure_kind != "optional":
                raise ClosureError(
                    f"{type(self).__name__}.step needs a closure. Call it like this:\n{_CLOSURES[self.closure_kind]}"
                )
            return None
        with torch.enable_grad():
            return closure()

    def loss_of(self, returned: Any) -> Tensor:
        """What a closure returned, checked to be a scalar loss.

        Raises:
            ClosureError: anything else.
        """
        if isinstance(returned, float | int) and not isinstance(returned, bool):
            returned = torch.tensor(float(returned))
        if not isinstance(returned, Tensor) or returned.numel() != 1:
            what = f"a tensor of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else repr(returned)
            raise ClosureError(
                f"{type(self).__name__}: the closure must return a scalar loss, got {what}. "
                f"Write it like this:\n{_CLOSURES.get(self.closure_kind, _CLOSURES['loss'])}"
            )
        return returned

    def refuse_sparse(self) -> None:
        """Raise before anything moves where some gradient is sparse.

        Raises:
            GradientError: naming the parameter's shape.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise GradientError(
                        f"{type(self).__name__} does not take sparse gradients, and the parameter of shape "
                        f"{tuple(param.shape)} has one. Build its embedding with sparse=False."
                    )

    def members(self, group: Group) -> list[Member]:
        """The parameters of ``group`` that have a gradient and are not empty."""
        found = []
        for param in group["params"]:
            given = param.grad
            if given is None or param.numel() == 0:
                continue
            grad = -given if group.get("maximize") else given
            real = torch.view_as_real(param) if param.is_complex() else param
            pairs = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
            found.append(Member(real, pairs, self.state[param]))
        return found


def check_number(
    owner: object,
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
) -> float:
    """``value`` as a float, checked to be finite and within ``[low, high]``.

    Args:
        owner: whose setting it is, for the message.
        name: the setting.
        value: a number, or a tensor with one element.
        low: least value.
        high: greatest value.
        above: whether ``low`` itself is excluded.
        below: whether ``high`` itself is excluded.

    Raises:
        SettingError: anything else.
    """
    number = math.nan
    if isinstance(value, Real | Tensor) and not isinstance(value, bool):
        number = float(cast(float, value)) if not isinstance(value, Tensor) or value.numel() == 1 else math.nan
    inside = low <= number <= high and not (above and number == low) and not (below and number == high)
    if not inside or math.isinf(number):
        left = f"{'greater than' if above else 'at least'} {low:g}"
        right = "" if math.isinf(high) else f" and {'less than' if below else 'at most'} {high:g}"
        raise SettingError(f"{type(owner).__name__}: {name} must be a number {left}{right}, got {value!r}.")
    return number


def check_pair(owner: object, name: str, value: Any) -> tuple[float, float]:
    """Two decay rates, each in ``[0, 1)``.

    Raises:
        SettingError: anything else.
    """
    if not isinstance(value, Iterable) or len(found := tuple(value)) != 2:
        raise SettingError(f"{type(owner).__name__}: {name} must be two numbers, got {value!r}.")
    first, second = (
        check_number(owner, f"{name}[{place}]", entry, high=1.0, below=True) for place, entry in enumerate(found)
    )
    return first, second


def require_one_process(owner: object, why: str) -> None:
    """Refuse a method that takes more than gradients from its batch where several processes train one model.

    ``DistributedDataParallel`` averages gradients and nothing else, so the replicas would drift apart without a word.

    Args:
        owner: whose constructor asks.
        why: what differs between the processes, as a clause.

    Raises:
        SettingError: ``torch.distributed`` is in use with more than one process.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise SettingError(
            f"{type(owner).__name__} trains in one process, and torch.distributed has {distributed.get_world_size()}: "
            f"{why}, so the replicas of the model would drift apart. Train in one process, or take an optimizer that "
            "needs averaged gradients only, such as torch.optim.AdamW or netwright.optim.Shampoo."
        )
