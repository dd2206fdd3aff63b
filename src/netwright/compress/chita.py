"""CHITA: which weights go, and what the others become, by sparse regression on gradients."""

from dataclasses import dataclass

from torch import Tensor, nn

from netwright.compress._elimination import eliminate
from netwright.compress._hard_threshold import solve_sparse
from netwright.compress._least_squares import LeastSquares
from netwright.compress._staged_pruning import StagedPruning
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["CHITA"]


@dataclass(frozen=True)
class CHITA(StagedPruning):
    r"""Sets single weights to zero and moves the others so that the loss rises least, without training.

    Reach for it when most weights shall go in one shot: at 90% and more it keeps far more accuracy than magnitude.
    Fine-tune the result with ``Recipe(keep_zeros=True)``. It is a dense module with exact zeros: smaller on disk, not
    faster.

    All weights of matrices and kernels are one vector :math:`w \in \mathbb R^p`, :math:`\bar w` its present value. Of
    :math:`n` small batches of :math:`m` training items, drawn without replacement, the gradients of the loss at
    :math:`\bar w` are the rows of :math:`X \in \mathbb R^{n \times p}`. The empirical Fisher matrix
    :math:`m X^\top X / n` stands for the Hessian and is never formed: the quadratic model of the loss is least squares,

    .. math:: \min_w \frac1{2n} \lVert X w - t \rVert^2 + \frac\lambda2 \lVert w - \bar w \rVert^2
              \quad\text{s.t.}\quad \lVert w \rVert_0 \le k, \qquad t = X \bar w - \tfrac1m 1

    where :math:`1/m` stands for the gradient of the loss, and falls away with ``first_order=False``. A support is found
    by cuts: the exact solution on the columns :math:`S` that are left is

    .. math:: w_S = \bar w_S + X_S^\top C (t - X_S \bar w_S), \qquad C = (n \lambda I + X_S X_S^\top)^{-1},

    and setting entry :math:`i` to zero, the others adapting, would cost :math:`w_i^2 / (2 [H_S^{-1}]_{ii})` with
    :math:`[H_S^{-1}]_{ii} = (1 - x_i^\top C x_i) / \lambda`; the entries of least cost go, half of them before the
    solution is taken anew. In the last stage hard thresholding follows, which can also bring entries back,

    .. math:: w \leftarrow P_k\big(w - \tau D^{-2} \nabla f(w)\big), \qquad
              \nabla f(w) = \tfrac1n X^\top (X w - t) + \lambda (w - \bar w), \qquad
              D_{ii}^2 = \tfrac1n \sum_j X_{ji}^2 + \lambda,

    :math:`P_k` keeping the :math:`k` largest of :math:`|D w|`; with ``scaled=False``, :math:`D = I`. The step
    :math:`\tau` is exact while the support stays, and otherwise doubled while the objective falls. Steps act on the
    :math:`1.5 k` columns that a full step would make largest; then the support is fitted exactly by an
    :math:`n \times n` system, and the columns are chosen anew.

    The quadratic model holds near :math:`\bar w` only, so pruning goes in stages: after stage :math:`s` of
    :math:`S`, :math:`p\,(1 - \text{ratio})^{s/S}` weights are left, and gradients are taken anew.

    Args:
        ratio: share of the weights to remove, in (0, 1).
        stages: :math:`S`; 1 takes gradients once. The more go, the more stages pay.
        gradients: :math:`n`, fewer where the training split is smaller; best not far below :math:`k`.
        batch_size: items in each gradient, :math:`m`; 1 takes them of single items, together where the model permits.
        ridge: :math:`\lambda` in multiples of the mean square of an entry of :math:`X`. The fewer gradients, the more.
        first_order: whether the loss may have a slope at :math:`\bar w`, as it has from the second stage on.
        scaled: whether weights are compared by what they matter, :math:`D_{ii} |w_i|`, or as they are.
        noise: standard deviation of normal noise that is added to the gradients, in multiples of their root mean
            square: to see how a method bears gradients that are not exact.
        exclude: names of parameters or modules whose weights stay as they are.

    Raises:
        TransformError: a setting outside its range; on a call, weights or gradients that are not finite, gradients that
            are all zero, a ratio that would leave no weight, a name in ``exclude`` that the model does not have, or a
            task without a loss.
        NothingToPruneError: on a call, a model without matrices or kernels.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(64, 4), torch.rand(64, 2))
        >>> model = nn.Sequential(nn.Linear(4, 15), nn.ReLU(), nn.Linear(15, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.mse_loss, lambda o, t: 0.0)
        >>> sparse = CHITA(0.9, stages=2, gradients=16, batch_size=4)(model, task)
        >>> sum(int((value != 0).sum()) for value in sparse.parameters() if value.ndim > 1)
        9

    Source: 34. R. Benbaki, W. Chen, X. Meng, H. Hazimeh, N. Ponomareva, Z. Zhao, R. Mazumder. Fast as CHITA: Neural
        Network Pruning with Combinatorial Optimization. 2023. arXiv:2302.14623.

    Differs: the cuts are ours, Optimal Brain Surgeon's with many weights at a time; from there thresholding finds
        little more. At 2% of the weights of a small network they are worth four points over thresholding alone, as much
        as a surgeon that removes four weights at a time, in a fifteenth of its time. The scaling :math:`D` is ours
        too; ``scaled=False`` is the paper's. The exact fit of a support ends every round of thresholding, where the
        paper has coordinate descent or a single fit at the end. Its variant for blocks of the Hessian is left out: the
        rows themselves, n words for each weight, are then what takes memory. The ridge is relative to the gradients, so
        that one setting serves many networks; the paper's is absolute and searched for. A step that would raise the
        objective is halved.

    Cost: for each stage ``n`` backward passes, and ``O(n**2 s + n**3)`` time for each of two cuts with ``s`` weights
        left; in the last, ``O(n p)`` time for each choice of columns and ``O(n k)`` for each step. Memory
        ``n (p + 1.5 k)`` words, never ``p**2``.
    """

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A copy of ``model`` with ``ratio`` of its weights zero, in eval mode.

        Args:
            model: any trained module.
            task: loss and training split.
            budget: not needed, nothing is trained.
            seed: draws the items.
            progress: told how far it is.
        """
        return self.prune(model, task, seed, progress, _solve)


def _solve(problem: LeastSquares, start: Tensor, count: int, last: bool) -> Tensor:
    return solve_sparse(problem, start, count) if last else eliminate(problem, start, count)
