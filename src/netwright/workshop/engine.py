"""Where evaluations run: one interface, whatever stands behind it."""

from collections.abc import Sequence
from typing import Protocol

from netwright.workshop.evaluation import Outcome, Request

__all__ = ["Engine"]


class Engine(Protocol):
    """Runs evaluations side by side.

    An engine answers every request exactly once, with a failed outcome where a worker died, and never
    raises for what a candidate did. Where a worker cannot even read the task, no candidate is at fault: it raises.
    """

    workers: int
    """How many evaluations run side by side."""

    def submit(self, request: Request) -> None:
        """Start an evaluation on a free worker. Only when fewer than ``workers`` are under way."""
        ...

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Outcomes that arrived, after at most ``timeout`` seconds; empty when none did.

        Raises:
            NetwrightError: a worker cannot read the task.
        """
        ...

    def close(self) -> None:
        """Stop every worker at once, whatever it is doing."""
        ...
