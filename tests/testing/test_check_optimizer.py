"""The optimizer suite passes torch's own optimizers and names the one property that a broken one breaks."""

import functools
import math
import random
import warnings

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from netwright.testing import check_optimizer, optimizer_properties

STEPS = 200


@pytest.mark.parametrize(
    ("make", "claims"),
    [
        (torch.optim.AdamW, {"complex": True, "sparse": False}),
        (functools.partial(torch.optim.RMSprop, momentum=0.5), {"complex": True, "sparse": False}),
        (torch.optim.Adagrad, {"complex": True, "sparse": True}),
        # SGD takes lr = nan: torch checks it with lr < 0 alone.
        (torch.optim.SGD, {"complex": True, "sparse": True, "skip": ["nan_lr"]}),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1), {"skip": ["nan_lr"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_torch_optimizers_pass(make, claims):
    check_optimizer(make, steps=STEPS, **claims)


class Momentum(Optimizer):
    """A correct method with every feature; the classes below break one property each."""

    def __init__(self, params, lr=0.1, beta=0.9, decay=0.01, foreach=False, maximize=False):
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be finite and not negative, got {lr}.")
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay, "foreach": foreach, "maximize": maximize})

    def __getstate__(self):
        kept = {name: value for name, value in vars(self).items() if not name.startswith("_optimizer_")}
        kept.pop("step", None)  # what a scheduler puts there
        return kept

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.loss_of(closure)
        for group in self.param_groups:
            for param in self.members(group):
                if param.grad is not None:
                    if param.grad.is_sparse:
                        self.meet_sparse(param)
                    self.update(param, group)
        return loss

    def loss_of(self, closure):
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def members(self, group):
        return group["params"]

    def meet_sparse(self, param):
        raise RuntimeError("Momentum does not take sparse gradients.")

    def sign(self, group):
        return -1.0 if group["maximize"] else 1.0

    def rate(self, group):
        return group["lr"]

    def update(self, param, group):
        state = self.state[param]
        if "average" not in state:
            state["average"] = torch.zeros_like(param)
        average = state["average"]
        average.mul_(group["beta"]).add_(self.sign(group) * param.grad)
        param.mul_(1 - self.rate(group) * group["decay"]).sub_(self.rate(group) * average)


class Still(Momentum):
    def update(self, param, group):
        pass


class OutOfPlace(Momentum):
    def update(self, param, group):
        super().update(param, group)
        param.data = param.data.clone()


class Random(Momentum):
    def rate(self, group):
        return group["lr"] * random.uniform(0.5, 1.0)  # not torch's random state


class SharedDecay(Momentum):
    """Reads the decay of the defaults and the lr of the last group."""

    def rate(self, group):
        return self.param_groups[-1]["lr"]


class ForgetsAddedGroups(Momentum):
    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.count = len(self.param_groups)

    def members(self, group):
        known = [id(entry) for entry in self.param_groups[: self.count]]
        return group["params"] if id(group) in known else []


class StateOutside(Momentum):
    """Keeps its average where state_dict does not see it."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.averages = {}

    def update(self, param, group):
        average = self.averages.setdefault(param, torch.zeros_like(param))
        average.mul_(group["beta"]).add_(self.sign(group) * param.grad)
        param.mul_(1 - group["lr"] * group["decay"]).sub_(group["lr"] * average)


class Unsaveable(Momentum):
    """Its state needs unpickling of arbitrary objects."""

    def update(self, param, group):
        super().update(param, group)
        self.state[param]["why"] = random.Random(0)


class ResumesOnce(Momentum):
    """Wants in a state what torch adds to the defaults while it restores one."""

    def load_state_dict(self, state_dict):
        if any(set(self.defaults) - set(group) for group in state_dict["param_groups"]):
            raise ValueError("not a state of mine")
        super().load_state_dict(state_dict)


class RoundsItsState(Momentum):
    """Keeps its average in float32, which torch casts to the type of the parameter on resuming."""

    def update(self, param, group):
        state = self.state[param]
        if "average" not in state:
            state["average"] = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
        super().update(param, group)


class CopiesForget(Momentum):
    """Keeps a setting on itself, and copies what torch copies."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.factor = 0.5

    def __getstate__(self):
        return Optimizer.__getstate__(self)

    def rate(self, group):
        return group["lr"] * getattr(self, "factor", 1.0)


class CopiesSteer(Momentum):
    """Copies take along the step that a scheduler has put on the original."""

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if not name.startswith("_optimizer_")}


