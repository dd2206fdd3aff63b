"""Amended DARTS against first-order DARTS: what a long search derives."""

from claims._relaxed import digits, searched
from netwright.search.amended_darts import AmendedDARTS
from netwright.search.darts import DARTS

PAPER = 174
CLAIM = (
    "On digits, after a long search (30 epochs) among identities, 1x1 and 3x3 convolutions, the network derived by "
    "AmendedDARTS is more accurate after training than that of first-order DARTS; same steps, both with the better of "
    "two rates of the alphas by validation accuracy."
)
BETTER = "higher"
KINDS = ("skip", "conv_1x1", "conv_3x3")
RATES = (1e-2, 3e-2)


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task, rates = digits(KINDS), RATES[:1] if smoke else RATES
    epochs, training = (1, 0.5) if smoke else (30, 8.0)
    method = searched(task, lambda rate: AmendedDARTS(epochs=epochs, lr=0.05, alpha_lr=rate), rates, seed, training)
    baseline = searched(task, lambda rate: DARTS(epochs=epochs, lr=0.05, alpha_lr=rate), rates, seed, training)
    return {
        "method": method.test,
        "baseline": baseline.test,
        "skip_share": method.skips,
        "skip_share_baseline": baseline.skips,
        "seconds_method": method.seconds,
        "seconds_baseline": baseline.seconds,
    }
