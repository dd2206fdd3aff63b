"""Candidates of a super-network, scored and measured on this machine."""

import math
from dataclasses import dataclass

from netwright.core.cost import measure
from netwright.core.errors import NetwrightError, SettingError
from netwright.core.evaluate import evaluate
from netwright.core.task import Task
from netwright.search.space import Params
from netwright.search.super_net import Elastic

__all__ = ["Measured"]


@dataclass(frozen=True)
class Measured:
    """Evaluates candidates of a super-network: validation score, and what they cost here in ONNX Runtime.

    Reach for it as the ``evaluate`` of :func:`netwright.search.run`. The metrics are ``score``, ``latency_ms``
    (median of a call), ``memory_bytes``, ``size_bytes``, ``macs`` and ``parameters``.

    Args:
        net: the super-network, of any class with a space and ``extract``.
        task: its data and score.
        batch: items in a measured call.
        threads: threads of a measured call.
        seconds: length of a measurement.

    Raises:
        SettingError: a super-network without a space or ``extract``, or a setting that is not positive.
        NetwrightError: on a call, a candidate whose score is not finite.

    Example:
        >>> from netwright.core.task import load_task
        >>> from netwright.search import SuperNet
        >>> task = load_task("breast-cancer")
        >>> evaluate = Measured(SuperNet(task.build(seed=0), task), task, seconds=0.01)
        >>> sorted(evaluate({"width/0": 64, "width/2": 128}))
        ['latency_ms', 'macs', 'memory_bytes', 'parameters', 'score', 'size_bytes']

    Cost: of a call, an extraction, an export, a pass over the validation split and ``seconds``. Several at a time on
        one machine disturb each other's latency.
    """

    net: Elastic
    task: Task
    batch: int = 1
    threads: int = 1
    seconds: float = 0.3

    def __post_init__(self) -> None:
        if not isinstance(self.net, Elastic):
            raise SettingError(
                f"{type(self.net).__name__} is no super-network: it needs an attribute space, a SearchSpace, and a "
                "method extract(params) that returns a module."
            )
        for name in ("batch", "threads", "seconds"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be positive, got {getattr(self, name)!r}.")

    def __call__(self, params: Params) -> dict[str, float]:
        """The metrics of a candidate."""
        self.net.space.check(params)
        model = self.net.extract(params)
        score = evaluate(model, self.task, "val")
        if not math.isfinite(score):
            raise NetwrightError(f"The score of {dict(params)} is {score}.")
        example = self.task.example(max(self.batch, 2))
        cost = measure(model, example, batch=self.batch, threads=self.threads, seconds=self.seconds)
        return {
            "score": score,
            "latency_ms": cost.latency.median_ms,
            "memory_bytes": float(cost.memory_bytes),
            "size_bytes": float(cost.size_bytes),
            "macs": float(cost.macs),
            "parameters": float(cost.parameters),
        }
