"""AGVM: the learning rates of a network's modules, balanced by the noise in their gradients."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.optim._base import Group, check_number
from netwright.optim._modules import module_groups
from netwright.optim._wrap import Wrapper, make_base

__all__ = ["AGVM", "module_groups"]

_TINY = 1e-6


def _dissimilarity(first: list[Tensor], second: list[Tensor]) -> float:
    """One minus the cosine between two gradients, each in pieces; NaN where one of them vanishes."""
    if not first:
        return math.nan
    precise = [torch.promote_types(grad.dtype, torch.float32) for grad in first]
    pairs = [(a.flatten().to(t), b.flatten().to(t)) for a, b, t in zip(first, second, precise, strict=True)]
    device = pairs[0][0].device
    sums = torch.stack([torch.stack([a.dot(b), a.dot(a), b.dot(b)]).to(device).double() for a, b in pairs]).sum(0)
    product, left, right = sums.tolist()
    return 1 - product / math.sqrt(left * right) if left > 0 and right > 0 else math.nan


def _ratio(reference: float, own: float, low: float, high: float) -> float:
    """``sqrt(clamp((phi_r + 1e-6) / (phi_i + 1e-6), low, high))``."""
    return math.sqrt(min(max((reference + _TINY) / (own + _TINY), low), high))


class AGVM(Wrapper):
    r"""Adaptive gradient variance modulator: brings the gradient noise of all modules to that of the backbone.

    Reach for it when a network of several parts (a backbone with a segmentation and a detection head) loses quality as
    the batch grows, although the learning rate was scaled along. Wrap any optimizer whose parameter groups are the
    modules, the backbone first (see :func:`module_groups`), split the batch, and say when the first half is done::

        optimizer = AGVM(torch.optim.SGD(module_groups(model, "backbone"), lr=0.1), interval=5)
        optimizer.zero_grad()
        (loss_of(first_half) / 2).backward()
        optimizer.observe()
        (loss_of(second_half) / 2).backward()
        optimizer.step()

    Every ``interval`` steps the gradients :math:`a_i, b_i` of module :math:`i` on the two halves are compared and the
    factor :math:`\mu_i` on its learning rate follows, with reference module :math:`r`:

    .. math:: \varphi_i = 1 - \frac{\langle a_i, b_i \rangle}{\lVert a_i \rVert \lVert b_i \rVert}, \qquad
              \mu_i \leftarrow m\,\mu_i + (1 - m) \sqrt{\mathrm{clamp}\Big(
              \frac{\varphi_r + \epsilon}{\varphi_i + \epsilon}, c_\mathrm{low}, c_\mathrm{high}\Big)}

    with :math:`\mu_i = 1` at the start, :math:`m` = ``momentum``, :math:`\epsilon = 10^{-6}` and bounds :math:`c`. The
    step is the inner optimizer's, with :math:`\mu_i` times the learning rate that the group has at that moment. The
    group's ``lr`` itself is as before when ``step`` returns, so that schedules work and nothing compounds. Where the
    inner optimizer keeps ``exp_avg_sq`` (Adam and its kin), :math:`a_i` and :math:`b_i` are first divided by
    :math:`\sqrt{\beta_2 v + (1 - \beta_2) g^2} + \epsilon_\mathrm{Adam}` with :math:`g` the half's own gradient.

    With gradient accumulation over more micro-batches, call :meth:`observe` after half of them. Call it once more after
    the last one if anything (clipping, unscaling) changes the gradients before ``step``. Under
    ``DistributedDataParallel`` gradients are averaged in each backward pass, and nothing else is needed. A closure
    given to ``step`` may call :meth:`observe` between its two backward passes. Steps without it keep the factors.
    Where a step is left out, as by ``GradScaler`` where gradients overflow, :meth:`zero_grad` forgets what was seen.

    Cost: on every ``interval``-th step one copy of the gradients and three dot products; else nothing. Memory beside
    the inner optimizer's: one number per group, and that copy between ``observe`` and ``step``.

    Args:
        optimizer: steps the parameters; its groups are the modules.
        interval: steps from one comparison to the next.
        start: steps before the first comparison; the authors wait until the warm-up is over.
        momentum: of the factors, in [0, 1).
        bounds: least and greatest ratio of dissimilarities, before the square root.
        reference: index of the group that the others follow.

    Raises:
        SettingError: a setting outside its range, an inner optimizer that needs a closure, or, from :meth:`observe`, a
            single group.
        GradientError: :meth:`observe` without gradients, or more than twice in a step; sparse gradients.

    Example:
        >>> backbone, head = nn.Linear(3, 4), nn.Linear(4, 2)
        >>> groups = [{"params": backbone.parameters()}, {"params": head.parameters()}]
        >>> optimizer = AGVM(torch.optim.SGD(groups, lr=0.1), interval=1, momentum=0.5)
        >>> inputs = torch.arange(12.0).view(2, 2, 3).sin()
        >>> for half in inputs:
        ...     head(backbone(half)).square().mean().backward()
        ...     optimizer.observe()
        >>> optimizer.step()
        >>> optimizer.scales[0], optimizer.param_groups[1]["lr"]
        (1.0, 0.1)

    Source: paper 49, Zeyue Xue, Jianming Liang, Guanglu Song, Zhuofan Zong, Liang Chen, Yu Liu and Ping Luo,
    Large-batch Optimization for Dense Visual Predictions, 2022, arXiv 2210.11078.

    Differs: the halves are two micro-batches and not two halves of the workers; any group may be the reference; a group
    without gradient in one of the halves keeps its factor. The authors switch to Adam's scaled gradients by a flag,
    here the inner state decides.
    """

    takes_complex: ClassVar[bool] = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        interval: int = 5,
        start: int = 0,
        momentum: float = 0.97,
        bounds: tuple[float, float] = (0.5, 10.0),
        reference: int = 0,
    ) -> None:
        super().__init__(optimizer)
        for name, value, least in (("interval", interval, 1), ("start", start, 0), ("reference", reference, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(f"AGVM: {name} must be an integer of at least {least}, got {value!r}.")
        if reference >= len(optimizer.param_groups):
            count = len(optimizer.param_groups)
            raise SettingError(f"AGVM: reference is {reference}, but there are {count} groups, counted from 0.")
        if not isinstance(bounds, Iterable) or len(tuple(bounds)) != 2:
            raise SettingError(f"AGVM: bounds must be two numbers, got {bounds!r}.")
        low = check_number(self, "bounds[0]", bounds[0], above=True)
        self.bounds = low, check_number(self, "bounds[1]", bounds[1], low=low)
        self.momentum = check_number(self, "momentum", momentum, high=1.0, below=True)
        self.interval, self.start, self.reference = interval, start, reference
        self._steps = 0
        self._scales = [1.0] * len(optimizer.param_groups)
        self._half: list[list[Tensor | None]] | None = None
        self._measured = False

    @classmethod
    def over(
        cls,
        params: Iterable[nn.Parameter],
        model: nn.Module,
        base: str | Callable[..., Optimizer] = "torch.optim:SGD",
        base_settings: Mapping[str, Any] | None = None,
        *,
        lr: float | Tensor | None = None,
        first: Sequence[str] = (),
        **settings: Any,
    ) -> "AGVM":
        """AGVM over an optimizer that is made here; ``create("agvm")``, ``netwright.optim:AGVM.over`` in a recipe.

        The training loop then shows each batch in two halves.

        Args:
            params: the parameters to move, without groups; those of the model that are not among them stay.
            model: whose children are the modules, see :func:`module_groups`.
            base: makes the inner optimizer: a class, its import path, or its short name.
            base_settings: its keyword arguments.
            lr: its learning rate; None leaves it to ``base_settings`` and its own default.
            first: names of children to put first, the reference before all.
            settings: those of :class:`AGVM`.

        Raises:
            SettingError: parameter groups, whose settings could not be kept; and as :class:`AGVM` does.
        """
        given = list(params)
        if not all(isinstance(param, Tensor) for param in given):
            raise SettingError(
                "AGVM.over makes its groups from the model's modules, so it takes parameters and no groups of them, as "
                "mup or a fine-tuning recipe give. Leave them out, or wrap an optimizer that has one group per module."
            )
        wanted = set(given)
        groups = [
            {**group, "params": [param for param in group["params"] if param in wanted]}
            for group in module_groups(model, *first)
        ]
        moved = [group for group in groups if group["params"]]
        return cls(make_base(base, moved, base_settings, lr), **settings)

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor on each group's learning rate."""
        return tuple(self._scales)

    def add_param_group(self, param_group: Group) -> None:
        """Add a module; its factor starts at 1."""
        super().add_param_group(param_group)
        self._scales.append(1.0)

    @torch.no_grad()
    def observe(self) -> None:
        """Say that the gradients are now those of half of the batch; on a second call, that they are those of all."""
        if not self._due():
            return
        if len(self.param_groups) < 2:
            raise SettingError(
                "AGVM compares modules, but the optimizer has one parameter group. Give one group per module, the "
                'backbone first: AGVM(torch.optim.SGD(module_groups(model, "backbone"), lr=0.1)).'
            )
        if self._measured:
            raise GradientError(
                "AGVM: observe was called three times before step. Call it after half of the batch, and once more "
                "at its end where gradients are clipped or unscaled before step; where a step is left out, clear the "
                "gradients by this optimizer's zero_grad."
            )
        self.refuse_sparse()
        if self._half is not None:
            self._compare()
            return
        grads = [[param.grad for param in group["params"]] for group in self.param_groups]
        if all(grad is None for group in grads for grad in group):
            raise GradientError("AGVM: observe found no gradients. Call it after the backward pass of the first half.")
        self._half = [[None if grad is None else grad.clone() for grad in group] for group in grads]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget what was observed of them."""
        super().zero_grad(set_to_none)
        self._half, self._measured = None, False

    def _due(self) -> bool:
        return self._steps >= self.start and (self._steps - self.start) % self.interval == 0

    def _compare(self) -> None:
        """Compare the halves, and let the factors follow."""
        assert self._half is not None
        phi = [_dissimilarity(*self._halves(*pair)) for pair in zip(self.param_groups, self._half, strict=True)]
        self._half, self._measured = None, True
        anchor = phi[self.reference]
        for place, own in enumerate(phi):
            if math.isfinite(anchor) and math.isfinite(own):
                ratio = _ratio(anchor, own, *self.bounds)
                self._scales[place] = self.momentum * self._scales[place] + (1 - self.momentum) * ratio

    def _halves(self, group: Group, half: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of the two halves in those parameters that have both, scaled as the inner optimizer will."""
        firsts: list[Tensor] = []
        seconds: list[Tensor] = []
        for param, first in zip(group["params"], half, strict=True):
            if param.grad is None or param.numel() == 0:
                continue
            first = torch.zeros_like(param.grad) if first is None else first
            for found, grad in ((firsts, first), (seconds, param.grad - first)):
                real = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
                found.append(self._scaled(real, self.state.get(param, {}), group))
        return firsts, seconds

    def _scaled(self, grad: Tensor, state: dict[str, Any], group: Group) -> Tensor:
        """``g / (sqrt(b2 v + (1 - b2) g^2) + eps)`` where the inner optimizer keeps v, else g."""
        if "exp_avg_sq" not in state or "betas" not in group:
            return grad
        kept = state["exp_avg_sq"]
        second = torch.view_as_real(kept) if kept.is_complex() else kept
        decay = float(group["betas"][1])
        root = second.mul(decay).addcmul_(grad, grad, value=1 - decay).sqrt_()
        return grad / root.add_(group.get("eps", 1e-8))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every module with its factor times its learning rate.

        Args:
            closure: clears the gradients, runs backward and returns the loss; optional.

        Returns:
            What the closure returned.
        """
        returned = self.evaluate(closure)
        if self._half is not None:
            self._compare()
        self._measured = False
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, scale in zip(self.param_groups, self._scales, strict=True):
                group["lr"] = group["lr"] if scale == 1.0 else group["lr"] * scale
            self.optimizer.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        self._steps += 1
        return returned

    def own_state(self) -> dict[str, Any]:
        """Steps taken and factors."""
        return {"steps": self._steps, "scales": list(self._scales)}

    def load_own_state(self, own: dict[str, Any]) -> None:
        """Go on from saved factors.

        Raises:
            StateDictError: factors of another number of groups.
        """
        scales = [float(entry) for entry in cast(list[float], own["scales"])]
        if len(scales) != len(self.param_groups):
            raise StateDictError(f"The state has {len(scales)} factors, but there are {len(self.param_groups)} groups.")
        self._steps, self._scales = int(own["steps"]), scales
        self._half, self._measured = None, False
