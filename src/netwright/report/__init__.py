"""One self-contained HTML report, and the terminal's table, from a run directory."""

from netwright.report.read import read_run
from netwright.report.run import Run
from netwright.report.search_page import write_search_report
from netwright.report.table import summary_table
from netwright.report.write import write_report

__all__ = ["Run", "read_run", "summary_table", "write_report", "write_search_report"]
