"""Progress on terminals and elsewhere."""

import io
import time

import pytest
from rich.console import Console

from netwright.core.console import ConsoleProgress


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with ConsoleProgress("training digits", console=console) as progress:
        progress.update(0.25, "epoch 2.0/8  loss 0.5000  score 0.9000 [x]")
    said = out.getvalue()
    assert "training digits" in said
    assert "25%" in said
    assert "loss 0.5000  score 0.9000 [x]" in said
    assert "left" in said


def test_a_pipe_gets_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(0.5 * k for k in range(1, 41))])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with ConsoleProgress("searching", console=Console(file=out, width=20)) as progress:
        for k in range(1, 41):
            progress.update(k / 40, f"candidate {k} [best 0.97]")
    lines = out.getvalue().splitlines()
    assert lines == [
        "searching  10%  candidate 4 [best 0.97]  (2 s, 18 s left)",
        "searching  35%  candidate 14 [best 0.97]  (7 s, 13 s left)",
        "searching  60%  candidate 24 [best 0.97]  (12 s, 8 s left)",
        "searching  85%  candidate 34 [best 0.97]  (17 s, 3 s left)",
    ]


def test_quick_loops_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress("quick") as progress:
        for k in range(100):
            progress.update(k / 99, "x")
    assert capsys.readouterr() == ("", "")


def test_fractions_out_of_range_are_clamped() -> None:
    out = io.StringIO()
    with ConsoleProgress("odd", console=Console(file=out), quiet=0, every=0) as progress:
        progress.update(-1, "a")
        progress.update(7, "b")
    assert out.getvalue().splitlines()[0].startswith("odd   0%  a")
    assert out.getvalue().splitlines()[1].startswith("odd 100%  b")


def test_the_bar_is_closed_when_the_loop_fails() -> None:
    out = io.StringIO()
    progress = ConsoleProgress("failing", console=Console(file=out, force_terminal=True))
    with pytest.raises(ZeroDivisionError), progress:
        progress.update(1 / 0, "never")
    assert "\x1b[?25h" in out.getvalue()  # the cursor is shown again
