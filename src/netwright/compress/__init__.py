"""Smaller and faster networks: transforms that prune and quantize."""

from netwright.compress.int8_types import fastest_int8
from netwright.compress.prune import Prune
from netwright.compress.quantize import Int8

__all__ = ["Int8", "Prune", "fastest_int8"]
