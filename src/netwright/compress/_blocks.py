"""Places at which a teacher and a student can both be cut into blocks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netwright.core.data import Inputs, beside, call
from netwright.core.errors import TransformError
from netwright.core.outputs import take_items
from netwright.core.task import Task

__all__ = ["Cut", "channel", "features", "find_cuts", "replaced", "seen"]


_UNLIKE = 0.05  # how much nearer to the wanted share a pair of unlike shapes must be


class Cut(NamedTuple):
    """The names of two modules whose outputs correspond."""

    teacher: str
    student: str


class _Place(NamedTuple):
    """A module at whose output a network falls into two, the share of its work before it, and the output's shape."""

    name: str
    share: float
    shape: tuple[int, ...]


@contextmanager
def replaced(model: nn.Module, changes: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, the outputs of the modules named are what the functions make of them."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda module, args, output: change(output)

    handles = [model.get_submodule(name).register_forward_hook(hook(change)) for name, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seen(model: nn.Module, names: Sequence[str], inputs: Inputs) -> tuple[dict[str, Tensor], Any]:
    """The outputs of the modules named, each of which runs once, and the model's."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def change(output: Tensor) -> Tensor:
            found[name] = output.clone()  # what reads the output may change it in place
            return output

        return change

    with replaced(model, {name: keep(name) for name in names}):
        result = call(model, inputs)
    return found, result


def features(owner: object, who: str, model: nn.Module, names: Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
    """What the modules named give, each of which must run once and give one tensor.

    Args:
        owner: the transform, for messages.
        who: the model, for messages.
        model: in eval mode.
        names: of its modules.
        inputs: one batch.

    Raises:
        TransformError: a module that runs more than once or not at all, or that gives something else.
    """
    given: dict[str, list[Any]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            given[name].append(output.clone() if isinstance(output, Tensor) else output)

        return note

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in given]
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, outputs in given.items():
        if len(outputs) != 1:
            raise TransformError(
                f"{type(owner).__name__}: the {who}'s module {name!r} runs {len(outputs)} times in a pass, where a cut "
                "needs one that runs once. Name another."
            )
        if not isinstance(outputs[0], Tensor):
            raise TransformError(
                f"{type(owner).__name__}: the {who}'s module {name!r} gives a {type(outputs[0]).__name__}, where a cut "
                "needs a tensor. Name another."
            )
    return {name: outputs[0] for name, outputs in given.items()}


def _places(model: nn.Module, inputs: Inputs, other: Inputs) -> list[_Place]:
    """Where a network falls into two, in the order of execution; of modules that end together the last."""
    outputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    order: list[str] = []
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            order.append(name)
            if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1:
                outputs[name] = output.clone()

        return note

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(hook(name)))
    try:
        whole = _tensors(call(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    layers = [name for name in order if _has_weight(model.get_submodule(name))]
    found = []
    for position, name in enumerate(order):
        before = sum(each in layers for each in order[: position + 1])
        if name in outputs and calls[name] == 1 and 0 < before < len(layers):
            with replaced(model, {name: _constant(outputs[name])}):
                again = _tensors(call(model, other))
            if all(torch.allclose(one, two, rtol=1e-4, atol=1e-5) for one, two in zip(whole, again, strict=True)):
                found.append(_Place(name, before / len(layers), tuple(outputs[name].shape)))
    return found


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value.clone()


def _has_weight(module: nn.Module) -> bool:
    return any(value.ndim > 1 for value in module.parameters(recurse=False))


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def channel(teacher: Sequence[int], student: Sequence[int]) -> int | None:
    """The one dimension in which two shapes differ; -1 where they are equal, None where more than that differs.

    Example:
        >>> channel((2, 16, 4, 4), (2, 8, 4, 4))
        1
    """
    if len(teacher) != len(student):
        return None
    apart = [place for place, pair in enumerate(zip(teacher, student, strict=True)) if pair[0] != pair[1]]
    if not apart:
        return -1
    return apart[0] if len(apart) == 1 and apart[0] > 0 else None


def find_cuts(owner: object, teacher: nn.Module, student: nn.Module, task: Task, blocks: int) -> list[Cut]:
    """Up to ``blocks - 1`` pairs of modules, at about equal shares of the layers, at which both networks fall into two.

    Args:
        owner: the transform, for messages.
        teacher: in eval mode.
        student: in eval mode.
        task: its first training items are run.
        blocks: how many are wanted.

    Raises:
        TransformError: no such pair.
    """
    both = beside(task.example(4), teacher)
    order = torch.arange(_count(both)).flip(0)
    other = take_items(both, order)
    with torch.no_grad():
        theirs, own = _places(teacher, both, other), _places(student, both, other)
    cuts: list[Cut] = []
    first = (-1, -1)
    for index in range(1, blocks):
        wanted = index / blocks
        best = min(
            (
                (abs(a.share - wanted) + abs(b.share - wanted) + _UNLIKE * (apart >= 0), -i, -j)
                for i, a in enumerate(theirs)
                for j, b in enumerate(own)
                if i > first[0] and j > first[1] and (apart := channel(a.shape, b.shape)) is not None
            ),
            default=None,
        )
        if best is not None:
            first = (-best[1], -best[2])
            cuts.append(Cut(theirs[first[0]].name, own[first[1]].name))
    if not cuts:
        raise TransformError(
            f"{type(owner).__name__}: no module of teacher and student was found at which both fall into two and whose "
            "outputs differ in the channels alone. Name pairs of modules in at=, or use a student of the same stages."
        )
    return cuts


def _count(inputs: Inputs) -> int:
    if isinstance(inputs, Tensor):
        return len(inputs)
    return len(next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs)))
