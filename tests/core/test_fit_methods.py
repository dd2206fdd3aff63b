"""What a recipe names besides optimizer and schedule: clipping, averages, parameterizations, penalties, closures."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import TensorDataset

from netwright.core.average import MovingAverage
from netwright.core.data import Data
from netwright.core.errors import RecipeError
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.optimization import make_schedule
from netwright.core.recipe import Recipe
from netwright.core.score import r2
from netwright.core.task import Task
from netwright.optim import AGVM, module_groups

HERE = __name__
STEPS = 12


class Clip:
    """Scales gradients by a factor that halves with every call."""

    def __init__(self, start: float = 1.0) -> None:
        self.factor = start

    def __call__(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad.mul_(self.factor)  # type: ignore[union-attr]
        self.factor /= 2

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = state["factor"]


class Switching(MovingAverage):
    """Puts the average into the model when an epoch ends."""

    def end_epoch(self, model: nn.Module) -> None:
        self.put_into(model)


class Descent(torch.optim.Optimizer):
    """Plain descent that asks for a closure of each kind, and for the model."""

    def __init__(self, params: Any, model: nn.Module | None = None, lr: float = 0.1, kind: str = "graph") -> None:
        super().__init__(params, {"lr": lr})
        self.model = model
        self.closure_kind = kind

    def step(self, closure: Any = None) -> Any:
        params = [param for group in self.param_groups for param in group["params"]]
        with torch.enable_grad():
            found = closure()
        if self.closure_kind == "outputs":
            loss, outputs = found
            (back,) = torch.autograd.grad(loss, outputs, retain_graph=True)
            grads = torch.autograd.grad(outputs, params, back)
        else:
            loss = found
            grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for param, grad in zip(params, grads, strict=True):
                param.sub_(grad, alpha=self.param_groups[0]["lr"])
        return loss


class Elsewhere(torch.optim.SGD):
    """Descends; asked to rest, it moves every parameter by one, and back."""

    def _move(self, by: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.add_(by)

    def eval(self) -> None:
        self._move(1.0)

    def train(self) -> None:
        self._move(-1.0)


class Averaging(torch.optim.SGD):
    """Descends; inside ``averaged``, every parameter is zero."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        params = [param for group in self.param_groups for param in group["params"]]
        kept = [param.detach().clone() for param in params]
        with torch.no_grad():
            for param in params:
                param.zero_()
        yield
        with torch.no_grad():
            for param, value in zip(params, kept, strict=True):
                param.copy_(value)


def slow_bias(model: nn.Linear, lr: float) -> list[dict[str, Any]]:
    return [{"params": [model.weight]}, {"params": [model.bias], "lr": lr}]


def normalized(model: nn.Module) -> None:
    parametrizations.weight_norm(model)


def nothing_new(model: nn.Module) -> None:
    pass


def ridge(model: nn.Module, strength: float) -> Callable[[], Tensor]:
    return lambda: strength * sum((param**2).sum() for param in model.parameters())  # type: ignore[return-value]


def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
    parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 40), (40, 50), (50, 60))]
    return Task("line", lambda: nn.Linear(3, 1), Data(*parts), functional.mse_loss, r2)


SGD = Recipe(
    optimizer="torch.optim:SGD",
    optimizer_settings={"lr": 0.1},
    schedule=None,
    schedule_settings={},
    batch_size=10,
    epochs=STEPS / 4,
)


def trained(**changes: Any) -> nn.Module:
    return fit(task().build(0), task(), SGD.replace(**changes), seed=2).model


