"""The group envelope's proximal step against a general convex solver, and the number of units that it leaves."""

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, minimize

from claims._compress import lenet_300_100, small_cnn, task_of
from netwright.compress._group_envelope_prox import envelope_prox
from netwright.compress.group_envelope import GroupEnvelope
from netwright.core.graph import trace

PAPER = 181
CLAIM = (
    "The group envelope's proximal step differs from a convex solver's answer on 20 random problems (2 to 12 groups of "
    "1 to 5 entries) by at most 0.001 of the input's length, and a multilayer perceptron and a small convolutional "
    "network trained with it keep exactly as many units as were asked for, of each layer and in all. (A network with "
    "another number counts as 1.)"
)
BETTER = "lower"
SEEDS = 5
TOLERANCE = 1e-3  # of the solver


def solved(x: np.ndarray, k: int, strength: float) -> np.ndarray:
    """``min 1/2 |v - x|² + strength/2 sum |v_g|² / u_g`` over vectors and shares, with 0 < u <= 1 and sum u <= k."""
    groups = len(x)

    def value(z: np.ndarray) -> float:
        v, u = z[: x.size].reshape(x.shape), z[x.size :]
        return float(0.5 * ((v - x) ** 2).sum() + 0.5 * strength * ((v**2).sum(1) / u).sum())

    def slope(z: np.ndarray) -> np.ndarray:
        v, u = z[: x.size].reshape(x.shape), z[x.size :]
        return np.concatenate([(v - x + strength * v / u[:, None]).ravel(), -0.5 * strength * (v**2).sum(1) / u**2])

    sums = LinearConstraint(np.concatenate([np.zeros(x.size), np.ones(groups)])[None], -np.inf, k)
    start = np.concatenate([0.5 * x.ravel(), np.full(groups, k / groups)])
    low, high = np.full(x.size + groups, -np.inf), np.full(x.size + groups, np.inf)
    low[x.size :], high[x.size :] = 1e-7, 1.0
    found = minimize(
        value,
        start,
        jac=slope,
        bounds=Bounds(low, high),
        constraints=[sums],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 2000},
    )
    return np.asarray(found.x[: x.size]).reshape(x.shape)


def apart(generator: np.random.Generator) -> float:
    """The distance of the two answers to one problem, over the length of its input."""
    groups, width = int(generator.integers(2, 13)), int(generator.integers(1, 6))
    k, strength = int(generator.integers(1, groups + 1)), float(10 ** generator.uniform(-1, 0.7))
    x = generator.normal(size=(groups, width)) * generator.uniform(0.2, 3, size=(groups, 1))
    factors = envelope_prox(torch.tensor(np.linalg.norm(x, axis=1)), k, strength).numpy()
    return float(np.linalg.norm(factors[:, None] * x - solved(x, k, strength)) / np.linalg.norm(x))


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    generator = np.random.default_rng(seed)
    distances = [apart(generator) for _ in range(3 if smoke else 20)]
    wrong = 0
    for network in (lenet_300_100, small_cnn):
        task = task_of(network, items=1000, epochs=1.0, smoke=smoke)
        groups = {group.name: group.size for group in trace(task.build(seed), task.example()).groups}
        ratio = float(generator.uniform(0.3, 0.9))
        wanted, total = {name: size - int(ratio * size) for name, size in groups.items()}, sum(groups.values())
        for scope in ("layer", "global"):
            small = GroupEnvelope(ratio, scope=scope)(task.build(seed), task, seed=seed)
            left = {group.name: group.size for group in trace(small, task.example()).groups}
            wrong += left != wanted if scope == "layer" else sum(left.values()) != total - int(ratio * total)
    return {"method": 1.0 if wrong else max(distances), "baseline": TOLERANCE, "wrong_networks": wrong}
