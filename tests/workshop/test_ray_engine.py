"""Evaluations as Ray actors: the same interface as local workers."""

import builtins
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import pytest
import tiny
from subjects import prune, request, subject
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.errors import NetwrightError
from netwright.workshop.evaluation import Outcome
from netwright.workshop.ray_engine import RayEngine


def collect(engine: RayEngine, count: int, seconds: float = 120.0) -> list[Outcome]:
    found: list[Outcome] = []
    end = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        found.extend(engine.wait(0.5))
    return found


def actors() -> list[int]:
    """Processes in which our actors live."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "_Actor" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def own_cluster() -> Iterator[None]:
    """Inside, Ray is started on this machine alone."""
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'netwright[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


class Homesick(TensorDataset):
    """Cannot be read where it was not made."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _lost, ()


def _lost() -> None:
    raise LookupError("my files are not here")


def test_a_task_that_an_actor_cannot_read_is_no_candidates_fault() -> None:
    data = Data(*(Homesick(*part.tensors) for part in tiny.data().splits().values()))
    with own_cluster():
        made = RayEngine(replace(subject(), task=replace(tiny.task(), data=data)), 1)
        try:
            made.submit(request(0, epochs=0.05))
            with pytest.raises(NetwrightError, match=r"in a worker process: LookupError: my files are .*--resume"):
                collect(made, 1)
        finally:
            made.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    with own_cluster():
        made = RayEngine(subject(), 2)
        yield made
        made.close()  # one actor is busy
    assert actors() == []


def test_two_actors_answer_side_by_side(engine: RayEngine) -> None:
    assert engine.workers == 2
    assert engine.wait(0.01) == []
    for number in (0, 1):
        engine.submit(request(number, prune(first=0.25 * (number + 1)), epochs=0.05))
    outcomes = sorted(collect(engine, 2), key=lambda outcome: outcome.request.number)
    assert [(outcome.request.number, outcome.error) for outcome in outcomes] == [(0, None), (1, None)]
    macs = [outcome.point.cost.macs for outcome in outcomes if outcome.point is not None]
    assert macs[0] > macs[1], "each answer belongs to its request"


def test_a_killed_actor_is_a_failed_outcome_and_its_place_is_filled(engine: RayEngine) -> None:
    for number in (7, 8):
        engine.submit(request(number, epochs=1e6))
    before = actors()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    (outcome,) = collect(engine, 1)
    assert outcome.request.number in (7, 8)
    assert outcome.point is None
    assert outcome.error is not None
    assert "The Ray worker died" in outcome.error
    assert "\x1b" not in outcome.error
    engine.submit(request(9, epochs=0.05))
    (answer,) = collect(engine, 1)
    assert (answer.request.number, answer.error) == (9, None), "a new actor answers while the other one goes on"


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(NetwrightError, match=r"--engine ray needs Ray: pip install 'netwright\[ray\]'"):
        RayEngine(subject(), 1)
