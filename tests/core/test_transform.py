"""Chains of transforms."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.task import Task
from netwright.core.transform import Chain, Transform


@dataclass(frozen=True)
class Noted:
    """Adds a number to the bias and notes how it was called."""

    amount: float
    calls: list[tuple[float | None, int]] = field(default_factory=list)

    def __call__(self, model: nn.Module, task: Task, *, budget: Any = None, seed: int = 0, progress: Any = None) -> Any:
        self.calls.append((budget, seed))
        if progress is not None:
            progress(0.0, f"adding {self.amount}")
            progress(1.0, "added")
        made = nn.Linear(4, 2)
        made.load_state_dict(model.state_dict())
        with torch.no_grad():
            made.bias.mul_(2).add_(self.amount)
        return made


def task() -> Task:
    split = [TensorDataset(torch.zeros(2, 4), torch.zeros(2).long()) for _ in range(3)]
    return Task("t", nn.Linear(4, 2), Data(*split), nn.functional.cross_entropy, lambda o, t: 0.0)


def test_steps_are_applied_in_order_to_copies() -> None:
    model = nn.Linear(4, 2)
    nn.init.zeros_(model.bias)
    made = Chain([Noted(1.0), Noted(10.0)])(model, task())
    assert made.bias.tolist() == [12.0, 12.0]  # (0 * 2 + 1) * 2 + 10
    assert model.bias.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("budget", "share"), [(6.0, 2.0), (None, None), (0.3, pytest.approx(0.1))])
def test_the_budget_is_shared_and_seeds_follow(budget: float | None, share: Any) -> None:
    steps = [Noted(0.0), Noted(0.0), Noted(0.0)]
    Chain(steps)(nn.Linear(4, 2), task(), budget=budget, seed=7)
    assert [step.calls for step in steps] == [[(share, 7)], [(share, 8)], [(share, 9)]]


@dataclass(frozen=True)
class Training(Noted):
    """Says that it trains."""

    trains: bool = True


@pytest.mark.parametrize(("budget", "shares"), [(6.0, [0.0, 3.0, 0.0, 3.0]), (None, [None] * 4)])
def test_the_budget_goes_to_the_steps_that_train(budget: float | None, shares: list[float | None]) -> None:
    steps = [Noted(0.0), Training(0.0), Training(0.0, trains=False), Training(0.0)]
    chain = Chain(steps)
    chain(nn.Linear(4, 2), task(), budget=budget)
    assert [step.calls[0][0] for step in steps] == shares
    assert chain.trains
    assert not Chain(steps[:1]).trains


def test_a_chain_within_a_chain_trains_where_one_of_its_steps_does() -> None:
    first, second, third = Noted(0.0), Noted(0.0), Training(0.0)
    Chain([first, Chain([second, third])])(nn.Linear(4, 2), task(), budget=6.0)
    assert [step.calls[0][0] for step in (first, second, third)] == [0.0, 0.0, 6.0]


def test_progress_runs_through_all_steps() -> None:
    told: list[tuple[float, str]] = []
    Chain([Noted(1.0), Noted(2.0)])(nn.Linear(4, 2), task(), progress=lambda f, what: told.append((f, what)))
    assert told == [(0.0, "adding 1.0"), (0.5, "added"), (0.5, "adding 2.0"), (1.0, "added")]


def test_a_chain_is_a_transform_and_may_stand_in_a_chain() -> None:
    inner = [Noted(1.0), Noted(2.0)]
    outer = Chain([Chain(inner), Noted(3.0)])
    assert isinstance(outer, Transform)
    outer(nn.Linear(4, 2), task(), budget=8.0, seed=1)
    assert [step.calls for step in inner] == [[(2.0, 1)], [(2.0, 2)]]
    assert isinstance(outer.steps, tuple)


def test_chains_of_equal_steps_are_equal() -> None:
    assert Chain([Noted(1.0)]) == Chain((Noted(1.0),))
    assert Chain([Noted(1.0)]) != Chain([Noted(2.0)])


@pytest.mark.parametrize(("steps", "words"), [([], "at least one step"), ([Noted(1.0), "prune"], "got str")])
def test_a_chain_of_nothing_or_of_no_transforms_is_refused(steps: list[Any], words: str) -> None:
    with pytest.raises(TransformError, match=words):
        Chain(steps)


def test_an_error_of_a_step_comes_through() -> None:
    def broken(model: nn.Module, task: Task, **more: Any) -> nn.Module:
        raise TransformError("nothing to do")

    with pytest.raises(TransformError, match="nothing to do"):
        Chain([Noted(1.0), broken])(nn.Linear(4, 2), task())
