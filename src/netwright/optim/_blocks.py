"""The blocks of an encoder: where they are, and how they start."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from netwright.core.errors import SettingError

__all__ = ["find_blocks", "initialize"]

_LOADED = "_is_hf_initialized"  # Transformers' mark on tensors that its initialization leaves alone


def find_blocks(model: nn.Module, stack: str | None = None) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's blocks: of the lists of equal modules the one with the most parameters.

    Args:
        model: any module.
        stack: name of the list, where it is known.

    Raises:
        SettingError: there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if stack is not None:
        if stack not in lists:
            raise SettingError(f"{stack!r} is no nn.ModuleList of the model; there are {', '.join(lists) or 'none'}.")
        return stack, lists[stack]
    equal = {
        name: sum(param.numel() for param in module.parameters())
        for name, module in lists.items()
        if len(module) > 1 and len({type(block) for block in module}) == 1
    }
    if not any(equal.values()):
        raise SettingError(
            f"{type(model).__name__} has no nn.ModuleList of equal blocks, so its top layers are not known. "
            "Name the list with stack=..."
        )
    name = max(equal, key=lambda entry: equal[entry])
    return name, lists[name]


def initialize(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Give the parameters of ``modules`` fresh values by the model's own rules, in place.

    Args:
        model: around them.
        modules: by their names in ``model``.

    Raises:
        SettingError: a parameter that other parts share or that no rule reaches; all is then as before.
    """
    params = {
        f"{name}.{inner}": param for name, module in modules.items() for inner, param in module.named_parameters()
    }
    _refuse_shared(model, modules, params)
    kept = {name: (param.detach().clone(), getattr(param, _LOADED, None)) for name, param in params.items()}
    with torch.no_grad():
        try:
            for param in params.values():
                if hasattr(param, _LOADED):
                    setattr(param, _LOADED, False)
                if param.is_floating_point():
                    param.fill_(torch.nan)  # what is still NaN afterwards, no rule has reached
            for name, module in modules.items():
                _apply(_rule(model, name), module)
            missed = [name for name, param in params.items() if not bool(param.isfinite().all())]
            if missed:
                raise SettingError(
                    f"No rule initializes {', '.join(missed[:4])}: give its module a method reset_parameters()."
                )
        except BaseException:
            for name, param in params.items():
                param.copy_(kept[name][0])
            raise
        finally:
            for name, param in params.items():
                if kept[name][1] is not None:
                    setattr(param, _LOADED, kept[name][1])


def _refuse_shared(model: nn.Module, modules: Mapping[str, nn.Module], params: Mapping[str, nn.Parameter]) -> None:
    own = {id(param): name for name, param in params.items()}
    prefixes = tuple(f"{name}." for name in modules)
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in own and not name.startswith(prefixes):
            raise SettingError(f"{own[id(param)]} is shared with {name}, which is to stay. Take fewer layers.")


def _rule(model: nn.Module, name: str) -> Any:
    """``_init_weights`` of the innermost module around ``name`` that has it, or None."""
    rule = getattr(model, "_init_weights", None)
    module = model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        rule = getattr(module, "_init_weights", rule)
    return rule if callable(rule) else None


def _apply(rule: Any, module: nn.Module) -> None:
    """Initialize ``module`` from its innermost parts outwards."""
    for part in reversed(list(module.modules())):
        own = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if rule is not None:
            rule(part)
        elif callable(own):
            own()
