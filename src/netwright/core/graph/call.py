"""What a rule sees of one operation, and what it can say about it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from netwright.core.graph.axes import Axis, Factor, IntArray, Value, extent, size_of
from netwright.core.graph.constraints import Constraints, Producer
from netwright.core.graph.probe import zero_image

__all__ = ["Answer", "Call", "Rule", "UnprovableError"]

Answer: TypeAlias = Value | list[Value]
"""What is known about the result of an operation, or about each of several."""
Rule: TypeAlias = Callable[["Call"], Answer]
"""A function that knows what an operation does to the dimensions of its tensors."""


class UnprovableError(Exception):
    """Raised by a rule that cannot vouch for this call; its dimensions then stay as they are.

    Args:
        reason: completes "... stays as it is, for {reason}".
    """


class Call:
    """One call of an operation in the traced graph.

    ``call["name"]`` is the argument of that name in the operation's schema: a :class:`~netwright.core.graph.Value`
    for a tensor, a list of them for a list of tensors, the number or flag itself otherwise.

    Args:
        node: the node of the traced graph.
        environment: what is known about the tensors computed so far.
        constraints: where facts are collected.
    """

    def __init__(self, node: fx.Node, environment: dict[fx.Node, Answer], constraints: Constraints) -> None:
        self.node = node
        self.operation = str(node.target)
        self.constraints = constraints
        self._environment = environment
        self.arguments = {name: self._known(value) for name, value in _bound(node).items()}

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument of that name, or ``default`` where the operation has none."""
        return self.arguments.get(name, default)

    def tensors(self) -> list[Value]:
        """All tensor arguments in order, those in lists included."""
        return list(_values(list(self.arguments.values())))

    @property
    def name(self) -> str:
        """The operation without its namespace and overload: "conv2d"."""
        return str(schema.name).partition("::")[2] if (schema := self.schema) else self.operation

    @property
    def schema(self) -> Any:
        """The operation's schema, None where it is a plain function."""
        return getattr(self.node.target, "_schema", None)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the (only) result; entries that depend on the batch are symbolic."""
        return tuple(self.node.meta["val"].shape)

    @property
    def shapes(self) -> list[tuple[Any, ...]]:
        """The shapes of all results."""
        result = self.node.meta.get("val")
        results = result if isinstance(result, tuple | list) else [result]
        return [tuple(item.shape) for item in results if isinstance(item, Tensor)]

    @property
    def module(self) -> str:
        """The name of the innermost module whose ``forward`` made this call, "" for the model itself."""
        stack = self.node.meta.get("nn_module_stack") or {}
        return str(list(stack.values())[-1][0]) if stack else ""

    def fresh(self, size: int) -> Axis:
        """A new axis that nothing is known about."""
        return self.constraints.fresh(size)

    def fixed(self, length: Any, reason: str) -> Axis:
        """A new axis of this length, none of whose entries may be removed."""
        axis = self.constraints.fresh(*extent(length))
        self.freeze(axis, reason)
        return axis

    def tie(self, a: Axis, b: Axis) -> None:
        """Entry ``i`` of ``a`` is removed together with entry ``i`` of ``b``."""
        self.constraints.tie(a, b, self.operation)

    def freeze(self, axis: Axis, reason: str) -> None:
        """No entry of ``axis`` may be removed, and why."""
        self.constraints.freeze(axis, self.operation, reason)

    def inexact(self, axis: Axis, reason: str) -> None:
        """Removing an entry of ``axis`` changes statistics of the others, and why."""
        self.constraints.mark_inexact(axis, self.operation, reason)

    def flat(self, axis: Axis) -> IntArray:
        """One atom for each entry of ``axis``.

        Raises:
            UnprovableError: the axis depends on the batch.
        """
        atoms = self.constraints.flat(axis, self.operation)
        if atoms is None:
            raise UnprovableError("a dimension of it depends on the batch size")
        return atoms

    def axis(self, atoms: IntArray) -> Axis:
        """The axis whose entries have these atoms; a single one stays, for a dimension of length one has no atoms."""
        whole = (Factor(atoms.size, atoms),)
        if atoms.size == 1:
            self.freeze(whole, "it becomes a dimension of length one")
            return ()
        return whole

    def choose(self, elements: IntArray, factors: Sequence[Axis], prefer: int = 0) -> None:
        """``elements`` are a product of ``factors``; only one of these can lose entries, best the one preferred."""
        self.constraints.choose(elements, factors, prefer, self.operation)

    def produces(self, axis: Axis, weight: Value, kind: str = "units") -> None:
        """The module that owns ``weight`` computes ``axis``: groups are named after it.

        Where the weight itself is computed, they are named after the module that makes this call, or the call.
        """
        owner, _, name = weight.parameter.rpartition(".")
        module = owner or name or self.module or self.node.name
        for factor in axis:
            if factor.atoms is not None:
                self.constraints.producers.append(Producer(factor.atoms, module, kind))

    def heads(self, axis: Axis) -> None:
        """The entries of ``axis`` are attention heads."""
        self.constraints.heads.extend(factor.atoms for factor in axis if factor.atoms is not None)

    def keep(self, value: Value, dim: int) -> None:
        """Zeroing a unit leaves its entries in this dimension of a parameter or buffer alone: a variance, say."""
        if value.parameter:
            self.constraints.kept.add((value.parameter, dim))

    def contract(self, a: Axis, a_null: bool, b: Axis, b_null: bool) -> None:
        """``a`` and ``b`` are multiplied entry by entry and summed over."""
        self.tie(a, b)
        if not (a_null or b_null):
            self.inexact(a, "the sum over it sees entries that are not zero at zeroed units")

    def zero_image(self, null: Sequence[bool]) -> tuple[bool, bool]:
        """What this entrywise operation makes of zeros in the tensors flagged: ``(stays zero, is not finite)``."""
        return zero_image(self.node, tuple(null))

    def fits(self, answer: Answer) -> bool:
        """Whether a rule's answer has the shapes that the operation returns."""
        answers = answer if isinstance(answer, list) else [answer]
        shapes = self.shapes
        if len(answers) != len(shapes):
            return False
        return all(
            len(value.axes) == len(shape)
            and all(size_of(axis) == extent(length) for axis, length in zip(value.axes, shape, strict=True))
            for value, shape in zip(answers, shapes, strict=True)
        )

    def _known(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self._environment.get(argument, argument.meta.get("val"))
        if isinstance(argument, list | tuple):
            return [self._known(item) for item in argument]
        return argument


def _bound(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names of the schema, defaults filled in; by position where there is no schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(position): value for position, value in enumerate(node.args)}, **node.kwargs}
    bound: dict[str, Any] = {}
    positional = iter(node.args)
    for argument in node.target._schema.arguments:
        if argument.kwarg_only or argument.name in node.kwargs:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
        else:
            bound[argument.name] = next(positional, argument.default_value)
    return bound


def _values(argument: Any) -> Iterator[Value]:
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _values(item)
