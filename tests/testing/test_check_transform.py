"""The transform suite passes a correct transform and names the one property that a broken one breaks."""

import copy
import dataclasses
import functools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from netwright.core.data import batches, first_inputs
from netwright.core.errors import TransformError
from netwright.core.fit import fit
from netwright.core.task import Task
from netwright.core.transform import Chain
from netwright.testing import check_transform, small_tasks, transform_properties

small = functools.cache(small_tasks)


def mlp():
    return small()[1:2]


@dataclass(frozen=True)
class Noise:
    """Adds noise to the weights and recovers for the budget: a correct transform. The others break one property."""

    scale: float = 0.01
    leave: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model, task, *, budget=None, seed=0, progress=None):
        self.require_finite(model)
        found = self.copied(model)
        self.perturb(found, seed)
        if self.epochs(budget):
            recipe = task.recipe.replace(epochs=self.epochs(budget))
            fit(found, task, recipe, seed=seed, device="cpu", validate=False)
        self.tell(progress)
        self.extra(model, task)
        return self.finished(found)

    def require_finite(self, model):
        if not all(param.isfinite().all() for param in model.parameters()):
            raise TransformError("The model has weights that are not finite.")

    def copied(self, model):
        found = copy.deepcopy(model)
        for param in found.parameters():
            param.requires_grad_(True)
        return found

    def generator(self, seed):
        return torch.Generator().manual_seed(seed)

    def perturb(self, model, seed):
        generator = self.generator(seed)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name not in self.leave:
                    param.add_(self.scale * torch.randn(param.shape, generator=generator).to(param.device))

    def epochs(self, budget):
        return 0.5 if budget is None else budget

    def tell(self, progress):
        if progress is not None:
            progress(0.5, "noise")
            progress(1.0, "recovered")

    def extra(self, model, task):
        pass

    def finished(self, model):
        return model.eval()


@dataclass
class NotFrozen:
    scale: float = 0.01

    def __call__(self, *arguments, **settings):
        return Noise(self.scale)(*arguments, **settings)


@dataclass(frozen=True)
class TupleLost(Noise):
    """A tuple that JSON turns into a list."""

    def __post_init__(self):
        pass


@dataclass(frozen=True)
class NotJson(Noise):
    kind: torch.dtype = torch.float32


class Plain:
    def __call__(self, *arguments, **settings):
        return Noise()(*arguments, **settings)


@dataclass(frozen=True)
class EvaluatesGiven(Noise):
    def extra(self, model, task):
        model.eval()


@dataclass(frozen=True)
class HooksGiven(Noise):
    def extra(self, model, task):
        next(model.children()).register_forward_hook(lambda *_: None)


@dataclass(frozen=True)
class LeavesGradients(Noise):
    def extra(self, model, task):
        inputs, targets = next(batches(task.data.train, 4, device=next(model.parameters()).device))
        task.loss(task.outputs(model, inputs), targets).backward()


@dataclass(frozen=True)
class UnfreezesGiven(Noise):
    def extra(self, model, task):
        model.requires_grad_(True)


@dataclass(frozen=True)
class NudgesGiven(Noise):
    def extra(self, model, task):
        with torch.no_grad():
            list(model.parameters())[-1].view(-1)[0] *= 1 + 1e-6


@dataclass(frozen=True)
class DrawsGlobally(Noise):
    def extra(self, model, task):
        torch.rand(1)


@dataclass(frozen=True)
class SeedsPython(Noise):
    def extra(self, model, task):
        random.seed(3)


@dataclass(frozen=True)
class ClearsGradients(Noise):
    def extra(self, model, task):
        model.zero_grad()


@dataclass(frozen=True)
class StaysInTraining(Noise):
    def finished(self, model):
        return model.train()


@dataclass(frozen=True)
class SharesWeights(Noise):
    def __call__(self, model, task, **settings):
        found = super().__call__(model, task, **settings)
        found[-1].bias = nn.Parameter(model[-1].bias.data)
        return found


@dataclass(frozen=True)
class Function(Noise):
    def finished(self, model):
        return lambda inputs: model(inputs)


