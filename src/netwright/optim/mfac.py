"""M-FAC: natural gradient steps with the empirical Fisher matrix of the last gradients, matrix-free."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.core.errors import GradientError, SettingError
from netwright.core.inverse_fisher import row_products, solve_gram
from netwright.optim._base import BaseOptimizer, Group, Member, check_number

__all__ = ["MFAC"]

_SHARED = ("window", "damping")
_FLAT = ("gradients", "gram", "velocity")


class MFAC(BaseOptimizer):
    r"""Multiplies each gradient with the inverse empirical Fisher matrix of the last ``window`` gradients.

    Reach for it where curvature that couples all parameters is wanted at a cost linear in their number, without hooks
    into the network and for any kind of layer, and where memory for ``window`` copies of the parameters is there. It
    is a drop-in for ``torch.optim.SGD`` with a learning rate of its own: a step is about
    ``lr * window / norm of the gradient`` long where gradients have little in common and damping is small. Where
    gradients vanish at the end (full batches, data that are fitted exactly), raise ``damping`` or lower ``lr``.

    With the gradient :math:`g_t` of all parameters :math:`\theta` as one vector, :math:`G_t \in \mathbb R^{m \times d}`
    the last :math:`m` of them as rows (zero rows before there are :math:`m`), weight decay :math:`\omega`, damping
    :math:`\lambda`, momentum :math:`\mu` and learning rate :math:`\eta`,

    .. math:: g_t = \nabla f(\theta_t) + \omega \theta_t, \qquad
              F_t = \lambda I + \tfrac1m G_t^\top G_t, \qquad
              v_t = \mu v_{t-1} + (1 - \mu) F_t^{-1} g_t, \qquad
              \theta_{t+1} = \theta_t - \eta v_t .

    As :math:`g_t` is a row of :math:`G_t`, say :math:`g_t = G_t^\top e_j`, the product needs one small system,

    .. math:: F_t^{-1} g_t = m\, G_t^\top (m \lambda I + G_t G_t^\top)^{-1} e_j .

    Cost: one product with each of :math:`G` and its transpose, ``O(d m)``, and a factorization, ``O(m**3)``, a step;
    nothing else grows with the parameters or with the number of steps. Memory: ``m`` words for each parameter, one more
    with momentum, in the widest dtype of the parameters and at least float32, and ``m**2`` doubles.

    Args:
        params: parameters or groups; they share one window. A parameter joins it with its first gradient.
        lr: learning rate.
        window: gradients kept, m; the same for all groups.
        damping: :math:`\lambda > 0`, in the units of a squared gradient; the same for all groups. It may be changed
            during training.
        momentum: decay of the average of preconditioned gradients, in [0, 1); 0 keeps none.
        weight_decay: times the parameters, added to their gradient before it enters the window.
        maximize: ascend instead of descend.

    Raises:
        SettingError: a setting outside its range, groups that disagree on a shared one, parameters on several devices.
        GradientError: in a step, a sparse gradient, or one that is not finite (it would stay for m steps); nothing
            has moved then.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 1)
        >>> inputs, targets = torch.randn(32, 3), torch.randn(32, 1)
        >>> optimizer = MFAC(model.parameters(), lr=0.1, window=8, damping=1.0)
        >>> for step in range(40):
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(inputs), targets)
        ...     if step == 0:
        ...         first = loss.item()
        ...     loss.backward()
        ...     _ = optimizer.step()
        >>> loss.item() < first
        True

    Source: paper 14, Frantar, Kurtic and Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information", 2021, arXiv 2107.03356, the dynamic algorithm; defaults of ``lr`` and ``damping``, the zero rows at
    the start and the form of momentum and weight decay as in the authors' published code.

    Differs: the paper keeps coefficients of a recursion over the gradients in the window, a triangular factor without
    pivoting of :math:`m \lambda I + G G^\top` in float32, and subtracts :math:`G^\top c` from
    :math:`g / \lambda`. Here the small system is solved by a Cholesky factorization in float64, and its right side
    :math:`e_j` leaves no such difference: the same product in exact arithmetic, at the same cost, without a loop over
    gradients, and accurate where gradients are nearly parallel and damping is small. For that the new row of
    :math:`G G^\top` is summed in float64. Differences between gradients that are mere rounding are left out, by an
    eigendecomposition of :math:`G G^\top` in the steps that need it. ``window`` is 64 by default; with
    1024, as in the authors' code, and the same ``lr`` steps are up to 16 times longer.
    """

    state_names: ClassVar[frozenset[str]] = frozenset({"seen", "place", *_FLAT})
    takes_complex: ClassVar[bool] = True
    one_device: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 64,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "window": window,
                "damping": damping,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
        )

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting of this group outside its range."""
        check_number(self, "lr", group["lr"])
        check_number(self, "damping", group["damping"], above=True)
        check_number(self, "momentum", group["momentum"], high=1.0, below=True)
        check_number(self, "weight_decay", group["weight_decay"])
        window = group["window"]
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise SettingError(f"MFAC: window must be a positive integer, got {window!r}.")
        for name in _SHARED:
            if group[name] != self.param_groups[0][name]:
                raise SettingError(
                    f"MFAC: all groups share one {name}, got {self.param_groups[0][name]!r} and {group[name]!r}. "
                    "Give it to MFAC, not to a group."
                )

    def take_state(self, state_dict: dict[str, Any]) -> None:
        """Go on to the last bit."""
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for param, key in zip(params, saved, strict=True):  # torch has cast what belongs to all to this one's dtype
            for name, value in state_dict["state"].get(key, {}).items():
                if name in _FLAT:
                    self.state[param][name] = value.to(device=param.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the loss again and returns it; optional.

        Raises:
            GradientError: a gradient that is sparse or not finite.
        """
        loss = self.evaluate(closure)
        self.refuse_sparse()
        groups = [(group, self.members(group)) for group in self.param_groups]
        members = [member for _, found in groups for member in found]
        if not members:
            return loss
        grads = [_decayed(member, group["weight_decay"]) for group, found in groups for member in found]
        _refuse_infinite(grads)
        shared = self._shared(members)
        gradients, gram = shared["gradients"], shared["gram"]
        count = len(gradients)
        slot = shared["seen"] % count
        shared["seen"] += 1
        row = gradients[slot].zero_()
        torch._foreach_copy_(_views(row, members), grads)
        gram[slot] = gram[:, slot] = row_products(gradients, row)
        eps = torch.finfo(gradients.dtype).eps
        natural = gradients.mT @ _coefficients(gram, slot, self.param_groups[0]["damping"], eps).to(gradients.dtype)
        for group, found in groups:
            self._move(group, found, natural, shared)
        return loss

    def _move(self, group: Group, members: Sequence[Member], natural: Tensor, shared: dict[str, Any]) -> None:
        if not members:
            return
        steps = _views(natural, members)
        if group["momentum"]:
            if "velocity" not in shared:
                shared["velocity"] = torch.zeros_like(natural)
            averages = _views(shared["velocity"], members)
            torch._foreach_lerp_(averages, steps, 1 - group["momentum"])
            steps = averages
        torch._foreach_add_([member.param for member in members], steps, alpha=-float(group["lr"]))

    def _shared(self, members: Sequence[Member]) -> dict[str, Any]:
        """The state that all parameters share, kept with the first one, with columns for all ``members``."""
        shared: dict[str, Any] = self.state[self.param_groups[0]["params"][0]]
        if "seen" not in shared:
            window, device = self.param_groups[0]["window"], members[0].param.device
            shared["seen"] = 0
            shared["gradients"] = torch.zeros(window, 0, device=device)
            shared["gram"] = torch.zeros(window, window, dtype=torch.float64, device=device)
        known = shared["gradients"].shape[1]
        width = known
        for member in members:
            if "place" not in member.state:
                member.state["place"] = width
                width += member.param.numel()
        if width > known:
            _widen(shared, width, [member.param.dtype for member in members])
        return shared


def _coefficients(gram: Tensor, slot: int, damping: float, eps: float) -> Tensor:
    """``c`` in ``(damping I + Gᵀ G / m)^-1 g = Gᵀ c`` for the row ``g`` in ``slot`` of ``G``, given ``gram = G Gᵀ``."""
    count = len(gram)
    unit = torch.zeros_like(gram[0])
    unit[slot] = count
    return solve_gram(gram, count * float(damping), unit, eps)


def _decayed(member: Member, weight_decay: float) -> Tensor:
    return member.grad.add(member.param, alpha=weight_decay) if weight_decay else member.grad


def _refuse_infinite(grads: list[Tensor]) -> None:
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(grads, ord=float("inf"))])
    if not bool(norms.isfinite().all()):
        worst = next(grad for grad, norm in zip(grads, norms.tolist(), strict=True) if not norm < float("inf"))
        raise GradientError(
            f"MFAC: the gradient of shape {tuple(worst.shape)} is not finite and would spoil the window. Lower the "
            "learning rate, or leave the step out."
        )


def _views(flat: Tensor, members: Sequence[Member]) -> list[Tensor]:
    """The parts of ``(d,)`` that belong to ``members``, in their shapes."""
    return [
        flat[member.state["place"] : member.state["place"] + member.param.numel()].view(member.param.shape)
        for member in members
    ]


def _widen(shared: dict[str, Any], width: int, dtypes: Sequence[torch.dtype]) -> None:
    """Add columns of zeros for parameters that have their first gradient."""
    for name in {"gradients", "velocity"} & shared.keys():
        old = shared[name]
        dtype = old.dtype
        for other in dtypes:
            dtype = torch.promote_types(dtype, other)
        shared[name] = torch.zeros(*old.shape[:-1], width, dtype=dtype, device=old.device)
        shared[name][..., : old.shape[-1]] = old
