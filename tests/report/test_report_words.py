"""The sentences and figures of the report against figures computed here from the files."""

import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from example_run import write_example
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from netwright.report import Run, read_run, summary_table
from netwright.report.compare import cost_change
from netwright.report.format import TIMES, ScoreStyle, compact, quantity, times
from netwright.report.limits import score_floor, target_limit
from netwright.report.page import render
from netwright.report.progress import follow
from netwright.report.run import Cost, Evaluation, Latency, LatencyRatio, Point, Result, Score, ScoreDrop, Step
from netwright.report.words import headline

Status = Literal["met", "not_met", "interrupted"]


def point(
    ms: float = 2.0, size: int = 4_000_000, val: float = 0.98, test: float = 0.97, *, steps: bool = True
) -> Point:
    latency = Latency(ms, ms * 0.9, ms * 1.1, 1, 1, "onnxruntime")
    made = (Step("netwright.compress:Prune", {"ratio": 0.5}),) if steps else ()
    return Point(made, Score(val, test), latency, 10_000_000, size, 1_000_000, 1_000_000)


BASE = point(steps=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(write_example(tmp_path_factory.mktemp("runs") / "run"))


def say(run: Run, chosen: Point | None, status: Status = "met", ratio: LatencyRatio | None = None) -> str:
    assert run.result is not None
    drop = None if chosen is None else ScoreDrop((chosen.score.test or 0.0) - 0.97, None)
    result: Result = replace(
        run.result, baseline=BASE, chosen=chosen, ratios={}, latency_ratio=ratio, score_drop=drop, status=status
    )
    return headline(replace(run, result=result))


def test_headlines(run: Run) -> None:
    fast = point(ms=0.25, size=80_000, test=0.967)
    assert say(run, fast) == f"digits: 8.0{TIMES} faster and 50{TIMES} smaller at 0.3 points less accuracy"
    assert say(run, replace(fast, score=Score(0.98, 0.98))).endswith("at 1.0 point more accuracy")
    assert say(run, replace(fast, score=Score(0.98, 0.97))).endswith("at the same accuracy")
    assert say(run, fast, "not_met").startswith(f"digits: target not met; the best found is 8.0{TIMES} faster")
    assert say(run, fast, "interrupted").startswith(f"digits: not finished; the best so far is 8.0{TIMES} faster")


def test_an_interrupted_run_speaks_of_validation_only(run: Run) -> None:
    tried = (point(ms=0.5, val=0.975), point(ms=0.1, val=0.9), point(ms=1.0, val=0.98))
    entries = tuple(
        Evaluation(i, "ok", replace(p, score=Score(p.score.val)), None, 1.0, i) for i, p in enumerate(tried)
    )
    said = say(replace(run, evaluations=entries), None, "interrupted")
    assert said == f"digits: not finished; the best so far is 4.0{TIMES} faster at 0.5 points less validation accuracy"


def test_headlines_never_flatter(run: Run) -> None:
    nothing = "nothing better than the baseline was found"
    assert say(replace(run, evaluations=()), None, "interrupted") == f"digits: not finished; {nothing}"
    assert say(run, None, "not_met") == f"digits: target not met; {nothing}"
    assert say(run, BASE, "not_met") == f"digits: target not met; {nothing}"
    assert say(run, point(ms=3.0), "not_met") == f"digits: target not met; {nothing}"
    slower = say(run, point(ms=3.0, size=1_000_000, test=0.97), "not_met")
    assert (
        slower
        == f"digits: target not met; the best found is 4.0{TIMES} smaller, but 1.5{TIMES} slower, at the same accuracy"
    )


def test_a_ratio_within_its_noise_is_no_improvement(run: Run) -> None:
    noisy = LatencyRatio(0.97, 0.9, 1.05, noisy=True)
    said = say(run, point(ms=1.9, size=1_000_000), ratio=noisy)
    assert "faster" not in said
    assert said.startswith(f"digits: 4.0{TIMES} smaller")


def test_an_unfinished_run_says_so(run: Run) -> None:
    assert headline(replace(run, result=None)) == "digits: not finished, 60 candidates evaluated so far"


def test_other_scores_are_not_percent(run: Run) -> None:
    named = replace(run, settings=replace(run.settings, score="r2"))
    assert say(named, point(ms=0.25, size=80_000, test=0.9455)).endswith("at 0.0245 lower r2")


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("accuracy", True),
        ("top5_accuracy", True),
        ("BalancedAccuracy", True),
        ("ACCURACY", True),
        ("negative_inaccuracy", False),
        ("accuracyless", False),
        ("score", False),
    ],
)
def test_percent_is_for_what_is_called_accuracy(name: str, percent: bool) -> None:
    assert ScoreStyle(name).percent is percent
    assert ScoreStyle.of(name, BASE).percent is percent


