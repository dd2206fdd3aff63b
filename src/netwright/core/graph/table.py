"""Which rule speaks for which operation."""

from collections.abc import Callable
from typing import Any

import torch

from netwright.core.errors import TraceError
from netwright.core.graph.call import Rule

__all__ = ["ResizeRule", "register_rule", "resize_rule_for", "rule", "rule_for"]

ResizeRule = Callable[[Any], None]
"""A function that rewrites the lengths among the arguments of an operation in a shrunk graph."""

_RULES: dict[str, Rule] = {}
_RESIZE: dict[str, ResizeRule] = {}


def register_rule(op: Any, fn: Rule, *, resize: ResizeRule | None = None) -> None:
    """Teach :func:`trace` an operation, or replace what it knows about one.

    Reach for it when ``graph.blocked`` names an operation of your own: until it has a rule, every dimension that it
    touches stays as it is.

    Args:
        op: the operation as it stands in the exported graph: ``torch.ops.mine.scale`` (all its overloads),
            ``torch.ops.mine.scale.default`` or its name, ``"mine::scale"``.
        fn: ``fn(call) -> Value | list[Value]``. It reads the arguments with ``call["name"]``, says what belongs
            together with ``call.tie``, what must stay with ``call.freeze``, whose removal changes statistics with
            ``call.inexact``, and returns what is known about the result. ``netwright.core.graph.rules`` has
            ready ones, ``pointwise`` for example.
        resize: ``resize(edit)``, needed where the operation takes lengths as arguments: sets them
            in the shrunk graph (see :class:`netwright.core.graph.resize.Edit`).

    Raises:
        TraceError: ``op`` names no operation, or ``fn`` is not callable.

    Example:
        >>> from netwright.core.graph.rules import pointwise
        >>> register_rule("aten::erfinv", pointwise)
    """
    if not callable(fn):
        raise TraceError(f"A rule must be a function of a Call, got {type(fn).__name__}.")
    key = _key(op)
    _RULES[key] = fn
    if resize is not None:
        _RESIZE[key] = resize


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: this function speaks for these ``aten`` operations, all overloads (or one: ``"add.Tensor"``)."""

    def enter(fn: Rule) -> Rule:
        for name in names:
            _RULES[f"aten::{name}"] = fn
        return fn

    return enter


def rule_for(target: Any) -> Rule | None:
    """The rule for a node's target: that of the overload, else that of the operation, else None."""
    return next((_RULES[key] for key in _keys(target) if key in _RULES), None)


def resize_rule_for(target: Any) -> ResizeRule | None:
    """The function that rewrites the lengths a call of ``target`` takes as arguments, or None."""
    return next((_RESIZE[key] for key in _keys(target) if key in _RESIZE), None)


def register_resize(names: tuple[str, ...], fn: ResizeRule) -> None:
    """``fn`` rewrites the lengths among the arguments of these ``aten`` operations."""
    for name in names:
        _RESIZE[f"aten::{name}"] = fn


def _keys(target: Any) -> tuple[str, ...]:
    if not isinstance(target, torch._ops.OpOverload):
        return ()
    name = target._schema.name
    return f"{name}.{target._overloadname}", name


def _key(op: Any) -> str:
    if isinstance(op, torch._ops.OpOverload):
        return _keys(op)[0]
    if isinstance(op, torch._ops.OpOverloadPacket):
        return str(op._qualified_op_name)
    if isinstance(op, str) and "::" in op:
        return op
    raise TraceError(
        f"register_rule needs an operation such as torch.ops.mine.scale or its name 'mine::scale', got {op!r}."
    )
