"""Evaluations in worker processes on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import cloudpickle

from netwright.workshop.evaluation import Outcome, Request, Subject
from netwright.workshop.portable import outcome_of, portable

__all__ = ["LocalEngine", "cause"]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    request: Request | None = None


class LocalEngine:
    """Worker processes, each with one thread, started afresh when one dies.

    A worker ends by itself when its parent does, however that happened. What goes to a worker (the task, the
    trained baseline) is passed through a pipe between the two processes and never through a file.

    Args:
        subject: what every evaluation starts from.
        workers: how many processes.

    Raises:
        NetwrightError: a task that cannot be handed to another process.
    """

    def __init__(self, subject: Subject, workers: int) -> None:
        self.workers = workers
        self._payload = portable(subject)
        self._folder = tempfile.TemporaryDirectory(prefix="netwright-")  # workers may be killed: it is ours to clear
        self._workers: list[_Worker] = [self._start() for _ in range(workers)]
        for worker in self._workers:  # once all of them are starting, for this waits until they read
            self._feed(worker)

    def submit(self, request: Request) -> None:
        """Send a request to a free worker."""
        worker = next(worker for worker in self._workers if worker.request is None)
        worker.request = request
        with contextlib.suppress(OSError):  # it died while idle: wait() sees its end and answers for it
            worker.pipe.send_bytes(cloudpickle.dumps(request))

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Outcomes that arrived within ``timeout`` seconds.

        Raises:
            NetwrightError: a worker cannot read the task.
        """
        ready = wait([worker.pipe for worker in self._workers], timeout)
        outcomes = [self._receive(worker) for worker in list(self._workers) if worker.pipe in ready]
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """Kill every worker, and what it started."""
        for worker in self._workers:
            _kill(worker.process)
        for worker in self._workers:
            worker.process.wait()
            worker.pipe.close()
        self._workers = []
        self._folder.cleanup()

    def _receive(self, worker: _Worker) -> Outcome | None:
        request = worker.request
        try:
            outcome = outcome_of(worker.pipe.recv_bytes())
            worker.request = None
            return outcome
        except (EOFError, OSError):
            _kill(worker.process)
            reason = cause(worker.process.wait())
            worker.pipe.close()
            fresh = self._start()
            self._workers[self._workers.index(worker)] = fresh
            self._feed(fresh)
            return None if request is None else Outcome(request, None, f"The worker process {reason}.", 0.0)

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "netwright.workshop.worker", str(theirs.fileno()), self._folder.name]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], start_new_session=True, env=environment, stdin=subprocess.DEVNULL
            )
        return _Worker(process, Connection(ours.detach()))

    def _feed(self, worker: _Worker) -> None:
        with contextlib.suppress(OSError):  # it died at once: wait() sees its end
            worker.pipe.send_bytes(self._payload)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its session and has not been waited for, and all that it started there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says so of a group that has ended
        os.killpg(process.pid, signal.SIGKILL)


def cause(code: int) -> str:
    """How a process ended, by its exit code: "ended with code 3"."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (often the system being out of memory)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"ended with code {code}"
