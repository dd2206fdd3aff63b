"""CHITA: which weights go, and what the others become, by sparse regression on gradients."""

from dataclasses import dataclass

from torch import Tensor, nn

from netwright.compress._elimination import eliminate
from netwright.compress._hard_threshold import solve_sparse
from netwright.compress._least_squares import LeastSquares
from netwright.compress._settings import check_flag
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

    .. math:: \min_w \frac1{2n} \lVert X w - t \rVert^2 + \frac\lambda2 \lVert D (w - \bar w) \rVert^2
              \quad\text{s.t.}\quad \lVert w \rVert_0 \le k, \qquad t = X \bar w - \tfrac1m 1

    where :math:`1/m` stands for the gradient of the loss, and falls away with ``first_order=False``. The diagonal
    matrix :math:`D` says how much a weight matters by itself, :math:`D_{ii}^2 = \frac1n \sum_j X_{ji}^2 + \rho` with
    :math:`\rho` as ``ridge`` says; with ``scaled=False``, :math:`D = I`. Written in :math:`v = D w` and
    :math:`Z = X D^{-1}`, the exact solution on the columns :math:`S` that are left is

    .. math:: v_S = \bar v_S + Z_S^\top C (t - Z_S \bar v_S), \qquad C = (n \lambda I + Z_S Z_S^\top)^{-1},

    and setting entry :math:`i` of it to zero, the others adapting, costs :math:`v_i^2 / (2 [H_S^{-1}]_{ii})` with
    :math:`[H_S^{-1}]_{ii} = (1 - z_i^\top C z_i) / \lambda`. The entries of least cost go, half of them before the
    solution is taken anew. With ``exchange`` the last stage goes on by hard thresholding, which can bring entries back,

    .. math:: v \leftarrow P_k\big(v - \tau \nabla f(v)\big), \qquad
              \nabla f(v) = \tfrac1n Z^\top (Z v - t) + \lambda (v - \bar v),

    :math:`P_k` keeping the :math:`k` largest. The step :math:`\tau` is exact while the support stays, and otherwise
    doubled while the objective falls. Steps act on the :math:`1.5 k` columns that a full step would make largest; then
    the support is fitted exactly, and the columns are chosen anew.

    The quadratic model holds near :math:`\bar w` only, so pruning goes in stages: after stage :math:`s` of
    :math:`S`, :math:`p\,(1 - \text{ratio})^{s/S}` weights are left, and gradients are taken anew.

    Args:
        ratio: share of the weights to remove, in (0, 1).
        stages: :math:`S`; 1 takes gradients once. The more go, the more stages pay.
        gradients: :math:`n`, fewer where the training split is smaller; best not far below :math:`k`.
        batch_size: items in each gradient, :math:`m`; 1 takes them of single items, together where the model permits.
        ridge: :math:`\lambda` and :math:`\rho` in multiples of the mean square of an entry of :math:`Z` and of
            :math:`X`. The fewer gradients, the more.
        first_order: whether the loss may have a slope at :math:`\bar w`, as it has from the second stage on.
        scaled: whether weights are compared, and held, by what they matter, or as they are (:math:`D = I`).
        noise: standard deviation of normal noise that is added to the gradients, in multiples of their root mean
            square: to see how a method bears gradients that are not exact.
        exclude: names of parameters or modules whose weights stay as they are.
        exchange: whether hard thresholding follows in the last stage. It lowers the objective, and cost up to three
            points of accuracy at 2% of the weights of a small network, where it fits the gradients too well.

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

    Differs: the paper solves by hard thresholding alone, from the largest weights; here weights go as Optimal Brain
        Surgeon has it, many at a time, which keeps three points more at 2% of the weights of a small network and as
        much at 10%. Every support is fitted exactly, where the paper has coordinate descent or a single fit at the end.
        The scaling :math:`D` is ours too, and holds what the gradients do not see; ``scaled=False`` is the paper's. Its
        variant for blocks of the Hessian is left out: the rows themselves, n words for each weight, are then what takes
        memory. The ridge is relative to the gradients, so that one setting serves many networks; the paper's is
        absolute and searched for. A step that would raise the objective is halved.

    Cost: for each stage ``n`` backward passes, and ``O(n**2 s + n**3)`` time for each of two cuts with ``s`` weights
        left, or of up to sixteen where these are fewer than ``64 n``; with ``exchange``, ``O(n p)`` time for each
        choice of columns and ``O(n k)`` for each step in the last. Memory ``n p`` words, ``n (p + 1.5 k)`` with
        ``exchange``, never ``p**2``.
    """

    exchange: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "exchange", self.exchange)

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
        return self.prune(model, task, seed, progress, self._solve)

    def _solve(self, problem: LeastSquares, start: Tensor, count: int, last: bool) -> Tensor:
        return solve_sparse(problem, start, count) if last and self.exchange else eliminate(problem, start, count)
