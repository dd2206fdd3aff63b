"""MetaAug: its gradient against autograd through the step, no augmentation against plain distillation."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress._calibrated import calibrated, levels
from netwright.compress._input_change import Augmented
from netwright.compress.meta_aug import MetaAug, _Bilevel, _margin, _scaled
from netwright.core.data import Data, batches
from netwright.core.errors import TransformError
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task
from netwright.testing import check_transform
from netwright.testing._tasks import small_tasks
from tests.compress.zoo_tasks import zoo_task


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def task(**changes) -> Task:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> TensorDataset:
        inputs = torch.randn(count, 4, generator=generator)
        return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long())

    plain = Recipe(optimizer="torch.optim:SGD", optimizer_settings={"lr": 0.1}, schedule=None, batch_size=8, epochs=2)
    base = Task("blobs", small, Data(part(64), part(24), part(8)), functional.cross_entropy, accuracy, recipe=plain)
    return dataclasses.replace(base, **changes)


class Spy:
    """Takes an optimizer's place and keeps the gradients."""

    def __init__(self, values) -> None:
        self.values, self.seen = values, []

    def step(self) -> None:
        self.seen = [value.grad.clone() for value in self.values]

    def zero_grad(self) -> None:
        for value in self.values:
            value.grad = None


def apart(wanted, given, temperature):
    p, q = (wanted / temperature).softmax(1), (given / temperature).softmax(1)
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


