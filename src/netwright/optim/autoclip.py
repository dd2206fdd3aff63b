"""AutoClip: gradients clipped at a percentile of the norms seen so far."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.optim._base import check_number
from netwright.optim._quantile_sketch import QuantileSketch

__all__ = ["AutoClip"]

NonFinite = Literal["zero", "keep", "raise"]


class AutoClip:
    r"""Clips the norm of all gradients together at the ``percentile`` of its own history.

    Reach for it wherever a clipping threshold would have to be tuned: the threshold follows the gradients of the task,
    the model and the phase of training. Call it between ``backward`` and ``optimizer.step``, with mixed precision
    after ``scaler.unscale_``. With :math:`g_i` the gradients at call :math:`t` and :math:`p` the percentile

    .. math:: n_t = \sqrt{\textstyle\sum_i \lVert g_i \rVert^2}, \qquad
              \eta_t = \operatorname{quantile}_{p/100}(n_1, \dots, n_t), \qquad
              g_i \leftarrow g_i \min(1, \eta_t / n_t).

    The quantile interpolates between neighbours, as ``numpy.percentile`` does. The first ``capacity`` norms are all
    kept and it is exact; beyond, a sketch of them answers with a rank error of at most
    :math:`\tfrac{n}{2k} \log_2 \tfrac{2n}{k} + \tfrac{n}{k}` among :math:`n` norms, :math:`k` being the capacity:
    0.15% after a million norms with the default, 0.3% after a billion.

    A norm that is zero or not finite does not enter the history. Gradients that are not finite are set to zero, so that
    one overflow does not end a run; ``nonfinite`` says otherwise. A norm that merely overflows single precision is
    computed again in double precision and is an ordinary one.

    Cost: one pass over the gradients, a second one (read and write) where they are clipped, one synchronization with
    the device; :math:`8 k` bytes and at most :math:`8 k (1 + \log_2(n/k))` after :math:`n > k` calls, whatever the
    size of the model.

    Args:
        percentile: :math:`p`, in [0, 100]. Low values clip nearly always and make steps nearly normalized, 100 never
            clips. Default 10, as in the paper.
        capacity: :math:`k`, norms that are kept exactly; an even number.
        nonfinite: what becomes of gradients whose norm is infinite or NaN: "zero" sets them all to zero, "keep" leaves
            them as they are, "raise" raises.

    Raises:
        SettingError: a setting outside its range.
        GradientError: on a call, a sparse gradient, or one that is not finite with ``nonfinite="raise"``.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clip = AutoClip(percentile=50.0)
        >>> for scale in (1.0, 3.0):
        ...     weight.grad = torch.tensor([0.6, 0.8]) * scale
        ...     norm = clip([weight])
        >>> round(float(norm), 4), round(float(weight.grad.norm()), 4), round(clip.threshold, 4)
        (3.0, 2.0, 2.0)

    Source: paper 198, P. Seetharaman, G. Wichern, B. Pardo, J. Le Roux, "AutoClip: Adaptive Gradient Clipping for
    Source Separation Networks", 2020, arXiv:2007.14469.

    Differs: the paper keeps every norm for ever and says nothing of norms that are zero or not finite. It scales by
    :math:`\eta / (n + 10^{-6})`, as ``torch.nn.utils.clip_grad_norm_`` does; here the clipped norm is the threshold.
    """

    def __init__(self, percentile: float = 10.0, *, capacity: int = 4096, nonfinite: NonFinite = "zero") -> None:
        self.percentile = check_number(self, "percentile", percentile, high=100.0)
        if nonfinite not in get_args(NonFinite):
            known = ", ".join(map(repr, get_args(NonFinite)))
            raise SettingError(f"AutoClip: nonfinite must be one of {known}, got {nonfinite!r}.")
        self.nonfinite = nonfinite
        self.history = QuantileSketch(capacity)
        self.refused = 0
        """Calls whose gradients were not finite."""

    @property
    def threshold(self) -> float | None:
        """The norm at which the last call clipped; None before the first."""
        return self.history.quantile(self.percentile / 100) if self.history.count else None

    @torch.no_grad()
    def __call__(self, parameters: Tensor | Iterable[Tensor]) -> Tensor:
        """Take in the norm of the gradients and clip them in place.

        Args:
            parameters: whose ``.grad`` are clipped together; those without one are passed over.

        Returns:
            The norm before clipping, a scalar on the device of the first gradient.
        """
        given = [parameters] if isinstance(parameters, Tensor) else parameters
        grads = [param.grad for param in given if param.grad is not None]
        _refuse_sparse(grads)
        lists = _by_kind([grad for grad in grads if grad.numel()])
        if not lists:
            return torch.tensor(0.0)
        total = _norm(lists)
        norm = float(total)  # the one synchronization
        if norm == torch.inf:
            total = _norm(lists, torch.float64)
            norm = float(total)
        if not norm < torch.inf:
            self._refuse(lists, norm)
        elif norm > 0.0:
            self.history.add(norm)
            threshold = self.threshold
            if threshold is not None and threshold < norm:
                for same in reversed(lists):  # what was read last is still in the caches
                    torch._foreach_mul_(same[::-1], threshold / norm)
        return total

    def _refuse(self, lists: list[list[Tensor]], norm: float) -> None:
        self.refused += 1
        if self.nonfinite == "raise":
            raise GradientError(
                f"AutoClip: the norm of the gradients is {norm}. Lower the learning rate, or look for values in the "
                "data that the loss cannot take."
            )
        if self.nonfinite == "zero":
            for same in lists:
                torch._foreach_zero_(same)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: the history and the number of calls refused."""
        return {"history": self.history.state_dict(), "refused": self.refused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            StateDictError: something else.
        """
        if set(state) != {"history", "refused"}:
            raise StateDictError(f"This state was not saved by AutoClip: it has {', '.join(sorted(map(str, state)))}.")
        self.history.load_state_dict(state["history"])
        self.refused = int(state["refused"])


def _refuse_sparse(grads: list[Tensor]) -> None:
    for grad in grads:
        if grad.layout != torch.strided:
            raise GradientError(
                f"AutoClip does not take sparse gradients, and the parameter of shape {tuple(grad.shape)} has one. "
                "Build its embedding with sparse=False."
            )


def _by_kind(grads: list[Tensor]) -> list[list[Tensor]]:
    """Lists of one device and one type each, as the foreach kernels want them, and none conjugated on reading."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        found.setdefault((grad.device, grad.dtype), []).append(grad.conj() if grad.is_conj() else grad)
    return list(found.values())


def _norm(lists: list[list[Tensor]], dtype: torch.dtype | None = None) -> Tensor:
    """The norm of all tensors together, summed in at least single precision, on the device of the first.

    Args:
        lists: tensors of one device and type each, none empty.
        dtype: the real type to sum in, if not the tensors' own.
    """
    device = lists[0][0].device
    parts = []
    for same in lists:
        real = [torch.view_as_real(grad) for grad in same] if same[0].is_complex() else same
        wide = dtype or torch.promote_types(real[0].dtype, torch.float32)
        parts.append(torch.stack(torch._foreach_norm(real, 2, wide)).to(device))
    widest = max((part.dtype for part in parts), key=lambda kind: kind.itemsize)
    total: Tensor = torch.linalg.vector_norm(torch.cat([part.to(widest) for part in parts]))
    return total
