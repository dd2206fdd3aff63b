"""Evaluations as Ray tasks, on a cluster that is there or on this machine."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import cloudpickle

from netwright.core.portable import packed
from netwright.core.ray_cluster import RayCluster, reason
from netwright.search._workers import Answer, answer, opened

__all__ = ["RayWorkers"]

T = TypeVar("T")


class RayWorkers(Generic[T]):
    """Evaluates candidates as Ray tasks of one core each; one whose worker dies is tried once more.

    Args:
        evaluate: called with the decisions of a candidate.
        count: evaluations at a time.

    Raises:
        NetwrightError: Ray is not installed, the cluster cannot be reached or is too small, or ``evaluate`` cannot be
            handed to another process.
    """

    def __init__(self, evaluate: Callable[[Mapping[str, Any]], Any], count: int) -> None:
        payload = packed(evaluate, "What evaluates candidates")
        self._cluster, self.count = RayCluster(count), count
        ray = self._cluster.ray
        self._payload = ray.put(payload)
        self._task = ray.remote(num_cpus=1, max_retries=1)(_evaluated)
        self._running: dict[Any, tuple[T, float]] = {}

    @property
    def inside(self) -> bool:
        """Evaluations run in processes of Ray's."""
        return False

    @property
    def free(self) -> bool:
        """Whether one more may start."""
        return len(self._running) < self.count

    @property
    def busy(self) -> bool:
        """Whether an answer is to come."""
        return bool(self._running)

    def submit(self, job: T, params: Mapping[str, Any]) -> None:
        """Start one."""
        self._running[self._task.remote(self._payload, cloudpickle.dumps(dict(params)))] = job, time.monotonic()

    def next(self) -> list[tuple[T, Answer]]:
        """What ended; waits for at least one."""
        if not self._running:
            return []
        ray = self._cluster.ray
        ready, _ = ray.wait(list(self._running), num_returns=1)
        found = []
        for reference in ready:
            job, start = self._running.pop(reference)
            try:
                found.append((job, cloudpickle.loads(ray.get(reference))))
            except ray.exceptions.RayError as error:
                words = f"The Ray worker died: {reason(str(error))}"
                found.append((job, Answer(None, words, time.monotonic() - start)))
        return found

    def close(self) -> None:
        """Stop; what runs is abandoned."""
        for reference in self._running:
            self._cluster.ray.cancel(reference, force=True)
        self._running.clear()
        self._cluster.close()


def _evaluated(payload: bytes, params: bytes) -> bytes:
    """Runs in a process of Ray's; bytes in, bytes out, so that Ray needs to know none of our types.

    They come from this search and go back to it; nothing is read from a file.
    """
    found: bytes = cloudpickle.dumps(answer(opened(payload), cloudpickle.loads(params)))
    return found
