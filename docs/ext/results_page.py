"""Sphinx extension: the page of benchmarks shows ``benchmarks/RESULTS.md`` and what the claims gave."""

import json
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

__all__ = ["CLAIMS", "MARK", "NOTHING", "claims_table", "setup", "with_results"]

MARK = "<!-- benchmarks/RESULTS.md -->"
CLAIMS = "<!-- claims/results.jsonl -->"
NOTHING = "There are no committed results yet. `make bench` writes `benchmarks/RESULTS.md`, which is then shown here."

_RECORDS = Path(__file__).resolve().parents[2] / "claims" / "results.jsonl"
_RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "RESULTS.md"


def with_results(source: str, results: str | None) -> str:
    """The page with the mark replaced by the results, their headings one level lower; None says that there are none."""
    return source.replace(MARK, NOTHING if results is None else _lower_headings(results))


def claims_table(lines: str) -> str:
    """The last summary of each claim as a Markdown table, those that hold first.

    Args:
        lines: JSON lines as ``python -m claims --record`` appends them.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in lines.splitlines():
        record = json.loads(line)
        if "claim" in record and not record["smoke"]:
            found[record["name"]] = record
    rows = [
        "| paper | claim | method | baseline | 95% interval of the difference | holds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in sorted(found.values(), key=lambda entry: (not entry["holds"], entry["name"])):
        interval = "" if record["ci95"] is None else " to ".join(f"{end:.3g}" for end in record["ci95"])
        sentence = record["claim"] + (f" *{record['why']}*" if record.get("why") and not record["holds"] else "")
        cells = [
            "" if record["paper"] is None else str(record["paper"]),
            sentence.replace("|", r"\|"),
            f"{record['mean_method']:.4g}",
            f"{record['mean_baseline']:.4g}",
            interval,
            "yes" if record["holds"] else "**no**",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _lower_headings(text: str) -> str:
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else re.sub(r"^#", "##", part, flags=re.MULTILINE) for part in parts)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "benchmarks":
        app.env.note_dependency(str(_RESULTS))
        app.env.note_dependency(str(_RECORDS))
        if _RECORDS.exists():
            source[0] = source[0].replace(CLAIMS, claims_table(_RECORDS.read_text(encoding="utf-8")))
        source[0] = with_results(source[0], _RESULTS.read_text(encoding="utf-8") if _RESULTS.exists() else None)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", _read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
