"""Progress on a terminal as a bar, elsewhere as a few plain lines."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ConsoleProgress"]


class ConsoleProgress:
    """Shows how far a loop is; a context manager whose :meth:`update` is the loop's progress function.

    On a terminal: a bar with a description, the loop's own words (loss, score), elapsed and remaining time.
    Elsewhere (a log file, a pipe): one plain line every ``every`` seconds, and none for a loop that is over before
    ``quiet`` seconds.

    Args:
        description: what is going on, in a word or two.
        console: where to write; by default standard error, so that results on standard output stay clean.
        every: seconds between plain lines.
        quiet: seconds before the first plain line.

    Example:
        >>> with ConsoleProgress("training") as progress:
        ...     for step in range(10):
        ...         progress.update((step + 1) / 10, f"loss {1 / (step + 1):.2f}")
    """

    def __init__(
        self, description: str, *, console: Console | None = None, every: float = 5.0, quiet: float = 2.0
    ) -> None:
        self._description = description
        self._console = Console(stderr=True) if console is None else console
        self._every = every
        self._start = time.monotonic()
        self._next = self._start + quiet
        self._bar: Progress | None = None
        self._row: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._row = self._bar.add_task(self._description, total=1.0, text="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, fraction: float, text: str) -> None:
        """Tell how far it is.

        Args:
            fraction: finished share, in [0, 1].
            text: what to show beside it, such as ``"loss 0.12  score 0.98"``.
        """
        fraction = min(max(fraction, 0.0), 1.0)
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=fraction, text=text)
            return
        now = time.monotonic()
        if now >= self._next and not self._console.is_terminal:
            self._next = now + self._every
            elapsed = now - self._start
            left = f", {elapsed * (1 - fraction) / fraction:.0f} s left" if fraction > 0 else ""
            line = f"{self._description} {fraction:4.0%}  {text}  ({elapsed:.0f} s{left})"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
