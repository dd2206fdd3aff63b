"""The tutorial's and the README's Python is run as it stands, with a smaller budget."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What the README calls "your own": a trained model and three datasets.
PRELUDE = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x = x.float() / 16
train_set, val_set, test_set = (TensorDataset(x[p], y[p]) for p in (slice(900), slice(900, 1300), slice(1300, None)))
trained_model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
optimizer = torch.optim.AdamW(trained_model.parameters(), lr=2e-3)
for _ in range(100):
    batch = torch.randint(900, (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(trained_model(x[batch]), y[batch]).backward()
    optimizer.step()
"""


def blocks(path: Path) -> list[str]:
    return _BLOCK.findall(path.read_text(encoding="utf-8"))


def run(code: str, folder: Path) -> str:
    """Run ``code`` as a script in ``folder``, its budgets cut to one second."""
    shorter, count = re.subn(r'budget="\d+[smh]"', 'budget="1s"', code)
    assert count == 1
    (folder / "script.py").write_text(shorter)
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tutorial")
    return folder, run("\n".join(blocks(TUTORIAL)), folder)


def test_the_tutorial_runs_to_its_end(tutorial: tuple[Path, str]) -> None:
    folder, said = tutorial
    result = json.loads((folder / "runs" / "mine" / "result.json").read_text())
    assert result["explanation"] in said
    assert result["evaluations"] > 0
    assert result["failed"] == 0


def test_the_tutorial_prints_what_it_says(tutorial: tuple[Path, str]) -> None:
    folder, said = tutorial
    result = json.loads((folder / "runs" / "mine" / "result.json").read_text())
    assert said.count("val score") == len(result["front"])
    accuracies = {name: float(value) for name, value in re.findall(r"^(\S+) on the test split: ([\d.]+)$", said, re.M)}
    assert set(accuracies) == {"model.onnx", "model.pt2"}
    point = result["chosen"] or result["baseline"]
    assert accuracies["model.onnx"] == pytest.approx(point["score"]["test"], abs=1e-3)
    assert accuracies["model.pt2"] == pytest.approx(accuracies["model.onnx"], abs=0.03)


def test_the_files_that_the_tutorial_names_are_there(tutorial: tuple[Path, str]) -> None:
    folder, _ = tutorial
    named = set(re.findall(r"`(\w+\.(?:json|onnx|pt2|safetensors|html))`", TUTORIAL.read_text()))
    assert {"model.onnx", "model.pt2", "result.json", "report.html"} <= named
    assert _files(folder) >= named


def test_the_page_of_the_command_line_names_every_file_of_a_run(tutorial: tuple[Path, str]) -> None:
    table = (ROOT / "docs" / "cli.md").read_text().split("## The run directory")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    passing = {"baseline.checkpoint", "baseline-training.json", "final-*"}  # until what they are for is done
    assert listed == _files(tutorial[0]) | passing


def _files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs" / "mine").iterdir() if not path.name.startswith(".")}


def test_the_example_in_the_readme(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "README.md")
    assert len(example.splitlines()) <= 15
    run(PRELUDE + example, tmp_path)
    assert (tmp_path / "runs" / "mine" / "result.json").exists()
