"""The measuring lock between processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from netwright.workshop.quiet import QuietRoom

_WORK = """
import sys, time
from pathlib import Path
from netwright.workshop.quiet import QuietRoom
room = QuietRoom(Path(sys.argv[1]))
log = open(sys.argv[2], "a", buffering=1)
with room.work():
    print("in", flush=True)
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end:
        log.write(f"{time.monotonic()}\\n")
        time.sleep(0.005)
        if sys.argv[4] == "polite":
            room.give_way()
"""


def _worker(folder: Path, name: str, seconds: float, manner: str) -> subprocess.Popen:
    command = [sys.executable, "-c", _WORK, str(folder), str(folder / name), str(seconds), manner]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    return child


def test_nobody_works_while_one_measures_and_a_measurement_is_not_starved(tmp_path: Path) -> None:
    children = [_worker(tmp_path, f"log{n}", 30.0, "polite") for n in range(2)]
    try:
        room = QuietRoom(tmp_path)
        spans = []
        for _ in range(3):
            with room.measure():
                start = time.monotonic()
                time.sleep(0.15)
                spans.append((start, time.monotonic()))
            time.sleep(0.05)
        logs = [[float(line) for line in (tmp_path / f"log{n}").read_text().split()] for n in range(2)]
        for times in logs:
            for start, end in spans:
                assert not [moment for moment in times if start < moment < end]
            assert [moment for moment in times if moment > spans[0][1]], "work goes on after a measurement"
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_workers_share_the_room(tmp_path: Path) -> None:
    first, second = (_worker(tmp_path, f"log{n}", 30.0, "rude") for n in range(2))
    first.kill()
    second.kill()
    first.wait()
    second.wait()


def test_the_lock_of_a_killed_worker_goes_with_it(tmp_path: Path) -> None:
    child = _worker(tmp_path, "log", 60.0, "rude")
    child.kill()
    child.wait()
    start = time.monotonic()
    with QuietRoom(tmp_path).measure():
        assert time.monotonic() - start < 5


_FORK = """
import os, sys, time
from pathlib import Path
from netwright.workshop.quiet import QuietRoom
room = QuietRoom(Path(sys.argv[1]))
with room.work():
    if os.fork() == 0:
        os.kill(os.getppid(), 9)
        with room.measure():  # by locks of its own
            print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_a_child_that_outlives_its_worker_does_not_keep_its_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FORK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        child = int(worker.stdout.readline())
        try:
            assert worker.wait(10) == -signal.SIGKILL
            measure = "from pathlib import Path; from netwright.workshop.quiet import QuietRoom\n"
            measure += f"with QuietRoom(Path({str(tmp_path)!r})).measure(): print('alone')"
            done = subprocess.run(
                [sys.executable, "-c", measure], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.stdout == "alone\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
