"""Candidates evaluated by Ray, on this machine."""

import os
import signal
from collections.abc import Iterator

import pytest
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler

from netwright.core.errors import SettingError
from netwright.search import SearchSpace, run
from netwright.search._ray_workers import RayWorkers

SPACE = SearchSpace({"width": IntDistribution(1, 6)})


def evaluate(params):
    width = params["width"]
    if width == 3:
        raise ValueError("three is too many")
    if width == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"cost": float(width), "process": float(os.getpid())}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'netwright[ray]'")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    import ray

    assert not ray.is_initialized(), "what was started for a search ends with it"


def test_every_candidate_is_answered_once_whatever_becomes_of_it(tmp_path):
    out = tmp_path / "run"
    found = run(
        SPACE,
        evaluate,
        {"cost": "minimize"},
        sampler=RandomSampler(seed=0),
        evaluations=6,
        workers=2,
        engine="ray",
        out=out,
        progress=lambda share, what: None,
    )
    by_width = {entry.params["width"]: entry for entry in found.evaluations}
    assert sorted(by_width) == [1, 2, 3, 4, 5, 6]
    assert by_width[3].error is not None
    assert "three is too many" in by_width[3].error
    assert by_width[5].error is not None
    assert "The Ray worker died" in by_width[5].error
    assert [by_width[width].metrics["cost"] for width in (1, 2, 4, 6)] == [1.0, 2.0, 4.0, 6.0]
    assert all(by_width[width].metrics["process"] != os.getpid() for width in (1, 2, 4, 6))
    assert len((out / "evaluations.jsonl").read_text().splitlines()) == 6


def test_what_runs_is_abandoned():
    def slow(params):
        import time

        time.sleep(60)

    workers = RayWorkers(slow, 1)
    workers.submit("job", {"width": 1})
    assert workers.busy
    assert not workers.free
    workers.close()
    assert not workers.busy


def test_an_unknown_engine_is_named():
    with pytest.raises(SettingError, match="engine must be 'local' or 'ray', got 'rays'"):
        run(SPACE, evaluate, {"cost": "minimize"}, engine="rays")
