"""Properties of a transform, one function each."""

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from netwright.core.artifact import OnnxModule, export_onnx
from netwright.core.data import to_device
from netwright.core.errors import NetwrightError
from netwright.core.graph.export import arguments, export_model
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.transform import Chain, Transform
from netwright.testing._compare import described, equal, facts, gap, outputs
from netwright.testing._property import expect
from netwright.testing._transform_case import Case

__all__ = ["PROPERTIES"]

_BATCH_SIZES = (1, 3)


def _settings(case: Case) -> None:
    transform = case.make()
    expect(isinstance(transform, Transform), "it cannot be called as a transform.")
    steps: tuple[Any, ...] = tuple(transform.steps) if isinstance(transform, Chain) else (transform,)
    for step in steps:
        name = type(step).__name__
        expect(dataclasses.is_dataclass(step) and not isinstance(step, type), f"{name} is not a dataclass.")
        settings: dict[str, Any] = dataclasses.asdict(step)
        for field in settings:
            try:
                setattr(step, field, settings[field])
            except dataclasses.FrozenInstanceError:
                continue
            expect(False, f"{name}.{field} can be assigned to; declare @dataclass(frozen=True).")
        again = type(step)(**json.loads(json.dumps(settings)))
        expect(again == step, f"{name} read back from JSON is {again!r}, it was {step!r}.")


def _untouched(case: Case) -> None:
    model = case.model()
    for module in list(model.modules())[::2]:
        module.training = True  # a mixture, so that a blanket train() or eval() shows
    next(iter(model.parameters())).requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = facts(model)
    case.apply(model)
    after = facts(model)
    for what, value in before.items():
        expect(equal(value, after[what]), f"the given model's {what} changed.")


def _random_state(case: Case) -> None:
    drawn = case.observed.drawn
    expect(not drawn, f"the global random state of {' and of '.join(drawn)} was advanced.")


def _result(case: Case) -> None:
    model, result = case.observed.model, case.observed.result
    expect(isinstance(result, nn.Module), f"the result is a {type(result).__name__}, not an nn.Module.")
    expect(result is not model, "the result is the given model itself.")
    training = [name or "the model" for name, module in result.named_modules() if module.training]
    expect(not training, f"the result is not in eval mode: {', '.join(training[:3])}.")
    given = {value.data_ptr() for value in [*model.parameters(), *model.buffers()] if value.numel()}
    for name, value in [*result.named_parameters(), *result.named_buffers()]:
        expect(not value.numel() or value.data_ptr() not in given, f"{name} shares memory with the given model.")


def _shape(case: Case) -> None:
    model = case.model()
    for size in _BATCH_SIZES:
        wanted, got = outputs(model, case.inputs(size)), outputs(case.result, case.inputs(size))
        expect(
            [(tuple(a.shape), a.dtype) for a in wanted] == [(tuple(b.shape), b.dtype) for b in got],
            f"at batch size {size} outputs are {described(got)} where the given model's are {described(wanted)}.",
        )


def _finite(case: Case) -> None:
    for value in outputs(case.result, case.inputs(16)):
        expect(bool(value.isfinite().all()), "an output of the result is not finite.")


def _determinism(case: Case) -> None:
    with isolated(2):
        again = case.apply(case.model().train())
    first, second = (dict(result.state_dict()) for result in (case.result, again))
    expect(equal(first, second), "two results of the same seed have different weights.")
    apart = gap(*(outputs(result, case.inputs(8)) for result in (case.result, again)))
    expect(apart == 0.0, f"the outputs of two results of the same seed differ by {apart:.3g} of the largest.")


def _copies(case: Case) -> None:
    apart = gap(*(outputs(model, case.inputs(8)) for model in (case.result, copy.deepcopy(case.result))))
    expect(apart == 0.0, f"a deep copy of the result differs from it by {apart:.3g} of the largest output.")


def _trains(case: Case) -> None:
    model = case.model()
    result = case.apply(model).train()
    given = facts(model)["weights or buffers"]
    before = [param.detach().clone() for param in result.parameters()]
    expect(any(param.requires_grad for param in result.parameters()), "the result has no trainable parameter.")
    assert case.task.loss is not None
    inputs, targets = case.batch()
    loss = case.task.loss(case.task.outputs(result, inputs), targets)
    expect(bool(loss.isfinite()), "the loss of the result in training mode is not finite.")
    torch.autograd.backward(loss)
    torch.optim.SGD([param for param in result.parameters() if param.requires_grad], lr=0.1).step()
    moved = any(not torch.equal(old, new) for old, new in zip(before, result.parameters(), strict=True))
    expect(moved, "no parameter of the result receives a gradient.")
    expect(equal(given, facts(model)["weights or buffers"]), "training the result changed the given model.")