def naive(
    after: Callable[[nn.Module, int], None] = lambda model, step: None,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    lrs: tuple[float, float] = (0.1, 0.1),
) -> nn.Module:
    """The same training by hand."""
    model = task().build(0)
    x, y = task().data.train.tensors  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(2)
    step = 0
    for _ in range(STEPS // 4):
        for index in torch.randperm(40, generator=generator).split(10):
            value = functional.mse_loss(model(x[index]), y[index])
            if loss is not None:
                value = value + loss(model, x[index], y[index])
            grads = torch.autograd.grad(value, [model.weight, model.bias])
            for param, grad, lr in zip((model.weight, model.bias), grads, lrs, strict=True):
                param.grad = grad
                param.data = param.data - lr * grad * (0.5**step if after is halve else 1.0)
            step += 1
            after(model, step)
    return model


def halve(model: nn.Module, step: int) -> None:
    """Marks a training whose gradients are halved with each step."""


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.allclose(x, y, rtol=1e-5, atol=1e-6) for (a, x), (b, y) in pairs)


def test_a_clip_is_called_after_every_backward_pass() -> None:
    assert same(trained(clip=f"{HERE}:Clip"), naive(halve))
    assert not same(trained(), naive(halve))


def test_a_clip_is_resumed(tmp_path: Path) -> None:
    recipe = SGD.replace(clip=f"{HERE}:Clip", clip_settings={"start": 2.0})
    whole = fit(task().build(0), task(), recipe).model

    def stop(record: Any) -> None:
        if record.step == 6:
            raise KeyboardInterrupt

    place = tmp_path / "checkpoint"
    settings: dict[str, Any] = {"checkpoint": place, "checkpoint_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        fit(task().build(0), task(), recipe, callbacks=[stop], **settings)
    resumed = fit(task().build(0), task(), recipe, **settings).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_an_average_acts_at_the_end_of_each_epoch() -> None:
    state: dict[str, Any] = {}

    def switch(model: nn.Module, step: int) -> None:
        if not state:
            state["average"] = MovingAverage(task().build(0), 0.5)
        state["average"].update(model)
        if step % 4 == 0:
            state["average"].put_into(model)

    assert same(trained(average=0.5, average_method=f"{HERE}:Switching"), naive(switch))


@pytest.mark.parametrize("kind", ["graph", "outputs"])
def test_an_optimizer_gets_the_closure_that_it_asks_for(kind: str) -> None:
    model = trained(optimizer=f"{HERE}:Descent", optimizer_settings={"lr": 0.1, "kind": kind})
    assert same(model, naive())


def test_an_optimizer_that_asks_for_the_model_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        Descent,
        "__setattr__",
        lambda self, name, value: seen.append((name, value)) or object.__setattr__(self, name, value),
    )
    model = task().build(0)
    fit(model, task(), SGD.replace(optimizer=f"{HERE}:Descent"))
    assert dict(seen)["model"] is model


def test_an_optimizer_rests_where_it_is_to_be_evaluated() -> None:
    result = fit(task().build(0), task(), SGD.replace(optimizer=f"{HERE}:Elsewhere"), seed=2)
    there = copy.deepcopy(naive())
    with torch.no_grad():
        for param in there.parameters():
            param.add_(1.0)
    assert same(result.model, there), "training went on from where it was, and ended at rest"


def test_an_optimizer_that_keeps_an_average_is_evaluated_there() -> None:
    result = fit(task().build(0), task(), SGD.replace(optimizer=f"{HERE}:Averaging"), seed=2)
    assert all(value.detach().abs().max() == 0 for value in result.model.parameters())
    assert result.history[-1].val_score == evaluate(result.model, task(), "val")
    assert result.history[-1].train_loss < result.history[0].train_loss, "training went on elsewhere"


def test_a_parameterization_is_used_and_folded_back() -> None:
    model = trained(parameterization=f"{HERE}:normalized", optimizer_settings={"lr": 0.05})
    assert type(model) is nn.Linear
    assert list(model.state_dict()) == ["weight", "bias"]
    by_hand = task().build(0)
    normalized(by_hand)
    fit(by_hand, task(), SGD.replace(optimizer_settings={"lr": 0.05}), seed=2)
    assert torch.allclose(model.weight, by_hand.weight)
    assert not same(model, trained(optimizer_settings={"lr": 0.05}))


