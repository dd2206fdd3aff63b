"""The list of methods that work: one row for each paper, and the built-in steps of ``optimize``.

The list itself is ``catalog.toml``. A paper enters when its claim holds.
"""

import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netwright.core.errors import NetwrightError, RecipeError
from netwright.core.recipe import resolve

__all__ = ["CatalogError", "Row", "Step", "load", "steps"]

WINGS = (
    *("optim", "param", "diagnose", "tune", "search", "compress", "certify", "distribute", "solve", "graphs"),
    *("netops", "control", "language", "sequence", "vision", "geometry", "generate", "science"),
)
_PATH = Path(__file__).with_name("catalog.toml")


class CatalogError(NetwrightError):
    """A catalogue that cannot be read, or a row that is not what it should be."""


@dataclass(frozen=True)
class Row:
    """A paper's method.

    Args:
        paper: its number in the list of papers.
        title: the paper's title.
        wing: where the method lives.
        object: its import path, ``module:name``.
        claim: the script that shows that it works, ``claims/<wing>/<method>.py`` in the repository.
    """

    paper: int
    title: str
    wing: str
    object: str
    claim: str


@dataclass(frozen=True)
class Step:
    """A building block of ``optimize`` that is no paper's method.

    Args:
        wing: where it lives.
        object: its import path, ``module:name``.
        summary: what it does, in one sentence.
    """

    wing: str
    object: str
    summary: str


def load(path: Path | None = None) -> tuple[Row, ...]:
    """The methods of papers, in the order of the file.

    Args:
        path: another file of the same form; None is Netwright's own.

    Raises:
        CatalogError: a file that is not such a list; a row with a missing, unknown or ill-typed entry, with an import
            path that leads nowhere or a claim that is not named ``claims/<wing>/<method>.py``; a paper listed twice.

    Example:
        >>> all(row.claim.startswith("claims/") for row in load())
        True
    """
    rows = tuple(Row(**_entry("method", table, Row)) for table in _tables(path)["method"])
    for row in rows:
        if row.paper < 1:
            raise CatalogError(f"[[method]] {row.title!r}: paper must be a positive number, got {row.paper}.")
        _check_place("method", row.wing, row.object)
        parts = row.claim.split("/")
        if len(parts) != 3 or parts[:2] != ["claims", row.wing] or not parts[2].removesuffix(".py").isidentifier():
            raise CatalogError(
                f"[[method]] paper {row.paper}: claim must be named claims/{row.wing}/<method>.py, got {row.claim!r}."
            )
    _once("paper", [row.paper for row in rows])
    return rows


def steps(path: Path | None = None) -> tuple[Step, ...]:
    """The built-in steps of ``optimize``, in the order of the file.

    Args:
        path: as for :func:`load`.

    Raises:
        CatalogError: as for :func:`load`; an object listed twice.

    Example:
        >>> [step.object for step in steps()][0]
        'netwright.compress:Prune'
    """
    found = tuple(Step(**_entry("step", table, Step)) for table in _tables(path)["step"])
    for step in found:
        _check_place("step", step.wing, step.object)
    _once("object", [step.object for step in found])
    return found


def _tables(path: Path | None) -> Mapping[str, list[Any]]:
    place = _PATH if path is None else path
    try:
        content = tomllib.loads(place.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogError(f"The catalogue {place} cannot be read: {error}.") from error
    unknown = sorted(set(content) - {"method", "step"})
    if unknown:
        raise CatalogError(f"The catalogue {place} has unknown tables {', '.join(unknown)}; known are method and step.")
    tables = {name: content.get(name, []) for name in ("method", "step")}
    for name, rows in tables.items():
        if not isinstance(rows, list):
            raise CatalogError(f"The catalogue {place}: write every row under [[{name}]], in double brackets.")
    return tables


def _entry(name: str, table: Any, kind: type[Row] | type[Step]) -> dict[str, Any]:
    wanted = kind.__annotations__
    if not isinstance(table, Mapping) or set(table) != set(wanted):
        got = ", ".join(table) if isinstance(table, Mapping) else type(table).__name__
        raise CatalogError(f"[[{name}]] needs exactly {', '.join(wanted)}, got {got or 'nothing'}.")
    for key, type_ in wanted.items():
        value = table[key]
        if not isinstance(value, type_) or isinstance(value, bool) or value == "":
            raise CatalogError(f"[[{name}]] {key} must be a non-empty {type_.__name__}, got {value!r}.")
    return dict(table)


def _check_place(name: str, wing: str, path: str) -> None:
    if wing not in WINGS:
        raise CatalogError(f"[[{name}]] {path}: no wing {wing!r}. Known are {', '.join(WINGS)}.")
    try:
        resolve(path)
    except RecipeError as error:
        raise CatalogError(f"[[{name}]] object: {error}") from error


def _once(what: str, values: list[Any]) -> None:
    twice = [str(value) for value, count in Counter(values).items() if count > 1]
    if twice:
        raise CatalogError(f"The catalogue lists {what} {', '.join(twice)} more than once.")
