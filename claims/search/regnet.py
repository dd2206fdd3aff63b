"""Networks drawn from RegNet's space against networks drawn from AnyNet's, all of like cost and alike trained."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from claims._training import accuracy, arrays, descend
from netwright.search.regnet import AnyNetSpace, DesignSpaceEDF, RegNetSpace, design_space_edf

PAPER = 279
CLAIM = (
    "Of networks with three stages and 0.5 to 1 million multiply-accumulates, trained alike for 60 steps on "
    "Fashion-MNIST at 16 x 16, 10 from RegNetSpace have a lower mean test error than 10 from AnyNetSpace."
)
BETTER = "lower"
SEEDS = 8
NETWORKS, PILOTS, STEPS = 10, 2, 60
RATES = (3e-3, 1e-2, 3e-2)
MACS, INPUTS, GROUPS = (0.5e6, 1.0e6), (1, 16, 16), (1, 2, 4, 8, 16)

Split = tuple[Tensor, Tensor]


def halved(data: Split) -> Split:
    """Images with a border of two pixels, at half the resolution."""
    return functional.avg_pool2d(functional.pad(data[0], (2, 2, 2, 2)), 2), data[1]


def edf(space: RegNetSpace | AnyNetSpace, splits: tuple[Split, Split, Split], seed: int, smoke: bool) -> DesignSpaceEDF:
    """Test errors of networks drawn from a space; the learning rate is the best of three for the first few, on val."""
    train, val, test = splits
    rng = np.random.default_rng(seed)
    drawn = [space.sample(rng) for _ in range(1 if smoke else NETWORKS)]

    def error(place: int, rate: float, judged: Split) -> float:
        torch.manual_seed(1000 * seed + place)
        model = space.build(drawn[place])
        steps = 1 if smoke else STEPS
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        descend(model, optimizer, train, functional.cross_entropy, steps=steps, batch=32, seed=place, schedule=schedule)
        return 1 - accuracy(model, judged)

    pilots = range(1 if smoke else PILOTS)
    rates = RATES[:1] if smoke else RATES
    rate = min(rates, key=lambda rate: float(np.mean([error(place, rate, val) for place in pilots])))
    return design_space_edf([error(place, rate, test) for place in range(len(drawn))])


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    torch.set_num_threads(1)
    data = arrays("fashion-mnist", seed=seed, train=2000, held_out=200 if smoke else 1000)
    splits = halved(data.train), halved(data.val), halved(data.test)
    regular = RegNetSpace(
        depth=(3, 12),
        w0=(8, 48),
        wa=(1, 48),
        stages=(3, 3),
        group_width=GROUPS,
        macs=MACS,
        inputs=INPUTS,
        outputs=10,
        stem=8,
    )
    free = AnyNetSpace(
        stages=3, depth=(1, 4), width=(8, 96), group_width=GROUPS, macs=MACS, inputs=INPUTS, outputs=10, stem=8
    )
    ours, theirs = edf(regular, splits, seed, smoke), edf(free, splits, seed, smoke)
    return {
        "method": ours.mean,
        "baseline": theirs.mean,
        "best_regnet": float(ours.errors.min()),
        "best_anynet": float(theirs.errors.min()),
        "dominates": float(ours.dominates(theirs)),
        "area_gained": ours.area(0.9) - theirs.area(0.9),
    }
