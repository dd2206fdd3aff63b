"""What came of comparing methods: rows, a table, a figure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.core.cost import Cost
from netwright.core.errors import ArtifactError
from netwright.core.files import atomic_write
from netwright.core.timing import Ratio

if TYPE_CHECKING:
    from bokeh.models.layouts import LayoutDOM

__all__ = ["Comparison", "Row"]

_HEADS = ("Method", "Val", "Test", "Latency", "Size", "MACs", "Zeros", "Seconds")


@dataclass(frozen=True)
class Row:
    """One method.

    Args:
        name: what it was called; ``"baseline"`` for the network as it came.
        error: why it failed, in one line, or None. Everything below is then None.
        val: score on the validation split.
        test: score on the test split.
        cost: what the result costs on this machine.
        ratio: its latency as a share of the baseline's, measured in turns.
        zeros: share of the entries of matrices and kernels that are zero.
        seconds: wall time that the method and the recovery after it took.
    """

    name: str
    error: str | None = None
    val: float | None = None
    test: float | None = None
    cost: Cost | None = None
    ratio: Ratio | None = None
    zeros: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "name": self.name,
            "error": self.error,
            "val": self.val,
            "test": self.test,
            "cost": None if self.cost is None else self.cost.to_dict(),
            "ratio": None if self.ratio is None else self.ratio.to_dict(),
            "zeros": self.zeros,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Row":
        """The row that :meth:`to_dict` wrote."""
        cost, ratio = data["cost"], data["ratio"]
        return cls(
            data["name"],
            data["error"],
            _number(data["val"]),
            _number(data["test"]),
            None if cost is None else Cost.from_dict(cost),
            None if ratio is None else Ratio(**ratio),
            _number(data["zeros"]),
            float(data["seconds"]),
        )


@dataclass(frozen=True)
class Comparison:
    """What :func:`netwright.compress.compare` returns.

    Args:
        task: name of the task.
        baseline: the network as it came.
        rows: one for each method, in the order in which they were given.
        seed: source of weights, batches and the methods' randomness; None where it is not known.
        machine: the processor that latency was measured on; None where it is not known.
    """

    task: str
    baseline: Row
    rows: tuple[Row, ...]
    seed: int | None = None
    machine: str | None = None

    def table(self) -> str:
        """The rows as text, aligned; latency and size as shares of the baseline's."""
        lines = [_HEADS, *(_cells(entry, self.baseline) for entry in (self.baseline, *self.rows))]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
        text = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        failed = [f"{entry.name} failed: {entry.error}" for entry in self.rows if entry.error]
        return "\n".join([*text, *failed])

    def plot(self) -> "LayoutDOM":
        """A Bokeh figure: validation score against measured latency, and against the size of the file."""
        from netwright.compress._comparison_figure import drawn  # Bokeh takes half a second to import

        return drawn(self)

    def save(self, path: str | Path) -> Path:
        """Write the figure and the table as one HTML file that needs no network.

        Raises:
            ArtifactError: a path that cannot be written.
        """
        from netwright.compress._comparison_figure import page

        with atomic_write(Path(path), ArtifactError) as place:
            place.write_text(page(self), encoding="utf-8", errors="backslashreplace")
        return Path(path)

    def to_json(self) -> str:
        """Everything as JSON."""
        rows = [entry.to_dict() for entry in self.rows]
        return json.dumps(
            {
                "task": self.task,
                "seed": self.seed,
                "machine": self.machine,
                "baseline": self.baseline.to_dict(),
                "rows": rows,
            },
            indent=1,
        )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _cells(entry: Row, baseline: Row) -> tuple[str, ...]:
    if entry.cost is None or baseline.cost is None or entry.val is None:
        return (entry.name, *["-"] * (len(_HEADS) - 1))
    latency = "1.000x" if entry.ratio is None else f"{entry.ratio.median:.3f}x{'?' if entry.ratio.noisy else ''}"
    return (
        entry.name,
        f"{entry.val:.4f}",
        "-" if entry.test is None else f"{entry.test:.4f}",
        latency,
        f"{entry.cost.size_bytes / baseline.cost.size_bytes:.3f}x",
        f"{entry.cost.macs / max(baseline.cost.macs, 1):.3f}x",
        "-" if entry.zeros is None else f"{entry.zeros:.1%}",
        f"{entry.seconds:.1f}",
    )
