"""Scales searched by cosine similarity against min-max and percentile calibration, at 7 and at 6 bits."""

from torch import nn

from claims._compress import task_of, trained
from netwright.compress._calibrated import calibrated, levels
from netwright.compress.easy_quant import EasyQuant
from netwright.core.evaluate import evaluate, predict
from netwright.core.task import Task

PAPER = 89
CLAIM = (
    "Rounding weights and activations of a depthwise separable network, trained on 6,000 Fashion-MNIST images, to 7 "
    "and 6 bits after training changes fewer of its test predictions (mean of both) with scales searched by cosine "
    "similarity than with the better of min-max and percentile calibration on the same 256 images."
)
BETTER = "lower"
SEEDS = 5
ITEMS = 256


def separable() -> nn.Module:
    """A convolution and three depthwise separable ones with batch norms; 5,642 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for inner, outer, stride in ((16, 32, 1), (32, 32, 2), (32, 64, 1)):
        layers += [nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU()]
        layers += [nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def changed(model: nn.Module, whole: nn.Module, task: Task, split: str) -> float:
    """The share of predictions that differ."""
    one, two = (predict(each, task, split)[0].argmax(1) for each in (model, whole))
    return float((one != two).float().mean())


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(separable, items=6000, epochs=6, smoke=smoke)
    model = trained(task, seed)
    found, items = {"accuracy": evaluate(model, task, "test")}, 32 if smoke else ITEMS
    for bits in (7, 6):
        weights, activations = levels(bits)
        plain: list[nn.Module] = []
        for kind in ("minmax", "percentile"):
            made = calibrated(
                "Claim", model, task, weights=weights, activations=activations, items=items, seed=seed, calibration=kind
            )
            plain.append(made.module)
        best = min(plain, key=lambda each: changed(each, model, task, "val"))
        ours = EasyQuant(bits, calibration_items=items)(model, task, seed=seed)
        for name, each in (("method", ours), ("baseline", best)):
            found[f"{name}{bits}"] = changed(each, model, task, "test")
            found[f"{name}{bits}_accuracy"] = evaluate(each, task, "test")
    return {name: (found[f"{name}7"] + found[f"{name}6"]) / 2 for name in ("method", "baseline")} | found
