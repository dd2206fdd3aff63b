"""Full recovery: who gets it, in which order, with how much time, and what is kept for it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from subjects import point
from test_study import BASE, SPACE, open_run

from netwright.core.errors import CorruptRunError
from netwright.core.loop import Record
from netwright.workshop.evaluation import Outcome, Request
from netwright.workshop.finals import CLOSING, Finals
from netwright.workshop.job import Job
from netwright.workshop.kept import forget_outcomes, kept_outcomes
from netwright.workshop.plan import Plan
from netwright.workshop.point import Point
from netwright.workshop.study import Study
from netwright.workshop.target import parse_keep, parse_targets

LONGEST = 8.0
Judge = Callable[[Request], Point | None]


class Bench:
    """An engine whose workers answer after some seconds of a clock that runs while it waits."""

    def __init__(self, judge: Judge, workers: int = 2, seconds: float = 5.0) -> None:
        self.judge, self.workers, self.seconds = judge, workers, seconds
        self.now, self.flying, self.asked = 0.0, [], []

    def submit(self, request: Request) -> None:
        assert len(self.flying) < self.workers
        self.flying.append((self.now + self.seconds, request))
        self.asked.append(request)

    def wait(self, timeout: float) -> Sequence[Outcome]:
        self.now += timeout
        done = [request for end, request in self.flying if end <= self.now]
        self.flying = [(end, request) for end, request in self.flying if end > self.now]
        return [Outcome(request, self.judge(request), None, self.seconds) for request in done]

    def close(self) -> None:
        """Nothing to stop."""


def finals(path: Path, values: Sequence[tuple[float, float, float]], budget: float = 100.0) -> Finals:
    """After candidates of these val scores, latencies and epochs, each of 4 seconds of which 2 were training."""
    with open_run(path / "run") as run:
        limits, keep = parse_targets(["latency<=0.001x"]), parse_keep("score>=-0.01")
        study = Study(run, SPACE, BASE, limits, keep, 0, longest=LONGEST)
        for val, latency, epochs in values:
            proposal = study.ask()
            assert proposal is not None
            request = Request(proposal.number, proposal.steps, 2.0, 0, proposal.params)
            made = point(val, latency, 1.0, *proposal.steps)
            study.tell(proposal, Outcome(request, made, None, 4.0, epochs=epochs), finished=1.0)
        job = Job("tiny", limits, keep, budget, path / "run")
        return Finals(run, job, BASE, study, Plan(SPACE, 2, 0.0, 2.0, 40.0, []))


def same(phase: Finals) -> Judge:
    return lambda request: phase.study.entries[request.number].point


CANDIDATES = [(0.9, 0.5, 2.0), (0.885, 0.1, 2.0), (0.88, 0.2, 2.0), (0.9, 0.8, 2.0), (0.6, 0.01, 2.0)]


def test_the_safe_one_then_gains_then_as_long_as_there_are_any(tmp_path: Path) -> None:
    phase = finals(tmp_path, CANDIDATES)
    bench = Bench(same(phase))
    found = phase.run(bench, lambda: bench.now, lambda text: None)
    assert [request.number for request in bench.asked] == [0, 1, 2], "what is dearer than 0, or lost, stays away"
    assert [outcome.request.number for outcome in found] == [0, 1, 2]
    assert all(request.deliver for request in bench.asked)


def test_what_regains_the_score_makes_the_dearer_ones_needless(tmp_path: Path) -> None:
    phase = finals(tmp_path, CANDIDATES)
    bench = Bench(lambda request: replace(same(phase)(request), val=0.9))
    phase.run(bench, lambda: bench.now, lambda text: None)
    assert [request.number for request in bench.asked] == [0, 1]


def test_what_recovery_gives_back_says_who_else_can_be_saved(tmp_path: Path) -> None:
    values = [(0.877, 0.5, 2.0), (0.875, 0.45, 2.0), (0.85, 0.3, 2.0), (0.6, 0.01, 2.0)]
    much, little = finals(tmp_path / "much", values), finals(tmp_path / "little", values)
    for phase, gain, asked in ((much, 0.04, [1, 0, 2]), (little, 0.02, [1, 0])):
        bench = Bench(
            lambda request, phase=phase, gain=gain: replace(same(phase)(request), val=same(phase)(request).val + gain)
        )
        phase.run(bench, lambda bench=bench: bench.now, lambda text: None)
        assert [request.number for request in bench.asked] == asked, gain


def test_where_recovery_fails_the_next_safe_one_follows(tmp_path: Path) -> None:
    phase = finals(tmp_path, CANDIDATES)
    bench = Bench(lambda request: None)
    phase.run(bench, lambda: bench.now, lambda text: None)
    assert [request.number for request in bench.asked][:4] == [0, 1, 3, 2]


def test_time_is_shared_and_ends(tmp_path: Path) -> None:
    phase = finals(tmp_path, CANDIDATES, budget=50.0)
    bench = Bench(lambda request: None, seconds=22.0)
    phase.run(bench, lambda: bench.now, lambda text: None)
    assert len(bench.asked) == 3, "those that were planned; no fourth after 22 of 50 seconds"
    assert bench.asked[0].seconds == pytest.approx((50.0 - CLOSING) / 2 - 2.0), "two rounds, 2 s of each not training"


def test_what_was_recovered_before_an_interruption_is_not_recovered_again(tmp_path: Path) -> None:
    phase = finals(tmp_path, CANDIDATES)
    curve = (Record(3, 1.5, math.nan, None, 0.1, 2.0), Record(4, 2.0, 0.5, 0.875, 0.1, 3.0))

    class Torn(Bench):
        def wait(self, timeout: float) -> Sequence[Outcome]:
            if self.now > 6.0:
                raise KeyboardInterrupt
            return [
                replace(outcome, artifact=b"net", weights=b"tensors", epochs=7.5, history=curve)
                for outcome in super().wait(timeout)
            ]

    torn = Torn(same(phase), seconds=5.0)
    with pytest.raises(KeyboardInterrupt):
        phase.run(torn, lambda: torn.now, lambda text: None)
    (phase.run_directory.path / "final-00009.onnx").write_bytes(b"torn")  # no JSON file, so it does not count
    kept = kept_outcomes(phase.run_directory)
    assert [outcome.request.number for outcome in kept] == [0, 1]
    assert kept[1] == Outcome(
        torn.asked[1], same(phase)(torn.asked[1]), None, 5.0, 7.5, b"net", kept[1].history, b"tensors"
    )
    assert math.isnan(kept[1].history[0].train_loss)
    assert kept[1].history[1] == curve[1]
    bench = Bench(same(phase))
    found = phase.run(bench, lambda: bench.now, lambda text: None)
    assert [request.number for request in bench.asked] == [2]
    assert [outcome.request.number for outcome in found] == [0, 1, 2]
    forget_outcomes(phase.run_directory)
    assert not list(phase.run_directory.path.glob("final*"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("onnx", None),
        ("safetensors", None),
        ("json", {"seconds": "long"}),
        ("json", {"steps": 3}),
        ("json", {"point": {}}),
    ],
)
def test_a_kept_recovery_that_was_damaged_is_named(name: str, damage: dict | None, tmp_path: Path) -> None:
    phase = finals(tmp_path, CANDIDATES[:1])
    bench = Bench(same(phase))
    phase.run(bench, lambda: bench.now, lambda text: None)
    place = phase.run_directory.path / f"final-00000.{name}"
    whole = place.read_bytes()
    place.unlink()
    if damage is not None:
        place.write_text(json.dumps({**json.loads(whole), **damage}))
    with pytest.raises(CorruptRunError, match=place.name):
        kept_outcomes(phase.run_directory)


def test_where_nothing_keeps_the_score_one_is_recovered_early(tmp_path: Path) -> None:
    phase = finals(tmp_path / "lacking", [(0.877, 0.5, 2.0), (0.87, 0.6, 2.0), (0.85, 0.3, 2.0)])
    first = phase.first()
    assert first is not None
    assert (first.number, first.deliver, first.seconds) == (0, True, 20.0), "what lacks least, for half of that time"
    point = same(phase)(first)
    assert point is not None
    phase.keep(Outcome(first, replace(point, val=0.917), None, 9.0))
    assert phase.study.gains == pytest.approx((0.04,))
    assert phase.first() is None, "one tells enough"
    again = finals(tmp_path / "lacking", [])
    again.recall()
    assert again.study.gains == phase.study.gains, "a resumed run knows it too"
    sound = finals(tmp_path / "sound", CANDIDATES[:1])
    assert sound.first() is None, "nothing costs less than what keeps the score"
    dearer = finals(tmp_path / "dearer", [(0.9, 0.5, 2.0), (0.9, 0.8, 2.0), (0.88, 0.6, 2.0)])
    assert dearer.first() is None
    failed = finals(tmp_path / "failed", [(0.8, 0.5, 2.0)])
    request = failed.first()
    assert request is not None
    failed.keep(Outcome(request, None, "no memory", 1.0))
    assert failed.first() is None, "nor is it tried for ever"


def test_where_something_keeps_the_score_one_that_costs_less_is_recovered_early(tmp_path: Path) -> None:
    promising = finals(tmp_path / "promising", CANDIDATES).first()
    assert promising is not None
    assert promising.number == 1, "the largest expected gain"
    hopeful = finals(
        tmp_path / "hopeful", [(0.9, 0.5, 2.0), (0.7, 0.1, 2.0), (0.75, 0.2, 2.0), (0.6, 0.01, 2.0)]
    ).first()
    assert hopeful is not None
    assert hopeful.number == 2, "where none promises one, what lacks least of those that would be one"


def test_a_failed_recovery_is_kept_too(tmp_path: Path) -> None:
    phase = finals(tmp_path, CANDIDATES[:1])
    bench = Bench(lambda request: None)
    first = phase.run(bench, lambda: bench.now, lambda text: None)
    assert phase.run(Bench(same(phase)), lambda: 0.0, lambda text: None) == first


def test_time_is_kept_for_what_the_longest_recoveries_take(tmp_path: Path) -> None:
    phase = finals(tmp_path / "a", CANDIDATES)  # three in line, with a quarter of the longest recovery each
    assert phase.reserved() == pytest.approx(1.25 * 3 * (4.0 + 2.0 * 3) / 2)
    slow = finals(tmp_path / "b", [(0.9, 0.5, 0.01)])
    assert slow.reserved() == 40.0, "as planned where that is not known"
    assert finals(tmp_path / "c", []).reserved() == 40.0
    assert finals(tmp_path / "d", [(0.9, 0.5, 8.0)]).reserved() == pytest.approx(1.25 * 4.0)
