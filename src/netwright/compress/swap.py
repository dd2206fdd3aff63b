"""SWAP: pruning by sparse regression on gradients, in which optimal transport takes the place of the squared error."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from netwright.compress._elimination import eliminate
from netwright.compress._hard_threshold import solve_sparse
from netwright.compress._least_squares import LeastSquares
from netwright.compress._settings import check_count, check_number
from netwright.compress._sinkhorn import barycentric_target, sinkhorn_plan
from netwright.compress._staged_pruning import StagedPruning
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["SWAP", "transport_problem"]


def transport_problem(problem: LeastSquares, plan: Tensor) -> LeastSquares:
    r"""The regression with its plan held fixed, which is least squares with another target.

    .. math:: \sum_{ij} \Pi_{ij} (a_i - x_j^\top w)^2 = \frac1n \lVert X w - n \Pi^\top a \rVert^2 + \text{const}

    With the identical assignment, :math:`\Pi = I / n`, it is the problem itself.
    """
    return replace(problem, target=barycentric_target(plan, problem.target))


@dataclass(frozen=True)
class SWAP(StagedPruning):
    r"""Sets single weights to zero and moves the others, as CHITA does, for gradients that are noisy.

    Reach for it in place of :class:`~netwright.compress.chita.CHITA` where gradients are not exact, as with noisy data,
    private training or analog memory. As there, nothing is trained; fine-tune with ``Recipe(keep_zeros=True)``.

    With the gradients :math:`x_1, \dots, x_n` as rows of :math:`X \in \mathbb R^{n \times p}`, the present weights
    :math:`\bar w \in \mathbb R^p` and :math:`a = X \bar w - \tfrac1m 1` (see CHITA), the squared error between
    :math:`a` and :math:`Xw` becomes the cost of transport between their entries, blurred by entropy:

    .. math:: \min_{w,\ \Pi \ge 0} \frac12 \sum_{ij} \Pi_{ij} (a_i - x_j^\top w)^2 + \frac\varepsilon2 \sum_{ij}
              \Pi_{ij} \log \Pi_{ij} + \frac\lambda2 \lVert D (w - \bar w) \rVert^2 \quad\text{s.t.}\quad
              \Pi 1 = \Pi^\top 1 = \tfrac1n 1,\quad \lVert w \rVert_0 \le k

    For fixed :math:`w` the plan :math:`\Pi` is found by Sinkhorn's scaling; for fixed :math:`\Pi` the gradient in
    :math:`w` is :math:`X^\top (\tfrac1n X w - \Pi^\top a) + \lambda D^2 (w - \bar w)`, that of CHITA with the target
    :math:`n \Pi^\top a`: every target is a mean of neighbours, in which noise averages out. Both alternate
    ``alternations`` times, from the solution of CHITA, where :math:`\Pi = I/n`.

    As :math:`\varepsilon \to 0`, the smallest :math:`a_i` becomes the target of the smallest :math:`x_j^\top w`, and so
    on: CHITA wherever its solution keeps the order of the targets, else a permutation of them. As :math:`\varepsilon
    \to \infty` all targets become their mean, and the regression removes what the network has learned; from
    :math:`\varepsilon` of a tenth of the variance on, that costs accuracy also where gradients are exact.

    Args:
        ratio: share of the weights to remove, in (0, 1).
        stages: of pruning, between which gradients are taken anew.
        gradients: :math:`n`, fewer where the training split is smaller.
        batch_size: items in each gradient, :math:`m`.
        ridge: :math:`\lambda` in multiples of the mean square of an entry of :math:`X`.
        first_order: whether the loss may have a slope at :math:`\bar w`.
        scaled: whether weights are compared, and held, by what they matter (see CHITA), or as they are.
        noise: standard deviation of normal noise added to the gradients, in multiples of their root mean square.
        exclude: names of parameters or modules whose weights stay as they are.
        eps: :math:`\varepsilon` in multiples of the variance of the entries of :math:`a`.
        alternations: of plan and weights; 0 is CHITA.

    Raises:
        TransformError: a setting outside its range; on a call, what CHITA refuses.
        NothingToPruneError: on a call, a model without matrices or kernels.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(64, 4), torch.rand(64, 2))
        >>> model = nn.Sequential(nn.Linear(4, 15), nn.ReLU(), nn.Linear(15, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.mse_loss, lambda o, t: 0.0)
        >>> sparse = SWAP(0.9, stages=2, gradients=16, batch_size=4)(model, task)
        >>> sum(int((value != 0).sum()) for value in sparse.parameters() if value.ndim > 1)
        9

    Source: 80. L. You, H. V. Cheng. SWAP: Sparse Entropic Wasserstein Regression for Robust Network Pruning. 2023.
        arXiv:2310.04918.

    Differs: for a fixed plan the regression is solved by CHITA's thresholding and exact fit, from CHITA's solution, in
        place of stochastic gradient steps on random batches of rows; the ridge and the entropy are relative to the
        gradients, in place of absolute ones that are searched for.

    Cost: that of CHITA, ``1 + alternations`` times the regression, and ``O(n**2)`` time for each scaling and memory for
        the plan.
    """

    eps: float = 0.01
    alternations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "eps", self.eps, above=True)
        check_count(self, "alternations", self.alternations, least=0)

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
        w = eliminate(problem, start, count)
        spread = float(problem.target.double().var(correction=0))
        for _ in range(self.alternations if spread > 0 else 0):
            plan = sinkhorn_plan(problem.target, problem.rows @ w, self.eps * spread)
            w = solve_sparse(transport_problem(problem, plan), w, count)
        return w
