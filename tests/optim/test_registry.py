"""Optimizers by name: what is said of each is measured."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from netwright.core.errors import SettingError
from netwright.core.optimization import closure_kind
from netwright.core.recipe import resolve
from netwright.optim import AGVM, Lion, OptEx, available, create, schedules

SETTINGS = {"sgd": {"lr": 0.1}, "optimistic-amsgrad": {"span": 3}, "mfac": {"window": 4}}
ELSEWHERE = ("kfac", "shampoo", "optex", "agvm")  # whose words depend on layers, or on what is within


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


@pytest.mark.parametrize("name", [name for name in available() if name not in ELSEWHERE])
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
    made = [resolve(record.object) for record in available().values() if "netwright" in record.object]
    assert kinds == {getattr(maker, "__self__", maker) for maker in made}, "OptEx.over makes an OptEx"


@pytest.mark.parametrize(("name", "kind"), [("optex", OptEx), ("agvm", AGVM)])
def test_optimizers_around_others_are_made_by_name(name: str, kind: type[Optimizer]) -> None:
    for base, within in (("lion", Lion), ("torch.optim:NAdam", torch.optim.NAdam), (torch.optim.SGD, torch.optim.SGD)):
        optimizer = create(name, network(), base=base, lr=0.25)
        assert type(optimizer) is kind
        assert type(optimizer.optimizer) is within
        assert all(group["lr"] == 0.25 for group in optimizer.param_groups)
    settings = {"base": "sgd", "base_settings": {"lr": 0.5, "momentum": 0.9}}
    for changes, lr in (({}, 0.5), ({"lr": 0.25}, 0.25)):
        groups = create(name, network(), **settings, **changes).param_groups
        assert {(group["lr"], group["momentum"]) for group in groups} == {(lr, 0.9)}
    own = create(name, network()).optimizer
    assert {group["lr"] for group in own.param_groups} == {type(own)(network().parameters()).defaults["lr"]}
    with pytest.raises(SettingError, match="Did you mean lion"):
        create(name, network(), base="lyon")
    with pytest.raises(SettingError, match=f"{name} refuses the settings"):
        create(name, network(), paralelism=3)


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
        ("adamw", {"lr": -1.0}, r"adamw refuses the settings \['lr'\]: Invalid learning rate: -1.0\."),
        ("kfac", {}, r"create\('kfac', model"),
    ],
)
def test_mistakes_are_named(name: str, settings: dict, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        create(name, network().parameters(), **settings)


def conjugated(lazily: bool, name: str) -> Tensor:
    """A complex parameter after steps along gradients that are conjugated on reading, or are resolved."""
    weight = nn.Parameter(torch.tensor([1.0 + 2.0j, -3.0 + 0.5j]))
    optimizer = create(name, [weight], **SETTINGS.get(name, {}))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.view_as_real(weight.conj().resolve_conj()).square().sum()
        loss.backward()
        assert weight.grad is not None
        assert weight.grad.is_conj()
        weight.grad = weight.grad if lazily else weight.grad.resolve_conj()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return weight.detach()


COMPLEX = [name for name, record in available().items() if "netwright" in record.object and record.complex]


@pytest.mark.parametrize("name", [name for name in COMPLEX if not available()[name].needs_model])
def test_gradients_that_are_conjugated_on_reading_are_taken(name: str) -> None:
    assert torch.equal(conjugated(True, name), conjugated(False, name))


@pytest.mark.parametrize("name", [name for name, record in available().items() if "netwright" in record.object])
def test_hooks_on_states_are_called_and_hand_them_over(name: str) -> None:
    optimizer, _ = steps(name, 2)
    heard: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: heard.append("saves"))
    optimizer.register_state_dict_post_hook(lambda _, state: heard.append("saved") or {"within": state})
    state = optimizer.state_dict()
    assert heard == ["saves", "saved"]
    assert list(state) == ["within"]
    other, _ = steps(name, 1)
    other.register_load_state_dict_pre_hook(lambda _, state: heard.append("loads") or state["within"])
    other.register_load_state_dict_post_hook(lambda _: heard.append("loaded"))
    other.load_state_dict(state)
    assert heard[2:] == ["loads", "loaded"]
    again, before = other.state_dict(), state["within"]
    assert again.keys() == before.keys()
    assert torch.utils._pytree.tree_map(_plain, again) == torch.utils._pytree.tree_map(_plain, before)


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else value


def test_groups_are_refused_where_modules_make_them() -> None:
    model = network()
    groups = [{"params": [param], "lr": 0.1} for param in model.parameters()]
    with pytest.raises(SettingError, match=r"makes its groups from the model's modules"):
        create("agvm", groups, model=model)


@pytest.mark.parametrize("name", ["lion", "dog", "mfac", "shampoo"])
def test_numbers_of_numpy_are_taken_as_pythons(name: str) -> None:
    settings = SETTINGS.get(name, {})
    models = network(), network()
    optimizers = [
        create(name, model, lr=lr, **settings)
        for model, lr in zip(models, (np.float32(0.25), 0.25), strict=True)  # a power of two
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(5, 6)).square().sum().backward()
            optimizer.step()
    assert type(optimizers[0].param_groups[0]["lr"]) is float
    assert all(torch.equal(one, two) for one, two in zip(*(model.parameters() for model in models), strict=True))


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        create("lion", [])
