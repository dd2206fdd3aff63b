"""A traced model: which units it has, and how to zero them or take them out."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.export import ExportedProgram

from netwright.core.data import Inputs
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.graph.agreement import difference, example, first_parameter, like, same_function
from netwright.core.graph.attributes import fit_attributes
from netwright.core.graph.export import export_model
from netwright.core.graph.groups import Blocked, Group, find_blocked, find_groups
from netwright.core.graph.inference import inference
from netwright.core.graph.patch import changed_lengths, patch
from netwright.core.graph.rebuild import literals, rebuild, resized
from netwright.core.graph.solve import Solution, solve
from netwright.core.graph.surgery import Keep, sliced, zeroed
from netwright.core.graph.walk import Walk, walk

__all__ = ["Graph", "Units", "trace"]

Units = Mapping[str, Sequence[int]]
"""For group names the numbers of the units in question."""

_AGAINST_ZEROED = 1e-3  # other sums in another order
_AGAINST_REBUILT = 1e-5  # the same operations on the same numbers


class Graph:
    """What :func:`trace` returns.

    Attributes:
        program: the exported program.
        groups: what can be removed, in the order in which the model computes it.
        blocked: what has to stay, and because of which operation.
    """

    def __init__(
        self, program: ExportedProgram, inputs: Inputs, dtype: torch.dtype, walk: Walk, solution: Solution
    ) -> None:
        self.program = program
        self.groups: tuple[Group, ...] = find_groups(walk, solution)
        self.blocked: tuple[Blocked, ...] = find_blocked(walk, solution, self.groups)
        self._inputs = inputs
        self._dtype = dtype
        self._walk = walk
        self._solution = solution

    def __repr__(self) -> str:
        lines = [f"Graph of {sum(group.size for group in self.groups)} units in {len(self.groups)} groups"]
        lines += [f"  {group!r}" for group in self.groups]
        lines += [f"  {item.name} stays: {item.operation}: {item.reason}" for item in self.blocked]
        return "\n".join(lines)

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            TransformError: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups[:8]) or "none"
        raise TransformError(
            f"No group {name!r} in this graph. Its groups are: {known}{' ...' * (len(self.groups) > 8)}"
        )

    def require_groups(self) -> tuple[Group, ...]:
        """The groups.

        Raises:
            NothingToPruneError: there are none; the message names the operations that stopped them.
        """
        if not self.groups:
            stopped = "; ".join(f"{item.name}: {item.operation} ({item.reason})" for item in self.blocked[:5])
            raise NothingToPruneError(
                f"Nothing in this model can be proved safe to remove. What stopped it: {stopped or 'no layers found'}. "
                "An operation of your own can be taught with netwright.core.graph.register_rule."
            )
        return self.groups

    def zero(self, model: nn.Module, units: Units) -> nn.Module:
        """A copy of ``model`` whose named units are zero wherever they are parameters, so that they contribute nothing.

        Args:
            model: the traced module, or one of the same shape.
            units: for group names the numbers of the units.

        Raises:
            TransformError: an unknown group, a unit out of range or named twice, all units of a group, or a model
                that is not the one traced.
        """
        return zeroed(model, self._keep(self._removed(units)), frozenset(self._walk.constraints.kept))

    def masks(self, units: Units) -> dict[str, torch.Tensor]:
        """For every parameter that the named units are part of, ones and zeros that take them out when multiplied.

        A model whose parameters are so multiplied computes what :meth:`zero` makes compute, and gradients flow.

        Args:
            units: for group names the numbers of the units.

        Returns:
            By name, a tensor that broadcasts against the parameter.

        Raises:
            TransformError: as :meth:`zero`.
        """
        found: dict[str, torch.Tensor] = {}
        for name, dims in self._keep(self._removed(units)).items():
            for dim, kept in dims.items():
                if name in self.program.graph_signature.parameters and (name, dim) not in self._walk.constraints.kept:
                    sizes = [1] * self.program.state_dict[name].ndim
                    sizes[dim] = len(kept)
                    factor = kept.to(self._dtype).reshape(sizes)
                    found[name] = found[name] * factor if name in found else factor
        return found

    def shrink(self, model: nn.Module, units: Units) -> nn.Module:
        """A copy of ``model`` without the named units: an ordinary module that trains, exports and saves.

        It is of the model's own class where that class still runs and computes the right thing with smaller
        parameters; otherwise a ``torch.fx.GraphModule`` with the same parameter names. Either has been checked on
        the traced inputs, with its own parameters and with random ones, and where all groups are exact against
        :meth:`zero`. That costs two copies of the model and about twelve passes of two or three items.

        Args:
            model: the traced module, or one of the same shape.
            units: for group names the numbers of the units.

        Raises:
            TransformError: as :meth:`zero`; or the smaller model does not run, which names a defect in a rule.
        """
        removed = self._removed(units)
        native = sliced(model, self._keep(removed))
        graph = resized(self.program, self._walk, removed)
        lengths = changed_lengths(graph.graph, self._walk.values, self._walk.constraints, removed)
        fit_attributes(native, literals(graph.graph, self._walk, removed))
        rebuilt = rebuild(graph, native)
        inputs = like(self._inputs, model, self._dtype)
        exact = all(self.group(name).exact for name in units)
        reference = self.zero(model, units) if exact else rebuilt
        wrong = difference(reference, rebuilt, inputs, _AGAINST_ZEROED)
        if wrong:
            if exact and not difference(reference, native, inputs, _AGAINST_ZEROED):
                return native
            raise TransformError(_undescribed(type(model).__name__, wrong))

        def works() -> bool:
            return same_function(rebuilt, native, inputs, _AGAINST_REBUILT)

        return native if works() or patch(native, lengths, works) else rebuilt

    def _removed(self, units: Units) -> npt.NDArray[np.bool_]:
        labels = [self.group(name).labels[_checked(self.group(name), chosen)] for name, chosen in units.items()]
        gone = np.zeros(self._walk.constraints.count, dtype=np.bool_)
        for part in labels:
            gone[part] = True
        return np.asarray(gone[self._solution.label], dtype=np.bool_)

    def _keep(self, removed: npt.NDArray[np.bool_]) -> Keep:
        keep: dict[str, dict[int, torch.Tensor]] = {}
        for name, value in self._walk.parameters.items():
            for dim, axis in enumerate(value.axes):
                if axis and axis[0].atoms is not None and removed[axis[0].atoms].any():
                    keep.setdefault(name, {})[dim] = torch.from_numpy(~removed[axis[0].atoms])
        return keep


def trace(model: nn.Module, inputs: Inputs) -> Graph:
    """Trace a model once and find everything that can be taken out of it.

    Reach for it before pruning, merging or counting: one trace serves them all, and stays valid as long as the
    shapes of the model's parameters do. Nearly all of the time goes into ``torch.export``; finding the groups takes a
    few hundredths of a second for a network of a hundred layers, and grows with the number of layers times the
    number of parameter rows and columns (not of parameters). The trace holds the model's parameters by reference.

    Args:
        model: any module that ``torch.export`` can trace; it is left untouched.
        inputs: a batch for it: a tensor, a tuple of positional arguments, or a dict of keyword arguments. The
            batch dimension stays dynamic.

    Returns:
        The graph, with the groups of coupled channels, heads and hidden units.

    Raises:
        TraceError: the model cannot be traced.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = trace(model, torch.randn(2, 4))
        >>> graph
        Graph of 8 units in 1 groups
          Group('0', 8 units, 3 places)
          2 stays: output: it is an output of the model
        >>> graph.shrink(model, {"0": [1, 5]})
        Sequential(
          (0): Linear(in_features=4, out_features=6, bias=True)
          (1): ReLU()
          (2): Linear(in_features=6, out_features=2, bias=True)
        )
    """
    inputs = example(inputs)
    with inference(model):
        program = export_model(model, inputs)
    found = walk(program, model)
    return Graph(program, inputs, first_parameter(model).dtype, found, solve(found.constraints))


def _undescribed(name: str, wrong: str) -> str:
    return (
        f"{name} cannot be shrunk: without these units {wrong[:300]}. An operation's rule, or the one that rewrites "
        "its lengths, does not describe it; see netwright.core.graph.register_rule."
    )


def _checked(group: Group, units: Sequence[int]) -> list[int]:
    chosen = [int(unit) for unit in units]
    wrong = [unit for unit in chosen if not 0 <= unit < group.size]
    if wrong:
        raise TransformError(f"Group {group.name!r} has units 0 to {group.size - 1}, got {wrong[0]}.")
    if len(set(chosen)) < len(chosen):
        raise TransformError(f"Units of group {group.name!r} are named twice: {sorted(chosen)}.")
    if len(chosen) == group.size:
        raise TransformError(f"All {group.size} units of group {group.name!r} cannot go: one has to remain.")
    return chosen
