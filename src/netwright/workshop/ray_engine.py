"""Evaluations as Ray actors, on a cluster that is there or on this machine."""

import sys
from collections.abc import Sequence
from typing import Any

import cloudpickle

from netwright.core.portable import unpacked
from netwright.core.ray_cluster import RayCluster, reason
from netwright.workshop.evaluation import Outcome, Request, Subject
from netwright.workshop.portable import evaluator, outcome_of, portable

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
        self.workers = workers
        self._cluster = RayCluster(workers)
        self._ray = self._cluster.ray
        self._actors: list[Any] = []
        self._payload = self._ray.put(portable(subject))
        self._class = self._ray.remote(num_cpus=1)(_Actor)
        self._actors = [self._start() for _ in range(workers)]
        self._flying: dict[Any, tuple[int, Request]] = {}

    def submit(self, request: Request) -> None:
        """Hand a request to a free actor."""
        busy = {index for index, _ in self._flying.values()}
        index = next(index for index in range(self.workers) if index not in busy)
        self._flying[self._actors[index].run.remote(cloudpickle.dumps(request))] = (index, request)

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Outcomes that arrived within ``timeout`` seconds.

        Raises:
            NetwrightError: an actor cannot read the task.
        """
        if not self._flying:
            return []
        ready, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=timeout)
        return [self._receive(reference) for reference in ready]

    def close(self) -> None:
        """Kill every actor; a Ray that was started for this run ends too."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        self._cluster.close()

    def _receive(self, reference: Any) -> Outcome:
        index, request = self._flying.pop(reference)
        try:
            return outcome_of(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            self._actors[index] = self._start()
            return Outcome(request, None, f"The Ray worker died: {reason(str(error))}", 0.0)

    def _start(self) -> Any:
        return self._class.remote(self._payload)


class _Actor:
    """Lives in a process of Ray's; bytes in, bytes out, so that Ray needs to know none of our types."""

    def __init__(self, payload: bytes) -> None:
        import torch

        torch.set_num_threads(1)
        path, subject = unpacked(payload)
        sys.path.extend(folder for folder in path if folder not in sys.path)
        self._evaluate = evaluator(subject)

    def run(self, request: bytes) -> bytes:
        found: bytes = cloudpickle.dumps(self._evaluate(cloudpickle.loads(request)))
        return found
