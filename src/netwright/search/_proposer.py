"""The inner half of LINAS: from what was measured to the candidates that are worth measuring next."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import norm, qmc

from netwright.core.errors import SettingError
from netwright.search._encoding import Encoding
from netwright.search._gain import directions, front_rows, reach
from netwright.search._scale import Scale, bounded

__all__ = ["Measured", "Settings", "goals", "minimized", "propose"]

Array: TypeAlias = NDArray[np.float64]
_SHORT_LIST = 256
_LEAST_CHANCE = 0.05  # of meeting all constraints


@dataclass(frozen=True)
class Settings:
    """How the inner search goes."""

    batch: int
    population: int
    generations: int
    draws: int
    reference: tuple[float, ...] | None
    start: int
    ideal: tuple[float, ...] | None = None  # an infinite one is none, whatever its sign


@dataclass(frozen=True)
class Measured:
    """What is known: genes ``(n, d)``, objectives ``(n, m)`` to be minimized, violations ``(n, c)`` (at most 0: met).

    ``signs`` is -1 for an objective that the study maximizes.
    """

    genes: Array
    values: Array
    violations: Array
    signs: Array


def goals(name: str, given: Sequence[float] | None, *, finite: bool = True) -> tuple[float, ...] | None:
    """A value for each objective, as it was given.

    Raises:
        SettingError: one of them is NaN, or infinite where it must be ``finite``.
    """
    if given is None:
        return None
    found = tuple(map(float, given))
    for value in found:
        if math.isnan(value) or (finite and math.isinf(value)):
            raise SettingError(f"{name} must hold {'finite ' if finite else ''}numbers, got {value} in {found}.")
    return found


def minimized(name: str, given: tuple[float, ...] | None, known: Measured) -> tuple[float, ...] | None:
    """A value for each objective in the study's own sign, as for objectives that are all minimized.

    Raises:
        SettingError: another number of values than objectives.
    """
    count = known.values.shape[1]
    if given is not None and len(given) != count:
        raise SettingError(f"{name} has {len(given)} values for {count} objectives.")
    return None if given is None else tuple(known.signs * np.array(given))


class Model(Protocol):
    """A fitted predictor."""

    def predict(self, inputs: Array, /) -> tuple[Array, Array]:
        """Mean and standard deviation, each ``(n,)``, of rows ``(n, f)``."""
        ...


def propose(
    encoding: Encoding,
    known: Measured,
    avoid: set[bytes],
    settings: Settings,
    seed: int,
    *,
    look: Callable[[Array], Array],
    fit: Callable[[Array, Array], Model],
) -> Array:
    """Genes ``(batch, d)`` of the candidates to measure next, best first.

    Args:
        encoding: of the space.
        known: what was measured.
        avoid: keys of candidates that are not to be proposed.
        settings: sizes.
        seed: source of randomness.
        look: features of genes.
        fit: from features and warped objectives to a predictor.
    """
    rng = np.random.default_rng([seed, len(known.genes)])
    scale = Scale(known.values, settings.start)
    values = scale.warp(known.values)
    features = look(known.genes)
    models = [fit(features, column) for column in values.T]
    limits = [fit(features, bounded(column)) for column in known.violations.T if (column > 0).any()]
    feasible = np.asarray((known.violations <= 0).all(1), dtype=bool)
    good = values[feasible] if feasible.any() else values
    end = scale.reference() if settings.reference is None else np.asarray(settings.reference, dtype=float)
    reference = (end - scale.middle) / scale.width
    best = np.full(len(end), -np.inf) if settings.ideal is None else np.asarray(settings.ideal, dtype=float)
    best = np.where(np.isinf(best), -np.inf, best)
    box = _Box(reference, (best - scale.middle) / scale.width)
    score = _Score(look, scale, models, limits, good if feasible.any() else None, box, settings.draws, rng)
    pool = _evolve(encoding, known, values, feasible, score, avoid, settings, rng)
    return _greedy(pool, score, settings.batch)


@dataclass(frozen=True)
class _Box:
    """Where the hypervolume ends, and beyond which values nothing more is gained, each ``(m,)`` in widths."""

    reference: Array
    ideal: Array


class _Score:
    """Expected gain of hypervolume, times the probability of meeting the constraints."""

    def __init__(
        self,
        look: Callable[[Array], Array],
        scale: Scale,
        models: list[Model],
        limits: list[Model],
        front: Array | None,
        box: _Box,
        draws: int,
        rng: np.random.Generator,
    ) -> None:
        self._look, self._scale, self._models, self._limits = look, scale, models, limits
        self._box = box
        self._along = directions(len(models))
        uniform = qmc.Sobol(len(models), seed=rng).random(draws)
        self._normal = norm.ppf(np.clip(uniform, 1e-6, 1 - 1e-6))
        self._reached = np.zeros(len(self._along))
        if front is not None:
            self._reached = self._reach(front[front_rows(front)]).max(0)

    def predict(self, genes: Array) -> tuple[Array, Array, Array]:
        """Means and deviations ``(n, m)`` of the objectives, and the probability ``(n,)`` of being feasible."""
        rows = self._look(genes)
        found = [model.predict(rows) for model in self._models]
        chance = np.ones(len(genes))
        for limit in self._limits:
            mean, spread = limit.predict(rows)
            chance *= ndtr(-mean / np.maximum(spread, 1e-12))
        return np.stack([mean for mean, _ in found], 1), np.stack([spread for _, spread in found], 1), chance

    def reaches(self, mean: Array, spread: Array) -> Array:
        """How far each candidate reaches in each draw along each direction, ``(draws, n, k)``."""
        return self._reach(mean + self._normal[:, None, :] * spread)

    def gains(self, mean: Array, spread: Array, chance: Array) -> Array:
        """Expected gain of each candidate alone, ``(n,)``."""
        found = np.zeros(len(mean))
        for normal in self._normal:
            far = self._reach(mean + normal * spread)
            found += np.maximum(far - self._reached, 0.0).mean(1)
        return _likely(chance) * found / len(self._normal)

    def _reach(self, warped: Array) -> Array:
        values = np.maximum(self._scale.unwarp(warped), self._box.ideal)
        return reach(values, self._box.reference, self._along)

    @property
    def reached(self) -> Array:
        """How far what was measured reaches along each direction, ``(k,)``."""
        return self._reached


def _likely(chance: Array) -> Array:
    """Probabilities of being feasible, 0 for small ones: no gain is worth the trials that it would take."""
    return np.where(chance < _LEAST_CHANCE, 0.0, chance)


@dataclass
class _Pool:
    genes: Array
    mean: Array
    spread: Array
    chance: Array
    gain: Array


def _evolve(
    encoding: Encoding,
    known: Measured,
    values: Array,
    feasible: NDArray[np.bool_],
    score: _Score,
    avoid: set[bytes],
    settings: Settings,
    rng: np.random.Generator,
) -> _Pool:
    """Evolution whose fitness is the expected gain; everything that it meets is kept for the choice."""
    seen: set[bytes] = set()
    archive: list[_Pool] = []

    def admit(genes: Array) -> None:
        genes = genes[encoding.valid(genes)]
        fresh = []
        for place, key in enumerate(encoding.keys(genes)):
            if key not in seen and key not in avoid:
                seen.add(key)
                fresh.append(place)
        if fresh:
            genes = genes[fresh]
            mean, spread, chance = score.predict(genes)
            archive.append(_Pool(genes, mean, spread, chance, score.gains(mean, spread, chance)))

    parents = known.genes[feasible] if feasible.any() else known.genes
    aims = values[feasible] if feasible.any() else values
    parents = parents[front_rows(aims)]
    admit(encoding.random(rng, settings.population))
    admit(_offspring(encoding, parents, settings.population, rng))
    for _ in range(settings.generations):
        if archive:
            merged = _merge(archive)
            best = np.lexsort((-merged.chance, -merged.gain))[: settings.population // 2]
            admit(_offspring(encoding, np.concatenate([merged.genes[best], parents]), settings.population, rng))
        else:
            admit(encoding.random(rng, settings.population))
    return _merge(archive) if archive else _Pool(np.empty((0, len(encoding.names))), *[np.empty(0)] * 4)


def _merge(parts: list[_Pool]) -> _Pool:
    if len(parts) > 1:
        whole = _Pool(
            np.concatenate([part.genes for part in parts]),
            np.concatenate([part.mean for part in parts]),
            np.concatenate([part.spread for part in parts]),
            np.concatenate([part.chance for part in parts]),
            np.concatenate([part.gain for part in parts]),
        )
        parts[:] = [whole]
    return parts[0]


def _offspring(encoding: Encoding, parents: Array, count: int, rng: np.random.Generator) -> Array:
    """Crossover (SBX for ordered genes, uniform for categorical ones) and mutation (polynomial, or another choice)."""
    first, second = (parents[rng.integers(len(parents), size=count)] for _ in range(2))
    ordered = encoding.choices == 0
    u = rng.random(first.shape)
    beta = np.where(u < 0.5, (2 * u) ** (1 / 16), (1 / np.maximum(2 * (1 - u), 1e-12)) ** (1 / 16))
    blended = 0.5 * ((1 + beta) * first + (1 - beta) * second)
    mixed = np.where(ordered, blended, np.where(rng.random(first.shape) < 0.5, first, second))
    child = np.where(rng.random((count, 1)) < 0.5, mixed, first)
    width = child.shape[1]
    rate = np.where(rng.random((count, 1)) < 0.5, 1.0, 2.0) / width
    u = rng.random(child.shape)
    step = np.where(u < 0.5, (2 * u) ** (1 / 21) - 1, 1 - (2 * (1 - u)) ** (1 / 21))
    other = np.floor(rng.random(child.shape) * np.maximum(encoding.choices, 1))
    jump = np.where(rng.random(child.shape) < 0.3, rng.random(child.shape), child + step)
    changed = np.where(ordered, jump, other)
    child = np.where(rng.random(child.shape) < rate, changed, child)
    return encoding.snap(np.where(ordered, np.clip(child, 0.0, 1.0), child))


def _greedy(pool: _Pool, score: _Score, count: int) -> Array:
    """One after the other the candidate with the largest expected gain, given, draw by draw, those taken before it.

    Where nothing is left to gain, those come first that are likely to be feasible.
    """
    short = np.lexsort((-pool.chance, -pool.gain))[: max(_SHORT_LIST, count)]
    if len(short) == 0:
        return pool.genes
    far = score.reaches(pool.mean[short], pool.spread[short]).astype(np.float32)
    reached = np.repeat(score.reached[None, :], len(far), axis=0).astype(np.float32)
    left = np.ones(len(short), dtype=bool)
    taken = []
    for _ in range(min(count, len(short))):
        gain = np.maximum(far - reached[:, None, :], 0).mean((0, 2)) * _likely(pool.chance[short])
        best = int(np.lexsort((-pool.chance[short], np.where(left, -gain, 1.0)))[0])
        left[best] = False
        taken.append(short[best])
        reached = np.maximum(reached, far[:, best])
    return pool.genes[taken]