def _exports(case: Case) -> None:
    program = export_model(case.result, case.inputs(2)).module()
    for size in _BATCH_SIZES:
        args, kwargs = arguments(case.inputs(size))
        wanted = outputs(case.result, case.inputs(size))
        apart = gap(wanted, outputs(lambda _, args=args, kwargs=kwargs: program(*args, **kwargs), case.inputs(size)))
        expect(
            apart <= 1e-5, f"the exported program differs by {apart:.3g} of the largest output at batch size {size}."
        )


def _onnx(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(case.result, case.inputs(2), path)
        model = OnnxModule(path)
        for size in _BATCH_SIZES:
            apart = gap(outputs(case.result, case.inputs(size)), outputs(model, case.inputs(size)))
            expect(
                apart <= case.onnx_tolerance,
                f"the ONNX file differs by {apart:.3g} of the largest output at batch size {size}.",
            )


def _test_split(case: Case) -> None:
    expect(not case.observed.read, "the test split was read.")


def _budget(case: Case) -> None:
    items = len(case.task.data.train)
    steps = max(1, items // (case.task.recipe or Recipe()).batch_size)
    basis = _trained(case, 0.0)
    for budget in (1.0, 2.5):
        found = _trained(case, budget)
        spent = (found.items - basis.items) / items
        if spent <= 0:  # a loss of the method's own
            spent = (found.steps - basis.steps) / steps
        expect(spent <= budget + 1e-9, f"with budget={budget} it trained {spent:.3g} epochs more than with budget=0.")
        expect(
            spent > 0 or equal(found.state, basis.state),
            f"the results of budget={budget} and budget=0 differ, but neither the task's loss with gradients nor an "
            "optimizer's step was seen, so that its training cannot be counted.",
        )


@dataclasses.dataclass(frozen=True)
class _Trained:
    """What came of a budget.

    Args:
        items: those whose loss was taken with gradients.
        steps: of optimizers.
        state: the result's weights and buffers.
    """

    items: int
    steps: int
    state: dict[str, Any]


def _trained(case: Case, budget: float) -> _Trained:
    count, steps = 0, _Steps()
    loss = case.task.loss

    def counted(output: Any, target: Tensor) -> Tensor:
        nonlocal count
        count += len(target) if torch.is_grad_enabled() else 0
        assert loss is not None
        return loss(output, target)

    hook = register_optimizer_step_post_hook(steps)
    try:
        result = case.apply(case.model(), task=dataclasses.replace(case.task, loss=counted), budget=budget)
    finally:
        hook.remove()
    return _Trained(count, steps.count, dict(result.state_dict()))


class _Steps:
    """Counts steps of optimizers; steps of several that take turns count as one."""

    def __init__(self) -> None:
        self.count = 0
        self._moved: set[Optimizer] = set()

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._moved or optimizer in self._moved:
            self.count += 1
            self._moved = set()
        self._moved.add(optimizer)


def _progress(case: Case) -> None:
    calls = case.observed.calls
    fractions = [fraction for fraction, _ in calls]
    expect(bool(calls), "progress is never called.")
    expect(all(0 <= fraction <= 1 for fraction in fractions), f"fractions leave [0, 1]: {fractions}.")
    expect(fractions == sorted(fractions), f"fractions fall: {fractions}.")
    expect(all(isinstance(what, str) and what for _, what in calls), "progress is called without a word.")


def _errors(case: Case) -> None:
    for value in (float("nan"), float("inf")):
        model = case.model()
        weight = next(param for param in model.parameters() if param.is_floating_point())
        weight.data.view(-1)[0] = value
        try:
            case.apply(model)
        except NetwrightError as error:
            expect(bool(str(error)), "the error for non-finite weights has no message.")
            continue
        expect(False, f"a model with a weight of {value} is accepted.")


def _device(case: Case) -> None:
    if not torch.cuda.is_available():
        return
    model = case.model().to("cuda")
    result = case.apply(model)
    named = [*result.named_parameters(), *result.named_buffers()]
    left = [name for name, value in named if value.device.type != "cuda"]
    expect(not left, f"the given model is on CUDA, and of the result {', '.join(left[:3])} is not.")
    expect(next(model.parameters()).device.type == "cuda", "the given model was moved from CUDA.")
    there = [value.cpu() for value in outputs(result, to_device(case.inputs(8), "cuda"))]
    for value in there:
        expect(bool(value.isfinite().all()), "an output of the result on CUDA is not finite.")
    apart = gap(outputs(result.to("cpu"), case.inputs(8)), there)
    expect(apart <= 1e-2, f"the result on CUDA differs from itself on the CPU by {apart:.3g} of the largest output.")


PROPERTIES: Mapping[str, Callable[[Case], Any]] = {
    "settings": _settings,
    "untouched": _untouched,
    "random_state": _random_state,
    "result": _result,
    "shape": _shape,
    "finite": _finite,
    "determinism": _determinism,
    "copies": _copies,
    "trains": _trains,
    "exports": _exports,
    "onnx": _onnx,
    "test_split": _test_split,
    "budget": _budget,
    "progress": _progress,
    "errors": _errors,
    "device": _device,
}
