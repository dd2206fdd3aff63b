"""Writes ``report.html``."""

from pathlib import Path

from netwright.core.files import atomic_write
from netwright.report.page import render
from netwright.report.read import read_run
from netwright.report.training_page import render_training
from netwright.report.training_run import is_training, read_training

__all__ = ["write_report"]


def write_report(run: Path | str) -> Path:
    """Write one self-contained ``report.html`` into a run directory, finished or not.

    Reach for it after a run, or while one is going on, for something to look at and to pass on: the file
    opens without a network and stays below 2 MB for hundreds of candidates. It reads files only
    (``run.json``, ``result.json``, ``evaluations.jsonl``, ``history.json``, ``layers.json``); what is absent
    is left out with a sentence. A run of ``netwright train`` (``training.json``, ``trainings.jsonl``) gets a page of
    its own kind. The file is replaced atomically.

    Args:
        run: the run directory.

    Returns:
        The path of the report.

    Raises:
        CorruptRunError: ``run.json`` is missing, or ``run.json`` or ``result.json`` cannot be read.
        RunDirectoryError: the report cannot be written.
    """
    path = Path(run) / "report.html"
    page = render_training(read_training(Path(run))) if is_training(Path(run)) else render(read_run(run))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files may be no text
    return path
