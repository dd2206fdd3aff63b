"""The global random states of torch, NumPy and Python: set aside, seeded, saved, brought back.

NumPy's legacy generator is treated because datasets of users draw their augmentation from it; nothing of ours does.
The linter's rule against that generator is therefore switched off on the three lines that are about it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["isolated", "restore_states", "save_states", "seeded"]


@contextmanager
def isolated(seed: int | None = None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, global randomness starts from ``seed``; outside, nothing was drawn.

    Reach for it around any code that draws from the global generators (dropout, a dataset's
    augmentation, a user's callback) and that must neither depend on the caller's random state nor disturb it.

    Args:
        seed: where torch, NumPy's global generator and ``random`` start; None goes on from where they are.
        device: a CUDA device whose generator is treated likewise; "cpu" for none. With a seed cuDNN is held to
            algorithms that give the same result every time.

    Example:
        >>> with isolated(0):
        ...     first = torch.rand(1)
        >>> with isolated(0):
        ...     bool(torch.rand(1) == first)
        True
    """
    device = torch.device(device)
    before = save_states(device)
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        if seed is not None:
            _seed_all(seed, device)
            if device.type == "cuda":
                cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = flags
        restore_states(before, device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's generators of all devices start from ``seed``; outside, nothing was drawn from them.

    Reach for it around code that initializes weights wherever it pleases.

    Example:
        >>> with seeded(0):
        ...     first = torch.nn.Linear(2, 1).weight
        >>> with seeded(0):
        ...     torch.equal(first, torch.nn.Linear(2, 1).weight)
        True
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def save_states(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The global random states as tensors and tuples, which ``torch.load(weights_only=True)`` reads back."""
    device = torch.device(device)
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (
            torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            int(legacy["state"]["pos"]),
            int(legacy["has_gauss"]),
            float(legacy["gauss"]),
        ),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_states(states: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Put back what :func:`save_states` returned; a checkpoint may have brought its tensors to another device."""
    device = torch.device(device)
    torch.set_rng_state(states["torch"].cpu())
    random.setstate(states["python"])
    key, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", key.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def _seed_all(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.set_state(np.random.RandomState(seed % 2**32).get_state())  # noqa: NPY002
