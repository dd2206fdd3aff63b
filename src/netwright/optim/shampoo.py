"""Shampoo: full-matrix preconditioning along each dimension of a tensor."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.core.errors import SettingError
from netwright.optim._base import BaseOptimizer, Group, Member, check_number, check_pair
from netwright.optim._kronecker import as_type, inverse_roots, wide_dtype
from netwright.optim._points import restore_tensors

__all__ = ["Shampoo"]

Grafting = Literal["none", "sgd", "adam"]


class _Due(NamedTuple):
    """A parameter's roots that are to be found anew."""

    state: dict[str, Any]
    order: int
    scale: float
    damping: float


def _step(block: Tensor, roots: Sequence[Tensor]) -> Tensor:
    r""":math:`G \times_1 H_1^{-1/2k} \dots \times_k H_k^{-1/2k}`; each product moves its dimension to the end."""
    for root in roots:
        block = torch.tensordot(block, root, ([0], [0]))
    return block


def _moments(block: Tensor) -> list[Tensor]:
    r""":math:`G_{(i)} G_{(i)}^\top` for each unfolding :math:`G_{(i)}` along a dimension."""
    unfoldings = (block.movedim(dim, 0).flatten(1) if block.dim() > 1 else block[:, None] for dim in range(block.dim()))
    return [unfolding @ unfolding.mT for unfolding in unfoldings]