class LosesTheLoss(Momentum):
    def loss_of(self, closure):
        super().loss_of(closure)


class ClosureWithoutGradients(Momentum):
    def loss_of(self, closure):
        return None if closure is None else closure()


class ZeroMeansDefault(Momentum):
    """Takes lr = 0 for "not given"."""

    def add_param_group(self, param_group):
        super().add_param_group({**param_group, "lr": param_group.get("lr") or self.defaults["lr"]})


class CachedRate(Momentum):
    """Reads lr at construction only."""

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self.param_groups[-1]["cached"] = self.param_groups[-1]["lr"]

    def rate(self, group):
        return group["cached"]


class History(Momentum):
    """Remembers a norm for every step."""

    def update(self, param, group):
        super().update(param, group)
        self.norms = [*getattr(self, "norms", []), float(param.grad.norm())]


class GrowingState(Momentum):
    def update(self, param, group):
        super().update(param, group)
        seen = getattr(self, "seen", torch.zeros(0))
        self.seen = torch.cat([seen, torch.zeros(1)])


class TakesAnyRate(Momentum):
    def __init__(self, params, lr=0.1, **settings):
        super().__init__(params, lr=abs(lr), **settings)


class TakesNan(Momentum):
    def __init__(self, params, lr=0.1, **settings):
        super().__init__(params, lr=0.1 if lr != lr else lr, **settings)


class ForeachDiffers(Momentum):
    def update(self, param, group):
        super().update(param, {**group, "decay": 0.0} if group["foreach"] else group)


class ForeachNotADefault(Momentum):
    def __init__(self, params, lr=0.1, foreach=False):
        super().__init__(params, lr=lr)
        del self.defaults["foreach"]
        for group in self.param_groups:
            del group["foreach"]


class FlippedMaximize(Momentum):
    def sign(self, group):
        return 1.0


class MaximizesDecay(Momentum):
    """Flips the decay along with the gradient."""

    def update(self, param, group):
        super().update(param, {**group, "decay": self.sign(group) * group["decay"]})


class FailsOnEmpty(Momentum):
    def update(self, param, group):
        assert param.grad.abs().max() >= 0
        super().update(param, group)


class DecaysFrozen(Momentum):
    """Weight decay reaches parameters without a gradient."""

    def members(self, group):
        for param in group["params"]:
            if param.grad is None:
                param.mul_(1 - self.rate(group) * group["decay"])
        return group["params"]


class MuddledSparse(Momentum):
    def meet_sparse(self, param):
        raise RuntimeError("unsupported layout")


class HalfSparse(Momentum):
    """Claims sparse gradients and halves them."""

    def meet_sparse(self, param):
        param.grad = param.grad.to_dense() / 2


class Widens(Momentum):
    def update(self, param, group):
        super().update(param, group)
        if param.dtype == torch.bfloat16:
            param.data = param.data.float()
            self.state[param]["average"] = self.state[param]["average"].float()


class Bf16Sign(Momentum):
    """The half-precision branch steps the wrong way."""

    def sign(self, group):
        return -super().sign(group) if group["params"][0].dtype == torch.bfloat16 else super().sign(group)


class Bf16Slow(Momentum):
    """The half-precision branch stands still, at a rate with which rounding might have explained it."""

    def __init__(self, params, lr=1e-4):
        super().__init__(params, lr)

    def update(self, param, group):
        super().update(param, {**group, "lr": 0.0 if param.dtype == torch.bfloat16 else group["lr"]})


class TurnsOnCuda(Momentum):
    """Steps the wrong way on a CUDA device."""

    def update(self, param, group):
        super().update(param, {**group, "lr": -group["lr"] if param.is_cuda else group["lr"]})


class ComplexModulus(Momentum):
    """Normalizes by the modulus, where the real parts have squares of their own."""

    def update(self, param, group):
        grad = param.grad
        if grad.is_complex():
            param.sub_(self.rate(group) * grad / (grad.abs() + 1))
        else:
            param.sub_(self.sign(group) * self.rate(group) * grad / (grad.abs() + 1))


