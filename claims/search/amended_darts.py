"""Amended DARTS against first-order DARTS: how many edges collapse to identities."""

from claims._relaxed import digits, searched
from netwright.search.amended_darts import AmendedDARTS
from netwright.search.darts import DARTS

PAPER = 174
CLAIM = (
    "On digits, after 24 epochs of search among identities, 1x1 and 3x3 convolutions, a smaller share of the edges has "
    "collapsed to identities with AmendedDARTS than with first-order DARTS; same steps, both with the better of two "
    "rates of the alphas by validation accuracy."
)
BETTER = "lower"
SEEDS = 4
KINDS = ("skip", "conv_1x1", "conv_3x3")
RATES = (1e-2, 3e-2)


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task, rates = digits(KINDS), RATES[:1] if smoke else RATES
    epochs, training = (1, 0.5) if smoke else (24, 8.0)
    method = searched(task, lambda rate: AmendedDARTS(epochs=epochs, lr=0.05, alpha_lr=rate), rates, seed, training)
    baseline = searched(task, lambda rate: DARTS(epochs=epochs, lr=0.05, alpha_lr=rate), rates, seed, training)
    return {
        "method": method.skips,
        "baseline": baseline.skips,
        "accuracy": method.test,
        "accuracy_baseline": baseline.test,
        "seconds_method": method.seconds,
        "seconds_baseline": baseline.seconds,
    }
