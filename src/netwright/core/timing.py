"""How long a call takes, and how two calls compare, on a machine that is never quite still."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["Latency", "Ratio", "compare_calls", "time_call"]

_BLOCK_NS = 1_000_000  # calls are timed one by one in blocks of about this length
_MOST_CALLS = 64  # in one block
_STEADY = 0.05  # warm-up ends when two blocks agree to this


@dataclass(frozen=True)
class Latency:
    """The time of one call.

    Args:
        median_ms: median, in milliseconds.
        p10_ms: tenth percentile.
        p90_ms: ninetieth percentile.
        batch: items in the call.
        threads: threads that it may use.
        runtime: "onnxruntime" or "torch".
        repeats: calls that were timed.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    batch: int
    threads: int
    runtime: str
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data as ``result.json`` has it: every field, without its unit."""
        return {
            "median": self.median_ms,
            "p10": self.p10_ms,
            "p90": self.p90_ms,
            "batch": self.batch,
            "threads": self.threads,
            "runtime": self.runtime,
            "repeats": self.repeats,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Latency":
        """The latency that :meth:`to_dict` wrote."""
        times = (data["median"], data["p10"], data["p90"])
        return cls(*times, data["batch"], data["threads"], data["runtime"], data["repeats"])


@dataclass(frozen=True)
class Ratio:
    """How much longer a call takes than the baseline's; below 1 it is faster.

    Args:
        median: median over the rounds of (median time of the call / median time of the baseline).
        low: tenth percentile of the rounds' ratios.
        high: ninetieth percentile of them.
        noisy: the baseline, measured against itself in the same rounds, was not within 1.00 +- 0.05.
        self_ratio: that ratio of the baseline to itself.
        repeats: rounds.
    """

    median: float
    low: float
    high: float
    noisy: bool
    self_ratio: float
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def time_call(call: Callable[[], object], *, seconds: float = 0.5, repeats: int | None = None) -> list[int]:
    """Times of single calls in nanoseconds, after warm-up, with the garbage collector off.

    Args:
        call: what to time.
        seconds: how long to go on for, at least five calls.
        repeats: how many calls to time, in place of ``seconds``.
    """
    warm_up(call, limit_s=seconds)
    times: list[int] = []
    with no_garbage_collection():  # which collects first: the clock starts when that is done
        stop = time.perf_counter_ns() + int(seconds * 1e9)
        while len(times) < (repeats or 5) or (repeats is None and time.perf_counter_ns() < stop):
            times.append(_timed(call))
    return times


def compare_calls(
    call: Callable[[], object],
    baseline: Callable[[], object],
    again: Callable[[], object],
    *,
    seconds: float = 1.0,
    repeats: int = 20,
) -> Ratio:
    """The ratio of the times of two calls, measured in turns.

    A round times a block of calls of each of the three, in an order that turns from round to round, and takes the
    median of each block; a slow spell of the machine thus meets all three alike. The first call of a block, whose
    caches the one before has filled with its own data, is not counted where a block has more than two.

    Args:
        call: what to time.
        baseline: what to compare it with.
        again: the baseline once more, through objects of its own: the measurement of the noise.
        seconds: about how long to take in all.
        repeats: the number of rounds.
    """
    calls = (call, baseline, again)
    lengths = [warm_up(each, limit_s=seconds / 6) for each in calls]
    share = max(seconds * 1e9 / (3 * repeats), _BLOCK_NS / 10)
    counts = [max(1, min(_MOST_CALLS, round(share / length))) for length in lengths]
    counts[1] = counts[2] = max(counts[1:])
    rounds = np.empty((repeats, 3))
    with no_garbage_collection():
        for position in range(repeats):
            for turn in range(3):
                which = (position + turn) % 3
                rounds[position, which] = _block(calls[which], counts[which])
    ratios = rounds[:, 0] / rounds[:, 1]
    self_ratio = float(np.median(rounds[:, 2] / rounds[:, 1]))
    low, median, high = (float(value) for value in np.percentile(ratios, [10, 50, 90]))
    return Ratio(median, low, high, bool(abs(self_ratio - 1) > 0.05), self_ratio, repeats)


def percentiles(times: Sequence[int]) -> tuple[float, float, float]:
    """Tenth percentile, median and ninetieth percentile in milliseconds."""
    low, median, high = np.percentile(np.asarray(times) / 1e6, [10, 50, 90])
    return float(low), float(median), float(high)


def warm_up(call: Callable[[], object], *, limit_s: float) -> float:
    """Call until two blocks in a row take the same time to 5%, or time is up; the time of one call in nanoseconds."""
    stop = time.perf_counter_ns() + int(limit_s * 1e9)
    length = float(_timed(call))
    while True:
        count = max(1, min(_MOST_CALLS, round(_BLOCK_NS / length)))
        before, length = length, _block(call, count + 1)
        if abs(length / before - 1) < _STEADY or time.perf_counter_ns() > stop:
            return length


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """The garbage collector off, and as it was afterwards."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _block(call: Callable[[], object], count: int) -> float:
    """Median time of ``count`` calls; the first does not count when there are more than two."""
    times = [_timed(call) for _ in range(count + (count > 1))]
    return float(np.median(times[1:] if count > 1 else times))


def _timed(call: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    call()
    return max(1, time.perf_counter_ns() - start)
