"""Modules beside a task file: seen by the file, by what it runs later, and by other processes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from netwright.core.errors import TaskError
from netwright.core.neighbours import neighbours
from netwright.core.portable import packed
from netwright.core.task import load_task

NET = """
from torch import nn
class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, WIDTH)
"""
TASK = """
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from netwright.core.data import Data
from netwright.core.task import Task
IMPORTS
split = lambda n: TensorDataset(torch.zeros(n, 4), torch.zeros(n).long())
def made(model):
    return Task("mine", model, Data(split(4), split(3), split(2)), cross_entropy, max)
"""
AT_TOP = TASK.replace("IMPORTS", "from mynet import Net") + "task = made(Net)\n"
IN_FUNCTION = TASK.replace("IMPORTS", "") + "def task():\n    from mynet import Net\n    return made(Net)\n"
IN_BUILDER = (
    TASK.replace("IMPORTS", "") + "def build():\n    from mynet import Net\n    return Net()\ntask = made(build)\n"
)
OTHER = """
import sys, cloudpickle
from netwright.core.portable import unpacked
with open(sys.argv[1], "rb") as file:
    path, inner = unpacked(file.read())
sys.path.extend(path)
model = cloudpickle.loads(inner).build()
print(type(model).__name__, model.out_features)
"""


@pytest.fixture(autouse=True)
def _imports_as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) & neighbours().keys() - before:
        del sys.modules[name]


def written(folder: Path, task: str = AT_TOP, width: int = 3) -> str:
    folder.mkdir()
    (folder / "mynet.py").write_text(NET.replace("WIDTH", str(width)))
    (folder / "mine.py").write_text(task)
    return f"{folder}/mine.py:task"


def width(model: nn.Module) -> int:
    assert isinstance(model, nn.Linear)
    return model.out_features


def elsewhere(task: object, tmp_path: Path, remove: Path | None = None) -> list[str]:
    """What a process in another folder builds of a task, ``remove`` removed before it starts."""
    payload, folder = tmp_path / "payload", tmp_path / "elsewhere"
    payload.write_bytes(packed(task, "A task"))
    folder.mkdir(exist_ok=True)
    if remove is not None:
        shutil.rmtree(remove)
    command = [sys.executable, "-c", OTHER, str(payload)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=folder)
    assert not done.returncode, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("source", [AT_TOP, IN_FUNCTION], ids=["top", "function"])
def test_another_process_and_another_machine_see_them(source: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    task = load_task(written(folder, source))
    assert elsewhere(task, tmp_path) == ["Net", "3"]
    assert elsewhere(task, tmp_path, remove=folder) == ["Net", "3"]


def test_a_module_of_a_package_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "apackage", AT_TOP.replace("from mynet", "from .mynet"))
    (tmp_path / "apackage" / "__init__.py").write_text("")
    with pytest.raises(TaskError, match=f"write apackage.mine:name from {tmp_path}"):
        load_task(f"{tmp_path}/apackage/mine.py:task")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    task = load_task("apackage.mine:task")
    assert width(task.build()) == 3
    monkeypatch.chdir("/")
    assert elsewhere(task, tmp_path) == ["Net", "3"]
    assert elsewhere(task, tmp_path, remove=tmp_path / "apackage") == ["Net", "3"]


def test_what_is_imported_only_later(tmp_path: Path) -> None:
    task = load_task(written(tmp_path / "a", IN_BUILDER))
    assert elsewhere(task, tmp_path) == ["Net", "3"]
    assert width(task.build()) == 3


def test_packages_and_a_name_that_python_has_too(tmp_path: Path) -> None:
    spec = written(tmp_path / "a", AT_TOP.replace("mynet", "this.net"))
    for package, inner in (("this", "parts"), ("noinit", "sizes")):
        (tmp_path / "a" / package).mkdir()
        (tmp_path / "a" / package / f"{inner}.py").write_text("import torch.nn as nn\nWIDTH = 5\n")
    (tmp_path / "a" / "this" / "__init__.py").write_text("")
    (tmp_path / "a" / "this" / "net.py").write_text("from .parts import nn\nfrom noinit.sizes import WIDTH\n" + NET)
    task = load_task(spec)
    assert {"this.parts", "noinit.sizes"} <= neighbours().keys()
    assert elsewhere(task, tmp_path, remove=tmp_path / "a") == ["Net", "5"], "not the poem of the standard library"


def test_a_file_that_changes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a", "import os\nos.chdir('/')\n" + IN_FUNCTION)
    monkeypatch.chdir(tmp_path)
    task = load_task("a/mine.py:task")
    assert width(task.build()) == 3
    assert elsewhere(task, tmp_path) == ["Net", "3"]


@pytest.mark.parametrize("source", [AT_TOP, IN_FUNCTION, IN_BUILDER], ids=["top", "function", "builder"])
def test_each_file_has_its_own(source: str, tmp_path: Path) -> None:
    specs = [written(tmp_path / name, source, size) for name, size in (("a", 3), ("b", 7))]
    first, (second, again) = load_task(specs[0]), [load_task(spec) for spec in (specs[1], specs[1])]
    assert [width(second.build()), width(again.build())] == [7, 7]
    assert elsewhere(second, tmp_path) == ["Net", "7"]
    if source is not IN_BUILDER:  # which looks for its neighbour anew each time
        assert width(first.build()) == 3
        assert elsewhere(first, tmp_path) == ["Net", "3"]
    assert width(load_task(specs[0]).build()) == 3
    assert [sys.path.count(str(tmp_path / name)) for name in "ab"] == [1, 1]


def test_other_modules_stay(tmp_path: Path) -> None:
    load_task(written(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "json.py").write_text("")
    (tmp_path / "b" / "mine.py").write_text(IN_FUNCTION)
    kept = {name: sys.modules[name] for name in ("mynet", "json", "json.decoder")}
    load_task(f"{tmp_path}/b/mine.py:task")
    assert all(sys.modules[name] is module for name, module in kept.items())


def test_a_folder_that_is_on_the_path_keeps_its_place(tmp_path: Path) -> None:
    spec = written(tmp_path / "a")
    sys.path.insert(1, str(tmp_path / "a"))
    before = list(dict.fromkeys(sys.path))
    load_task(spec)
    assert sys.path == before


def test_a_folder_of_the_user_s_own_stays_in_front_of_another_task(tmp_path: Path) -> None:
    load_task(written(tmp_path / "a"))
    sys.path.insert(0, str(tmp_path / "a"))
    before = list(dict.fromkeys(sys.path))
    load_task(written(tmp_path / "b"))
    assert sys.path[0] == str(tmp_path / "a")
    assert [entry for entry in sys.path if entry != str(tmp_path / "b")] == before


def test_a_file_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    before = list(sys.path)
    with pytest.raises(TaskError, match="ZeroDivisionError"):
        load_task(written(tmp_path / "a", "1 / 0"))
    assert sys.path == before