def test_a_parameterization_that_was_there_stays() -> None:
    by_hand = task().build(0)
    normalized(by_hand)
    fit(by_hand, task(), SGD.replace(parameterization=f"{HERE}:nothing_new", optimizer_settings={"lr": 0.01}))
    assert parametrize.is_parametrized(by_hand, "weight")


def test_a_parameterization_gives_groups() -> None:
    model = trained(parameterization=f"{HERE}:slow_bias", parameterization_settings={"lr": 0.01})
    assert same(model, naive(lrs=(0.1, 0.01)))


def test_a_penalty_is_added_to_the_loss() -> None:
    model = trained(penalty=f"{HERE}:ridge", penalty_settings={"strength": 0.1})
    by_hand = naive(loss=lambda inner, x, y: 0.1 * sum((param**2).sum() for param in inner.parameters()))
    assert same(model, by_hand)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": f"{HERE}:Clip", "clip_norm": 1.0}, "Recipe.clip must be None where clip_norm is given"),
        ({"clip": f"{HERE}:nothing"}, "cannot be imported"),
        ({"clip": f"{HERE}:Clip", "clip_settings": {"stop": 1}}, "refuses the settings"),
        ({"penalty": f"{HERE}:normalized"}, "must give something to call"),
        ({"average": 0.9, "average_method": f"{HERE}:ridge"}, "cannot average weights"),
        ({"parameterization": f"{HERE}:slow_bias"}, "refuses the settings"),
        (
            {"optimizer": f"{HERE}:Descent", "clip": f"{HERE}:Clip"},
            "takes derivatives on its own, so nothing can be clipped",
        ),
        (
            {
                "optimizer": f"{HERE}:Descent",
                "optimizer_settings": {"kind": "outputs"},
                "penalty": f"{HERE}:ridge",
                "penalty_settings": {"strength": 1.0},
            },
            "takes no penalty",
        ),
        (
            {
                "schedule": "torch.optim.lr_scheduler:OneCycleLR",
                "schedule_settings": {"max_lr": 0.1, "total_steps": 1},
            },
            "is given 1 iterations, but the fit has",
        ),
    ],
)
def test_what_cannot_be_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        trained(**changes)


def test_a_peak_that_is_not_given_is_the_optimizers_rate() -> None:
    rates = (1e-4, 3e-2)
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates])
    schedule = make_schedule(Recipe(), optimizer, 50)
    assert schedule is not None
    seen = []
    for _ in range(50):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [max(column) for column in zip(*seen, strict=True)] == pytest.approx(rates, rel=0.02)


