"""How a conformance suite speaks: one named property after the other."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

__all__ = ["expect", "run_properties"]

Case = TypeVar("Case")


def expect(holds: bool, message: str) -> None:
    """Raise an ``AssertionError`` that says ``message`` unless ``holds``.

    Unlike the statement ``assert`` it also works under ``python -O``.

    Raises:
        AssertionError: ``holds`` is false.
    """
    if not holds:
        raise AssertionError(message)


def run_properties(
    subject: str, properties: Mapping[str, Callable[[Case], Any]], case: Case, skip: Collection[str]
) -> None:
    """Check every property in turn; the first that fails is raised under its name.

    Args:
        subject: what is being checked, for the message.
        properties: a function per name; it raises where the property does not hold.
        case: handed to each function.
        skip: names to leave out.

    Raises:
        AssertionError: "SUBJECT breaks 'NAME': what was seen", or an unknown name in ``skip``.
    """
    unknown = sorted(set(skip) - set(properties))
    expect(not unknown, f"skip names no property: {', '.join(unknown)}. Known are {', '.join(properties)}.")
    for name, check in properties.items():
        if name in skip:
            continue
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{subject} breaks {name!r}: {error}") from error
        except Exception as error:  # whatever a stranger's method raises is the finding, under the property's name
            raise AssertionError(f"{subject} breaks {name!r}: it raised {type(error).__name__}: {error}") from error
