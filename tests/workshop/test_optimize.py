"""Whole runs of the main job on a small real task."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny import task

from netwright.core.errors import CorruptRunError, RunDirectoryError, RunLockedError, TargetError, TaskError
from netwright.core.front import non_dominated
from netwright.core.recipe import Recipe
from netwright.workshop import Job, Measuring, baseline, make_job, parse_keep, parse_targets, replay, run_job

TINY = f"{Path(__file__).with_name('tiny.py')}:task"


def job(out: Path, target: str = "macs<=0.9x", keep: str = "score>=-0.1", budget: float = 120.0, **more) -> Job:
    return Job(task=TINY, limits=parse_targets([target]), keep=parse_keep(keep), budget=budget, out=out, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run_job(job(out, evaluations=6))
    return out


def lines(run: Path) -> list[dict]:
    path = run / "evaluations.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def test_the_result_says_what_was_found(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["schema"] == 1
    assert result["status"] in ("met", "not_met")
    assert result["evaluations"] == 6
    assert result["failed"] == 0
    for point in [result["baseline"], result["chosen"], *result["front"]]:
        assert 0 < point["latency_ms"]["p10"] <= point["latency_ms"]["median"] <= point["latency_ms"]["p90"]
        assert point["size_bytes"] > 0
    assert result["baseline"]["score"]["test"] is not None
    assert result["chosen"]["score"]["test"] is not None
    others = [point for point in result["front"] if point not in (result["baseline"], result["chosen"])]
    assert all(point["score"]["test"] is None for point in others), "test is read for two models only"
    for name in ("macs", "parameters"):
        assert result["ratios"][name] == pytest.approx(result["chosen"][name] / result["baseline"][name])
    assert result["ratios"]["size"] == pytest.approx(result["chosen"]["size_bytes"] / result["baseline"]["size_bytes"])


def test_the_front_is_what_the_evaluations_leave(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    finals = json.loads((finished / "finals.json").read_text())
    assert {entry["trial"] for entry in finals} <= {line["trial"] for line in lines(finished)}
    assert any(entry["point"]["macs"] == result["chosen"]["macs"] for entry in finals)
    points = [entry["point"] for entry in [*lines(finished), *finals] if entry["point"]]
    points += [result["baseline"], result["chosen"]]
    values = np.array([[-point["score"]["val"], point["macs"]] for point in points])
    best = {tuple(row) for row in values[non_dominated(values)]}
    assert {(-point["score"]["val"], point["macs"]) for point in result["front"]} == best


def test_the_artifacts_agree_and_load_without_netwright(finished: Path) -> None:
    test = task().data.test
    x = torch.stack([test[i][0] for i in range(64)])
    session = onnxruntime.InferenceSession(finished / "model.onnx")
    (runtime,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    program = torch.export.load(finished / "model.pt2").module()(x)
    assert (torch.as_tensor(runtime).argmax(1) == program.argmax(1)).float().mean() > 0.96
    result = json.loads((finished / "result.json").read_text())
    assert (finished / "model.onnx").stat().st_size == result["chosen"]["size_bytes"]


def test_nothing_is_evaluated_twice(finished: Path) -> None:
    steps = [json.dumps(line["point"]["steps"], sort_keys=True) for line in lines(finished) if line["point"]]
    assert len(steps) == len(set(steps))


def test_a_finished_run_resumes_to_itself(finished: Path) -> None:
    before = (finished / "result.json").read_text()
    start = time.perf_counter()
    assert run_job(job(finished), resume=True) == json.loads(before)
    assert time.perf_counter() - start < 10
    assert (finished / "result.json").read_text() == before


def test_an_old_run_is_never_overwritten(finished: Path) -> None:
    with pytest.raises(RunDirectoryError, match="--resume"):
        run_job(job(finished))
    with pytest.raises(RunDirectoryError, match="has seed 0, not 7"):
        run_job(job(finished, seed=7), resume=True)
    with pytest.raises(RunDirectoryError, match="has batch 1, not 8"):
        run_job(job(finished, measuring=Measuring(batch=8)), resume=True)
    before = (finished / "run.json").read_text()
    with pytest.raises(RunDirectoryError, match="is finished, and target cannot be given anew"):
        run_job(job(finished, target="macs<=0.001x"), resume=True)
    assert (finished / "run.json").read_text() == before


def test_what_a_resumed_run_is_not_told_again_stays(finished: Path) -> None:
    asked = job(finished, evaluations=6)
    again = make_job(TINY, "macs<=0.9x", out=finished, resume=True)
    assert again == replace(asked, workers=None)
    assert make_job(TINY, "macs<=0.9x", out=finished, resume=True, budget="7m").budget == 420
    assert make_job(TINY, out=finished, resume=True) == again
    with pytest.raises(TargetError, match="No target"):
        make_job(TINY, out=finished)
    assert make_job(TINY, "macs<=0.9x", out=finished).evaluations is None
    with pytest.raises(RunDirectoryError, match="holds no run to resume"):
        make_job(TINY, "macs<=0.9x", out=finished.parent / "other", resume=True)


def test_a_baseline_that_is_trained_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as within:
        within.setattr(baseline, "measure_onnx", cut)
        assert run_job(job(tmp_path / "run", evaluations=1), resume=False)["status"] == "interrupted"
    assert not (tmp_path / "run" / "baseline.json").exists()
    monkeypatch.setattr(baseline, "fit", never)
    result = run_job(job(tmp_path / "run", evaluations=1), resume=True)
    assert result["status"] in ("met", "not_met")
    history = json.loads((tmp_path / "run" / "history.json").read_text())["baseline"]
    assert history[-1]["epoch"] == 4
    assert result["baseline"]["score"]["val"] == history[-1]["val_score"]
    assert not list((tmp_path / "run").glob("baseline-training.json")) + list((tmp_path / "run").glob("final-*"))


def test_where_everything_fails_the_cause_is_told(tmp_path: Path) -> None:
    stubborn = Job(
        TINY.replace(":task", ":stubborn"),
        parse_targets(["macs<=0.5x"]),
        parse_keep("score>=-1"),
        300.0,
        tmp_path / "run",
        steps=("prune",),
    )
    result = run_job(stubborn)
    assert result["status"] == "not_met"
    assert result["failed"] == result["evaluations"] <= 12, "it does not go on for five minutes"
    assert "candidates failed" in result["explanation"]
    assert "not my network" in result["explanation"]
    assert all("saliency" not in line["params"] for line in lines(tmp_path / "run")), "no loss, no gradients"


def test_a_limit_that_the_baseline_meets_throws_no_candidate_out(tmp_path: Path) -> None:
    asked = job(tmp_path / "run", target="size<=1MB,macs<=1G", keep="score>=-1", steps=("int8",), evaluations=1)
    result = run_job(asked)
    assert result["status"] == "met", result["explanation"]
    assert result["ratios"]["macs"] == 1.0
    assert result["ratios"]["size"] < 1


def test_a_target_that_the_baseline_meets_is_met(tmp_path: Path) -> None:
    result = run_job(job(tmp_path / "run", target="macs<=1G", steps=("int8",), evaluations=1))
    assert (result["status"], result["chosen"]) == ("met", None)
    assert result["explanation"].startswith("The baseline meets macs<=1G already. No candidate cost less")


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="No task 'nowhere'"):
        run_job(Job("nowhere", parse_targets(["latency<=0.5x"]), parse_keep("score>=-0.01"), 20.0, tmp_path / "run"))
    endless = replace(task(), recipe=Recipe(epochs=1e6))
    with pytest.raises(TargetError, match="more than the whole budget of 20 s"):
        run_job(replace(job(tmp_path / "run", budget=20.0), task=endless))
    assert not (tmp_path / "run").exists()


def _start(out: Path, *more: str, budget: str = "40s") -> subprocess.Popen:
    command = [sys.executable, "-m", "netwright", "optimize", TINY, "--target", "latency<=0.9x", "--keep"]
    command += ["score>=-0.1", "--budget", budget, "--out", str(out), *more]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out.parent,
        preexec_fn=_heed_ctrl_c,
    )


def _heed_ctrl_c() -> None:
    """A process that a shell has put into the background ignores SIGINT, and so does what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_for(out: Path, count: int, child: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while len(lines(out)) < count and time.monotonic() < end and child.poll() is None:
        time.sleep(0.05)


def test_kill_at_five_moments_then_resume_loses_and_repeats_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    known: list[dict] = []
    for round_, moment in enumerate(np.random.default_rng(0).uniform(0, 1, 5)):
        child = _start(out, *(["--resume"] if (out / "run.json").exists() else []), budget="300s")
        if round_ % 2:
            _wait_for(out, len(known) + 2, child)  # in the middle of the search
            time.sleep(moment)
        else:
            time.sleep(3 + 6 * moment)  # while it starts, trains the baseline, or starts its workers
        child.send_signal(signal.SIGKILL)
        child.wait()
        now = lines(out)
        assert now[: len(known)] == known, "what was finished stays as it was"
        known = now
    child = _start(out, "--resume", budget="1s")  # no time for more: it concludes
    _, errors = child.communicate(timeout=200)
    assert child.returncode in (0, 3), errors
    final = lines(out)
    assert final[: len(known)] == known
    steps = [json.dumps(line["params"], sort_keys=True) for line in final]
    assert len(steps) == len(set(steps))
    result = json.loads((out / "result.json").read_text())
    assert result["evaluations"] == len(final)
    assert len(known) >= 4
    values = np.array([[-line["point"]["score"]["val"], line["point"]["latency_ratio"]["median"]] for line in known])
    front = {(-p["score"]["val"], p["latency_ratio"]["median"]) for p in result["front"] if p["latency_ratio"]}
    for row in values:
        better = [f for f in front if f[0] <= row[0] and f[1] <= row[1]]
        assert better, "every old point is on the front or beaten by a point on it"


def test_ctrl_c_leaves_a_valid_result_and_no_processes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = _start(out, budget="200s")
    _wait_for(out, 2, child)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert result["evaluations"] >= 2
    assert "--resume" in result["explanation"]
    assert result["explanation"] in output
    with pytest.raises(RunDirectoryError):
        run_job(job(out))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = _start(out, budget="200s")
    try:
        end = time.monotonic() + 60
        while not (out / "run.json").exists() and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(RunLockedError):
            run_job(job(out), resume=True)
    finally:
        child.kill()
        child.wait()


def test_orphaned_workers_end(tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = _start(out, budget="200s")
    _wait_for(out, 1, child)
    workers = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_worker_of(int(pid), child.pid)]
    assert workers
    child.kill()
    child.wait()
    end = time.monotonic() + 20
    while any(_runs(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in workers if _runs(pid)]


def _runs(pid: int) -> bool:
    """Whether the process lives; one that has ended may stay listed as a zombie where nobody collects it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _is_worker_of(pid: int, parent: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[1]) == parent and b"netwright.workshop.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_recipe_makes_the_model_again(finished: Path, tmp_path: Path) -> None:
    again = replay(finished, tmp_path / "again")  # by its folder
    chosen = json.loads((finished / "result.json").read_text())["chosen"]
    assert again["macs"] == chosen["macs"]
    assert again["score"]["val"] == pytest.approx(chosen["score"]["val"], abs=0.03)
    test = task().data.test
    x = torch.stack([test[i][0] for i in range(64)]).numpy()
    outputs = []
    for folder in (finished, tmp_path / "again"):
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        outputs.append(session.run(None, {session.get_inputs()[0].name: x})[0])
    assert (outputs[0].argmax(1) == outputs[1].argmax(1)).mean() > 0.9


def test_replay_refuses_what_is_no_recipe(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptRunError, match="it lacks"):
        replay(finished / "layers.json", tmp_path / "again")
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path, "it lacks"), (tmp_path / "empty", "holds no recipe.json: it is written when")):
        with pytest.raises(CorruptRunError, match=words):
            replay(folder, tmp_path / "again")
    whole = json.loads((finished / "recipe.json").read_text())
    for damage in ({"steps": [7]}, {"recovery": {"epochs": "many", "seed": 0}}, {"recovery": 3}, {"seed": None}):
        (tmp_path / "recipe.json").write_text(json.dumps({**whole, **damage}))
        with pytest.raises(CorruptRunError, match=r"recipe\.json does not hold a recipe"):
            replay(tmp_path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_task_from_python_is_given_to_replay_again(finished: Path, tmp_path: Path) -> None:
    recipe = json.loads((finished / "recipe.json").read_text())
    assert recipe["given"] is False
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "task": "digits", "given": True}))
    with pytest.raises(TaskError, match="of the Task 'digits', given from Python"):
        replay(tmp_path / "recipe.json", tmp_path / "again")
    with pytest.raises(TaskError, match="No task 'nowhere'"):
        replay(tmp_path / "recipe.json", tmp_path / "again", task="nowhere")
    assert not (tmp_path / "again").exists()


def test_the_task_of_a_recipe_is_found_from_elsewhere(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = json.loads((finished / "recipe.json").read_text())
    assert recipe["task_file"] == json.loads((finished / "run.json").read_text())["task_file"] == TINY[: -len(":task")]
    (tmp_path / "mine.py").write_text("task = 'the file of the run'")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for file, words in (
        (str(tmp_path / "mine.py"), f"{tmp_path}/mine.py:task is a str"),
        ("/gone/mine.py", "names the task 'mine.py:task'.*nor is /gone/mine.py. Give it"),
        (None, "names the task 'mine.py:task'.*from here. Give it"),
    ):
        named = {**recipe, "task": "mine.py:task", "task_file": file}
        (tmp_path / "recipe.json").write_text(json.dumps(named))
        with pytest.raises(TaskError, match=words):
            replay(tmp_path / "recipe.json", tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=r"mine\.py:task is a str"):
        replay(tmp_path / "recipe.json", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_only_the_named_steps_are_taken(tmp_path: Path) -> None:
    result = run_job(job(tmp_path / "run", evaluations=2, steps=("prune",)))
    taken = {step["method"] for point in result["front"] for step in point["steps"]}
    assert taken <= {"netwright.compress:Prune"}
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["int8"] is None
    assert all("int8" not in line["params"] for line in lines(tmp_path / "run"))
    assert len(lines(tmp_path / "run")) == 2
