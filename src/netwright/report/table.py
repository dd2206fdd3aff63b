"""The table that the terminal shows at the end of a run."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from netwright.report.compare import Row, compare
from netwright.report.fields import Fields
from netwright.report.format import ScoreStyle
from netwright.report.read import parse_result

__all__ = ["summary_table"]

_STYLES = {"better": "green", "worse": "red", "same": ""}


def summary_table(run_result: Mapping[str, object], score: str = "score") -> Table:
    """Baseline against chosen as a Rich table: scores with intervals, latency with its spread, every other cost.

    Args:
        run_result: the content of ``result.json``.
        score: the score's name, as in ``run.json``; accuracies from 0 to 1 are shown in percent.

    Raises:
        CorruptRunError: the content is not that of a ``result.json``.
    """
    result = parse_result(Fields("result.json", run_result, "Pass the content of a finished run's result.json."))
    table = Table(title=Text(f"{result.task}, {result.status.replace('_', ' ')}"), title_justify="left")
    table.add_column("")
    table.add_column("Baseline", justify="right")
    table.add_column("Chosen" if result.chosen else "Chosen (none)", justify="right")
    table.add_column("Change", justify="right")
    for row in compare(result, ScoreStyle.of(score, result.baseline)):
        table.add_row(
            Text(row.name),
            _cell(row.baseline, row.baseline_interval),
            _cell(row.chosen, row.chosen_interval),
            _change(row),
        )
    return table


def _cell(value: str, interval: str) -> Text:
    return Text("\n".join(part for part in (value, f"[{interval}]" if interval else "") if part))


def _change(row: Row) -> Text:
    words = f"{row.change}, {row.words}" if row.words else row.change
    return Text(_cell(words, row.change_interval).plain, style=_STYLES[row.verdict])
