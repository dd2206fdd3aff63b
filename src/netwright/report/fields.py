"""Typed reading of JSON that may be damaged: every complaint names the file, the field and the remedy."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from netwright.core.errors import CorruptRunError

__all__ = ["Fields", "load_object"]


@dataclass(frozen=True)
class Fields:
    """One JSON object of a run directory, read field by field.

    Reach for it where a file comes from disk and a wrong type must become one clear sentence
    instead of a ``KeyError`` three calls later.

    Args:
        where: the file and the place in it, as the reader should see it: ``result.json: baseline``.
        content: the object.
        remedy: what to do when it is not as it should be.

    Example:
        >>> fields = Fields("result.json", {"seed": 3, "inner": {"ms": 1.5}}, "Run it again.")
        >>> fields.integer("seed"), fields.inner("inner").number("ms")
        (3, 1.5)
        >>> fields.text("seed")
        Traceback (most recent call last):
        ...
        netwright.core.errors.CorruptRunError: result.json: 'seed' should be text, got 3. Run it again.
    """

    where: str
    content: Mapping[str, object]
    remedy: str

    def wrong(self, key: str, wanted: str) -> CorruptRunError:
        """The error for a field that is absent or of the wrong kind."""
        got = f"got {_short(self.content[key])}" if key in self.content else "it is missing"
        return CorruptRunError(f"{self.where}: '{key}' should be {wanted}, {got}. {self.remedy}")

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.content.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """A string; ``default`` where the field is absent or null."""
        if default is not None and not self.has(key):
            return default
        value = self.content.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise self.wrong(key, "a finite number")
        return float(value)

    def positive(self, key: str) -> float:
        """A finite number above 0."""
        value = self.number(key)
        if not value > 0:
            raise self.wrong(key, "a number above 0")
        return value

    def maybe_number(self, key: str) -> float | None:
        """A finite number, or None where the field is absent or null."""
        return self.number(key) if self.has(key) else None

    def integer(self, key: str) -> int:
        """A whole number."""
        value = self.number(key)
        if value != int(value):
            raise self.wrong(key, "a whole number")
        return int(value)

    def flag(self, key: str) -> bool:
        """True or false; absent counts as false."""
        value = self.content.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def interval(self, key: str) -> tuple[float, float] | None:
        """Two finite numbers in order, or None where the field is absent or null."""
        if not self.has(key):
            return None
        value = self.content[key]
        if not isinstance(value, list) or len(value) != 2:
            raise self.wrong(key, "a list of two numbers")
        pair = Fields(self.where, {key: value[0], f"{key}[1]": value[1]}, self.remedy)
        low, high = pair.number(key), pair.number(f"{key}[1]")
        if low > high:
            raise self.wrong(key, "a lower and an upper end, in that order")
        return low, high

    def inner(self, key: str) -> "Fields":
        """The object under ``key``."""
        value = self.content.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(f"{self.where}: {key}", value, self.remedy)

    def inners(self, key: str) -> tuple["Fields", ...]:
        """The list of objects under ``key``; absent or null counts as empty."""
        if not self.has(key):
            return ()
        value = self.content[key]
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.wrong(key, "a list of objects")
        return tuple(Fields(f"{self.where}: {key}[{i}]", entry, self.remedy) for i, entry in enumerate(value))

    def sizes(self, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers such as a shape, or None where the field is absent or null."""
        if not self.has(key):
            return None
        value = self.content[key]
        if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
            raise self.wrong(key, "a list of whole numbers")
        return tuple(value)

    def plain(self, key: str) -> Mapping[str, object]:
        """The object under ``key`` as it stands; absent or null counts as empty."""
        return dict(self.inner(key).content) if self.has(key) else {}


def load_object(path: Path, remedy: str) -> Fields:
    """The JSON object in a file.

    Args:
        path: the file.
        remedy: what the user can do when the file is damaged.

    Raises:
        CorruptRunError: not UTF-8, not JSON, or not an object.
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptRunError(f"{path} is not valid JSON ({error}). {remedy}") from error
    except IsADirectoryError as error:
        raise CorruptRunError(f"{path} is a folder, not a file. {remedy}") from error
    if not isinstance(content, dict):
        raise CorruptRunError(f"{path} should hold one JSON object, got {_short(content)}. {remedy}")
    return Fields(str(path), content, remedy)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _short(value: object) -> str:
    """A value in at most 60 characters."""
    shown = json.dumps(value, default=repr)
    return shown if len(shown) <= 60 else shown[:57] + "…"