@pytest.mark.parametrize(
    ("val", "test", "percent"),
    [
        (0.98, 0.97, True),
        (0.0, 1.0, True),
        (0.98, None, True),
        (97.3, 97.1, False),
        (0.9, 1.2, False),
        (-0.1, 0.2, False),
    ],
)
def test_percent_is_for_scores_from_0_to_1(val: float, test: float | None, percent: bool) -> None:
    assert ScoreStyle.of("accuracy", replace(BASE, score=Score(val, test))).percent is percent


def test_an_accuracy_in_percent_is_shown_as_it_is(run: Run) -> None:
    assert run.result is not None
    base = replace(BASE, score=Score(97.3, 97.1))
    chosen = replace(point(ms=0.25, size=80_000), score=Score(97.0, 96.8))
    drop = ScoreDrop(-0.3, None)
    result = replace(run.result, baseline=base, chosen=chosen, ratios={}, latency_ratio=None, score_drop=drop)
    told = replace(run, result=result)
    assert headline(told).endswith("at 0.3000 lower accuracy")
    page = render(told)
    assert "97.1000" in page
    assert "9710.0%" not in page


def test_the_paired_ratio_beats_two_separate_figures(run: Run) -> None:
    assert run.result is not None
    chosen = point(ms=0.25)
    result = replace(run.result, baseline=BASE, chosen=chosen, ratios={}, latency_ratio=None)
    alone = cost_change(result, "latency")
    assert alone is not None
    assert alone.ratio == 0.125
    paired = cost_change(replace(result, latency_ratio=LatencyRatio(0.2, 0.19, 0.21, False)), "latency")
    assert paired is not None
    assert (paired.ratio, paired.interval, paired.words) == (0.2, (0.19, 0.21), f"5.0{TIMES} faster")


@given(st.floats(1e-6, 1e12))
def test_three_digits_are_kept(value: float) -> None:
    assert float(compact(value)) == pytest.approx(value, rel=0.006)


@given(st.floats(1e-4, 1e4))
def test_times_reads_the_same_both_ways(ratio: float) -> None:
    assert times(ratio) == times(1 / ratio)
    assert float(times(ratio)) == pytest.approx(max(ratio, 1 / ratio), rel=0.06)


@given(st.integers(0, 10**12))
def test_bytes_are_decimal(value: int) -> None:
    number, unit = quantity("size", value).split()
    worth = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[unit]
    assert float(number) * worth == pytest.approx(value, rel=0.006)


@pytest.mark.parametrize(
    ("cost", "wanted", "limit"),
    [
        ("latency", "<=0.2x", 0.4),
        ("latency", "<=300us", 0.3),
        ("size", "<=200KB", 200_000),
        ("macs", "<=5M", 5e6),
        ("memory", "<=1e-1x", 1e6),
        ("latency", "fast", None),
        ("latency", "<=3parsec", None),
    ],
)
def test_targets_become_lines(cost: Cost, wanted: str, limit: float | None) -> None:
    found = target_limit(cost, wanted, BASE)
    assert found == (None if limit is None else pytest.approx(limit))


