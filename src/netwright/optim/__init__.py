"""How parameters move: optimizers, schedules, clipping and averaging."""
