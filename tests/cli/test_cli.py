"""The commands, from the outside."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from netwright import catalog
from netwright.cli.app import app
from netwright.cli.main import COMMANDS as MODULES
from netwright.version import __version__

TASKS = Path(__file__).with_name("bad_tasks.py")
COMMANDS = ("optimize", "compress", "search", "train", "measure", "methods", "replay", "report", "doctor")


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_version() -> None:
    assert invoke("--version") == f"netwright {__version__}\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(flag: str) -> None:
    text = plain(invoke(flag))
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_documents_every_option(command: str) -> None:
    text = plain(invoke(command, "-h"))
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    assert found.help
    for parameter in found.params:
        if parameter.name == "help":
            continue
        assert parameter.help, f"{command}: {parameter.name} has no help"
        for name in parameter.opts if parameter.param_type_name == "option" else []:
            assert name in text


def test_commands_are_those_that_are_tested() -> None:
    assert set(get_command(app).commands) == set(COMMANDS)  # type: ignore[attr-defined]
    assert {module.__name__.rpartition(".")[2] for module in MODULES} == set(COMMANDS)


def test_methods_lists_the_catalogue() -> None:
    listed = json.loads(invoke("methods", "--json"))
    assert [row["object"] for row in listed["steps"]] == [step.object for step in catalog.steps()]
    assert {"netwright.compress:Prune", "netwright.compress:Int8"} <= {row["object"] for row in listed["steps"]}
    assert len(listed["methods"]) == len(catalog.load())
    assert "netwright.compress:Prune" in plain(invoke("methods"))


def test_doctor_passes_its_own_test() -> None:
    found = json.loads(invoke("doctor", "--json"))
    assert found["self_test"]["passed"] is True
    assert found["self_test"]["shrink_error"] < 1e-4
    assert found["machine"]["cores"] >= 1
    assert found["packages"]["torch"]
    assert found["tasks"]["digits"] == "ready"


def test_measure_agrees_with_the_model() -> None:
    found = json.loads(invoke("measure", "breast-cancer", "--json", "--seconds", "0.1", "--batch", "3"))
    for runtime in ("onnxruntime", "torch"):
        cost = found[runtime]
        assert cost["latency_ms"]["runtime"] == runtime
        assert cost["latency_ms"]["batch"] == 3
        assert 0 < cost["latency_ms"]["p10"] <= cost["latency_ms"]["median"] <= cost["latency_ms"]["p90"]
        assert cost["size_bytes"] > 4 * cost["parameters"]
    assert found["onnxruntime"]["parameters"] == found["torch"]["parameters"]
    assert 0.5 < found["self_ratio"]["median"] < 2


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--target", "latency<=0.5x", "--target", "size<=20KB", "--budget", "2m", "--workers", "3"]
    text = invoke("optimize", f"{TASKS}:good", *words, "--dry-run")
    assert "32 training, 16 validation, 16 test items" in text
    assert "58 parameters" in text
    assert "latency<=0.5x, size<=20KB; keep score>=-0.01" in text
    assert "about 120 s, on 3 workers (local)" in text
    assert "8 " in next(line for line in text.splitlines() if line.startswith("  0:"))
    assert "Space: prune, int8, int4, codebooks; about" in text, "it has no branches"
    assert "Space: prune, int8; about" in invoke("optimize", f"{TASKS}:good", *words[:2], "--dry-run"), "no size"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["optimize", "digits"],
        ["optimize", "digits", "--target", "latency<=0.5x", "--engine", "steam"],
        ["optimize", "digits", "--target", "latency<=0.5x", "--workers", "0"],
        ["measure", "digits", "--batch", "0"],
        ["polish"],
    ],
)
def test_wrong_options_end_with_two(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_as_a_program_an_error_is_one_line_and_code_two(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "netwright", "optimize", "nowhere", "--target", "latency<=0.5x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: No task 'nowhere'.")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_folder_is_where_the_user_stands_whatever_the_task_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine.py").write_text(
        f"import os\nimport sys\nsys.path.insert(0, {str(TASKS.parent)!r})\nfrom bad_tasks import good as task\n"
        f"os.chdir({str(tmp_path / 'elsewhere')!r})\n"
    )
    recipe = json.dumps({"epochs": 1})
    (tmp_path / "recipe.json").write_text(recipe)

    def go(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        return plain(invoke(words[0], "mine.py:task", *words[1:]))

    go("train", "--out", "trained", "--recipe", "recipe.json")
    go("train")
    go("compress", "--method", "Prune", "--set", "ratios=0.25", "--epochs", "0.5", "--out", "compressed")
    go("search", "--evaluations", "1", "--epochs", "0.5", "--out", "searched")
    go("measure", "--weights", "trained/model.safetensors", "--seconds", "0.05")
    assert f"Run directory: {tmp_path / 'optimized'}." in go(
        "optimize", "--target", "macs<=0.5x", "--out", "optimized", "--dry-run"
    )
    for place in ("trained/report.html", "runs/train-mine.py-task", "compressed/Prune.onnx", "searched/report.html"):
        assert (tmp_path / place).exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_train_compares_and_reports(tmp_path: Path) -> None:
    words = ("train", "breast-cancer", "--set", "epochs=1", "--compare", "sgd,adamw", "--lrs", "1e-3,1e-2")
    planned = json.loads(invoke(*words, "--dry-run"))
    assert [entry["name"] for entry in planned] == ["sgd", "sgd", "adamw", "adamw"]
    assert [entry["optimizer_settings"]["lr"] for entry in planned] == [1e-3, 1e-2] * 2
    place = tmp_path / "run"
    said = plain(invoke(*words, "--out", str(place)))
    assert "adamw" in said
    assert str(place / "report.html") in said
    result = json.loads((place / "training.json").read_text())
    assert len(result["trainings"]) == 4
    page = (place / "report.html").read_text()
    assert "did best on the validation set" in page
    assert "https://" not in page.partition("<script")[0]
    (place / "report.html").unlink()
    assert invoke("report", str(place)).strip() == str(place / "report.html")
    again = plain(invoke(*words, "--out", str(place), "--resume"))
    assert "adamw" in again
    assert json.loads(invoke("report", str(place), "--json")) == result
    (tmp_path / "begun").mkdir()
    for name in ("run.json", "trainings.jsonl"):
        (tmp_path / "begun" / name).write_bytes((place / name).read_bytes())
    state = json.loads(invoke("report", str(tmp_path / "begun"), "--json"))
    assert (state["status"], len(state["trainings"])) == ("unfinished", 4)
    recipe = place / "recipe.json"
    shown = json.loads(invoke("train", "breast-cancer", "--recipe", str(recipe), "--dry-run"))
    assert shown[0]["epochs"] == 1
    recipe.write_text(json.dumps({"task": "breast-cancer", "steps": [], "training": json.loads(recipe.read_text())}))
    assert json.loads(invoke("train", "breast-cancer", "--recipe", str(recipe), "--dry-run")) == shown


def test_compress_tells_methods_of_one_name_apart() -> None:
    words = ("compress", "breast-cancer", "--method", "Int8", "--method", "netwright.compress.quantize:Int8")
    assert list(json.loads(invoke(*words, "--dry-run"))) == ["Int8", "netwright.compress.quantize.Int8"]


def test_compress_compares_and_resumes(tmp_path: Path) -> None:
    words = ("compress", "breast-cancer", "--method", "Prune", "--method", "netwright.compress:Int8")
    words = (*words, "--set", "Prune.ratios=0.25", "--epochs", "1")
    planned = json.loads(invoke(*words, "--dry-run"))
    assert planned["Prune"]["settings"]["ratios"] == 0.25
    assert planned["Int8"]["method"] == "netwright.compress.quantize:Int8"
    place = tmp_path / "run"
    said = plain(invoke(*words, "--out", str(place)))
    assert said.splitlines()[0].split()[:2] == ["Method", "Val"]
    assert {path.name for path in place.glob("*.onnx")} == {"baseline.onnx", "Prune.onnx", "Int8.onnx"}
    again = json.loads(invoke(*words, "--out", str(place), "--resume", "--json"))
    assert [row["name"] for row in again["rows"]] == ["Prune", "Int8"]