class Doubled(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


def _tupled(output):
    return output, output


def _infinite(output):
    return output / torch.zeros_like(output)


@dataclass(frozen=True)
class TwoOutputs(Noise):
    def finished(self, model):
        return Doubled(model, _tupled).eval()


@dataclass(frozen=True)
class HalfPrecision(Noise):
    def finished(self, model):
        return Doubled(model, torch.Tensor.half).eval()


@dataclass(frozen=True)
class Explodes(Noise):
    def finished(self, model):
        return Doubled(model, _infinite).eval()


@dataclass(frozen=True)
class GlobalSeed(Noise):
    """Reads the global random state, and leaves it as it was."""

    def generator(self, seed):
        return torch.Generator().manual_seed(torch.initial_seed() + seed)


class Uncopied(nn.Module):
    """Forgets its scale when it is copied."""

    def __init__(self, model):
        super().__init__()
        self.model, self.scale = model, 2.0

    def forward(self, x):
        return self.model(x) * self.scale

    def __deepcopy__(self, memo):
        twin = Uncopied(copy.deepcopy(self.model))
        twin.scale = 1.0
        return twin


@dataclass(frozen=True)
class ForgetsOnCopy(Noise):
    def finished(self, model):
        return Uncopied(model).eval()


@dataclass(frozen=True)
class Frozen(Noise):
    def finished(self, model):
        return model.requires_grad_(False).eval()


class Branching(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if float(x.sum()) > -1e9 else x


@dataclass(frozen=True)
class Untraceable(Noise):
    def finished(self, model):
        return Branching(model).eval()


class Digamma(nn.Module):
    """Uses an operation without a counterpart in ONNX."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.digamma(self.model(x).exp() + 1)


@dataclass(frozen=True)
class NoOnnx(Noise):
    def finished(self, model):
        return Digamma(model).eval()


@dataclass(frozen=True)
class ReadsTest(Noise):
    def extra(self, model, task):
        first_inputs(task.data.test)


@dataclass(frozen=True)
class TakesTestTensors(Noise):
    def extra(self, model, task):
        len(task.data.test.tensors)


@dataclass(frozen=True)
class Spends(Noise):
    def epochs(self, budget):
        return 0.5 if budget is None else 1.5 * budget


@dataclass(frozen=True)
class OwnLoss(Noise):
    """Trains by a loss of its own, in turns with something else: a correct transform."""

    times: float = 1.0

    def __call__(self, model, task, *, budget=None, **settings):
        epochs = None if budget is None else self.times * budget
        own = dataclasses.replace(task, loss=lambda output, target: nn.functional.cross_entropy(output, target))
        return super().__call__(model, own, budget=epochs, **settings)

    def extra(self, model, task):
        other = torch.optim.SGD([nn.Parameter(torch.zeros(1, requires_grad=True))], lr=0.1)
        other.step()


@dataclass(frozen=True)
class SpendsUnseen(OwnLoss):
    times: float = 1.5


@dataclass(frozen=True)
class MovesByHand(Noise):
    """Descends without the loss of the task and without an optimizer."""

    def __call__(self, model, task, *, budget=None, **settings):
        found = super().__call__(model, task, budget=0.0, **settings)
        for _ in range(round(2 * (budget or 0.0))):
            for inputs, targets in batches(task.data.train, 16, device=next(found.parameters()).device):
                loss = nn.functional.cross_entropy(found(inputs), targets)
                slopes = torch.autograd.grad(loss, list(found.parameters()))
                with torch.no_grad():
                    for param, slope in zip(found.parameters(), slopes, strict=True):
                        param.sub_(slope, alpha=0.01)
        return found


@dataclass(frozen=True)
class Silent(Noise):
    def tell(self, progress):
        pass


@dataclass(frozen=True)
class Percent(Noise):
    def tell(self, progress):
        if progress is not None:
            progress(50, "noise")


@dataclass(frozen=True)
class Backwards(Noise):
    def tell(self, progress):
        if progress is not None:
            progress(0.6, "noise")
            progress(0.4, "recovered")


@dataclass(frozen=True)
class Wordless(Noise):
    def tell(self, progress):
        if progress is not None:
            progress(1.0, "")


@dataclass(frozen=True)
class AcceptsInfinity(Noise):
    """Looks for NaN alone, and does not train."""

    def require_finite(self, model):
        if any(param.isnan().any() for param in model.parameters()):
            raise TransformError("The model has weights that are not numbers.")

    def epochs(self, budget):
        return 0.0


@dataclass(frozen=True)
class ReturnsToTheCpu(Noise):
    def copied(self, model):
        return super().copied(model).to("cpu")


@dataclass(frozen=True)
class WrongError(Noise):
    def require_finite(self, model):
        assert all(param.isfinite().all() for param in model.parameters())


BROKEN = [
    (NotFrozen, "settings"),
    (TupleLost, "settings"),
    (NotJson, "settings"),
    (Plain, "settings"),
    (EvaluatesGiven, "untouched"),
    (HooksGiven, "untouched"),
    (LeavesGradients, "untouched"),
    (UnfreezesGiven, "untouched"),
    (NudgesGiven, "untouched"),
    (DrawsGlobally, "random_state"),
    (SeedsPython, "random_state"),
    (ClearsGradients, "untouched"),
    (StaysInTraining, "result"),
    (SharesWeights, "result"),
    (Function, "result"),
    (TwoOutputs, "shape"),
    (HalfPrecision, "shape"),
    (Explodes, "finite"),
    (GlobalSeed, "determinism"),
    (ForgetsOnCopy, "copies"),
    (Frozen, "trains"),
    (Untraceable, "exports"),
    (NoOnnx, "onnx"),
    (ReadsTest, "test_split"),
    (TakesTestTensors, "test_split"),
    (Spends, "budget"),
    (SpendsUnseen, "budget"),
    (MovesByHand, "budget"),
    (Silent, "progress"),
    (Percent, "progress"),
    (Backwards, "progress"),
    (Wordless, "progress"),
    (AcceptsInfinity, "errors"),
    (WrongError, "errors"),
    pytest.param(ReturnsToTheCpu, "device", marks=pytest.mark.cuda),
]
# Each of these must break something else too: the same weights trained twice, outputs that cannot be compared, ...
CONSEQUENCES = {Function, TwoOutputs, HalfPrecision, Explodes, SharesWeights, Untraceable}


def test_the_correct_transform_passes_on_every_model():
    check_transform(Noise, models=small())


def test_a_loss_of_its_own_passes():
    check_transform(OwnLoss, models=mlp())


def test_a_chain_passes():
    check_transform(lambda: Chain([Noise(), Noise(scale=0.02)]), models=mlp())


@pytest.mark.parametrize(("kind", "name"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_each_broken_transform_is_caught_by_name(kind, name):
    with pytest.raises(AssertionError, match=f"{kind.__name__} on 'small-mlp' breaks '{name}'"):
        check_transform(kind if kind is not TupleLost else lambda: TupleLost(leave=("0.bias",)), models=mlp())
    if kind not in CONSEQUENCES:
        slow = {"exports", "onnx"} - {name}
        check_transform(kind, models=mlp(), skip={name, *slow})


def test_every_property_has_a_transform_that_breaks_it():
    assert {getattr(entry, "values", entry)[1] for entry in BROKEN} == set(transform_properties())


def test_bad_arguments_are_named():
    untrained = dataclasses.replace(small()[1], model=lambda: nn.Linear(20, 3))
    with pytest.raises(AssertionError, match="'small-mlp' needs a trained module"):
        check_transform(Noise, models=[untrained])
    with pytest.raises(AssertionError, match="needs at least one model"):
        check_transform(Noise, models=[])
    with pytest.raises(AssertionError, match="skip names no property: speed"):
        check_transform(Noise, models=mlp(), skip=["speed"])


def test_small_tasks_are_trained_and_repeat_themselves():
    again = small_tasks()
    for task, twin in zip(small(), again, strict=True):
        assert isinstance(task, Task)
        assert isinstance(task.model, nn.Module)
        assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), twin.model.parameters(), strict=True))
    other = small_tasks(seed=1)
    assert not torch.equal(small()[1].model[0].weight, other[1].model[0].weight)
