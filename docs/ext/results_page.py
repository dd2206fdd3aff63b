"""Sphinx extension: the page of benchmarks shows ``benchmarks/RESULTS.md`` and what the claims gave."""

import ast
import json
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

__all__ = ["CLAIMS", "MARK", "NOTHING", "claims_table", "setup", "with_results"]

MARK = "<!-- benchmarks/RESULTS.md -->"
CLAIMS = "<!-- claims/results.jsonl -->"
NOTHING = "There are no committed results yet. `make bench` writes `benchmarks/RESULTS.md`, which is then shown here."

_SCRIPTS = Path(__file__).resolve().parents[2] / "claims"
_RECORDS = _SCRIPTS / "results.jsonl"
_RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "RESULTS.md"


def with_results(source: str, results: str | None) -> str:
    """The page with the mark replaced by the results, their headings one level lower; None says that there are none."""
    return source.replace(MARK, NOTHING if results is None else _lower_headings(results))


def claims_table(lines: str, scripts: Path = _SCRIPTS) -> str:
    """The last summary of each claim as a Markdown table, those that hold first.

    Runs before the last of the same sentence that ended otherwise are named beside it, with their seeds.

    Args:
        lines: JSON lines as ``python -m claims --record`` appends them.
        scripts: where the claims' modules lie; their ``WHY`` is taken where a record has none.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in lines.splitlines():
        record = json.loads(line)
        if "claim" in record and not record["smoke"]:
            runs.setdefault(record["name"], []).append(record)
    rows = [
        "| paper | claim | method | baseline | 95% interval of the difference | holds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for *earlier, record in sorted(runs.values(), key=lambda entry: (not entry[-1]["holds"], entry[-1]["name"])):
        interval = "" if record["ci95"] is None else " to ".join(f"{end:.3g}" for end in record["ci95"])
        why = "" if record["holds"] else record.get("why") or _why(scripts / f"{record['name']}.py")
        sentence = record["claim"] + (f" *{why}*" if why else "")
        cells = [
            "" if record["paper"] is None else str(record["paper"]),
            sentence.replace("|", r"\|"),
            f"{record['mean_method']:.4g}",
            f"{record['mean_baseline']:.4g}",
            interval,
            _holds(record, [entry for entry in earlier if entry["claim"] == record["claim"]]),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _holds(record: dict[str, Any], earlier: list[dict[str, Any]]) -> str:
    """The verdict, and after it the seeds of earlier runs of the same sentence whose verdict was another."""
    other = [_seeds(entry["seeds"]) for entry in earlier if entry["holds"] != record["holds"]]
    said = "yes" if record["holds"] else "**no**"
    if not other:
        return said
    return f"{said} (earlier, with seeds {'; '.join(other)}: {'no' if record['holds'] else 'yes'})"


def _seeds(seeds: list[int]) -> str:
    whole = len(seeds) > 1 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def _why(script: Path) -> str:
    """The string that a claim's module assigns to ``WHY``; empty where there is none."""
    if not script.exists():
        return ""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["WHY"]:
            return str(ast.literal_eval(node.value))
    return ""


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
