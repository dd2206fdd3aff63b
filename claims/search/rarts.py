"""RARTS against first-order DARTS by accuracy, within two fifths of the time of second-order DARTS."""

import time

from claims._relaxed import digits, searched
from netwright.search.darts import DARTS
from netwright.search.rarts import RARTS

PAPER = 203
CLAIM = (
    "On digits, in the cell space of NAS-Bench-201, the network derived by RARTS in at most 40% of the processor time "
    "of second-order DARTS is more accurate after training than that of first-order DARTS (40 epochs of both DARTS, 16 "
    "of RARTS; the better of two rates of the alphas by validation accuracy). A seed in which RARTS takes more than "
    "40% counts with accuracy 0."
)
BETTER = "higher"
WHY = (
    "Ahead on two of three seeds, by 0.5 points on average, in 33 to 36% of the time: three seeds leave 2 points "
    "either way."
)
RATES = (1e-2, 3e-2)
SHARE = 0.4


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task, rates = digits(), RATES[:1] if smoke else RATES
    epochs, fewer, training = (1, 1, 0.2) if smoke else (40, 16, 8.0)
    method = searched(task, lambda rate: RARTS(epochs=fewer, lr=0.05, alpha_lr=rate), rates, seed, training)
    baseline = searched(task, lambda rate: DARTS(epochs=epochs, lr=0.05, alpha_lr=rate), rates, seed, training)
    start, timed = time.process_time(), max(1, epochs // 4)  # its epochs take equally long, so a quarter is timed
    DARTS(order=2, epochs=timed, lr=0.05, alpha_lr=rates[0]).search(task.build(seed), task, seed=seed)
    ratio = method.seconds / ((time.process_time() - start) * epochs / timed)
    return {
        "method": method.test if ratio <= SHARE or smoke else 0.0,
        "baseline": baseline.test,
        "accuracy": method.test,
        "time_to_second_order": ratio,
        "without_weights": method.idle,
        "without_weights_baseline": baseline.idle,
        "seconds_baseline": baseline.seconds,
    }
