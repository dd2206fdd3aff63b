"""Where a fit evaluates and ends: at the optimizer's average, also within a wrapper, with zeros that stay zero."""

from typing import Any

import pytest
import torch
from torch import nn

from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.optimization import at_rest
from netwright.core.recipe import Recipe
from netwright.core.task import Task, load_task
from netwright.optim import AGVM, DoG, OptEx, UDoG

HERE = __name__
SETTINGS = {"initial_movement": 0.1}


class Shifted(torch.optim.SGD):
    """Is evaluated one half above where it trains, as said by ``eval`` and ``train``."""

    def shift(self, by: float) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.add_(by)

    def eval(self) -> None:
        self.shift(0.5)

    def train(self) -> None:
        self.shift(-0.5)


def thinned(task: Task) -> nn.Module:
    """A model of which half the weights of each matrix are zero."""
    model = task.build(seed=0)
    for param in model.parameters():
        if param.ndim > 1:
            param.data[param.data.abs() < param.data.abs().median()] = 0.0
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "netwright.optim:DoG", "optimizer_settings": SETTINGS},
        {"optimizer": "netwright.optim:DoG", "optimizer_settings": SETTINGS, "average": 0.5},
        {"optimizer": "netwright.optim:UDoG", "optimizer_settings": SETTINGS},
        {"optimizer": f"{HERE}:Shifted", "optimizer_settings": {"lr": 0.1}},
        {
            "optimizer": "netwright.optim:OptEx.over",
            "optimizer_settings": {"base": "netwright.optim:DoG", "base_settings": SETTINGS, "parallelism": 2},
        },
        {"optimizer": "torch.optim:SGD", "average": 0.9, "average_method": "netwright.optim:SwitchEMA"},
    ],
)
def test_zeros_stay_where_the_optimizer_or_the_fit_averages(changes: dict[str, Any]) -> None:
    task = load_task("breast-cancer")
    model = thinned(task)
    gone = [param == 0 for param in model.parameters() if param.ndim > 1]
    result = fit(model, task, Recipe(schedule=None, epochs=2, keep_zeros=True, **changes))
    matrices = [param for param in result.model.parameters() if param.ndim > 1]
    assert all(torch.equal(place, param == 0) for place, param in zip(gone, matrices, strict=True))
    assert result.history[-1].val_score == evaluate(result.model, task, "val")


def test_an_evaluation_between_leaves_training_as_it_was() -> None:
    task = load_task("breast-cancer")
    recipe = Recipe(f"{HERE}:Shifted", {"lr": 0.1}, schedule=None, epochs=2, keep_zeros=True)
    found = [fit(thinned(task), task, recipe, validate=validate).model for validate in (False, True)]
    for one, two in zip(*(model.parameters() for model in found), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [AGVM, OptEx, lambda inner: OptEx(AGVM(inner))])
def test_a_wrapped_optimizer_rests_where_the_inner_one_does(wrap: Any) -> None:
    weight = torch.tensor([3.0, -2.0], requires_grad=True)
    inner = DoG([weight], initial_movement=0.1, average=1.0)
    outer = wrap(inner)

    def closure() -> torch.Tensor:
        outer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    for _ in range(4):
        outer.step(closure)
    here = weight.detach().clone()
    with inner.averaged():
        there = weight.detach().clone()
    assert not torch.equal(here, there)
    with at_rest(outer):
        assert torch.equal(weight, there)
    assert torch.equal(weight, here)


def test_a_wrapped_optimizer_that_says_it_by_eval_and_train() -> None:
    weight = torch.zeros(2, requires_grad=True)
    with at_rest(OptEx(AGVM(Shifted([weight], lr=0.1)))):
        assert weight.tolist() == [0.5, 0.5]
    assert weight.tolist() == [0.0, 0.0]


def test_an_optimizer_without_another_place_rests_where_it_is() -> None:
    weight = torch.ones(2, requires_grad=True)
    for optimizer in (torch.optim.SGD([weight]), AGVM(torch.optim.SGD([weight])), UDoG([weight])):
        with at_rest(optimizer):
            assert torch.equal(weight, torch.ones(2))
