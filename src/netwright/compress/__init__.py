"""Smaller and faster networks: transforms that prune and quantize."""

from netwright.compress._comparison import Comparison, Row
from netwright.compress.compare import compare, described
from netwright.compress.int8_types import fastest_int8
from netwright.compress.prune import Prune
from netwright.compress.quantize import Int8

__all__ = ["Comparison", "Int8", "Prune", "Row", "compare", "described", "fastest_int8"]
