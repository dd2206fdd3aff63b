"""Processes beside a search: what they do not run again, and that they end with the process that started them."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys
from dataclasses import dataclass
from pathlib import Path

from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import RandomSampler

from netwright.search import SearchSpace, run

with Path(sys.argv[1], "ran").open("a") as log:
    log.write("once\\n")


@dataclass(frozen=True)
class Kind:
    size: int


def evaluate(params):
    BODY


space = SearchSpace({"kind": CategoricalDistribution((Kind(1), Kind(2))), "a": IntDistribution(0, 2)})
found = run(
    space,
    evaluate,
    {"cost": "minimize"},
    sampler=RandomSampler(seed=0),
    evaluations=6,
    workers=2,
    progress=lambda share, words: None,
)
print(sorted((entry.params["kind"].size, entry.params["a"], entry.metrics["cost"]) for entry in found.evaluations))
"""


def started(folder, body):
    """A script without a guard, as a process of its own."""
    (folder / "script.py").write_text(SCRIPT.replace("BODY", body))
    command = [sys.executable, "-W", "ignore", str(folder / "script.py"), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_workers_do_not_run_the_script_of_the_user_again(tmp_path):
    with started(tmp_path, 'return {"cost": params["kind"].size * params["a"]}') as process:
        words, _ = process.communicate(timeout=120)
    assert words.strip() == str(sorted((size, a, float(size * a)) for size in (1, 2) for a in range(3)))
    assert (tmp_path / "ran").read_text() == "once\n"


@pytest.mark.skipif(sys.platform == "win32", reason="asks by POSIX signals whether a process lives")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    body = """
    import os, time
    Path(sys.argv[1], f"worker-{os.getpid()}").touch()
    time.sleep(100)
    """
    with started(tmp_path, body) as process:
        workers = awaited(lambda: [int(path.name[7:]) for path in tmp_path.glob("worker-*")], 2, 60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert awaited(lambda: [worker for worker in workers if alive(worker)], 0, 20) == []


def awaited(look, count, seconds):
    """What ``look`` finds once it is that many, or after the time."""
    end = time.monotonic() + seconds
    while len(found := look()) != count and time.monotonic() < end:
        time.sleep(0.05)
    return found


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
