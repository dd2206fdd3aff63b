"""Worker processes: they answer, they die, they are replaced, they end."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from subjects import prune, request, subject
from torch import Tensor, nn
from torch.utils.data import Dataset

from netwright.core.data import Data
from netwright.core.errors import NetwrightError
from netwright.core.onnx_export import export_onnx
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task, load_task
from netwright.workshop.evaluation import Outcome
from netwright.workshop.local import LocalEngine

SHORT = {"epochs": 0.05}
ENDLESS = {"epochs": 1e6}


def collect(engine: LocalEngine, count: int, seconds: float = 90.0) -> list[Outcome]:
    found: list[Outcome] = []
    end = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        found.extend(engine.wait(0.25))
    return found


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "netwright.workshop.worker" in " ".join(child.cmdline())
    ]


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine(subject(), 2)
    yield made
    made.close()


def test_two_workers_answer_side_by_side(engine: LocalEngine) -> None:
    assert engine.workers == 2
    assert len(children()) == 2
    for number in (0, 1):
        engine.submit(request(number, prune(first=0.25 * (number + 1)), **SHORT))
    outcomes = sorted(collect(engine, 2), key=lambda outcome: outcome.request.number)
    assert [outcome.request.number for outcome in outcomes] == [0, 1]
    assert [outcome.error for outcome in outcomes] == [None, None]
    macs = [outcome.point.cost.macs for outcome in outcomes if outcome.point is not None]
    assert macs[0] > macs[1], "each answer belongs to its request"
    assert engine.wait(0.01) == []


def test_a_killed_worker_is_a_failed_outcome_and_its_place_is_filled(engine: LocalEngine) -> None:
    before = [child.pid for child in children()]
    for number in (7, 8):
        engine.submit(request(number, **ENDLESS))
    os.kill(before[0], signal.SIGKILL)
    (outcome,) = collect(engine, 1)
    assert outcome.request.number in (7, 8)
    assert outcome.point is None
    assert outcome.error is not None
    assert "SIGKILL" in outcome.error
    assert "memory" in outcome.error
    engine.submit(request(9, **SHORT))
    (answer,) = collect(engine, 1)
    assert (answer.request.number, answer.error) == (9, None), "a new worker answers while the other one goes on"
    after = [child.pid for child in children()]
    assert len(after) == 2
    assert before[0] not in after
    assert before[1] in after


def orphaning(model: nn.Module, *, budget: float | None, seed: int, teacher: Any = None) -> None:
    """Starts a helper, as a loader of data does, and dies of something else."""
    helper = os.fork()
    if helper == 0:
        time.sleep(100)
        os._exit(0)
    (Path(os.environ["NETWRIGHT_TEST_PLACE"]) / str(helper)).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_worker_started_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETWRIGHT_TEST_PLACE", str(tmp_path))
    made = LocalEngine(subject(task=replace(tiny.task(), loss=None, fit=orphaning)), 1)
    try:
        made.submit(request(0, **SHORT))
        (outcome,) = collect(made, 1)
    finally:
        made.close()
    assert outcome.error is not None
    assert "SIGKILL" in outcome.error
    (helper,) = (int(entry.name) for entry in tmp_path.iterdir())
    end = time.monotonic() + 10
    while psutil.pid_exists(helper) and psutil.Process(helper).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_close_ends_busy_workers_at_once(engine: LocalEngine) -> None:
    assert len(children()) == 2
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 5
    assert children() == []


FILE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from netwright import Data, Recipe, Task

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.body(x)

def split(start):
    generator = torch.Generator().manual_seed(start)
    x = torch.randn(64, 4, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())

task = Task(
    "mine",
    Mine,
    Data(split(0), split(1), split(2)),
    loss=lambda output, target: nn.functional.cross_entropy(output, target),
    score=lambda outputs, targets: float((outputs.argmax(1) == targets).float().mean()),
    recipe=Recipe(epochs=2),
)
"""


def test_lambdas_and_classes_of_a_task_file_travel_to_workers(tmp_path: Path) -> None:
    path = tmp_path / "a_task_of_mine.py"
    path.write_text(FILE)
    task = load_task(f"{path}:task")
    path.unlink()  # a worker gets the objects themselves, not the file
    model = task.build(0).eval()
    base = replace(subject(), task=task, model=model, artifact=_artifact(model, task, tmp_path / "model.onnx"))
    made = LocalEngine(base, 1)
    try:
        step = replace(prune(), settings={"ratios": {"body.0": 0.5}})
        made.submit(request(0, step, **SHORT))
        (outcome,) = collect(made, 1)
    finally:
        made.close()
    assert outcome.error is None
    assert outcome.point is not None
    assert outcome.point.cost.macs == 4 * 4 + 4 * 2


class Homesick(Dataset):
    """Cannot be read where it was not made."""

    def __init__(self) -> None:
        self.home = os.getpid()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(4), 0

    def __setstate__(self, state: dict) -> None:
        raise LookupError("my files are not here")


def test_a_task_that_a_worker_cannot_read_is_no_candidates_fault() -> None:
    data = Data(Homesick(), Homesick(), Homesick())
    made = LocalEngine(replace(subject(), task=replace(tiny.task(), data=data)), 1)
    try:
        made.submit(request(0, **SHORT))
        cause = "^The task cannot be read in a worker process: LookupError: my files are not here. .* with --resume.$"
        with pytest.raises(NetwrightError, match=cause):
            collect(made, 1)
    finally:
        made.close()


class Locked(Dataset):
    """Holds what cannot leave its process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(4), 0


def test_a_task_that_cannot_travel_is_a_clear_error_and_starts_nothing() -> None:
    task = Task("locked", tiny.network, Data(Locked(), Locked(), Locked()), nn.functional.cross_entropy, accuracy)
    with pytest.raises(NetwrightError, match=r"Task 'locked' cannot be handed to a worker process: TypeError.*lock"):
        LocalEngine(replace(subject(), task=task), 1)
    with pytest.raises(NetwrightError, match="open files, locks or connections"):
        LocalEngine(replace(subject(), task=task), 1)


def test_a_diverging_candidate_fails_by_name_and_the_worker_goes_on() -> None:
    wild = Recipe(optimizer="torch.optim:SGD", optimizer_settings={"lr": 1e30}, schedule=None)
    made = LocalEngine(subject(recipe=wild), 1)
    try:
        pids = [child.pid for child in children()]
        made.submit(request(0, epochs=1.0))
        (failed,) = collect(made, 1)
        made.submit(request(1, epochs=1.0))
        (again,) = collect(made, 1)
        assert pids == [child.pid for child in children()], "the same process answers"
    finally:
        made.close()
    for outcome in (failed, again):
        assert outcome.point is None
        assert outcome.error is not None
        assert outcome.error.startswith("NonFiniteLossError: ")


def _artifact(model: nn.Module, task: Task, path: Path) -> bytes:
    export_onnx(model, task.example(2), path)
    return path.read_bytes()
