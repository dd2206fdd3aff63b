"""Sub-networks of a task, gone on with after a stop, and folders that move or fill up."""

import errno
import os
from pathlib import Path

import pytest
import torch
from optuna.distributions import IntDistribution
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.errors import RunDirectoryError
from netwright.core.task import Task
from netwright.search import SearchSpace, explore

GOALS = ("score", "macs")


class Stack:
    """A super-network of a user's own: the number of layers."""

    space = SearchSpace({"depth": IntDistribution(1, 3)})

    def __init__(self):
        torch.manual_seed(0)
        self.layers, self.head = [nn.Linear(4, 4) for _ in range(3)], nn.Linear(4, 3)

    def extract(self, params):
        return nn.Sequential(*self.layers[: params["depth"]], self.head)


def task(before=lambda: None):
    def split(seed):
        inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(inputs, torch.arange(24) % 3)

    def score(output, target):
        before()
        return float((output.argmax(1) == target).float().mean())

    return Task("own", nn.Linear(4, 3), Data(split(0), split(1), split(2)), nn.functional.cross_entropy, score)


def test_a_search_that_was_stopped_before_it_began_is_gone_on_with(tmp_path):
    explore(task(), Stack(), objectives=GOALS, evaluations=1, out=tmp_path)
    for path in (tmp_path / "search").iterdir():
        path.unlink()
    (tmp_path / "search" / ".lock").touch()
    found = explore(task(), Stack(), objectives=GOALS, evaluations=2, out=tmp_path, resume=True)
    assert len(found.result.evaluations) == 2


def test_a_task_may_change_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    moving = task(lambda: os.chdir(tmp_path / "other"))
    found = explore(moving, Stack(), objectives=GOALS, evaluations=2, out="run")
    assert {path.parent for path in found.front.values()} == {tmp_path / "run" / "front"}
    assert all(path.is_file() for path in found.front.values())
    assert not any((tmp_path / "other").iterdir())


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    made = Path.mkdir

    def full(path, *args, **kwargs):
        if path.name == "front":
            raise OSError(errno.ENOSPC, "No space left on device")
        made(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RunDirectoryError, match="front: No space left on device"):
        explore(task(), Stack(), objectives=GOALS, evaluations=1, out=tmp_path / "run")
