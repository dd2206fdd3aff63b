"""The one training loop."""

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from netwright.core.console import ConsoleProgress
from netwright.core.errors import NonFiniteLossError, RecipeError, TaskError
from netwright.core.evaluate import device_of, evaluate
from netwright.core.loop import Callback, FitResult, Loop, Record, StepHook
from netwright.core.optimization import Parameterization
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress
from netwright.core.zeros import Zeros

__all__ = ["Callback", "FitResult", "Record", "StepHook", "fit"]


def fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    teacher: nn.Module | Tensor | None = None,
    device: torch.device | str | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 30.0,
    callbacks: Iterable[Callback] = (),
    progress: Progress | None = None,
    console: bool = False,
    validate: bool = True,
    hook: StepHook | None = None,
) -> FitResult:
    r"""Train ``model`` in place.

    Every iteration minimizes, over a shuffled batch with targets :math:`y`, outputs :math:`z` and the teacher's
    outputs :math:`z'`,

    .. math:: (1 - w)\,\mathrm{loss}(z, y) + w\,\mathrm{teacher\_loss}(z, z')

    with :math:`w` the recipe's ``distill_weight`` where a teacher is given and 0 elsewhere
    (see :func:`netwright.core.losses.teacher_loss`). A last batch smaller than the others is left out of its epoch.

    The same seed gives the same weights to the last bit (on one machine, with one number of threads), whatever the
    caller's random state, which is left untouched. With ``checkpoint``, an interrupted fit called again with the same
    arguments ends in the same weights to the last bit as one that was not interrupted. What cuts a fit short leaves the
    model without the recipe's parameterization, and with a checkpoint, where there is such a parameterization, with the
    values that it was given with.

    Time per iteration is that of a forward and a backward pass, and of the teacher's forward pass. A teacher's outputs
    are computed once and kept where the training set is a ``TensorDataset``, more than one epoch is trained and they
    have at most 16M elements.

    Args:
        model: any module; it stays on its device, and ends in eval mode.
        task: data, loss and score. Its own ``fit`` is called where it has one, with the recipe's epochs as budget;
            what ``keep_zeros`` holds is zero again when it returns.
        recipe: how to train; None is the task's recipe, or ``Recipe()``.
        seed: source of the shuffle and of every draw from the global generators (dropout, augmentation).
        teacher: a module whose outputs are to be matched, or its outputs on all training items in their order.
        device: where to train; None is CUDA where there is one, else the model's device.
        checkpoint: file to resume from where it exists, and to write.
        checkpoint_seconds: time between two checkpoints; one more is written at the end.
        callbacks: called with every :class:`Record`.
        progress: told the finished fraction, and loss and score in words.
        console: show progress on standard error.
        validate: score ``val`` at the end of every epoch.
        hook: what a method does within every iteration; not with ``checkpoint``, nor where the task trains by its own
            ``fit``.

    Returns:
        The model and its training curve.

    Raises:
        NonFiniteLossError: a loss that is NaN or infinite.
        TaskError: a loss that raises, is not a scalar or does not depend on the model.
        RecipeError: settings that the optimizer or the schedule refuses, or that a checkpoint cannot hold since JSON
            does not know them; a hook where none can be called.
        TransformError: zeros to hold, and a task whose own ``fit`` returns a network of other shapes.
        CorruptRunError: a checkpoint that is truncated or damaged.
        RunDirectoryError: a checkpoint of another training, or one that cannot be written.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> result = fit(task.build(seed=0), task, Recipe(epochs=2))
        >>> evaluate(result.model, task, "val") > 0.8
        True
    """
    chosen = recipe or task.recipe or Recipe()
    if teacher is model:
        raise RecipeError("The teacher is the model itself. Give fit() a copy: copy.deepcopy(model).")
    if hook is not None and (checkpoint is not None or task.fit is not None):
        raise RecipeError("fit() takes no hook together with a checkpoint, or for a task that trains by its own fit.")
    home = device_of(model)
    place = _place(device, home)
    shown = ConsoleProgress(f"training {task.name}") if console else nullcontext()
    with isolated(seed, place), shown as bar:
        told = [entry for entry in (progress, bar.update if bar is not None else None) if entry is not None]
        try:
            model.to(place)
            if task.fit is not None:
                return _own_fit(model, task, recipe or task.recipe, seed, teacher, validate)
            with _parameterized(model, chosen, checkpoint is not None) as parameterization:
                calls = tuple(callbacks)
                loop = Loop(model, task, chosen, seed, teacher, place, validate, calls, told, hook, parameterization)
                result = loop.run(None if checkpoint is None else Path(checkpoint), checkpoint_seconds)
            _require_finite(model, task)
            return result
        finally:
            model.to(home)
            model.eval()


def _place(device: torch.device | str | None, home: torch.device) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda") if torch.cuda.is_available() and home.type == "cpu" else home


@contextmanager
def _parameterized(model: nn.Module, recipe: Recipe, resumable: bool) -> Iterator[Parameterization]:
    """The recipe's parameterization of a model, removed at the end however that comes.

    Args:
        model: rewritten in place.
        recipe: names the parameterization.
        resumable: whether a model whose training is cut short gets its given values back, so that the parameterization
            can be called again as before.
    """
    names = {part: set(part.__dict__) for part in model.modules()}
    given = {}
    if resumable and recipe.parameterization is not None:
        given = {name: value.detach().to("cpu", copy=True) for name, value in _tensors(model)}
    parameterization = Parameterization(recipe, model)
    marks = [(part, name) for part, known in names.items() for name in part.__dict__.keys() - known]
    try:
        yield parameterization
    except BaseException:
        parameterization.remove()
        if given:
            _put_back(model, given, marks)
        raise
    parameterization.remove()


@torch.no_grad()
def _put_back(model: nn.Module, given: dict[str, Tensor], marks: list[tuple[nn.Module, str]]) -> None:
    for name, value in _tensors(model):
        if name in given and given[name].shape == value.shape:
            value.copy_(given[name])
    for part, name in marks:
        part.__dict__.pop(name, None)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _require_finite(model: nn.Module, task: Task) -> None:
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):  # rounding to integers can hide it from the loss
            raise NonFiniteLossError(
                f"Task {task.name!r}: training left values in {name} that are not finite. Lower the learning "
                "rate, set Recipe(clip_norm=1.0), or look for a function without a gradient, such as sqrt at 0."
            )


def _own_fit(
    model: nn.Module, task: Task, recipe: Recipe | None, seed: int, teacher: nn.Module | Tensor | None, validate: bool
) -> FitResult:
    assert task.fit is not None
    if isinstance(teacher, Tensor):
        raise TaskError(f"Task {task.name!r} trains by its own fit=, which takes a module as teacher, not its outputs.")
    start = time.monotonic()
    zeros = Zeros(model) if recipe is not None and recipe.keep_zeros else None
    found = task.fit(model, budget=None if recipe is None else recipe.epochs, seed=seed, teacher=teacher)
    trained = model if found is None else found
    if not isinstance(trained, nn.Module):
        raise TaskError(f"Task {task.name!r}: fit must return an nn.Module or None, got {type(trained).__name__}.")
    if zeros is not None:
        zeros.put_into(trained)
    trained.eval()
    score = evaluate(trained, task, "val") if validate else None
    seconds = time.monotonic() - start
    epochs = math.nan if recipe is None else recipe.epochs
    return FitResult(trained, (Record(0, epochs, math.nan, score, math.nan, seconds),), 0, seconds)
