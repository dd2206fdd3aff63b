"""WLSampler: Bayesian optimization over graphs, with a Gaussian process that names the motifs it relies on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from optuna import Study

from netwright.core.errors import SettingError
from netwright.search._encoding import Encoding
from netwright.search._model_sampler import SPARE, ModelSampler
from netwright.search._proposer import Measured, Settings, propose
from netwright.search._scale import Scale
from netwright.search.space import SearchSpace
from netwright.search.wl_process import WLProcess, subtrees

__all__ = ["Motif", "WLSampler"]

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Motif:
    """A subtree and what one more of it does to an objective, as the process sees it.

    Attributes:
        subtree: as :func:`subtrees` writes it.
        effect: change of the objective, in its own unit near its median.
        deviation: of the effect.
        graphs: how many measured candidates have it.
    """

    subtree: str
    effect: float
    deviation: float
    graphs: int


class WLSampler(ModelSampler):
    """Searches graphs by a Gaussian process on their Weisfeiler-Lehman features, and says which motifs matter.

    Reach for it where a candidate is a small graph, an evaluation is dear and a hundred of them are many, and where you
    want to know
    why: :meth:`motifs` names subtrees that raise or lower an objective. For large budgets and spaces without structure
    :class:`~netwright.search.linas.LINASSampler` is the better choice.

    The first ``start`` candidates are random. Then each objective's process (:class:`WLProcess`) is fitted, and the
    next batch is taken from a pool of random candidates and children of the best by expected improvement; with several
    objectives by expected gain of hypervolume, as LINAS does.

    Args:
        space: with ``graph``, which tells a candidate as a graph.
        start: random candidates before the first process.
        batch: complete trials between two fits.
        depth: largest depth of subtrees; the data choose one up to it.
        pool: random candidates of a fit; as many children of the best measured ones join them, then, twice, as many of
            the best of all these.
        draws: samples of the expectation.
        seed: source of randomness.

    Raises:
        SettingError: a space without graphs, or a setting out of its range.

    Example:
        >>> from optuna.distributions import CategoricalDistribution
        >>> import optuna
        >>> from netwright.search import Graph
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> def graph(params):
        ...     names = [params[f"layer{place}"] for place in range(4)]
        ...     return Graph(("in", *names), ((0, 1), (1, 2), (2, 3), (3, 4)))
        >>> kinds = CategoricalDistribution(("conv", "pool", "skip"))
        >>> space = SearchSpace({f"layer{place}": kinds for place in range(4)}, graph=graph)
        >>> sampler = WLSampler(space, start=6, batch=3, seed=0)
        >>> study = optuna.create_study(sampler=sampler, direction="maximize")
        >>> for _ in range(24):
        ...     trial = study.ask(dict(space.decisions))
        ...     _ = study.tell(trial, list(trial.params.values()).count("conv"))
        >>> study.best_value
        4.0
        >>> next(motif.effect > 0 for motif in sampler.motifs(study) if motif.subtree == "conv")
        True

    Source: paper 290: Ru, Wan, Dong and Osborne, "Interpretable Neural Architecture Search via Bayesian Optimisation
        with Weisfeiler-Lehman Kernels", ICLR 2021, arXiv 2006.07556.

    Differs: the pool is bred three times rather than once, several objectives are possible, a batch is diverse, and
        noise and depth come from one eigendecomposition each instead of gradient ascent. Subtrees follow what leads to
        a node, not what it leads to.

    Cost: a fit takes ``O(depth * min(n, 400)^3)``, the pool ``O(pool * min(n, 400))``; both once a batch.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        start: int = 15,
        batch: int = 5,
        depth: int = 2,
        pool: int = 200,
        draws: int = 32,
        seed: int | None = None,
    ) -> None:
        super().__init__(space, start, batch, seed)
        if space.graph is None:
            raise SettingError(
                "WLSampler needs a space that tells candidates as graphs. Give SearchSpace(..., graph=...)."
            )
        for name, value, least in (("depth", depth, 0), ("pool", pool, 2), ("draws", draws, 1)):
            if value < least:
                raise SettingError(f"{name} must be at least {least}, got {value}.")
        self._graph, self._depth, self._pool, self._draws = space.graph, depth, pool, draws
        self._remembered: dict[bytes, list[Counter[str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_remembered": {}}

    def motifs(self, study: Study, objective: int = 0, least: int = 3) -> list[Motif]:
        """What each subtree does to an objective, the surest effect first.

        The gradient of the process with respect to a subtree's count, averaged over the measured candidates that have
        it.

        Args:
            study: whose complete trials are looked at.
            objective: its place.
            least: candidates that must have a subtree.

        Raises:
            SettingError: fewer than two complete trials.
        """
        assert self._space is not None
        encoding = self._encoding(dict(self._space.decisions))
        trials = [trial for trial in study.get_trials(deepcopy=False) if self._usable(trial, encoding)]
        if len(trials) < 2:
            raise SettingError(f"Motifs need at least two complete trials, got {len(trials)}.")
        known = self._measured(study, trials, encoding)
        scale = Scale(known.values, self._start)
        vocabulary, rows = self.histograms(encoding, known.genes)
        process = WLProcess(vocabulary).fit(rows, scale.warp(known.values)[:, objective])
        mean, deviation = process.gradient(rows)
        factor = known.signs[objective] * scale.width[objective]
        found, seen, column = [], set[str](), 0
        for words in vocabulary[: process.depth + 1]:
            for name in words:
                have = rows[:, column] > 0
                if name not in seen and have.sum() >= least:
                    seen.add(name)
                    effect = float(factor * mean[have, column].mean())
                    spread = float(abs(factor) * deviation[have, column].mean())
                    found.append(Motif(name, effect, spread, int(have.sum())))
                column += 1
            column += 1
        return sorted(found, key=lambda motif: -abs(motif.effect) / max(motif.deviation, 1e-12))

    def histograms(
        self, encoding: Encoding, genes: Array, vocabulary: Sequence[Sequence[str]] | None = None
    ) -> tuple[list[list[str]], Array]:
        """Counts of subtrees, ``(n, f)``: for each depth a column a word, and one with the squares of other words.

        Args:
            encoding: of the space.
            genes: ``(n, d)``.
            vocabulary: words by depth; None for all that occur.
        """
        counts = [self._counts(encoding, row) for row in genes]
        levels = range(self._depth + 1)
        if vocabulary is None:
            vocabulary = [sorted({word for count in counts for word in count[level]}) for level in levels]
        columns = []
        for level in levels:
            place = {word: number for number, word in enumerate(vocabulary[level])}
            block = np.zeros((len(genes), len(place) + 1))
            for row, count in enumerate(counts):
                for word, times in count[level].items():
                    if word in place:
                        block[row, place[word]] = times
                    else:
                        block[row, -1] += times**2
            columns.append(block)
        return [list(words) for words in vocabulary], np.concatenate(columns, axis=1)

    def _counts(self, encoding: Encoding, row: Array) -> list[Counter[str]]:
        mark = row.tobytes()
        if mark not in self._remembered:
            if len(self._remembered) > 50_000:
                self._remembered.clear()
            self._remembered[mark] = subtrees(self._graph(encoding.space.reduced(encoding.params(row))), self._depth)
        return self._remembered[mark]

    def _propose(self, encoding: Encoding, known: Measured, avoid: set[bytes]) -> Array:
        vocabulary, _ = self.histograms(encoding, known.genes)

        def look(genes: Array) -> Array:
            return self.histograms(encoding, genes, vocabulary)[1]

        def fit(rows: Array, targets: Array) -> WLProcess:
            return WLProcess(vocabulary).fit(rows, targets)

        wanted = SPARE * self._size(len(known.genes))
        settings = Settings(wanted, self._pool, 2, self._draws, None, self._start)
        return propose(encoding, known, avoid, settings, self._seed % 2**32, look=look, fit=fit)
