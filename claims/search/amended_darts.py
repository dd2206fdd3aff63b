"""Amended DARTS against first-order DARTS: the worth of what is derived."""

from claims._relaxed import digits, searched
from netwright.search.amended_darts import AmendedDARTS
from netwright.search.darts import DARTS

PAPER = 174
CLAIM = (
    "On digits, in the cell space of NAS-Bench-201, the network that AmendedDARTS derives after 20 epochs of search is "
    "more accurate after training than that of first-order DARTS; same steps, both with the better of two rates of the "
    "alphas by validation accuracy."
)
BETTER = "higher"
RATES = (1e-2, 3e-2)


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task, rates = digits(), RATES[:1] if smoke else RATES
    epochs, training = (1, 0.2) if smoke else (20, 8.0)
    method = searched(task, lambda rate: AmendedDARTS(epochs=epochs, lr=0.05, alpha_lr=rate), rates, seed, training)
    baseline = searched(task, lambda rate: DARTS(epochs=epochs, lr=0.05, alpha_lr=rate), rates, seed, training)
    return {
        "method": method.test,
        "baseline": baseline.test,
        "without_weights": method.idle,
        "without_weights_baseline": baseline.idle,
        "seconds_method": method.seconds,
        "seconds_baseline": baseline.seconds,
    }
