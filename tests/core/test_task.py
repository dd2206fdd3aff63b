"""Tasks: what they refuse, how they build, and how they are found by name."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.errors import DataError, TaskError
from netwright.core.task import FILE_MODULE, Task, builtin_tasks, load_task


def data() -> Data:
    def split(seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        return TensorDataset(torch.randn(6, 4, generator=generator), torch.arange(6) % 2)

    return Data(split(0), split(1), split(2))


def make(**changes: Any) -> Task:
    settings: dict[str, Any] = {
        "name": "t",
        "model": lambda: nn.Linear(4, 2),
        "data": data(),
        "loss": nn.functional.cross_entropy,
        "score": lambda outputs, targets: 0.0,
    }
    return Task(**(settings | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "name must be a non-empty string, got ''"),
        ({"name": 3}, "name must be a non-empty string, got 3"),
        ({"model": 3}, "Task 't': model must be an nn.Module or a callable .*got int"),
        ({"data": [1]}, r"data must be netwright.Data\(train, val, test\), got list"),
        ({"loss": None}, "give loss="),
        ({"score": None}, "give score="),
        ({"loss": 3}, "loss must be callable, got int"),
        ({"score": "accuracy"}, "score must be callable, got str"),
        ({"output": "logits"}, "output must be callable, got str"),
        ({"fit": 3}, "fit must be callable"),
        ({"evaluate": 3}, "evaluate must be callable"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        make(**changes)


def test_loops_of_ones_own_replace_loss_and_score() -> None:
    def fit(model: nn.Module, *, budget: float | None, seed: int, teacher: nn.Module | None = None) -> None:
        """Train nothing."""

    def evaluate(model: nn.Module, split: str) -> float:
        return 1.0

    task = make(loss=None, score=None, fit=fit, evaluate=evaluate)
    assert task.fit is fit


def test_a_seed_gives_one_network_and_the_global_state_stays() -> None:
    task = make()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, second, other = task.build(3), task.build(3), task.build(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not second
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    assert isinstance(other, nn.Linear)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    torch.manual_seed(99)
    again = task.build(3)
    assert isinstance(again, nn.Linear)
    assert torch.equal(first.weight, again.weight), "whatever the state was before"


def test_a_trained_module_is_handed_out_itself() -> None:
    model = nn.Linear(4, 2)
    task = make(model=model)
    assert task.trained
    assert task.build(5) is model
    assert not make().trained


def test_a_class_of_modules_is_a_builder() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 2)

    assert not make(model=Mine).trained
    assert isinstance(make(model=Mine).build(), Mine)


def test_a_builder_that_fails_is_named() -> None:
    def broken() -> nn.Module:
        raise ValueError("no width given")

    with pytest.raises(TaskError, match="building the model failed: ValueError: no width given"):
        make(model=broken).build()
    with pytest.raises(TaskError, match=r"must return an nn\.Module, got int"):
        make(model=lambda: 3).build()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with pytest.raises(TaskError):
        make(model=broken).build()
    assert torch.equal(torch.rand(1), expected), "a failed build leaves the random state as well"


def test_what_loss_and_score_see() -> None:
    x = torch.ones(1)
    assert make().read(x) is x
    assert make().read((x,)) is x
    assert make().read({"logits": x, "loss": None}) is x
    pair = (x, x)
    assert make().read(pair) is pair
    assert make(output=lambda result: result[1]).read((None, x)) is x
    assert make(output=lambda result: result["logits"] + 1).read({"logits": x}).item() == 2.0
    two = {"logits": x, "hidden": 2 * x}
    for output in (lambda result: result.hidden, lambda result: result[1], lambda result: result[1:][0]):
        assert make(output=output).read(two).item() == 2.0, "an exported network returns a plain dict"
    with pytest.raises(TaskError, match="raised AttributeError on a dict: There is no output 'pooled'"):
        make(output=lambda result: result.pooled).read(two)


def test_example_is_the_head_of_the_training_split() -> None:
    task = make()
    example = task.example(3)
    assert isinstance(example, Tensor)
    assert torch.equal(example, task.data.train[:3][0])  # type: ignore[misc]
    assert len(task.example(100)) == 6
    model = task.build(0)
    assert torch.equal(task.outputs(model, example), model(example))


HEAD = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from netwright.core.data import Data
from netwright.core.task import Task
split = lambda n: TensorDataset(torch.zeros(n, 4), torch.zeros(n).long())
def make():
    return Task("mine", lambda: nn.Linear(4, 2), Data(split(4), split(3), split(2)), nn.functional.cross_entropy, max)
made = make()
"""


@pytest.mark.parametrize("name", ["make", "made"])
def test_a_task_or_a_function_in_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "of_a_stranger.py"
    path.write_text(HEAD)
    task = load_task(f"{path}:{name}")
    assert task.name == "mine"
    assert FILE_MODULE + "of_a_stranger" in sys.modules
    assert sys.path[0] != str(tmp_path), "of what all else imports its folder hides nothing"


def test_a_file_imports_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text(HEAD)
    (tmp_path / "mine.py").write_text("from neighbour_of_mine import make\n")
    monkeypatch.chdir(tmp_path)
    assert load_task("mine.py:make").name == "mine"


def test_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "importable_task.py").write_text(HEAD)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_task("importable_task:made").name == "mine"
    with pytest.raises(TaskError, match="importable_task defines no 'other'"):
        load_task("importable_task:other")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise KeyError('x')", "raised KeyError while it was imported"),
        ("def task(:", "raised SyntaxError"),
        ("other = 1", "defines no 'task'. Name the Task"),
        ("task = 7", "is a int, not a netwright.Task"),
        ("def task(): return None", "is a NoneType, not a netwright.Task"),
        ("def task(): return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("def task(needed): return needed", "raised TypeError: .*needed"),
        ("from netwright.core.errors import DataError\nraise DataError('my own words')", "my own words"),
    ],
)
def test_a_file_that_gives_no_task(source: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong_task.py"
    path.write_text(source)
    expected = DataError if "DataError" in source else TaskError
    with pytest.raises(expected, match=words):
        load_task(f"{path}:task")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere", "No task 'nowhere'. Built in are breast-cancer, digits, fashion-mnist, python-source; "),
        ("", "No task ''"),
        ("gone.py:task", "No file gone.py"),
        ("no.such.module:task", "Module no.such.module cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_name_that_leads_nowhere(spec: str, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        load_task(spec)


def test_built_in_names_are_sorted() -> None:
    assert list(builtin_tasks()) == sorted(builtin_tasks())
    assert "digits" in builtin_tasks()
