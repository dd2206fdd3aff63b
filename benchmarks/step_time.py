"""``python -m benchmarks.step_time``: time of a step relative to ``torch.optim.AdamW(fused=True)``, as JSON lines.

25 million float32 parameters in 160 tensors, gradients that stand still, two threads; one interleaved run in one
process, medians. What a closure costs is not in it. Then whole training steps of a residual network of 78k parameters.
With ``--device cuda`` everything is there, and a step ends when the device has done it.
"""

import argparse
import importlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from netwright.core.builtin.networks import ResNet
from netwright.core.data import batches
from netwright.core.optimization import closure_kind
from netwright.core.task import load_task
from netwright.optim import AutoClip, SwitchEMA, create

REFERENCE = "torch AdamW fused"
WARM_UP = 3
BATCH = 64

Step = Callable[[], object]


class Parameters(nn.Module):
    """40 blocks of a matrix of 384 x 384, a vector of 384, a matrix of 1242 x 384 and a scalar."""

    def __init__(self, device: str) -> None:
        super().__init__()
        shapes = [(384, 384), (384,), (1242, 384), (1,)] * 40
        self.all = nn.ParameterList(nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes)
        for param in self.all:
            param.grad = torch.randn_like(param) * 0.01


def closure() -> Tensor:
    """Stands for a closure: the gradients are there."""
    return torch.ones(())


def stepping(optimizer: Optimizer) -> Step:
    """A step with what the optimizer asks for."""
    if closure_kind(optimizer) == "optional":
        return optimizer.step
    step: Callable[..., object] = optimizer.step
    return lambda: step(closure)


def averaging(device: str) -> Step:
    """Clipping and averaging together, which are added to an optimizer's step."""
    module = Parameters(device)
    clip, average = AutoClip(), SwitchEMA(module, 0.999)

    def step() -> None:
        clip(module.parameters())
        average.update(module)

    return step


def steps(peers: bool, device: str) -> Mapping[str, Callable[[], Step]]:
    """What is timed, by name."""

    def ours(name: str, **settings: object) -> Callable[[], Step]:
        return lambda: stepping(create(name, Parameters(device), **settings))

    found: dict[str, Callable[[], Step]] = {
        REFERENCE: lambda: AdamW(Parameters(device).parameters(), 1e-3, fused=True).step,
        "torch AdamW foreach": lambda: AdamW(Parameters(device).parameters(), 1e-3, foreach=True).step,
        "Lion": ours("lion"),
        "Lion, foreach": ours("lion", fused=False),
        "DiffGrad": ours("diffgrad"),
        "DiffGrad, foreach": ours("diffgrad", fused=False),
        "DoG": ours("dog"),
        "UDoG": ours("udog"),
        "SANIA": ours("sania"),
        "OptimisticAMSGrad": ours("optimistic-amsgrad", lr=1e-3),
        "AutoClip + SwitchEMA": lambda: averaging(device),
    }
    if peers:
        other = importlib.import_module("pytorch_optimizer")
        found |= {
            "pytorch_optimizer Lion": lambda: other.Lion(Parameters(device).parameters(), 1e-4).step,
            "pytorch_optimizer Lion, foreach": lambda: (
                other.Lion(Parameters(device).parameters(), 1e-4, foreach=True).step
            ),
            "pytorch_optimizer DiffGrad": lambda: other.DiffGrad(Parameters(device).parameters(), 1e-3).step,
        }
    return found


def interleaved(timed: Mapping[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(rounds + WARM_UP):
        for name, step in timed.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ >= WARM_UP:
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def whole_steps(device: str) -> Mapping[str, Step]:
    """Forward, backward and step on digits."""
    inputs, targets = next(batches(load_task("digits").data.train, BATCH, device=device))

    def training(name: str, **settings: object) -> Step:
        torch.manual_seed(0)
        model = ResNet(1, 16, 10).to(device)
        optimizer = create(name, model, **settings)
        kind = closure_kind(optimizer)

        def outputs() -> tuple[Tensor, Tensor]:
            found = model(inputs)
            return functional.cross_entropy(found, targets), found

        def backward() -> Tensor:
            optimizer.zero_grad()
            loss = outputs()[0]
            torch.autograd.backward(loss)
            return loss

        call: Callable[..., object] = optimizer.step
        return lambda: call(outputs if kind == "outputs" else backward)

    return {
        "Adam, whole step": training("adam", lr=1e-3),
        "SGD, whole step": training("sgd", lr=1e-3, momentum=0.9),
        "ExactGaussNewton (residual), whole step": training("exact-gauss-newton", curvature="residual"),
        "MFAC (64 gradients), whole step": training("mfac", window=64),
        "KFAC, whole step": training("kfac"),
        "Shampoo, whole step": training("shampoo"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peers", action="store_true", help="Also time pytorch_optimizer, which must be installed.")
    parser.add_argument("--whole", action="store_true", help="Only the whole training steps.")
    parser.add_argument("--only", nargs="*", help="Names of steps beside the reference.")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    chosen = (
        {}
        if asked.whole
        else {
            name: make()
            for name, make in steps(asked.peers, asked.device).items()
            if not asked.only or name in (REFERENCE, *asked.only)
        }
    )
    times = interleaved(chosen, asked.rounds, asked.device)
    for name, found in times.items():
        print(json.dumps({"step": name, "ms": round(found, 2), "ratio": round(found / times[REFERENCE], 3)}))
    if asked.only:
        return
    rounds = max(asked.rounds, 70)  # a window of 64 gradients fills first
    whole = interleaved(whole_steps(asked.device), rounds, asked.device)
    for name, found in whole.items():
        base = "SGD, whole step" if name.startswith(("MFAC", "SGD")) else "Adam, whole step"
        print(json.dumps({"step": name, "ms": round(found, 2), "over": base, "ratio": round(found / whole[base], 3)}))


if __name__ == "__main__":
    main()
