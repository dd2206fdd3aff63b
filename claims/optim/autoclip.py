"""AutoClip against no clipping and against a fixed threshold that was picked on another task."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from claims._training import Arrays, Loss, arrays, best, descend, diabetes, full_loss
from netwright.core.builtin.networks import mlp
from netwright.optim.autoclip import AutoClip

PAPER = 198
CLAIM = (
    "Training a small network on digits by SGD with momentum and batches of 8, AutoClip at its default percentile ends "
    "at a lower test loss than the better of no clipping and of a fixed threshold picked on the diabetes regression, "
    "each at the best of the same five learning rates on validation data."
)
BETTER = "lower"
SEEDS = 5
_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)

Clip = Callable[[nn.Module], object]


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    steps = 30 if smoke else 300
    lrs = _LRS[1:3] if smoke else _LRS

    def outcome(
        data: Arrays, loss: Loss, sizes: tuple[int, int], make: Callable[[], Clip | None]
    ) -> tuple[float, float]:
        """The validation and test loss at the learning rate with the least validation loss."""
        found = []
        for lr in lrs:
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Flatten(), *mlp(sizes[0], (64, 64, 64), sizes[1]))
            optimizer, clip = SGD(model.parameters(), lr, momentum=0.9), make()
            descend(
                model,
                optimizer,
                data.train,
                loss,
                steps=steps,
                batch=8,
                seed=seed,
                schedule=CosineAnnealingLR(optimizer, steps),
                before_step=None if clip is None else partial(clip, model),
            )
            found.append((full_loss(model, data.val, loss), full_loss(model, data.test, loss)))
        return min(found)

    def fixed(threshold: float) -> Clip:
        return lambda model: nn.utils.clip_grad_norm_(model.parameters(), threshold)

    def automatic() -> Clip:
        clip = AutoClip()
        return lambda model: clip(model.parameters())

    other, digits = diabetes(seed), arrays("digits", seed=seed)
    threshold = best(
        (0.1, 1.0) if smoke else (0.1, 0.3, 1.0, 3.0, 10.0),
        lambda value: outcome(other, functional.mse_loss, (10, 1), lambda: fixed(value))[0],
    )
    sizes, loss = (64, 10), functional.cross_entropy
    none, kept = (outcome(digits, loss, sizes, make) for make in (lambda: None, lambda: fixed(threshold)))
    return {
        "method": outcome(digits, loss, sizes, automatic)[1],
        "baseline": min(none, kept)[1],
        "no_clipping": none[1],
        "fixed": kept[1],
        "threshold": threshold,
    }
