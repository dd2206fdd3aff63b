"""Amended DARTS: the first-order gradient plus a term that stands for how the weights answer the architecture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netwright.search._relaxed_loop import Loss, Stepper
from netwright.search._relaxed_search import GradientSearch
from netwright.search.darts import Alternating, hessian_product, mixed_product

__all__ = ["AmendedDARTS", "amended"]


def amended(
    train_loss: Loss,
    val_loss: Loss,
    weights: Sequence[nn.Parameter],
    alphas: Sequence[nn.Parameter],
    eta: float,
    *,
    exact: bool = False,
) -> tuple[Tensor, ...]:
    r"""The amended gradient of the architecture weights.

    Where the weights have converged, :math:`w^*(\alpha) = \arg\min_w L_t(w, \alpha)`, the gradient of
    :math:`L_v(w^*(\alpha), \alpha)` is :math:`\nabla_\alpha L_v - M H^{-1} v` with

    .. math:: M = \nabla^2_{\alpha, w} L_t, \qquad H = \nabla^2_{w, w} L_t, \qquad v = \nabla_w L_v.

    First order leaves out the second term. Here it is kept with :math:`H` in the place of its inverse,

    .. math:: \nabla_\alpha L_v - \eta\, M H v.

    :math:`H v` and :math:`H^{-1} v` agree in direction where :math:`H` is positive definite: their inner product is
    :math:`\lVert v \rVert^2`.

    Args:
        train_loss: :math:`L_t`.
        val_loss: :math:`L_v`.
        weights: :math:`w`; shifted meanwhile, and put back to the last bit.
        alphas: :math:`\alpha`.
        eta: how much of the term is taken; 0 is :func:`~netwright.search.darts.first_order`.
        exact: differentiate twice, rather than by finite differences.

    Example:
        >>> w, a = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (3.0, 1.0))
        >>> slope = amended(lambda: ((w - a) ** 2).sum(), lambda: (w**2).sum() / 2, [w], [a], 0.5, exact=True)
        >>> float(slope[0])  # M = -2, H = 2, v = 3
        6.0
    """
    found = torch.autograd.grad(val_loss(), [*alphas, *weights], materialize_grads=True)
    direct, vector = found[: len(alphas)], found[len(alphas) :]
    curved = hessian_product(train_loss, weights, vector, exact=exact)
    answer = mixed_product(train_loss, weights, alphas, curved, exact=exact)
    return tuple(first - eta * second for first, second in zip(direct, answer, strict=True))


@dataclass(frozen=True, kw_only=True)
class AmendedDARTS(GradientSearch):
    r"""A differentiable search that does not run into identities when it runs long.

    Reach for it in place of :class:`~netwright.search.darts.DARTS` where the derived network is worse the longer the
    search. Identities are quick to help while the other operations still have bad weights; first order, which takes the
    weights as they are, rewards them for it. The amended gradient (see :func:`amended`) also asks how the weights would
    answer. The rest of an iteration is that of DARTS.

    Args:
        eta: how much of the amending term is taken; 0 is first-order DARTS, to the last bit.
        exact: differentiate twice rather than by finite differences.
        epochs: passes over the halves.
        batch_size: of both batches.
        lr: of the weights at the start.
        momentum: of the weights.
        weight_decay: of the weights.
        clip_norm: largest norm of the weights' gradient; None for no bound.
        alpha_lr: of the alphas.
        alpha_decay: weight decay of the alphas.

    Raises:
        SettingError: a setting out of its range.

    Example:
        >>> from netwright.core.task import load_task
        >>> from netwright.search.relaxed import Mixed
        >>> edge = Mixed({"skip": nn.Identity(), "linear": nn.Sequential(nn.Linear(30, 30), nn.ReLU())})
        >>> model = nn.Sequential(edge, nn.Linear(30, 2))
        >>> result = AmendedDARTS(epochs=2, eta=0.1).search(model, load_task("breast-cancer"))
        >>> len(result.scores)
        2

    Source: paper 174: Bi, Hu, Xie, Chen, Wei and Tian, "Stabilizing DARTS with Amended Gradient Estimation on
        Architectural Parameters", 2019, arXiv 1910.11831.

    Differs: agreement with the exact gradient is stated for the direction in the space of weights. For the alphas,
        ``(M H v)ᵀ (M H⁻¹ v)`` is non-negative where ``MᵀM`` and ``H`` commute, and can be negative elsewhere: ``H =
        diag(1, 100)``, ``M = (1, 1)``, ``v = (1, -0.5)``. The step of the alphas is Adam's. Which data and which
        hyperparameters the search and the final training share is left to the caller.

    Cost: six forward and backward passes an iteration, three times first-order DARTS; memory is that of all operations
        together, with ``exact`` about twice as much.
    """

    eta: float = 0.1
    exact: bool = False

    def _stepper(self, network: nn.Module, seed: int) -> Stepper:
        return Alternating(self, network, self._gradient)

    def _gradient(
        self, train: Loss, held: Loss, weights: list[nn.Parameter], alphas: list[nn.Parameter], rate: float
    ) -> tuple[Tensor, ...]:
        return amended(train, held, weights, alphas, self.eta, exact=self.exact)
