"""The examples run from the command line as their first lines say, with a small budget."""

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMMANDS = {
    "own_model.py": ["own_model.py", "1s", "run"],
    "own_loop.py": ["own_loop.py", "1s", "run"],
    "task_file.py": [
        *("-m", "netwright", "optimize", "task_file.py:task", "--target", "size<=0.3x"),
        *("--keep", "score>=-0.05", "--budget", "1s", "--out", "run"),
    ],
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(COMMANDS)


def test_the_own_model_takes_less_than_40_lines() -> None:
    assert len((EXAMPLES / "own_model.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("name", COMMANDS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    words = [str(EXAMPLES / word) if word.startswith(name) else word for word in COMMANDS[name]]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in ((0, 3) if "-m" in words else (0,)), done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] in ("met", "not_met")
    assert result["evaluations"] > 0
    assert result["failed"] == 0, (tmp_path / "run" / "evaluations.jsonl").read_text()
    assert result["explanation"] in done.stdout
    assert (tmp_path / "run" / "report.html").exists()
    onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx")
