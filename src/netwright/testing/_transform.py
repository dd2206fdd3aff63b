"""The conformance suite of transforms."""

from collections.abc import Callable, Collection, Sequence

from netwright.core.task import Task
from netwright.core.transform import Transform
from netwright.testing._property import expect, run_properties
from netwright.testing._tasks import small_tasks
from netwright.testing._transform_case import Case
from netwright.testing._transform_properties import PROPERTIES

__all__ = ["check_transform", "transform_properties"]


def transform_properties() -> tuple[str, ...]:
    """The names that ``check_transform`` reports and that its ``skip`` understands, in the order of checking."""
    return tuple(PROPERTIES)


def check_transform(
    make_transform: Callable[[], Transform],
    *,
    models: Sequence[Task] | None = None,
    seed: int = 0,
    onnx_tolerance: float = 1e-4,
    skip: Collection[str] = (),
) -> None:
    """Check that a transform keeps what ``Chain``, ``optimize`` and a user's script rely on.

    Reach for it in the tests of a transform of your own. It is applied to small trained networks; nothing needs
    pytest.

    ================ =====================================================================================
    property         what must hold
    ================ =====================================================================================
    ``settings``     a frozen dataclass that survives ``asdict``, JSON and its constructor
    ``untouched``    the given model keeps its weights, gradients, modes, flags and hooks
    ``random_state`` the caller's global random state is left as it was
    ``result``       a module in eval mode that shares no tensor with the given model
    ``shape``        outputs keep structure, shape and type, at batch sizes 1 and 3
    ``finite``       outputs are finite
    ``determinism``  the same seed gives the same result, whatever the global random state
    ``copies``       ``copy.deepcopy`` of the result computes the same
    ``trains``       a step of SGD on the task's loss changes the result, and not the given model
    ``exports``      ``torch.export`` of the result computes the same
    ``onnx``         its ONNX file computes the same, within ``onnx_tolerance``
    ``test_split``   ``test`` is never read
    ``budget``       at most ``budget`` epochs more are trained than with ``budget=0``
    ``progress``     is called, with fractions in [0, 1] that never fall, and a word
    ``errors``       non-finite weights are refused by a ``NetwrightError``
    ``device``       a model on CUDA gives a result on CUDA that computes there what it computes on the CPU
    ================ =====================================================================================

    ``device`` is checked where there is a CUDA device. For ``budget`` the items are counted whose loss is taken with
    gradients, or, where a method has a loss of its own, the steps of optimizers, of which an epoch has as many as the
    recipe says.

    Args:
        make_transform: builds the transform.
        models: tasks with a ``loss`` whose model is a trained module; None for a residual convolutional net, a
            multilayer perceptron and a transformer with synthetic data.
        seed: given to the transform, and source of data and networks.
        onnx_tolerance: largest difference between the result and its ONNX file, relative to the largest output.
        skip: properties to leave out, by name; say in your own tests why.

    Raises:
        AssertionError: the first property that does not hold, by name, with the model and what was seen.

    Example:
        >>> import copy, dataclasses, torch
        >>> from netwright.core.errors import TransformError
        >>> @dataclasses.dataclass(frozen=True)
        ... class Scale:
        ...     by: float = 1.0
        ...     def __call__(self, model, task, *, budget=None, seed=0, progress=None):
        ...         if not all(p.isfinite().all() for p in model.parameters()):
        ...             raise TransformError("The model has non-finite weights.")
        ...         model = copy.deepcopy(model).eval()
        ...         with torch.no_grad():
        ...             next(model.parameters()).mul_(self.by)
        ...         if progress is not None:
        ...             progress(1.0, "scaled")
        ...         return model
        >>> check_transform(lambda: Scale(by=0.5))

    Cost: about ten calls of the transform and two exports for each model; seconds.
    """
    tasks = small_tasks(seed) if models is None else tuple(models)
    expect(bool(tasks), "check_transform needs at least one model.")
    name = type(make_transform()).__name__
    for task in tasks:
        case = Case(make_transform, task, seed, onnx_tolerance)
        run_properties(f"{name} on {task.name!r}", PROPERTIES, case, skip)