def test_an_optimizer_that_observes_sees_two_halves() -> None:
    inputs, targets = torch.randn(12, 3), torch.randn(12, 1)
    data = Data(
        TensorDataset(inputs, targets), TensorDataset(inputs[:3], targets[:3]), TensorDataset(inputs[3:6], targets[3:6])
    )
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    task = Task("halves", lambda: copy.deepcopy(model), data, functional.mse_loss, r2)
    plain = Recipe(optimizer="torch.optim:SGD", optimizer_settings={"lr": 0.1}, schedule=None, batch_size=7, epochs=6)
    settings = {"base_settings": {"lr": 0.1}, "first": ["2"], "interval": 2, "momentum": 0.5}
    recipe = plain.replace(optimizer="netwright.optim:AGVM.over", optimizer_settings=settings)

    whole = fit(task.build(), task, plain, seed=3, validate=False).model
    idle = recipe.replace(optimizer_settings={**settings, "start": 1000})
    unscaled = fit(task.build(), task, idle, seed=3, validate=False).model
    for one, two in zip(whole.parameters(), unscaled.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)

    found = fit(task.build(), task, recipe, seed=3, validate=False).model
    hand = copy.deepcopy(model)
    groups = module_groups(hand, "2")
    optimizer = AGVM(torch.optim.SGD(groups, lr=0.1), interval=2, momentum=0.5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        batch = torch.randperm(12, generator=generator)[:7]
        optimizer.zero_grad()
        for half in (batch[:4], batch[4:]):
            loss = functional.mse_loss(hand(inputs[half]), targets[half]) * len(half) / 7
            loss.backward()
            optimizer.observe()
        optimizer.step()
    assert optimizer.scales[1] != 1.0
    for one, two in zip(hand.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_a_parameterization_is_resumed(tmp_path: Path) -> None:
    recipe = SGD.replace(parameterization="netwright.param:BackwardModulation")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 3, generator=generator)
    parts = [TensorDataset(x[a:b], x[a:b, :1]) for a, b in ((0, 40), (40, 50), (50, 60))]

    def deep() -> nn.Module:
        layers = [layer for _ in range(4) for layer in (nn.Linear(3, 3), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(3, 1))

    found = Task("deep", deep, Data(*parts), functional.mse_loss, r2)

    def stop(record: Any) -> None:
        if record.step == 6:
            raise KeyboardInterrupt

    for steps in (4, 8):  # modulation has ended before the interruption, or ends after it
        asked = recipe.replace(parameterization_settings={"steps": steps})
        whole = fit(found.build(0), found, asked).model
        place = tmp_path / f"checkpoint-{steps}"
        settings: dict[str, Any] = {"checkpoint": place, "checkpoint_seconds": 0.0}
        with pytest.raises(KeyboardInterrupt):
            fit(found.build(0), found, asked, callbacks=[stop], **settings)
        resumed = fit(found.build(0), found, asked, **settings).model
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        always = fit(found.build(0), found, recipe).model
        assert not torch.equal(next(whole.parameters()), next(always.parameters())), "it did end"


def stopping(at: int) -> Callable[[Any], None]:
    def stop(record: Any) -> None:
        if record.step == at:
            raise KeyboardInterrupt

    return stop


def test_a_recipe_that_no_checkpoint_can_hold_is_refused_at_the_start(tmp_path: Path) -> None:
    settings = {"base": torch.optim.SGD, "lr": 0.1}
    recipe = SGD.replace(optimizer="netwright.optim:OptEx.over", optimizer_settings=settings)
    model, seen = task().build(0), []
    with pytest.raises(RecipeError, match=r"optimizer_settings\['base'\]"):
        fit(model, task(), recipe, checkpoint=tmp_path / "state", callbacks=[seen.append])
    assert not seen
    fit(model, task(), recipe)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("method", ["weight_conditioning", "BackwardModulation", "mup"])
def test_a_parameterized_fit_that_was_cut_short_starts_again_with_the_same_model(
    tmp_path: Path, method: str, saved: bool
) -> None:
    def network(width: int = 6) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    torch.manual_seed(0)
    model = network()
    base = {"base": {name: list(value.shape) for name, value in network(2).named_parameters()}}
    recipe = SGD.replace(
        parameterization=f"netwright.param:{method}",
        parameterization_settings=base | {"lr": 0.01} if method == "mup" else {},
    )
    whole = fit(copy.deepcopy(model), task(), recipe, seed=2).model
    settings: dict[str, Any] = {"seed": 2, "checkpoint": tmp_path / "state"}
    given = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, task(), recipe, callbacks=[stopping(6)], checkpoint_seconds=0.0 if saved else 1e6, **settings)
    assert same(model, given)
    assert not model._forward_hooks
    fit(model, task(), recipe, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_a_parameterized_fit_that_was_cut_short_leaves_what_it_learned_in_plain_weights() -> None:
    recipe = SGD.replace(parameterization=f"{HERE}:normalized", optimizer_settings={"lr": 0.05})
    model = task().build(0)
    with pytest.raises(KeyboardInterrupt):
        fit(model, task(), recipe, callbacks=[stopping(6)])
    assert list(model.state_dict()) == ["weight", "bias"]
    assert not same(model, task().build(0))
    refused = recipe.replace(optimizer_settings={"rate": 0.05})
    with pytest.raises(RecipeError, match="refuses the settings"):
        fit(model, task(), refused)
    assert not parametrize.is_parametrized(model)
