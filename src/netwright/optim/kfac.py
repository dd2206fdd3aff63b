"""K-FAC: natural gradient with one Kronecker product per layer."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from netwright.core.errors import SettingError
from netwright.optim._base import BaseOptimizer, Group, Member, check_number, require_one_process
from netwright.optim._kfac_tap import Listener, Tap, average_factors, forget_unfit
from netwright.optim._kronecker import (
    Sharing,
    Split,
    as_type,
    damped_inverse,
    leading_inverse,
    split_damping,
    wide_dtype,
)
from netwright.optim._points import restore_tensors

__all__ = ["KFAC"]


def _step(grad: Tensor, inverse_a: Tensor, inverse_b: Tensor) -> Tensor:
    r""":math:`B^{-1} G A^{-1}`, which is :math:`(A \otimes B)^{-1} \operatorname{vec} G` as a matrix."""
    return inverse_b @ grad @ inverse_a


class KFAC(BaseOptimizer):
    r"""Natural gradient descent with a Kronecker-factored Fisher matrix for linear and convolutional layers.

    Reach for it where steps are expensive or ill-conditioned and layers are of moderate width: it needs fewer steps
    than first-order methods, each of them dearer. Train as ever, with ``zero_grad``, ``backward``, ``step``: hooks on
    ``model`` collect what is needed during the forward and backward pass.

    For a layer with weight and bias :math:`W = [\text{weight}, \text{bias}]`, inputs :math:`a_{nr}` (with a last 1 for
    the bias) and output gradients :math:`g_{nr}` of the loss of sample :math:`n = 1..N` at position :math:`r = 1..R`
    (pixels of a convolution, tokens of a sequence; :math:`a` is then a patch),

    .. math:: A = \frac{1}{NR} \sum_{nr} a_{nr} a_{nr}^\top \qquad B = \frac1N \sum_{nr} g_{nr} g_{nr}^\top \qquad
              \text{("expand")}

    .. math:: A = \frac1N \sum_n \bar a_n \bar a_n^\top, \quad \bar a_n = \frac1R \sum_r a_{nr} \qquad
              B = \frac1N \sum_n \bar g_n \bar g_n^\top, \quad \bar g_n = \sum_r g_{nr} \qquad \text{("reduce")}

    .. math:: D = (B + \rho_B I)^{-1} \, \nabla_W L \, (A + \rho_A I)^{-1} \qquad
              M \leftarrow \mu M + D \qquad W \leftarrow (1 - \eta \lambda) W - \eta M

    with :math:`\eta` ``lr``, :math:`\mu` ``momentum``, :math:`\lambda` ``weight_decay``. :math:`A` and :math:`B` are
    moving averages with weight :math:`\min(1 - 1/k,` ``decay`` :math:`)` on the past at update :math:`k`. From
    :math:`\rho` = ``damping``,

    ======= ================================================================================================
    split   :math:`\rho_A, \rho_B`
    ======= ================================================================================================
    "pi"    :math:`\pi \sqrt\rho,\ \sqrt\rho / \pi` with :math:`\pi^2` the ratio of the mean eigenvalues of A and B
    "plain" :math:`\sqrt\rho,\ \sqrt\rho`
    "trace" :math:`\sqrt\rho \operatorname{tr} A,\ \sqrt\rho \operatorname{tr} B`: relative, free of the width's scale
    ======= ================================================================================================

    and a pair as ``damping`` is :math:`(\rho_A, \rho_B)` itself. With ``kl_clip`` :math:`\kappa` the directions
    :math:`D` of a group shrink by :math:`\min(1, \sqrt{\kappa / \sum \eta^2 \langle D, \nabla L \rangle})`.

    Everything else takes a plain SGD step with the same settings: parameters of other layers (normalization,
    embeddings), grouped convolutions, weights shared between modules, and layers whose weight is used without calling
    the layer. The loss is taken as a mean over the first dimension of the inputs. A bias that is frozen leaves its
    column out of :math:`A`. A copy of the optimizer listens to the layers that are copied with it.

    Cost: for a layer with :math:`m` outputs and :math:`n` inputs, state of :math:`2(m^2 + n^2) + mn` numbers (the last
    only with momentum); each step :math:`O(mn(m + n))`, each update :math:`O(NR(m^2 + n^2))`, each inversion
    :math:`O(m^3 + n^3)`, whatever the number of samples. With ``invert_every=10``, few layers wider than 1000 pay.

    Args:
        params: parameters or groups; groups may set all settings but ``model`` and ``sharing``. A layer follows its
            weight's group; its bias has an ``lr``, ``momentum`` and ``weight_decay`` of its own.
        model: the network to which they belong.
        lr: learning rate.
        damping: :math:`\rho` as above, or the pair of both.
        split: how one damping is shared between the factors.
        decay: of the factors' moving averages, in [0, 1).
        update_every: steps between updates of the factors.
        invert_every: steps between inversions.
        momentum: in [0, 1).
        weight_decay: decoupled, in units of 1 / ``lr``.
        kl_clip: bound on the squared length of each group's step in the metric; None for no bound, which diverges
            easily once gradients, and with them :math:`B`, become small.
        sharing: "expand" where every position has a loss of its own, "reduce" where positions are averaged before the
            loss.
        maximize: ascend.

    Raises:
        SettingError: a setting outside its range, a model that has none of the parameters, or several processes: each
            would have factors of its own.
        GradientError: on a step, sparse gradients.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = KFAC(model.parameters(), model, lr=0.1)
        >>> inputs = torch.randn(64, 3)
        >>> targets = inputs.prod(1, keepdim=True)
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(model(inputs), targets)
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(loss < 0.2 * targets.var())
        True

    Source: a building block of paper 138. Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored
    Approximate Curvature", 2015, arXiv 1503.05671; Grosse and Martens (convolutions), 2016, arXiv 1602.01407;
    Eschenhagen et al. (expand and reduce), 2023, arXiv 2311.00636.

    Differs: the Fisher matrix is the empirical one, from the gradients of the training labels, which come from the
    ordinary backward pass; no rescaling by the exact quadratic model and no adaptive damping. Gradients scaled for
    mixed precision distort :math:`B`: use bfloat16, which needs no scaling. A layer that is called several times in
    one pass counts each call as a batch of its own.
    """

    state_names: ClassVar[frozenset[str]] = frozenset(
        {"step", "updates", "a", "b", "inverse_a", "inverse_b", "momentum"}
    )
    _complete: bool = False  # whether all groups of the constructor are there: a bias may be in a later one

    def __init__(
        self,
        params: ParamsT,
        model: nn.Module,
        lr: float | Tensor = 0.03,
        *,
        damping: float | Sequence[float] = 1e-2,
        split: Split = "pi",
        decay: float = 0.95,
        update_every: int = 1,
        invert_every: int = 10,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        kl_clip: float | None = 1e-3,
        sharing: Sharing = "expand",
        maximize: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SettingError(f"KFAC: model must be the nn.Module that is trained, got {type(model).__name__}.")
        if sharing not in get_args(Sharing):
            raise SettingError(f"KFAC: sharing must be 'expand' or 'reduce', got {sharing!r}.")
        require_one_process(self, "its factors come from the batch of one process")
        self._listener = Listener(model, sharing)
        defaults = {
            "lr": lr,
            "damping": damping,
            "split": split,
            "decay": decay,
            "update_every": update_every,
            "invert_every": invert_every,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "kl_clip": kl_clip,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        known = {id(param) for param in model.parameters()}
        if not any(id(param) in known for group in self.param_groups for param in group["params"]):
            raise SettingError("KFAC: none of the parameters belongs to the model. Pass model.parameters() and model.")
        self._complete = True
        self._listen()

    def check(self, group: Group) -> None:
        """Refuse settings outside their range."""
        for name in ("lr", "weight_decay"):
            check_number(self, name, group[name])
        for name in ("decay", "momentum"):
            check_number(self, name, group[name], high=1.0, below=True)
        if group["kl_clip"] is not None:
            check_number(self, "kl_clip", group["kl_clip"], above=True)
        if group["split"] not in get_args(Split):
            raise SettingError(f"KFAC: split must be one of {', '.join(get_args(Split))}, got {group['split']!r}.")
        pair = group["damping"]
        if isinstance(pair, tuple | list) and len(pair) != 2:
            raise SettingError(f"KFAC: damping must be one number or those of both factors, got {pair!r}.")
        for value in pair if isinstance(pair, tuple | list) else [pair]:
            check_number(self, "damping", value)
        for name in ("update_every", "invert_every"):
            value = group[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"KFAC: {name} must be a positive integer, got {value!r}.")

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, and listen to the layers whose weights it has. Where it brings a bias, factors begin anew."""
        super().add_param_group(param_group)
        if self._complete:
            self._listen()

    def take_state(self, state_dict: dict[str, Any]) -> None:
        """Go on to the last bit, and listen to the layers anew."""
        restore_tensors(self, state_dict)
        self._listen()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and what the hooks have collected beside them."""
        super().zero_grad(set_to_none)
        self._listener.clear()

    def remove_hooks(self) -> None:
        """Take the hooks off the model; from then on the last inverses stay. Happens by itself at the end of life."""
        self._listener.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure's loss where there is one."""
        loss = self.evaluate(closure)
        self.refuse_sparse()
        places = self._listener.places
        members = [(group, self.members(group)) for group in self.param_groups]
        found = {id(member.param): member for _, entries in members for member in entries}
        moves = {name: member.grad for name, member in found.items()}
        natural: set[int] = set()
        for group, entries in members:
            for member in entries:
                place = places.get(id(member.param))
                if place is not None:
                    bias = found.get(id(place.layer.bias)) if place.tap.bias else None
                    directions = _directions(group, member, bias, place.tap)
                    moves |= directions
                    natural |= set(directions)
        for group, entries in members:
            known = [(entry.grad, moves[id(entry.param)]) for entry in entries if id(entry.param) in natural]
            shrink = _shrink(group, known)
            for member in entries:
                move = moves[id(member.param)]
                _descend(group, member, move * shrink if shrink < 1 and id(member.param) in natural else move)
        self._arm()
        return loss

    def _listen(self) -> None:
        self._listener.listen({id(param) for group in self.param_groups for param in group["params"]})
        forget_unfit(self._listener.places.values(), self.state)
        self._arm()

    def _arm(self) -> None:
        """Let those taps listen whose layers update their factors in the coming step."""
        places = self._listener.places
        for group in self.param_groups:
            for param in group["params"]:
                if id(param) in places:
                    state = self.state.get(param, {})
                    due = state.get("step", 0) % group["update_every"] == 0
                    places[id(param)].tap.armed = due or "a" not in state


