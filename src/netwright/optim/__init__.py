"""How parameters move: optimizers, schedules, clipping and averaging."""

from netwright.optim._registry import Capability, available, create, schedules

__all__ = ["Capability", "available", "create", "schedules"]