def test_the_floor_is_relative_to_the_baseline() -> None:
    assert score_floor({"score": ">=-0.01"}, BASE) == pytest.approx(0.97)
    assert score_floor({"score": ">=0.005"}, BASE) == pytest.approx(0.985)
    assert score_floor({}, BASE) is None
    assert score_floor({"score": ">=-0.01"}, None) is None


rows = st.lists(st.tuples(st.floats(0.05, 1.3), st.floats(0.95, 1.0)), min_size=1, max_size=12)


@given(rows)
def test_progress_against_brute_force(run: Run, rows: list[tuple[float, float]]) -> None:
    points = [point(ms=2.0 * share, val=val) for share, val in rows]
    entries = tuple(Evaluation(i, "ok", p, None, 1.0, float(i)) for i, p in enumerate(points))
    assert run.result is not None
    progress = follow(replace(run, result=replace(run.result, baseline=BASE), evaluations=entries))
    assert progress is not None
    floor, kept = 0.98 - 0.01, []
    for index, (share, val) in enumerate(rows):
        if val >= floor:
            kept.append(share)
        assert progress.best[index] == pytest.approx(min([1.0, *kept]))
        assert progress.volume[index] == pytest.approx(covered([(1.0, 0.98), *rows[: index + 1]]), abs=1e-9)


def covered(rows: list[tuple[float, float]], depth: float = 0.02, worst: float = 1.1) -> float:
    """Share of the box (cost up to 1.1, score from 0.02 below the baseline up to it) below some row, cell by cell."""
    boxes = [(min(share, worst), min(1.0, max(0.0, (0.98 - val) / depth))) for share, val in rows]
    xs = sorted({0.0, worst, *(x for x, _ in boxes)})
    ys = sorted({0.0, 1.0, *(y for _, y in boxes)})
    area = 0.0
    for x0, x1 in pairwise(xs):
        for y0, y1 in pairwise(ys):
            if any(x <= x0 and y <= y0 for x, y in boxes):
                area += (x1 - x0) * (y1 - y0)
    return area / worst


def test_progress_follows_time_not_the_order_of_lines(run: Run) -> None:
    shuffled = replace(run, evaluations=tuple(reversed(run.evaluations)))
    assert follow(shuffled) == follow(run)


def test_progress_of_a_thousand_candidates_is_quick(run: Run) -> None:
    entries = tuple(
        Evaluation(i, "ok", point(ms=2 / (1 + i % 97), val=0.98 - 0.0002 * (i % 89)), None, 1.0, float(i))
        for i in range(1000)
    )
    assert run.result is not None
    progress = follow(replace(run, result=replace(run.result, baseline=BASE), evaluations=entries))
    assert progress is not None
    assert all(a <= b + 1e-12 for a, b in pairwise(progress.volume))
    assert math.isclose(progress.best[-1], min(r for r, k in zip(progress.ratios, progress.kept, strict=True) if k))


def test_summary_table(tmp_path: Path) -> None:
    raw = json.loads((write_example(tmp_path / "run") / "result.json").read_text())
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary_table(raw, "accuracy"))
    text = console.export_text()
    assert "Accuracy, test" in text
    assert f"{100 * raw['baseline']['score']['test']:.1f}%" in text
    assert f"{1 / raw['latency_ratio']['median']:.0f}{TIMES} faster" in text
    assert "Peak memory" in text
    shifted = json.loads(json.dumps(raw))
    for part in ("baseline", "chosen"):
        shifted[part]["score"] = {name: shifted[part]["score"][name] and 97.3 for name in ("val", "test")}
    console.print(summary_table(shifted, "accuracy"))
    text = console.export_text()
    assert "97.3000" in text
    assert "9730" not in text
    plain = ScoreStyle("score").value(raw["baseline"]["score"]["val"])
    console.print(summary_table({**raw, "chosen": None, "status": "not_met"}))
    text = console.export_text()
    assert plain in text
    assert "Chosen (none)" in text
    assert "faster" not in text
