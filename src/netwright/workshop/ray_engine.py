"""Evaluations as Ray actors, on a cluster that is there or on this machine."""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import cloudpickle

from netwright.core.errors import NetwrightError
from netwright.workshop.evaluation import Evaluator, Outcome, Request, Subject
from netwright.workshop.portable import portable

__all__ = ["RayEngine"]


class RayEngine:
    """One actor with one core for each worker; Ray places them, and they are replaced when they die.

    The cluster is the one that ``RAY_ADDRESS`` names or ``ray start`` left on this machine; where there is
    none, Ray is started on this machine alone. Latency is measured on the machine where the actor lives, together with
    the baseline's.

    Args:
        subject: what every evaluation starts from.
        workers: how many actors.

    Raises:
        NetwrightError: Ray is not installed, the named cluster cannot be reached, or it has too few cores.
    """

    def __init__(self, subject: Subject, workers: int) -> None:
        try:
            import ray  # an extra, loaded only where it is asked for
        except ImportError as error:
            raise NetwrightError("--engine ray needs Ray: pip install 'netwright[ray]'.") from error
        self.workers = workers
        self._ray: Any = ray
        self._actors: list[Any] = []
        self._owned = not ray.is_initialized()
        if self._owned:
            self._connect(workers)
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        if cores < workers:
            self.close()
            raise NetwrightError(
                f"The Ray cluster has {cores} cores for {workers} workers. Ask for fewer by --workers."
            )
        self._payload = ray.put(portable(subject))
        self._class = ray.remote(num_cpus=1)(_Actor)
        self._actors = [self._start() for _ in range(workers)]
        self._flying: dict[Any, tuple[int, Request]] = {}

    def submit(self, request: Request) -> None:
        """Hand a request to a free actor."""
        busy = {index for index, _ in self._flying.values()}
        index = next(index for index in range(self.workers) if index not in busy)
        self._flying[self._actors[index].run.remote(cloudpickle.dumps(request))] = (index, request)

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Outcomes that arrived within ``timeout`` seconds."""
        if not self._flying:
            return []
        ready, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=timeout)
        return [self._receive(reference) for reference in ready]

    def close(self) -> None:
        """Kill every actor; a Ray that was started for this run ends too."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._owned:
            self._ray.shutdown()

    def _receive(self, reference: Any) -> Outcome:
        index, request = self._flying.pop(reference)
        try:
            outcome = cloudpickle.loads(self._ray.get(reference))
            assert isinstance(outcome, Outcome)
            return outcome
        except self._ray.exceptions.RayError as error:
            self._actors[index] = self._start()
            return Outcome(request, None, f"The Ray worker died: {_reason(str(error))}", 0.0)

    def _start(self) -> Any:
        return self._class.remote(self._payload)

    def _connect(self, workers: int) -> None:
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            try:
                self._ray.init(address="auto", **quiet)
            except ConnectionError:
                if os.environ.get("RAY_ADDRESS"):
                    raise
                self._ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise NetwrightError(f"The Ray cluster cannot be reached: {_reason(str(error))}") from error


def _reason(text: str) -> str:
    """The first and the last line of an error of Ray's, without its colours; between them stands a traceback."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:500]


class _Actor:
    """Lives in a process of Ray's; bytes in, bytes out, so that Ray needs to know none of our types."""

    def __init__(self, payload: bytes) -> None:
        import torch

        torch.set_num_threads(1)
        path, subject = cloudpickle.loads(payload)
        sys.path.extend(folder for folder in path if folder not in sys.path)
        self._evaluator = Evaluator(cloudpickle.loads(subject))

    def run(self, request: bytes) -> bytes:
        found: bytes = cloudpickle.dumps(self._evaluator(cloudpickle.loads(request)))
        return found
