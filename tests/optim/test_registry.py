"""Optimizers by name: what is said of each is measured."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from netwright.core.errors import SettingError
from netwright.core.optimization import closure_kind
from netwright.core.recipe import resolve
from netwright.optim import Lion, available, create, schedules

SETTINGS = {"sgd": {"lr": 0.1}, "optimistic-amsgrad": {"span": 3}, "mfac": {"window": 4}}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2))


def steps(name: str, count: int = 8) -> tuple[Optimizer, nn.Module]:
    """A few steps of an optimizer, with the closure that it asks for."""
    model = network()
    optimizer = create(name, model, **SETTINGS.get(name, {}))
    inputs = torch.randn(20, 6)
    targets = torch.randn(20, 2)
    kind = closure_kind(optimizer)

    def outputs() -> tuple[Tensor, Tensor]:
        found = model(inputs)
        return functional.mse_loss(found, targets), found

    def usual() -> Tensor:
        optimizer.zero_grad()
        loss = outputs()[0]
        loss.backward()
        return loss

    closures = {"outputs": outputs, "graph": lambda: outputs()[0]}
    for _ in range(count):
        optimizer.step(closures.get(kind, usual))
    return optimizer, model


def words(optimizer: Optimizer) -> int:
    """Elements of state that grow with the parameters."""
    return sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim > 0
    )


@pytest.mark.parametrize("name", [name for name in available() if name not in ("kfac", "shampoo")])
def test_the_state_is_as_large_as_it_says(name: str) -> None:
    text = available()[name].state
    expected = {"5 + span": 8, "window": 4}.get(text)
    if expected is None:
        found = re.match(r"\d+", text)
        assert found is not None, text
        expected = int(found[0])
    optimizer, model = steps(name)
    size = sum(param.numel() for param in model.parameters())
    beside = 4 * 4 if name == "mfac" else 0  # the products of its gradients
    assert words(optimizer) - beside == expected * size


@pytest.mark.parametrize("name", available())
def test_the_closure_is_the_one_it_says(name: str) -> None:
    record = available()[name]
    optimizer, _ = steps(name, 1)
    assert closure_kind(optimizer) == record.closure
    assert record.complex == bool(getattr(optimizer, "takes_complex", True))


def test_every_optimizer_of_ours_is_listed() -> None:
    import netwright.optim as package

    kinds = {value for value in vars(package).values() if isinstance(value, type) and issubclass(value, Optimizer)}
    wrappers = {package.AGVM, package.OptEx}
    assert kinds - wrappers == {
        resolve(record.object) for record in available().values() if "netwright" in record.object
    }


@pytest.mark.parametrize("name", schedules())
def test_schedules_can_be_made(name: str) -> None:
    path, settings = schedules()[name]
    optimizer = torch.optim.SGD(network().parameters(), lr=0.5)
    lengths = {"CosineAnnealingLR": "T_max", "LinearLR": "total_iters"}
    kind = resolve(path)
    needed = {lengths.get(kind.__name__, "total_steps"): 10} | ({"max_lr": 0.5} if name == "one-cycle" else {})
    schedule = kind(optimizer, **settings, **needed)
    for _ in range(9):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_names_are_forgiving() -> None:
    model = network()
    assert isinstance(create("LION", model.parameters()), Lion)
    assert type(create("Exact_Gauss_Newton", model.parameters())).__name__ == "ExactGaussNewton"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lyon", {}, "Did you mean lion"),
        ("xyzzy", {}, "Known are lion"),
        ("lion", {"beta": 1}, "lion refuses the settings"),
        ("lion", {"lr": -1.0}, "Lion: lr must be"),
        ("kfac", {}, r"create\('kfac', model"),
    ],
)
def test_mistakes_are_named(name: str, settings: dict, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        create(name, network().parameters(), **settings)


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        create("lion", [])
