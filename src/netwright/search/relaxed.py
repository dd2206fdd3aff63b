"""Networks with undecided operations: candidates on an edge, mixed by a softmax, and the network that is derived."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from netwright.core.errors import SettingError

__all__ = [
    "Mixed",
    "alphas",
    "choices",
    "derive",
    "mixed",
    "on_path",
    "skip_share",
    "weights",
]


class Mixed(nn.Module):
    r"""An edge whose operation is still to be chosen.

    Reach for it in a network of your own: put it wherever one of several modules could stand, and hand the network to
    any relaxed search (:class:`~netwright.search.darts.DARTS` and its relatives). It needs no other change.

    .. math:: \mathrm{mixed}(x) = \sum_k \mathrm{softmax}(\alpha)_k\, o_k(x),

    :math:`o_k` the operations, :math:`\alpha_k` their weights ``(operations,)``, 0 at first. On a path (see
    :func:`on_path`) one operation runs alone, with weight 1.

    Args:
        operations: at least two modules by name, which take the same arguments and return tensors of the same shape.
        alpha: a parameter ``(operations,)`` that several edges share, so that they decide alike; None for its own.

    Raises:
        SettingError: fewer than two operations, an alpha of another shape, or (when called) outputs of unequal shapes.

    Example:
        >>> edge = Mixed({"skip": nn.Identity(), "linear": nn.Linear(3, 3)})
        >>> edge(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
        >>> derive(nn.Sequential(edge, nn.ReLU()), {"0": "linear"})
        Sequential(
          (0): Linear(in_features=3, out_features=3, bias=True)
          (1): ReLU()
        )

    Cost: time and memory are those of all operations together; on a path, of one.
    """

    def __init__(self, operations: Mapping[str, nn.Module], alpha: nn.Parameter | None = None) -> None:
        super().__init__()
        if len(operations) < 2:
            raise SettingError(
                f"A Mixed chooses among at least two operations, got {list(operations)}. Where there is nothing to "
                "choose, put the module itself."
            )
        for name, part in operations.items():
            if not isinstance(part, nn.Module):
                raise SettingError(f"Operation {name!r} must be an nn.Module, got {type(part).__name__}.")
        if alpha is not None and (not isinstance(alpha, nn.Parameter) or alpha.shape != (len(operations),)):
            raise SettingError(
                f"alpha must be an nn.Parameter of shape ({len(operations)},), one number an operation, got "
                f"{type(alpha).__name__} of shape {tuple(getattr(alpha, 'shape', ()))}."
            )
        self.names = tuple(operations)
        self.operations = nn.ModuleList(operations.values())
        self.alpha = nn.Parameter(torch.zeros(len(operations))) if alpha is None else alpha
        self.path: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of what the operations return, or what the one on the path returns."""
        if self.path is not None:
            alone: Tensor = self.operations[self.path](*args, **kwargs)
            return alone
        outputs: list[Tensor] = [part(*args, **kwargs) for part in self.operations]
        for name, output in zip(self.names, outputs, strict=True):
            if output.shape != outputs[0].shape:
                raise SettingError(
                    f"Operations of a Mixed must return equal shapes: {self.names[0]!r} gave "
                    f"{tuple(outputs[0].shape)}, {name!r} gave {tuple(output.shape)}. Pad, stride or project."
                )
        shares = torch.softmax(self.alpha, 0)
        total = shares[0] * outputs[0]
        for share, output in zip(shares[1:], outputs[1:], strict=True):
            total = total + share * output
        return total

    @property
    def strongest(self) -> str:
        """Name of the operation with the largest alpha; of equal ones the first."""
        return self.names[int(self.alpha.detach().argmax())]


def mixed(model: nn.Module) -> dict[str, Mixed]:
    """Every :class:`Mixed` of any module by its path, the root's own being ``""``.

    Raises:
        SettingError: there is none.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, Mixed)}
    if not found:
        raise SettingError(
            f"{type(model).__name__} has no Mixed part, so there is nothing to search. Put "
            "netwright.search.Mixed({name: module, ...}) where one of several modules could stand."
        )
    return found


def alphas(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of operations, each parameter once, by the path of the first :class:`Mixed` that has it.

    Raises:
        SettingError: a module without a ``Mixed``.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, part in mixed(model).items():
        found.setdefault(id(part.alpha), (name, part.alpha))
    return dict(found.values())


def weights(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters that are no alpha."""
    apart = {id(alpha) for alpha in alphas(model).values()}
    return [part for part in model.parameters() if part.requires_grad and id(part) not in apart]


def choices(model: nn.Module) -> dict[str, str]:
    """The strongest operation of every :class:`Mixed`, by path."""
    return {name: part.strongest for name, part in mixed(model).items()}


def skip_share(model: nn.Module) -> float:
    """Share of the edges whose strongest operation passes its input on: an ``nn.Identity``, or named ``skip...``."""
    kept = [part.operations[part.names.index(part.strongest)] for part in mixed(model).values()]
    named = [part.strongest.startswith("skip") for part in mixed(model).values()]
    return sum(isinstance(part, nn.Identity) or name for part, name in zip(kept, named, strict=True)) / len(kept)


def derive(model: nn.Module, chosen: Mapping[str, str] | None = None) -> nn.Module:
    """A copy in which every :class:`Mixed` has become one of its operations, with that one's weights.

    It holds nothing of Netwright where the rest of the model and the operations do not. What an operation put out was
    scaled by its share before, so the copy wants training: recover it by a fit, or take the architecture only, as in
    ``derive(task.build(seed=1), result.choices)``, and train that from the start.

    Args:
        model: any module with ``Mixed`` parts; left as it is.
        chosen: names of operations by path of the ``Mixed``; None, or a path left out, for the strongest.

    Raises:
        SettingError: no ``Mixed``, a path where there is none, or an operation that it does not have.
    """
    wanted = {**choices(model), **(chosen or {})}
    _check(mixed(model), wanted)
    root = copy.deepcopy(model)
    parts = list(root.named_modules(remove_duplicate=False))
    paths = {part: name for name, part in mixed(root).items()}
    for name, part in reversed(parts):  # what lies within comes before what it lies in
        if isinstance(part, Mixed):
            kept = part.operations[part.names.index(wanted[paths[part]])]
            if not name:
                return kept
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, kept)
    return root


def _check(edges: Mapping[str, Mixed], wanted: Mapping[str, str]) -> None:
    """Assure that edges have the operations that are wanted of them.

    Raises:
        SettingError: one has not, or there is no such edge.
    """
    for name, kind in wanted.items():
        if name not in edges:
            raise SettingError(f"There is no Mixed at {name!r}. There are {', '.join(map(repr, edges))}.")
        if kind not in edges[name].names:
            raise SettingError(f"The Mixed at {name!r} has no operation {kind!r}, only {', '.join(edges[name].names)}.")


@contextmanager
def on_path(model: nn.Module, path: Mapping[str, str]) -> Iterator[None]:
    """Inside, each :class:`Mixed` runs one operation alone: time and memory are those of a single architecture.

    Args:
        model: any module with ``Mixed`` parts.
        path: names of operations by path of the ``Mixed``.

    Raises:
        SettingError: no ``Mixed``, a path where there is none, or an operation that it does not have.
    """
    edges = mixed(model)
    _check(edges, path)
    before = {name: part.path for name, part in edges.items()}
    try:
        for name, kind in path.items():
            edges[name].path = edges[name].names.index(kind)
        yield
    finally:
        for name, part in edges.items():
            part.path = before[name]
