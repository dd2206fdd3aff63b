"""How a model is run where it is looked at, not trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["inference"]


@contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without the key-value cache of Transformers models; undone afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    configs = {id(config): config for module in modes for config in [getattr(module, "config", None)]}
    cached: list[Any] = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in cached:
            config.use_cache = False
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for config in cached:
            config.use_cache = True
        for module, training in modes.items():
            module.training = training
