"""Where evaluations run: here, or in processes beside this one."""

import multiprocessing
import multiprocessing.context
import numbers
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import cloudpickle
import torch

from netwright.core.errors import NetwrightError
from netwright.core.portable import packed, unpacked

__all__ = ["Answer", "Pool", "Workers", "answer", "opened"]

T = TypeVar("T")
_hiding = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """What an evaluation returned, or why it did not, and its time.

    Attributes:
        value: by name, what is a number as one, and anything else as it reads; None where there is an error.
        error: why there is no value.
        seconds: what it took.
    """

    value: Mapping[str, float | str] | None
    error: str | None
    seconds: float


class Pool(Protocol[T]):
    """Where candidates are evaluated: each is answered exactly once."""

    @property
    def inside(self) -> bool:
        """Whether that is this very process, which dies with an evaluation that kills its own."""
        ...

    @property
    def free(self) -> bool:
        """Whether one more may start."""
        ...

    @property
    def busy(self) -> bool:
        """Whether an answer is to come."""
        ...

    def submit(self, job: T, params: Mapping[str, Any]) -> None:
        """Start one."""
        ...

    def next(self) -> list[tuple[T, Answer]]:
        """What ended; waits for at least one."""
        ...

    def close(self) -> None:
        """Stop; what runs is abandoned."""
        ...


class Workers(Generic[T]):
    """Evaluates candidates, several at a time where ``count`` is more than one.

    Each candidate is answered exactly once. What an evaluation raises is an answer; so is the death of its process,
    after one more try alone, since a process that dies takes its neighbours along.

    Args:
        evaluate: called with the decisions of a candidate.
        count: processes; with 1 evaluations run in this one.
    """

    def __init__(self, evaluate: Callable[[Mapping[str, Any]], Any], count: int) -> None:
        self._evaluate, self.count = evaluate, count
        self._payload = packed(evaluate, "What evaluates candidates") if count > 1 else b""
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[Future[Answer], tuple[T, Mapping[str, Any], float]] = {}
        self._ready: list[tuple[T, Answer]] = []

    @property
    def inside(self) -> bool:
        """Whether evaluations run in this process."""
        return self.count == 1

    @property
    def free(self) -> bool:
        """Whether one more may start."""
        return len(self._running) + len(self._ready) < self.count

    @property
    def busy(self) -> bool:
        """Whether an answer is to come."""
        return bool(self._running or self._ready)

    def submit(self, job: T, params: Mapping[str, Any]) -> None:
        """Start one."""
        if self.count == 1:
            self._ready.append((job, answer(self._evaluate, params)))
            return
        if self._pool is None:
            self._pool = _executor(self.count)
        start = time.monotonic()
        try:
            future = _begun(self._pool, self._payload, params)
        except BrokenProcessPool:
            self._ready += self._renew([])
            self.submit(job, params)
        else:
            self._running[future] = job, params, start

    def next(self) -> list[tuple[T, Answer]]:
        """What ended; waits for at least one."""
        done, self._ready = self._ready, []
        if done or not self._running:
            return done
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        lost = []
        for future in ended:
            job, params, start = self._running.pop(future)
            try:
                done.append((job, _result(future, start)))
            except BrokenProcessPool:
                lost.append((job, params))
        return done + self._renew(lost) if lost else done

    def close(self) -> None:
        """Stop; what runs is abandoned."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()) if self._running else ():
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _renew(self, lost: list[tuple[T, Mapping[str, Any]]]) -> list[tuple[T, Answer]]:
        """Answers of the jobs of a broken pool, each tried once more in a process of its own."""
        lost += [(job, params) for job, params, _ in self._running.values()]
        self._running.clear()
        self.close()
        return [(job, self._alone(params)) for job, params in lost]

    def _alone(self, params: Mapping[str, Any]) -> Answer:
        start = time.monotonic()
        with _executor(1) as pool:
            try:
                return _result(_begun(pool, self._payload, params), start)
            except BrokenProcessPool:
                return Answer(None, "its process died twice, without an exception", time.monotonic() - start)


def _result(future: Future[Answer], start: float) -> Answer:
    """The answer of a process.

    Raises:
        BrokenProcessPool: it died.
    """
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # what cannot be sent there or back fails its own candidate, not the search
        words = f"it cannot be sent between processes: {type(error).__name__}: {error}"
        return Answer(None, words, time.monotonic() - start)


def _executor(count: int) -> ProcessPoolExecutor:
    """Processes that do not outlive this one."""
    return ProcessPoolExecutor(count, mp_context=_context(), initializer=_watch)


def _watch() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that asked for it has ended, however it did."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _begun(pool: ProcessPoolExecutor, payload: bytes, params: Mapping[str, Any]) -> Future[Answer]:
    """The evaluation of a candidate in a pool, which starts a process for it where it has none.

    A process needs nothing of the main script: what is defined there travels by value. So the script is hidden while
    one may start, which would otherwise run it again, to the end where it has no guard.

    Raises:
        BrokenProcessPool: a process of the pool has died.
    """
    try:
        sent = cloudpickle.dumps(dict(params))
    except Exception as error:  # pickling runs code of the user's own objects
        unsent: Future[Answer] = Future()
        unsent.set_exception(error)
        return unsent
    with _hiding:
        main = sys.modules["__main__"].__dict__
        hidden: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
        main.update(dict.fromkeys(hidden))
        try:
            return pool.submit(_remote, payload, sent)
        finally:
            main.update(hidden)


def _context() -> multiprocessing.context.BaseContext:
    """Processes that start clean and fast: forked from one that has imported this package and nothing else."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _remote(payload: bytes, params: bytes) -> Answer:
    evaluate = opened(payload)  # whose modules the candidate may need
    # the caller's own candidate, from the process that started this one
    return answer(evaluate, cloudpickle.loads(params))


@lru_cache(maxsize=1)
def opened(payload: bytes) -> Callable[[Mapping[str, Any]], Any]:
    """What evaluates, in the process that is to do so; what cannot be read says so of every candidate.

    It is read once for all candidates of a search: a super-network is traced anew where it is read.
    """
    path, inner = unpacked(payload)
    sys.path.extend(folder for folder in path if folder not in sys.path)
    torch.set_num_threads(1)
    try:
        # the caller's own function, from the process that started this one
        evaluate: Callable[[Mapping[str, Any]], Any] = cloudpickle.loads(inner)
    except (Exception, SystemExit) as error:  # reading runs code of the user's own objects
        words = f"What evaluates cannot be read in a worker process: {type(error).__name__}: {error}"

        def refuse(params: Mapping[str, Any]) -> Any:
            raise NetwrightError(words)

        return refuse
    return evaluate


def answer(evaluate: Callable[[Mapping[str, Any]], Any], params: Mapping[str, Any]) -> Answer:
    start = time.monotonic()
    try:
        value = _plain(evaluate(dict(params)))
    except NetwrightError as error:
        return Answer(None, str(error), time.monotonic() - start)
    except (Exception, SystemExit) as error:  # whatever a candidate raises is its result: the search goes on
        return Answer(None, f"{type(error).__name__}: {error}", time.monotonic() - start)
    return Answer(value, None, time.monotonic() - start)


def _plain(value: Any) -> dict[str, float | str]:
    """Metrics by name, of which any process can be told: numbers as such, anything else as it reads.

    Raises:
        NetwrightError: it is no mapping.
    """
    if not isinstance(value, Mapping):
        raise NetwrightError(f"the evaluation returned {type(value).__name__}, not metrics by name")
    return {
        str(name): float(metric) if isinstance(metric, numbers.Real) else repr(metric) for name, metric in value.items()
    }
