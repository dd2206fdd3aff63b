"""Pruning in stages, each by a sparse regression on the gradients at the network of the stage before."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netwright.compress._least_squares import LeastSquares
from netwright.compress._per_sample_gradients import gradient_rows
from netwright.compress._settings import (
    check_count,
    check_flag,
    check_number,
    check_ratio,
    check_weights,
    checked_paths,
    require_loss,
)
from netwright.compress._weights import FlatWeights, differentiable
from netwright.core.errors import TransformError
from netwright.core.parametrized import fold_parametrizations
from netwright.core.randomness import isolated
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["StagedPruning"]

Solve = Callable[[LeastSquares, Tensor, int, bool], Tensor]


@dataclass(frozen=True)
class StagedPruning:
    """Settings and the course of a method that prunes by sparse regression; the regression itself is the method's."""

    ratio: float = 0.9
    stages: int = 16
    gradients: int = 256
    batch_size: int = 16
    ridge: float = 1.0
    first_order: bool = True
    scaled: bool = True
    noise: float = 0.0
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        check_ratio(self, "ratio", self.ratio, what="removes half of the weights")
        for name in ("stages", "gradients", "batch_size"):
            check_count(self, name, getattr(self, name))
        check_number(self, "ridge", self.ridge, above=True)
        check_number(self, "noise", self.noise)
        for name in ("first_order", "scaled"):
            check_flag(self, name, getattr(self, name))

    def counts(self, size: int) -> list[int]:
        """How many of ``size`` weights stay after each stage: equal shares of what is left go in each."""
        stages = range(1, self.stages + 1)
        return [max(1, round((1 - self.ratio) ** (stage / self.stages) * size)) for stage in stages]

    def prune(self, model: nn.Module, task: Task, seed: int, progress: Progress | None, solve: Solve) -> nn.Module:
        """A pruned copy of ``model`` in eval mode.

        Args:
            model: as in a call.
            task: as in a call.
            seed: of the first stage; each later one draws items anew.
            progress: told how far it is.
            solve: called with the regression of a stage, the present weights, how many may stay, and whether it is the
                last stage.
        """
        check_weights(self, model)
        require_loss(self, task)
        report = progress or (lambda fraction, what: None)
        result = deepcopy(model).eval()
        fold_parametrizations(result)
        weights = FlatWeights(result, self.exclude)
        weights.require_left(self, self.ratio)
        counts = self.counts(weights.size)
        for stage, count in enumerate(counts):
            report(stage / len(counts), f"stage {stage + 1} of {len(counts)}: gradients")
            with isolated(seed + stage), differentiable(result):
                problem = self.regression(result, weights, task, seed + stage)
            report((stage + 0.5) / len(counts), f"stage {stage + 1} of {len(counts)}: {count} weights stay")
            weights.write(problem.weights(solve(problem, problem.anchor, count, stage == len(counts) - 1)))
        report(1.0, f"{self.ratio:.4g} of {weights.size} weights are zero")
        return result

    def regression(self, model: nn.Module, weights: FlatWeights, task: Task, seed: int) -> LeastSquares:
        """The quadratic model of the loss around the present weights, as least squares on gradients.

        Raises:
            TransformError: gradients that are all zero, or not finite.
        """
        rows = gradient_rows(model, weights, task, count=self.gradients, items=self.batch_size, seed=seed)
        if self.noise:
            generator = torch.Generator(rows.device).manual_seed(seed)
            spread = self.noise * float(rows.double().square().mean().sqrt())
            for row in rows:
                row += spread * torch.randn(row.shape, generator=generator, dtype=row.dtype, device=row.device)
        squares = torch.linalg.vector_norm(rows, dim=0).square() / len(rows)
        square = float(squares.mean())
        if square == 0.0:
            raise TransformError(
                f"{type(self).__name__}: the loss of task {task.name!r} has no gradient at this model on {len(rows)} "
                "batches, so no weight matters. Is the model trained on this task?"
            )
        anchor = weights.read()
        shift = 1 / min(self.batch_size, len(task.data.train)) if self.first_order else 0.0
        target = rows @ anchor - shift
        if not self.scaled:
            return LeastSquares(rows, target, anchor, self.ridge * square, torch.ones_like(anchor))
        scale = (squares + self.ridge * square).sqrt()
        rows /= scale
        ridge = self.ridge * float((squares / scale.square()).mean())
        return LeastSquares(rows, target, anchor * scale, ridge, scale)
