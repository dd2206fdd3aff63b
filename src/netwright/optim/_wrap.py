"""An optimizer around another one: groups, state and gradients are those of the inner optimizer."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from netwright.core.errors import SettingError, StateDictError
from netwright.core.recipe import resolve
from netwright.optim._base import BaseOptimizer, Group
from netwright.optim._registry import find

__all__ = ["Wrapper", "make_base"]


def make_base(
    base: str | Callable[..., Optimizer], params: Any, settings: Mapping[str, Any] | None, lr: float | Tensor | None
) -> Optimizer:
    """The optimizer to wrap.

    Args:
        base: makes it: a class, its import path, or its short name (see ``netwright.optim.available``).
        params: parameters, or groups of them.
        settings: its keyword arguments.
        lr: its learning rate, before that of ``settings``; None leaves it to them.
    """
    path = find(base).object if isinstance(base, str) and ":" not in base else base
    factory: Callable[..., Optimizer] = resolve(path) if isinstance(path, str) else path
    given = {**(settings or {}), **({} if lr is None else {"lr": lr})}
    return factory(params, **given)


class Wrapper(BaseOptimizer):
    """A ``torch.optim.Optimizer`` that decides how another one steps.

    ``param_groups`` and ``state`` are the inner optimizer's own objects, so that a scheduler may hold either one.
    ``state_dict`` is the inner one's, with one more entry: what :meth:`own_state` returns, under the class's name.

    Args:
        optimizer: the inner optimizer.

    Raises:
        SettingError: no optimizer, one that needs a closure, or one whose groups have no ``lr``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        name = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            what = type(optimizer).__name__
            raise SettingError(f"{name} wraps a torch.optim.Optimizer, got {what}. Build one over the parameters.")
        kind = getattr(optimizer, "closure_kind", "loss" if isinstance(optimizer, LBFGS) else "optional")
        if kind != "optional":
            what = type(optimizer).__name__
            raise SettingError(f"{name}: {what} evaluates a closure in its step. Wrap an optimizer that needs none.")
        if any("lr" not in group for group in optimizer.param_groups):
            raise SettingError(f"{name} needs an lr in every group, and {type(optimizer).__name__} has none.")
        self.optimizer = optimizer
        self.defaults = dict(optimizer.defaults)  # torch adds to them
        self.__setstate__({})  # torch's hooks, without the groups that its constructor would make

    @property
    def param_groups(self) -> list[Group]:
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The inner optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def check(self, group: Group) -> None:
        """Accept what the inner optimizer accepts."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as the inner optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def own_state(self) -> dict[str, Any]:
        """What is kept between steps beside the inner optimizer's state: tensors, numbers and plain containers."""
        raise NotImplementedError

    def load_own_state(self, own: dict[str, Any]) -> None:
        """Take back what :meth:`own_state` returned."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's ``state_dict`` and this one's own state."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = {**self.optimizer.state_dict(), type(self).__name__: self.own_state()}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = _kept(after(self, state), state)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateDictError: a state that this kind of optimizer did not save.
        """
        name = type(self).__name__
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _kept(before(self, state_dict), state_dict)
        if name not in state_dict:
            raise StateDictError(
                f"This state was not saved by {name}: it has no entry {name!r}. "
                "Load the state of an inner optimizer alone into that optimizer."
            )
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != name})
        self.load_own_state(state_dict[name])
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _kept(returned: dict[str, Any] | None, state: dict[str, Any]) -> dict[str, Any]:
    """The state behind a hook, which returns another one or None."""
    return state if returned is None else returned
