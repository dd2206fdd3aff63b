"""Sphinx extension: the page of benchmarks shows ``benchmarks/RESULTS.md``, where it has been written."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

__all__ = ["MARK", "NOTHING", "setup", "with_results"]

MARK = "<!-- benchmarks/RESULTS.md -->"
NOTHING = "There are no committed results yet. `make bench` writes `benchmarks/RESULTS.md`, which is then shown here."

_RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "RESULTS.md"


def with_results(source: str, results: str | None) -> str:
    """The page with the mark replaced by the results, their headings one level lower; None says that there are none."""
    return source.replace(MARK, NOTHING if results is None else _lower_headings(results))


def _lower_headings(text: str) -> str:
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else re.sub(r"^#", "##", part, flags=re.MULTILINE) for part in parts)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "benchmarks":
        app.env.note_dependency(str(_RESULTS))
        source[0] = with_results(source[0], _RESULTS.read_text(encoding="utf-8") if _RESULTS.exists() else None)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", _read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
