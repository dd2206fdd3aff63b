"""A backbone with a segmentation and a classification head on scenes of digits, at 16 times the batch size."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from claims._training import arrays, batches, best
from netwright.optim.agvm import AGVM, module_groups

PAPER = 49
CLAIM = (
    "A small dense predictor (backbone, segmentation head, classification head) trained with 16 times the batch size "
    "in the same epochs reaches a higher mean IoU with AGVM than with plain scaling of the learning rate (linear or "
    "square-root, chosen from the same grid)."
)
BETTER = "higher"
SEEDS = 6
BATCH, TIMES, SMALL, KINDS = 8, 16, 0.03, 5  # SMALL: learning rate at the small batch size
Scenes = tuple[Tensor, Tensor, Tensor]


def scenes(images: Tensor, labels: Tensor, count: int, seed: int) -> Scenes:
    """``count`` scenes of one to four digits below 5: images, classes of pixels (5 is background), what is present."""
    images, labels = images[labels < KINDS].view(-1, 8, 8), labels[labels < KINDS]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (count, 4), generator=generator)
    shown = torch.rand(count, 4, generator=generator) < 0.6
    shown[:, 0] |= ~shown.any(1)
    cells = images[chosen] * shown[:, :, None, None]
    ink = (images[chosen] > images.mean()) & shown[:, :, None, None]
    classes = torch.where(ink, labels[chosen][:, :, None, None], KINDS)
    present = torch.zeros(count, KINDS).scatter_reduce(1, labels[chosen], shown.float(), "amax")
    tiled = [parts.view(-1, 2, 2, 8, 8).transpose(2, 3).reshape(-1, 16, 16) for parts in (cells, classes)]
    return tiled[0][:, None], tiled[1], present


def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Dense(nn.Module):
    """A backbone at half resolution and two heads."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        shapes = ((1, width, 2), (width, width, 1), (width, width, 1))
        self.backbone = nn.Sequential(*(layer for shape in shapes for layer in block(*shape)))
        self.segment = nn.Sequential(nn.Conv2d(width, 4 * KINDS + 4, 3, padding=1), nn.PixelShuffle(2))
        self.classify = nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, KINDS))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of pixels ``(b, 6, 16, 16)`` and of digits ``(b, 5)``."""
        features = self.backbone(inputs)
        return self.segment(features), self.classify(features)


def loss(model: Dense, data: Scenes, index: Tensor) -> Tensor:
    pixels, digits = model(data[0][index])
    return cross_entropy(pixels, data[1][index]) + binary_cross_entropy_with_logits(digits, data[2][index])


@torch.no_grad()
def mean_iou(model: Dense, data: Scenes) -> float:
    """Over the six classes."""
    model.eval()
    found = model(data[0])[0].argmax(1)
    kinds = KINDS + 1
    pairs = torch.bincount((data[1] * kinds + found).flatten(), minlength=kinds**2).view(kinds, kinds).double()
    return float((pairs.diagonal() / (pairs.sum(0) + pairs.sum(1) - pairs.diagonal()).clamp_min(1)).mean())


def train(lr: float, *, data: Scenes, epochs: int, batch: int, seed: int, modulate: bool) -> Dense:
    torch.manual_seed(seed)
    model, steps = Dense(), epochs * len(data[0]) // batch
    inner = torch.optim.SGD(module_groups(model, "backbone"), lr=lr, momentum=0.9, weight_decay=1e-4)
    optimizer = AGVM(inner, interval=1, start=steps // 10, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for index in batches(len(data[0]), batch, steps, seed):
        optimizer.zero_grad()
        for half in index.chunk(2):
            torch.autograd.backward(loss(model, data, half) / 2)
            if modulate:
                optimizer.observe()
        optimizer.step()
        schedule.step()
    return model


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    splits = arrays("digits", seed=seed)
    counts = (256, 64, 64) if smoke else (1024, 512, 1024)
    data, val, test = (scenes(*part, n, 3 * seed + i) for i, (part, n) in enumerate(zip(splits, counts, strict=True)))
    fitted = partial(train, data=data, epochs=1 if smoke else 20, seed=seed)

    def tuned(rates: tuple[float, ...], batch: int, modulate: bool) -> tuple[float, float]:
        models = {lr: fitted(lr, batch=batch, modulate=modulate) for lr in rates}
        chosen = best(rates, lambda lr: mean_iou(models[lr], val), higher=True)
        return chosen, mean_iou(models[chosen], test)

    reached = tuned((SMALL,), BATCH, False)[1]
    rates = (4 * SMALL,) if smoke else (2 * SMALL, TIMES**0.5 * SMALL, 8 * SMALL, TIMES * SMALL)
    (lr_plain, plain), (lr, modulated) = (tuned(rates, TIMES * BATCH, modulate) for modulate in (False, True))
    return {"method": modulated, "baseline": plain, "small_batch": reached, "lr_method": lr, "lr_baseline": lr_plain}