BROKEN = [
    (Still, "moves"),
    (OutOfPlace, "moves"),
    (Random, "determinism"),
    (SharedDecay, "groups"),
    (ForgetsAddedGroups, "add_group"),
    (StateOutside, "resume"),
    (Unsaveable, "resume"),
    (ResumesOnce, "resume"),
    (RoundsItsState, "resume"),
    (CopiesForget, "copy"),
    (CopiesSteer, "copy"),
    (LosesTheLoss, "closure"),
    (ClosureWithoutGradients, "closure"),
    (ZeroMeansDefault, "zero_lr"),
    (CachedRate, "schedule"),
    (History, "memory"),
    (GrowingState, "memory"),
    (TakesAnyRate, "settings"),
    (TakesNan, "nan_lr"),
    (ForeachDiffers, "foreach"),
    (ForeachNotADefault, "foreach"),
    (FlippedMaximize, "maximize"),
    (MaximizesDecay, "maximize"),
    (FailsOnEmpty, "zero_size"),
    (DecaysFrozen, "frozen"),
    (MuddledSparse, "sparse"),
    (HalfSparse, "sparse"),
    (Widens, "bf16"),
    (Bf16Sign, "bf16"),
    (Bf16Slow, "bf16"),
    (ComplexModulus, "complex"),
    pytest.param(TurnsOnCuda, "device", marks=pytest.mark.cuda),
]


CONSEQUENCES = {Still, Random}  # what does not move, or not repeat itself, must break further properties


def test_the_correct_method_passes():
    check_optimizer(Momentum, complex=True, sparse=False, steps=STEPS)


@pytest.mark.parametrize(("kind", "name"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_each_broken_method_is_caught_by_name(kind, name):
    skip = [] if name == "memory" else ["memory"]  # which walks over all living objects: slow here
    with pytest.raises(AssertionError, match=f"{kind.__name__} breaks '{name}'"):
        check_optimizer(kind, complex=kind is ComplexModulus, steps=STEPS, skip=skip)
    if kind not in CONSEQUENCES:
        also = ["device"] if name == "resume" else []  # which resumes too
        check_optimizer(kind, complex=kind is ComplexModulus, skip=[*skip, name, *also])


def test_every_property_has_a_method_that_breaks_it():
    assert {getattr(entry, "values", entry)[1] for entry in BROKEN} == set(optimizer_properties())


def test_sparse_claims_are_held_to():
    with pytest.raises(AssertionError, match=r"breaks 'sparse': sparse gradients are claimed"):
        check_optimizer(torch.optim.AdamW, sparse=True, skip=set(optimizer_properties()) - {"sparse"})
    with pytest.raises(AssertionError, match=r"breaks 'sparse': .* are to be refused"):
        check_optimizer(torch.optim.SGD, sparse=False, skip=set(optimizer_properties()) - {"sparse"})


class NeedsClosure(Momentum):
    """Differentiates the loss a second time: steps along the gradient after a look ahead."""

    def step(self, closure=None):
        if closure is None:
            raise TypeError("NeedsClosure.step needs a closure: optimizer.step(closure).")
        return super().step(closure)


class SilentWithoutClosure(NeedsClosure):
    def step(self, closure=None):
        return None if closure is None else super().step(closure)


class MuteWithoutClosure(NeedsClosure):
    def step(self, closure=None):
        return closure() if closure is None else super().step(closure)


def test_methods_that_need_a_closure():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's reminder that create_graph in backward() makes a cycle
        check_optimizer(NeedsClosure, needs_closure=True, create_graph=True, steps=20)
    with pytest.raises(AssertionError, match=r"breaks 'closure': a step without the closure that it needs is accepted"):
        check_optimizer(SilentWithoutClosure, needs_closure=True, steps=20)
    with pytest.raises(AssertionError, match=r"NeedsClosure breaks"):
        check_optimizer(NeedsClosure, steps=20)


class GlobalNorm(Momentum):
    """Divides by the norm of all gradients together."""

    def rate(self, group):
        grads = [p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]
        return group["lr"] / (1 + float(torch.stack([value.double() for value in grads]).norm()))


def test_coupled_methods_are_not_asked_to_be_separable():
    check_optimizer(GlobalNorm, coupled=True, steps=20)
    with pytest.raises(AssertionError, match="breaks 'groups'"):
        check_optimizer(GlobalNorm, steps=20)
    with pytest.raises(AssertionError, match=r"breaks 'groups': a group's own lr changes nothing"):
        check_optimizer(SharedDecay, coupled=True, steps=20)


def test_skip_must_name_a_property():
    with pytest.raises(AssertionError, match="skip names no property: speed"):
        check_optimizer(Momentum, skip=["speed"])


def test_the_given_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    check_optimizer(Momentum, steps=20)
    assert isinstance(expected, Tensor)
    assert torch.equal(torch.rand(1), expected)
