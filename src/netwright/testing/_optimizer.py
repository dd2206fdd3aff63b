"""The conformance suite of optimizers."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from netwright.testing._descent import MakeOptimizer, Trial, parameters
from netwright.testing._optimizer_forms import FORMS
from netwright.testing._optimizer_loop import LOOP
from netwright.testing._property import run_properties

__all__ = ["check_optimizer", "optimizer_properties"]

_PROPERTIES: Mapping[str, Callable[[Trial], Any]] = {**LOOP, **FORMS}


def optimizer_properties() -> tuple[str, ...]:
    """The names that ``check_optimizer`` reports and that its ``skip`` understands, in the order of checking."""
    return tuple(_PROPERTIES)


def check_optimizer(
    make: MakeOptimizer,
    *,
    needs_closure: bool = False,
    create_graph: bool = False,
    coupled: bool = False,
    sparse: bool | None = None,
    complex: bool = False,  # noqa: A002
    bf16: bool = True,
    steps: int = 1000,
    seed: int = 0,
    skip: Collection[str] = (),
) -> None:
    """Check that an optimizer behaves as every loop built on ``torch.optim`` takes for granted.

    Reach for it in the tests of an optimizer of your own. All properties are tried on a few small float64
    parameters under a loss with known, moving gradients; nothing needs pytest.

    ================== ===================================================================================
    property           what must hold
    ================== ===================================================================================
    ``moves``          parameters change in place, stay leaves, stay finite
    ``determinism``    two runs agree to the last bit
    ``groups``         groups keep settings of their own
    ``add_group``      ``add_param_group`` equals giving the group at construction
    ``resume``         through ``torch.save`` and ``torch.load(weights_only=True)``, to the last bit, more than once
    ``copy``           ``copy.deepcopy`` of parameters and optimizer goes on as they do, and leaves them alone
    ``closure``        ``step(closure)`` returns the loss; where one is needed, its absence is an error
    ``zero_lr``        with ``lr = 0`` parameters stay
    ``schedule``       a learning rate set by an ``LRScheduler`` takes effect
    ``memory``         nothing grows over ``steps`` iterations
    ``settings``       a negative ``lr`` and an empty parameter list are refused
    ``nan_lr``         an ``lr`` that is not a number is refused
    ``foreach``        the foreach and fused forms equal the loop over single tensors
    ``maximize``       equals minimizing the negative loss
    ``zero_size``      an empty parameter is harmless
    ``frozen``         a parameter without gradient stays, and so does the path of the others
    ``sparse``         sparse gradients are refused by a message that says so, or handled as dense ones
    ``bf16``           bfloat16 parameters stay bfloat16 and follow the float32 path
    ``complex``        a complex parameter equals its two real parts
    ``device``         parameters on CUDA follow the CPU's path, also resumed from a state read to the CPU
    ================== ===================================================================================

    ``zero_lr`` and ``schedule`` apply where the defaults have an ``lr``, ``foreach`` and ``maximize`` where the
    constructor has such an argument. It must then be among the optimizer's defaults, so that a group can set it.
    ``device`` is checked where there is a CUDA device; a method that draws random numbers there skips it.

    Args:
        make: ``make(parameters)`` or ``make(groups)`` builds the optimizer; a class, a ``functools.partial``, ...
        needs_closure: every step needs a closure (which clears gradients, runs backward, returns the loss). An
            optimizer with an attribute ``closure_kind`` says so itself: ``"optional"``, ``"loss"`` (that closure),
            ``"graph"`` (the closure returns the loss and does not run backward) or ``"outputs"`` (it returns the loss
            and the model's outputs and does not run backward; here the model is the identity).
        create_graph: the closure's backward pass keeps its graph, for methods that differentiate twice.
        coupled: the step of one parameter depends on the others (a shared step size, a global norm); then
            equalities with separate optimizers are not asked for.
        sparse: True where sparse gradients are supported, False where they must be refused, None for either.
        complex: complex parameters are claimed to work.
        bf16: bfloat16 parameters are claimed to work, and to resume.
        steps: iterations of the memory check.
        seed: source of parameters and of the random state before every step.
        skip: properties to leave out, by name; say in your own tests why.

    Raises:
        AssertionError: the first property that does not hold, by name, with what was seen.

    Example:
        >>> import functools, torch
        >>> check_optimizer(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), sparse=True, skip=["nan_lr"])
        >>> class Lazy(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         return None
        >>> check_optimizer(Lazy)
        Traceback (most recent call last):
        ...
        AssertionError: Lazy breaks 'moves': ...

    Cost: one to three seconds on one core for an optimizer of the size of AdamW, most of it ``memory``.
    """
    trial = Trial(
        make=make,
        needs_closure=needs_closure,
        create_graph=create_graph,
        coupled=coupled,
        sparse=sparse,
        complex=complex,
        bf16=bf16,
        steps=steps,
        seed=seed,
    )
    name = type(make(parameters(seed))).__name__
    run_properties(name, _PROPERTIES, trial, skip)