class Shampoo(BaseOptimizer):
    r"""AdaGrad with one full matrix per dimension of each parameter, in place of one number per entry.

    Reach for it where gradients of a layer are strongly correlated and Adam's diagonal misses it. It takes fewer steps
    than Adam and more time per step; ``precondition_every`` and ``block_size`` bound that time.

    For a parameter of :math:`k` dimensions (those of length 1 dropped) with gradient :math:`G_t`,

    .. math:: H_i \leftarrow \beta H_i + (1 - \beta) \, G_{t(i)} G_{t(i)}^\top
              \quad \text{(for } \beta = 1 \text{: } H_i + G_{t(i)} G_{t(i)}^\top \text{)} \qquad
              P_t = G_t \times_1 (\hat H_1 + \epsilon I)^{-1/2k} \dots \times_k (\hat H_k + \epsilon I)^{-1/2k}

    .. math:: M \leftarrow \mu M + P_t \qquad W \leftarrow (1 - \eta \lambda) W - \eta M

    with :math:`G_{(i)}` the unfolding along dimension :math:`i`, :math:`\times_i` the product along it, :math:`\beta`
    ``decay``, :math:`\hat H = H / (1 - \beta^t)` (:math:`H` for :math:`\beta = 1`), :math:`\epsilon` ``damping``,
    :math:`\eta` ``lr``, :math:`\mu` ``momentum``, :math:`\lambda` ``weight_decay``. Roots are found anew every
    ``precondition_every`` steps, and before the first of these 0, 1, 2, 4, 8, ... steps after the start, as the sums
    then still grow fast. Between, directions that no gradient had before are divided by
    powers of :math:`\epsilon` alone: a small ``damping`` needs a short interval. Dimensions longer than ``block_size``
    are cut into equal parts and every block is a parameter of its own.

    Grafting takes the length of each parameter's step from another method and only the direction from Shampoo:
    :math:`P_t \lVert U_t \rVert / \lVert P_t \rVert` with :math:`U_t = G_t` ("sgd") or Adam's step ("adam", where
    Adam's averaged gradient takes the place of :math:`G_t` in :math:`P_t`). Steps before ``start`` are those of the
    grafted method (of SGD for "none").

    Cost: for an :math:`m \times n` matrix within one block, state of :math:`2(m^2 + n^2)` numbers, :math:`mn` more
    with momentum and :math:`2mn` with "adam"; each step :math:`O(mn(m + n))`, each search for roots an
    eigendecomposition, :math:`O(m^3 + n^3)` in float64, batched over blocks of equal size. Cut into blocks of
    :math:`b \times b`, both times are :math:`O(mnb)` and the state is :math:`4mn` numbers. A tensor's state is
    :math:`2 \sum_i n_i^2` for each block of lengths :math:`n_i`: a long vector is dear, :math:`2nb`.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: in [0, 1). Not used with ``grafting="adam"``, whose averaged gradient (``betas``) stands in its place.
        damping: :math:`\epsilon`, in units of the squared gradient.
        decay: of the sums of squares, in (0, 1]; 1 adds up for ever, as in the paper.
        weight_decay: decoupled, in units of 1 / ``lr``.
        precondition_every: steps between searches for roots.
        start: first step, counted from 1, that is preconditioned.
        block_size: longest dimension that is not cut.
        grafting: "none", "sgd" or "adam".
        betas: of the grafted Adam.
        eps: of the grafted Adam.
        maximize: ascend.

    Raises:
        SettingError: a setting outside its range.
        GradientError: on a step, sparse gradients.

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]], requires_grad=True)
        >>> optimizer = Shampoo([weight], lr=1.0, damping=0.0)
        >>> (weight**2 / 2).sum().backward()
        >>> optimizer.step()
        >>> weight.round(decimals=3).tolist()  # the first step is orthogonal: here the identity
        [[2.0, 0.0], [0.0, 3.0]]

    Source: a building block of paper 138. Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor
    Optimization", 2018, arXiv 1802.09568. Blocks and grafting: Anil et al., "Scalable Second Order Optimization for
    Deep Learning", 2020, arXiv 2002.09018.

    Differs: :math:`\epsilon` is added when roots are found and not stored in :math:`H`, so that a group can change it;
    roots are not found in every step.
    """

    state_names: ClassVar[frozenset[str]] = frozenset({"step", "factors", "roots", "momentum", "exp_avg", "exp_avg_sq"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        damping: float = 1e-2,
        decay: float = 1.0,
        weight_decay: float = 0.0,
        precondition_every: int = 10,
        start: int = 1,
        block_size: int = 512,
        grafting: Grafting = "none",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "decay": decay,
            "weight_decay": weight_decay,
            "precondition_every": precondition_every,
            "start": start,
            "block_size": block_size,
            "grafting": grafting,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        """Refuse settings outside their range."""
        for name in ("lr", "damping", "weight_decay", "eps"):
            check_number(self, name, group[name])
        check_number(self, "momentum", group["momentum"], high=1.0, below=True)
        check_number(self, "decay", group["decay"], high=1.0, above=True)
        check_pair(self, "betas", group["betas"])
        for name in ("precondition_every", "start", "block_size"):
            value = group[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"Shampoo: {name} must be a positive integer, got {value!r}.")
        if group["grafting"] not in get_args(Grafting):
            raise SettingError(
                f"Shampoo: grafting must be one of {', '.join(get_args(Grafting))}, got {group['grafting']!r}."
            )

    def take_state(self, state_dict: dict[str, Any]) -> None:
        """Go on to the last bit."""
        restore_tensors(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure's loss where there is one."""
        loss = self.evaluate(closure)
        self.refuse_sparse()
        groups = [(group, self.members(group)) for group in self.param_groups]
        due = [_gather(group, member) for group, members in groups for member in members]
        _refresh([entry for entry in due if entry is not None])
        for group, members in groups:
            for member in members:
                _descend(group, member)
        return loss


def _blocks(tensor: Tensor, size: int) -> list[tuple[slice, ...]]:
    """Slices of equal length, give or take one, that cut every dimension to at most ``size``."""
    cuts: list[list[slice]] = []
    for length in tensor.shape:
        count = -(-length // size)
        ends = [length * part // count for part in range(count + 1)]
        cuts.append([slice(first, last) for first, last in itertools.pairwise(ends)])
    return list(itertools.product(*cuts))


def _squeezed(tensor: Tensor) -> Tensor:
    """Without dimensions of length 1, as a vector where nothing else is left."""
    shape = [length for length in tensor.shape if length > 1]
    return tensor.reshape(shape or [1])


def _gather(group: Group, member: Member) -> _Due | None:
    """Add this gradient to the sums; what is to be refreshed, if anything."""
    state = member.state
    state["step"] = state.get("step", 0) + 1
    grad = as_type(_squeezed(member.grad), wide_dtype(member.grad.dtype))
    moments = [moment for block in _blocks(grad, group["block_size"]) for moment in _moments(grad[block])]
    decay = group["decay"]
    if "factors" not in state:
        state["factors"] = [moment if decay == 1 else moment * (1 - decay) for moment in moments]
    else:
        for factor, moment in zip(state["factors"], moments, strict=True):
            factor.mul_(decay).add_(moment, alpha=1 if decay == 1 else 1 - decay)
    if not _is_due(state["step"] - group["start"], group["precondition_every"]):
        return None
    scale = 1.0 if decay == 1 else 1 / (1 - decay ** state["step"])
    return _Due(state, 2 * grad.dim(), scale, float(group["damping"]))


def _is_due(age: int, every: int) -> bool:
    """Whether roots are found anew ``age`` steps after the start."""
    return age >= 0 and (age % every == 0 or (age < every and age & (age - 1) == 0))


def _refresh(due: Sequence[_Due]) -> None:
    """Find roots, all that are due together; one that cannot be found stays as it was, or begins as the identity."""
    matrices = [
        factor if entry.scale == 1 else factor * entry.scale for entry in due for factor in entry.state["factors"]
    ]
    orders = [entry.order for entry in due for _ in entry.state["factors"]]
    dampings = [entry.damping for entry in due for _ in entry.state["factors"]]
    found = iter(inverse_roots(matrices, orders, dampings))
    for entry in due:
        factors = entry.state["factors"]
        before = entry.state.get("roots") or [torch.eye(len(h), dtype=h.dtype, device=h.device) for h in factors]
        after = itertools.islice(found, len(before))
        entry.state["roots"] = [old if new is None else new for old, new in zip(before, after, strict=True)]


def _descend(group: Group, member: Member) -> None:
    lr, param, state = float(group["lr"]), member.param, member.state
    if group["weight_decay"]:
        param.mul_(1 - lr * group["weight_decay"])
    adam = group["grafting"] == "adam"
    if adam:
        _average(group, member)
    if state["step"] < group["start"]:
        if adam:
            average, spread, correction = _adam(group, state)
            param.addcdiv_(average, spread, value=-lr / correction)
            return
        move = member.grad
    else:
        move = _direction(group, member)
    if group["momentum"] and not adam:
        if "momentum" in state:
            move = state["momentum"].mul_(group["momentum"]).add_(move)
        else:
            state["momentum"] = move.clone()
    param.add_(move, alpha=-lr)


def _direction(group: Group, member: Member) -> Tensor:
    """The preconditioned gradient, with the length that grafting gives."""
    state, grad, length = member.state, member.grad, None
    if group["grafting"] == "adam":
        average, spread, correction = _adam(group, state)
        grad = average / correction
        length = (grad / spread).norm()
    elif group["grafting"] == "sgd":
        length = grad.norm()
    source = as_type(_squeezed(grad), state["roots"][0].dtype)
    blocks = _blocks(source, group["block_size"])
    if len(blocks) == 1:
        move = _step(source, state["roots"])
    else:
        move = torch.empty_like(source)
        roots = iter(state["roots"])
        for block in blocks:
            move[block] = _step(source[block], list(itertools.islice(roots, source.dim())))
    if length is not None:
        move = move * (as_type(length, move.dtype) / move.norm().clamp_min(torch.finfo(move.dtype).tiny))
    return as_type(move.view_as(member.param), member.param.dtype)


def _average(group: Group, member: Member) -> None:
    first, second = group["betas"]
    state, grad = member.state, member.grad
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
    state["exp_avg"].lerp_(grad, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)


def _adam(group: Group, state: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Adam's averaged gradient, its divisor, and the average's bias correction."""
    first, second = (1 - beta ** state["step"] for beta in group["betas"])
    return state["exp_avg"], (state["exp_avg_sq"].sqrt() / second**0.5).add_(group["eps"]), first
