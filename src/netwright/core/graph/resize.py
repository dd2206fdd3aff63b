"""Lengths that stand as numbers in a traced graph, rewritten for the smaller model."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from netwright.core.graph.axes import Axis, Value, extent
from netwright.core.graph.call import Answer
from netwright.core.graph.constraints import Constraints
from netwright.core.graph.table import register_resize

__all__ = ["Edit"]


class Edit:
    """One call in the shrunk graph whose arguments may have to change.

    Args:
        node: the call, in the new graph.
        values: what is known about every tensor of the graph, by node name.
        constraints: the facts of the walk.
        removed: ``(atoms,)`` what is removed.
    """

    def __init__(
        self,
        node: fx.Node,
        values: Mapping[str, Answer],
        constraints: Constraints,
        removed: npt.NDArray[np.bool_],
    ) -> None:
        self.node = node
        self.operation = str(node.target)
        self._values = values
        self._constraints = constraints
        self._removed = removed

    @property
    def results(self) -> list[Value]:
        """What is known about the results."""
        answer = self._values.get(self.node.name)
        return answer if isinstance(answer, list) else [] if answer is None else [answer]

    def value(self, name: str) -> Value:
        """What is known about the tensor argument ``name``."""
        argument = self.argument(name)
        assert isinstance(argument, fx.Node), f"{name} is a tensor"
        value = self._values[argument.name]
        assert isinstance(value, Value), f"{name} is one tensor"
        return value

    def length(self, axis: Axis) -> int | None:
        """How many entries of ``axis`` remain; None where that depends on the batch."""
        size = 1
        for factor in axis:
            if factor.atoms is None:
                return None
            size *= int((~self._removed[factor.atoms]).sum())
        return size

    def before(self, axis: Axis, position: int) -> int:
        """How many of the first ``position`` entries of ``axis`` remain."""
        atoms = self._constraints.flat(axis, self.operation)
        assert atoms is not None, "only static dimensions are cut"
        return int((~self._removed[atoms[:position]]).sum())

    @property
    def groups(self) -> int | None:
        """How many of the groups that the rule spoke of remain."""
        axis = self._constraints.groups.get(self.node.name)
        return None if axis is None else self.length(axis)

    def changed(self) -> bool:
        """Whether any result has lost entries."""
        return any(
            bool(self._removed[factor.atoms].any())
            for value in self.results
            for axis in value.axes
            for factor in axis
            if factor.atoms is not None
        )

    def argument(self, name: str) -> Any:
        """The argument of that name."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        position = self._position(name)
        return self.node.args[position] if position < len(self.node.args) else None

    def set(self, name: str, value: Any) -> None:
        """Give the argument of that name another value."""
        position = self._position(name)
        if position < len(self.node.args):
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    def replace(self, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Call another operation instead."""
        self.node.target = target
        self.node.args = args
        self.node.kwargs = {}

    def _position(self, name: str) -> int:
        assert isinstance(self.node.target, torch._ops.OpOverload)
        return [argument.name for argument in self.node.target._schema.arguments].index(name)


def _sizes(edit: Edit) -> list[int]:
    return [-1 if size is None else size for size in map(edit.length, edit.results[0].axes)]


def _view(edit: Edit) -> None:
    name = "shape" if "reshape" in edit.operation else "size"
    if edit.changed() or _input_changed(edit):
        edit.set(name, _sizes(edit))


def _input_changed(edit: Edit) -> bool:
    source = edit.node.args[0]
    assert isinstance(source, fx.Node)
    return Edit(source, edit._values, edit._constraints, edit._removed).changed()


def _expand(edit: Edit) -> None:
    if not edit.changed():
        return
    x = edit.value("self")
    sizes = list(edit.argument("size"))
    for back, axis in enumerate(reversed(edit.results[0].axes), start=1):
        kept = len(x.axes) >= back and bool(x.axes[-back])
        length = edit.length(axis)
        if kept or length is not None:
            sizes[-back] = -1 if kept else length
    edit.set("size", sizes)


def _unflatten(edit: Edit) -> None:
    if edit.changed():
        sizes = edit.argument("sizes")
        dim = edit.argument("dim") % len(edit.value("self").axes)
        edit.set("sizes", _sizes(edit)[dim : dim + len(sizes)])


def _pieces(edit: Edit) -> None:
    if not edit.changed():
        return
    source = edit.node.args[0]
    x = edit._values[source.name] if isinstance(source, fx.Node) else None
    assert isinstance(x, Value)
    dim = (edit.argument("dim") or 0) % len(x.axes)
    sizes = [edit.length(value.axes[dim]) for value in edit.results]
    edit.replace(torch.ops.aten.split_with_sizes.default, (source, sizes, dim))


def _slice(edit: Edit) -> None:
    x, result = edit.value("self"), edit.results[0]
    dim = (edit.argument("dim") or 0) % len(x.axes)
    start = edit.argument("start") or 0
    if not edit.changed() and not _input_changed(edit):
        return
    if x.axes[dim] is result.axes[dim] or edit.length(x.axes[dim]) is None:
        return
    size = int(extent(edit.node.meta["val"].shape[dim])[0])
    whole = int(np.prod([factor.size for factor in x.axes[dim]]))
    start = max(0, start + whole) if start < 0 else start
    if (edit.argument("step") or 1) != 1:
        return  # such a dimension stays as it is
    new = edit.before(x.axes[dim], start)
    edit.set("start", new)
    edit.set("end", edit.before(x.axes[dim], start + size)) if "slice" in edit.operation else edit.set(
        "length", edit.before(x.axes[dim], start + size) - new
    )


def _normalized_shape(edit: Edit) -> None:
    if edit.changed():
        count = len(edit.argument("normalized_shape"))
        edit.set("normalized_shape", _sizes(edit)[-count:])


def _groups(edit: Edit) -> None:
    groups = edit.groups
    if groups is not None:
        edit.set("num_groups" if "group_norm" in edit.operation else "groups", groups)


def _filled(edit: Edit) -> None:
    if edit.changed():
        sizes = list(edit.argument("size"))
        for position, axis in enumerate(edit.results[0].axes):
            length = edit.length(axis)
            if length is not None:
                sizes[position] = length
        edit.set("size", sizes)


def _pad(edit: Edit) -> None:
    if not edit.changed():
        return
    amounts = list(edit.argument("pad"))
    for position in range(len(amounts) // 2):
        before, behind = amounts[2 * position], amounts[2 * position + 1]
        axis = edit.results[0].axes[-1 - position]
        if before < 0 or behind < 0 or before == behind == 0 or edit.length(axis) is None:
            continue  # such a dimension stays as it is, or nothing is added to it
        whole = sum(factor.size for factor in axis)
        amounts[2 * position] = edit.before(axis, before)
        amounts[2 * position + 1] = edit.before(axis, whole) - edit.before(axis, whole - behind)
    edit.set("pad", amounts)


def _squeeze(edit: Edit) -> None:
    """Only the dimensions that had length one before go, not those that have now."""
    x = edit.value("self")
    if "dim" not in edit.operation:
        ones = [position for position, axis in enumerate(x.axes) if not axis]
        edit.replace(torch.ops.aten.squeeze.dims, (edit.node.args[0], ones))


register_resize(("view", "reshape", "_unsafe_view"), _view)
register_resize(("expand", "broadcast_to"), _expand)
register_resize(("unflatten",), _unflatten)
register_resize(("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk"), _pieces)
register_resize(("slice", "narrow"), _slice)
register_resize(("layer_norm", "rms_norm"), _normalized_shape)
register_resize(
    (
        "group_norm",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "convolution",
    ),
    _groups,
)
register_resize(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), _filled)
register_resize(("pad", "constant_pad_nd"), _pad)
register_resize(("squeeze",), _squeeze)
