"""``python -m benchmarks.chita_scale``: time and memory of CHITA as a network grows, as JSON lines.

Multilayer perceptrons of about a quarter, half and one million parameters, trained briefly on Fashion-MNIST, lose 90%
of their weights; two threads, one process for each size, so that the peak of its memory is its own. The bytes of the
peak above what the process held before, divided by the parameters, stay the same where memory is linear.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from netwright.compress.chita import CHITA
from netwright.core.builtin.networks import mlp
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task, load_task

WIDTHS = (256, 430, 700)


def network(width: int) -> nn.Module:
    """784-width-width-10."""
    return nn.Sequential(nn.Flatten(), *mlp(784, (width, width), 10))


def peak_bytes() -> int:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(width: int, threads: int, epochs: float, ratio: float) -> dict[str, float | int]:
    """Prune one network."""
    torch.set_num_threads(threads)
    base = load_task("fashion-mnist")
    recipe = Recipe(epochs=epochs, batch_size=128)
    task = Task("scale", lambda: network(width), base.data, base.loss, base.score, recipe=recipe)
    model = fit(task.build(0), task, seed=0, device="cpu", validate=False).model
    before, start = peak_bytes(), time.perf_counter()
    sparse = CHITA(ratio)(model, task, seed=0)
    seconds, peak = time.perf_counter() - start, peak_bytes() - before
    parameters = sum(value.numel() for value in model.parameters())
    return {
        "width": width,
        "parameters": parameters,
        "threads": threads,
        "ratio": ratio,
        "seconds": round(seconds, 2),
        "peak_mib": round(peak / 2**20, 1),
        "peak_bytes_per_parameter": round(peak / parameters, 1),
        "val_before": round(evaluate(model, task, "val"), 4),
        "val_after": round(evaluate(sparse, task, "val"), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--ratio", type=float, default=0.9)
    asked = parser.parse_args()
    if len(asked.widths) == 1:
        print(json.dumps(measure(asked.widths[0], asked.threads, asked.epochs, asked.ratio)))
        return
    for width in asked.widths:
        options = ["--widths", str(width), "--threads", str(asked.threads), "--epochs", str(asked.epochs)]
        command = [sys.executable, "-m", "benchmarks.chita_scale", *options, "--ratio", str(asked.ratio)]
        subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])


if __name__ == "__main__":
    main()
