"""Options whose values several commands share."""

from enum import StrEnum

__all__ = ["Engine"]


class Engine(StrEnum):
    """Where candidates are evaluated."""

    local = "local"
    ray = "ray"