def test_the_transformation_follows_autograd_through_the_step() -> None:
    torch.manual_seed(0)
    model, whole = small().double(), small().double()
    x, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    settings = MetaAug(temperature=2.0, keep=0.3, margin=0.9, strength=0.6)
    net = Augmented(model, copy.deepcopy(whole), x, 5, 0.6).double()
    before = copy.deepcopy(model.state_dict())
    hook = _Bilevel(settings, net, task(), (x, y), rate=0.7)
    hook.optimizer = Spy(list(net.changes.parameters()))
    torch.manual_seed(3)
    hook.before_step(0, 10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    change = net.changes["0"].requires_grad_(True)
    torch.manual_seed(3)
    noise = torch.randn_like(x)
    both = torch.cat([x / x.std(), noise], 1)
    moved = 0.6 * torch.tanh(change.last(functional.relu(change.first(both))))
    varied = x + x.std() * moved
    weights = dict(model.named_parameters())
    inner = apart(whole(varied), model(varied), 2.0)
    gradient = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    after = {
        name: value - 0.7 * part / part.detach().square().mean().sqrt()
        for (name, value), part in zip(weights.items(), gradient, strict=True)
    }
    outer = apart(whole(x), functional_call(model, after, x), 2.0)
    least = functional.relu(0.9 * 0.6 - moved.square().mean(1).sqrt()).mean()
    loss = outer + 0.3 * apart(whole(x), whole(varied), 1.0) + least
    exact = torch.autograd.grad(loss, list(change.parameters()))
    for one, two in zip(hook.optimizer.seen, exact, strict=True):
        torch.testing.assert_close(one, two)
        assert two.abs().max() > 0


def test_the_step_matters_to_the_transformation() -> None:
    """With the other terms off, what is left is the gradient through the step, and it is not zero."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    net = Augmented(small().double(), small().double(), x, 5, 0.6).double()
    hook = _Bilevel(MetaAug(keep=0.0, margin=0.0), net, task(), (x, y), rate=0.7)
    hook.optimizer = Spy(list(net.changes.parameters()))
    hook.before_step(0, 10)
    assert sum(float(part.abs().sum()) for part in hook.optimizer.seen) > 1e-6


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.25, 60, 140), (1.0, 400, 400)])
def test_a_share_of_the_items_is_changed_and_the_others_are_read_as_they_are(share, least, most) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 4)
    net = Augmented(small(), small(), x, 5, 0.6, share)
    output = net(x)
    assert torch.equal(output, net.model(net.seen))
    changed = (net.seen != x).any(1)
    assert torch.equal(changed, (net.seen != x).all(1))
    assert least <= int(changed.sum()) <= most


def test_the_length_of_the_step_does_not_depend_on_that_of_the_gradient() -> None:
    gradient = [torch.tensor([[3.0, -4.0]]), torch.zeros(3)]
    for factor in (1e-6, 1.0, 1e6):
        step = _scaled([factor * part for part in gradient])
        torch.testing.assert_close(step[0], gradient[0] / 12.5**0.5)
        assert not step[1].any()
    for dtype in (torch.float16, torch.bfloat16):
        step = _scaled([1e-4 * part.to(dtype) for part in gradient])
        torch.testing.assert_close(step[0], (gradient[0] / 12.5**0.5).to(dtype))
        assert not step[1].any()
    leaf = torch.tensor([3.0, -4.0], requires_grad=True)
    _scaled([leaf**2])[0].sum().backward()  # the root mean square counts as constant
    torch.testing.assert_close(leaf.grad, torch.tensor([6.0, -8.0]) / ((81 + 256) / 2) ** 0.5)


def test_margin_by_hand() -> None:
    moved = torch.tensor([[0.3, 0.4], [3.0, 4.0]])
    assert float(_margin(moved, 1.0)) == pytest.approx((1 - (0.25 / 2) ** 0.5) / 2, abs=1e-5)


def test_without_changes_it_is_distillation_on_the_calibration_items() -> None:
    found = task()
    model = found.build(seed=1)
    ours = MetaAug(4, 6, 16, strength=0.0)(model, found, seed=5)
    made = calibrated("test", model, found, weights=levels(4)[0], activations=levels(6)[1], items=16, seed=5)
    held = next(iter(batches(found.data.train, 16, generator=torch.Generator().manual_seed(5))))
    few = dataclasses.replace(found, data=dataclasses.replace(found.data, train=TensorDataset(*held)))
    recipe = found.recipe.replace(epochs=8, distill_weight=1.0, distill_temperature=1.0)
    plain = fit(made.module, few, recipe, seed=5, teacher=copy.deepcopy(model), validate=False).model
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    unchanged = MetaAug(4, 6, 16, share=0.0)(model, found, seed=5)
    assert all(map(torch.equal, ours.parameters(), unchanged.parameters()))
    other = MetaAug(4, 6, 16)(model, found, seed=5)
    assert not torch.equal(next(other.parameters()), next(ours.parameters()))


def test_weights_have_as_many_levels_as_bits_allow() -> None:
    found = task()
    trained = MetaAug(3, 5)(found.build(seed=1), found)
    for name, value in trained.named_parameters():
        if value.ndim > 1:
            rounded = trained.get_submodule(f"{name}_quantizer")(value)
            assert max(len(row.unique()) for row in rounded) <= 7


@pytest.mark.parametrize("name", ["resnet", "two-inputs", "hf-vit", "mlp-mixer"])
def test_runs_on_models_of_many_kinds(name) -> None:
    model, found = zoo_task(name)
    result = MetaAug(calibration_items=4)(model, found, budget=1)
    assert found.outputs(result, found.example()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_runs_on_models_of_other_types(dtype) -> None:
    found = task()
    splits = [TensorDataset(part.tensors[0].to(dtype), part.tensors[1]) for part in (found.data.train,) * 3]
    found = dataclasses.replace(found, data=Data(*splits), model=lambda: small().to(dtype))
    before = found.build(seed=1)
    result = MetaAug(calibration_items=16)(before, found, budget=1)
    assert result(found.example()).dtype == dtype
    assert not torch.equal(
        result(found.example()), MetaAug(calibration_items=16)(before, found, budget=0)(found.example())
    )


def test_conformance() -> None:
    check_transform(lambda: MetaAug(calibration_items=8), models=small_tasks()[:2], onnx_tolerance=0.05)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 8"),
        ({"activation_bits": 16}, "activation_bits must be an integer from 2 to 8"),
        ({"bits": True}, "bits must be an integer"),
        ({"strength": 1.5}, "strength must be a finite number"),
        ({"share": 1.1}, "share must be a finite number"),
        ({"margin": -0.1}, "margin must be a finite number"),
        ({"calibration_items": 0}, "calibration_items must be a positive integer"),
        ({"temperature": 0.0}, "temperature must be a finite number, greater than 0"),
    ],
)
def test_settings_are_checked(settings, said) -> None:
    with pytest.raises(TransformError, match=said):
        MetaAug(**settings)


def test_what_cannot_be_varied_or_rounded() -> None:
    tokens = small_tasks()[2]
    with pytest.raises(TransformError, match="varies inputs of floating point"):
        MetaAug()(tokens.build(), tokens)
    assert isinstance(MetaAug(strength=0.0)(tokens.build(), tokens, budget=0.0), nn.Module)
    volumes = [TensorDataset(torch.randn(8, 1, 1, 2, 1, 2), torch.zeros(8).long()) for _ in range(3)]
    deep = task(model=nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), data=Data(*volumes))
    with pytest.raises(TransformError, match=r"of task 'blobs' are torch\.float32 in 6 dimensions"):
        MetaAug()(deep.build(), deep)
    nothing = task(model=nn.Softmax(1))
    with pytest.raises(TransformError, match="no convolution or linear layer"):
        MetaAug()(nothing.build(), nothing)