def _directions(group: Group, weight: Member, bias: Member | None, tap: Tap) -> dict[int, Tensor]:
    """The natural directions of a layer's weight and bias; empty while the layer was never heard."""
    state = weight.state
    step = state.setdefault("step", 0)
    state["step"] = step + 1
    heard = tap.take()
    if heard is not None:
        average_factors(state, heard, group["decay"], wide_dtype(weight.param.dtype))
    if "a" not in state:
        return {}
    if step % group["invert_every"] == 0 or "inverse_a" not in state:
        dampings = split_damping(state["a"], state["b"], group["damping"], group["split"])
        for name, damping in zip("ab", dampings, strict=True):
            state[f"inverse_{name}"] = damped_inverse(state[name], damping)
    grad, inverse_a = as_type(weight.grad.flatten(1), state["a"].dtype), state["inverse_a"]
    if bias is not None:
        grad = torch.cat([grad, as_type(bias.grad, grad.dtype)[:, None]], 1)
    elif tap.bias:  # it is frozen
        inverse_a = leading_inverse(inverse_a)
    move = _step(grad, inverse_a, state["inverse_b"])
    main = move if bias is None else move[:, :-1]
    found = {id(weight.param): as_type(main.reshape_as(weight.param), weight.param.dtype)}
    if bias is not None:
        found[id(bias.param)] = as_type(move[:, -1], bias.param.dtype)
    return found


def _shrink(group: Group, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    if group["kl_clip"] is None or not pairs:
        return 1.0
    length = float(group["lr"]) ** 2 * sum(float((grad * move).sum()) for grad, move in pairs)
    return min(1.0, math.sqrt(group["kl_clip"] / length)) if length > 0 else 1.0


def _descend(group: Group, member: Member, move: Tensor) -> None:
    lr, param = float(group["lr"]), member.param
    if group["weight_decay"]:
        param.mul_(1 - lr * group["weight_decay"])
    if group["momentum"]:
        if "momentum" in member.state:
            move = member.state["momentum"].mul_(group["momentum"]).add_(move)
        else:
            member.state["momentum"] = move.clone()
    param.add_(move, alpha=-lr)
