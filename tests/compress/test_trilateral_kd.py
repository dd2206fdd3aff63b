"""Distillation with learned ratios: the hypergradient against autograd, constant ratios against the training loop."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress import Prune
from netwright.compress import trilateral_kd as module
from netwright.compress.trilateral_kd import TrilateralKD
from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy, r2
from netwright.core.task import Task
from netwright.testing import check_transform

HALF = {"method": "netwright.compress:Prune", "settings": {"ratios": 0.5}}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def task(**changes) -> Task:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> TensorDataset:
        inputs = torch.randn(count, 4, generator=generator)
        return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long())

    plain = Recipe(optimizer="torch.optim:SGD", optimizer_settings={"lr": 0.1}, schedule=None, batch_size=8, epochs=2)
    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    base = Task("blobs", network, Data(part(64), part(24), part(8)), functional.cross_entropy, accuracy, recipe=plain)
    return dataclasses.replace(base, **changes)


def test_the_slope_of_a_ratio_is_that_of_autograd_through_the_step() -> None:
    torch.manual_seed(1)
    student, teacher = small().double(), small().double()
    inputs, classes = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    held, answers = torch.randn(5, 4).double(), torch.tensor([2, 1, 0, 0, 1])
    alpha = torch.rand(6).double().requires_grad_(True)
    weights = dict(student.named_parameters())
    terms = module._terms(functional_call(student, weights, inputs), teacher(inputs).detach(), classes, 3.0)
    loss = (alpha * terms.teacher + (1 - alpha) * terms.label).mean()
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    moved = {name: value - 0.2 * grad for (name, value), grad in zip(weights.items(), gradients, strict=True)}
    outer = functional.cross_entropy(functional_call(student, moved, held), answers)
    (exact,) = torch.autograd.grad(outer, alpha)

    hook = object.__new__(module._Distillation)
    hook.settings, hook.student, hook.task = TrilateralKD(HALF, temperature=3.0), student, task()
    after = {name: value.detach().requires_grad_(True) for name, value in moved.items()}
    direction = torch.autograd.grad(
        functional.cross_entropy(functional_call(student, after, held), answers), list(after.values())
    )
    length = float(sum(part.square().sum() for part in direction)) ** 0.5
    before = copy.deepcopy(student.state_dict())
    rise = hook._rise(inputs, classes, teacher(inputs).detach(), list(direction), length)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    torch.testing.assert_close(module._ratio_slopes(rise, 0.2), exact, rtol=2e-3, atol=1e-9)
    assert exact.abs().min() > 0


def test_terms_by_hand() -> None:
    student, teacher, classes = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.tensor([0, 2, 1, 1])
    terms = module._terms(student, teacher, classes, 2.0)
    for row in range(4):
        p = (teacher[row] / 2).exp() / (teacher[row] / 2).exp().sum()
        q = (student[row] / 2).exp() / (student[row] / 2).exp().sum()
        assert float(terms.teacher[row]) == pytest.approx(4 * float((p * (p / q).log()).sum()))
        own = student[row].exp() / student[row].exp().sum()
        assert float(terms.label[row]) == pytest.approx(-float(own[classes[row]].log()))


def test_with_ratios_held_at_a_half_it_is_plain_distillation() -> None:
    found = task()
    ours = TrilateralKD(HALF, temperature=2.0, every=10**6, fusion_lr=1e-12)(found.build(), found, seed=4)
    plain = Prune(0.5)(found.build(), found, seed=4)
    recipe = dataclasses.replace(found.recipe, distill_weight=0.5, distill_temperature=2.0)
    plain = fit(plain, found, recipe, seed=4, teacher=found.build(), validate=False).model
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_wrong_labels_get_more_of_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 4, generator=generator)
    clean = (inputs[:, 0] > 0).long()
    wrong = torch.rand(400, generator=generator) < 0.4
    noisy = torch.where(wrong, 1 - clean, clean)
    held = torch.randn(200, 4, generator=generator)
    sound = TensorDataset(held, (held[:, 0] > 0).long())
    data = Data(TensorDataset(inputs, noisy), sound, TensorDataset(*sound[:8]))
    teacher = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        teacher[0].weight.copy_(torch.tensor([[-2.0, 0, 0, 0], [2.0, 0, 0, 0]]))
        teacher[0].bias.zero_()
    recipe = Recipe(
        optimizer="torch.optim:SGD", optimizer_settings={"lr": 0.5}, schedule=None, batch_size=50, epochs=15
    )
    found = task(model=teacher, data=data, recipe=recipe)
    kept = []
    original = module._Distillation.__init__

    def spy(self, *args):
        original(self, *args)
        kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Distillation, "__init__", spy)
        TrilateralKD(f"{__name__}:narrow", every=1)(teacher, found)
    hook = kept[0]
    with torch.no_grad():
        logits, goal = hook.student(inputs), teacher(inputs)
        ratios = hook.fusion.cpu()(module._geometry(logits, goal, noisy, hook.means.cpu()))
    assert float(ratios[wrong].mean()) > float(ratios[~wrong].mean()) + 0.1


def narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def other() -> nn.Module:
    return nn.Linear(4, 7)


def test_conformance() -> None:
    check_transform(lambda: TrilateralKD(HALF, outer_items=16))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"student": "nowhere"}, "student must be an import path"),
        ({"student": {"name": "Prune"}}, "student must be an import path"),
        ({"student": HALF, "temperature": 0.0}, "temperature must be a finite number, greater than 0"),
        ({"student": HALF, "hidden": 0}, "hidden must be a positive integer"),
        ({"student": HALF, "every": 1.5}, "every must be a positive integer"),
    ],
)
def test_settings_are_checked(settings, said) -> None:
    with pytest.raises(TransformError, match=said):
        TrilateralKD(**settings)


def test_what_cannot_be_distilled() -> None:
    found = task()
    with pytest.raises(TransformError, match=r"student's outputs are \(2, 7\) for two items, the teacher's \(2, 3\)"):
        TrilateralKD(f"{__name__}:other")(found.build(), found)
    with pytest.raises(TransformError, match="refuses"):
        TrilateralKD({"method": "netwright.compress:Prune", "settings": {"ratio": 2}})(found.build(), found)
    numbers = TensorDataset(torch.randn(16, 4), torch.randn(16, 3))
    data = Data(numbers, TensorDataset(*numbers[:4]), TensorDataset(*numbers[4:8]))
    regression = task(data=data, loss=functional.mse_loss, score=r2)
    with pytest.raises(TransformError, match="needs logits over classes"):
        TrilateralKD(HALF)(regression.build(), regression)
