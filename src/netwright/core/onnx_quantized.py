"""Fake-quantized models as integer ONNX."""

from typing import Any


def translations() -> dict[Any, Any]:
    return {}


def store_integers(proto: Any) -> None:
    pass
