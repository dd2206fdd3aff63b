"""SANIA: preconditioned Polyak steps, without a step size to tune."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.core.errors import GradientError, SettingError
from netwright.optim._base import BaseOptimizer, ClosureKind, Group, Member, check_number, require_one_process

__all__ = ["SANIA"]

Preconditioner = Literal["adagrad", "adam", "hutchinson"]


class SANIA(BaseOptimizer):
    r"""Newton-like steps whose length follows from the loss itself, so that there is no step size to tune.

    Reach for it when features or layers differ in scale by orders of magnitude and the least loss is known, as 0 for a
    model that can fit its data: a rescaled feature then costs nothing, and no learning rate has to be searched.
    Noisy losses far above ``optimum`` make its steps too long.

    With the gradient :math:`g` of the loss :math:`f` of one batch, a diagonal preconditioner :math:`B` and the loss's
    lower bound :math:`f^*`, a step is

    .. math:: s = B^{-1} g, \qquad n = \langle g, s \rangle, \qquad
              \tau = \begin{cases} 1 - \sqrt{1 - 2 (f - f^*) / n} & 2 (f - f^*) \le n \\ 1 & \text{otherwise}
              \end{cases}, \qquad w \leftarrow w - \gamma\,\tau\,s.

    The model :math:`f + \langle g, \Delta \rangle + \tfrac12 \langle \Delta, B \Delta \rangle` reaches :math:`f^*` for
    the first time at :math:`\Delta = -\tau s`, or is least at :math:`\Delta = -s` where it never does. All parameters
    share one :math:`\tau`. In step :math:`t = 1, 2, \dots`, elementwise,

    .. math:: \text{adagrad: } B = \max\Bigl(\sum_{i \le t} g_i^2, \epsilon\Bigr) \qquad
              \text{adam: } B = \max\Bigl(\frac{v_t}{1 - \beta^t}, \epsilon\Bigr),\;
              v_t = \beta v_{t-1} + (1 - \beta) g_t^2

    .. math:: \text{hutchinson: } B = \max\Bigl(\frac{|D_t|}{1 - \beta^t}, \epsilon\Bigr),\;
              D_t = \beta D_{t-1} + (1 - \beta) \frac1k \sum_{j=1}^k z_j \circ H z_j

    with the loss's Hessian :math:`H` and vectors :math:`z_j` of independent, equally likely signs, for which
    :math:`z \circ H z` has the expectation :math:`\operatorname{diag} H`. There is no square root: :math:`B` of
    "adagrad" and "adam" scales as a squared gradient does, and where :math:`\epsilon` is never reached, multiplying the
    features by any constants leaves the path of the loss as it was. A draw of "hutchinson" scales so in expectation
    only, so that rescaled features give another path: an entry of :math:`z \circ H z` mixes the scales of all features,
    unless :math:`H` is diagonal. The scale of the loss itself does matter, as :math:`\langle g, s \rangle` of "adagrad"
    and "adam" has no unit: let it be of the order of 1, as a cross-entropy is.

    With "adagrad" and "adam" the closure calls ``backward`` (``closure_kind == "loss"``). With "hutchinson" it returns
    the loss with its graph (``"graph"``); ``grad`` of the parameters is then left alone.

    Cost: a few passes over the parameters and one word per parameter (:math:`\sum g^2`, :math:`v` or :math:`D`).
    "hutchinson" adds about two gradients' time per draw and the memory of the graph, which is freed before ``step``
    returns.

    Args:
        params: parameters, or groups of them.
        preconditioner: "adagrad", "adam" or "hutchinson".
        lr: :math:`\gamma`, a factor on the step for schedules; 1 is the method.
        beta: decay of "adam" and "hutchinson", in [0, 1).
        eps: :math:`\epsilon > 0`, in units of the squared gradient ("hutchinson": of the curvature). Entries below it
            are taken to matter little. Near zero it keeps the full scale invariance of "adagrad" and "adam"; networks,
            with entries whose gradient all but vanishes, need it larger.
        optimum: :math:`f^*`, in units of the loss. A loss at or below it stops the step.
        samples: :math:`k`, draws of "hutchinson" in each step.

    Raises:
        SettingError: a setting outside its range, or several processes: each would have a loss and a step of its own.
        ClosureError: no closure, or one that does not return a scalar loss.
        GradientError: a sparse gradient; with "hutchinson", a loss without a graph.

    Example:
        >>> features = torch.tensor([[1000.0, 0.0], [0.0, 0.01]])
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> optimizer = SANIA([weight], eps=1e-12)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (features @ weight - 1).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> [round(float(optimizer.step(closure)), 4) for _ in range(2)]
        [1.0, 0.0]

    Source: paper 54. Abdukhakimov, Xiang, Kamzolov, Gower, Takáč, "SANIA: Polyak-type Optimization Framework Leads to
    Scale Invariant Stochastic Algorithms", 2023, arXiv 2312.17369.

    Differs: the steps follow the authors' code. It takes the optimum as 0 and :math:`D_0` from warm-up draws; here
    the optimum can be given and :math:`D` is corrected for its start at 0 instead. :math:`\tau` is evaluated as
    :math:`q / (1 + \sqrt{1 - q})` with :math:`q = 2 (f - f^*) / n`, which loses no digits for small :math:`q`.
    """

    closure_kind: ClosureKind = "loss"
    state_names = frozenset({"step", "diagonal"})
    one_device = True

    def __init__(
        self,
        params: ParamsT,
        preconditioner: Preconditioner = "adagrad",
        *,
        lr: float | Tensor = 1.0,
        beta: float = 0.999,
        eps: float = 1e-3,
        optimum: float = 0.0,
        samples: int = 1,
    ) -> None:
        require_one_process(self, "its step follows from the loss of the batch of one process")
        if preconditioner not in get_args(Preconditioner):
            known = " or ".join(map(repr, get_args(Preconditioner)))
            raise SettingError(f"SANIA: preconditioner must be {known}, got {preconditioner!r}.")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise SettingError(f"SANIA: samples must be a positive integer, got {samples!r}.")
        self.preconditioner: Preconditioner = preconditioner
        self.optimum = check_number(self, "optimum", optimum, low=-torch.finfo(torch.float64).max)
        self.samples = samples
        self.closure_kind = "graph" if preconditioner == "hutchinson" else "loss"
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps})

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting outside its range."""
        check_number(self, "lr", group["lr"])
        check_number(self, "beta", group["beta"], high=1.0, below=True)
        check_number(self, "eps", group["eps"], above=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One step; the loss of the batch, before it.

        Args:
            closure: see ``closure_kind``.
        """
        loss = self.loss_of(self.evaluate(closure))
        if self.preconditioner == "hutchinson":
            found, estimates = self._differentiate(loss)
        else:
            self.refuse_sparse()
            found = [self.members(group) for group in self.param_groups]
            estimates = [[member.grad.square() for member in members] for members in found]
        directions = [
            [_direction(member, estimate, self._decay(group), group) for member, estimate in zip(*pair, strict=True)]
            for group, *pair in zip(self.param_groups, found, estimates, strict=True)
        ]
        flat = [member for members in found for member in members]
        if flat:
            size = _size(loss.detach() - self.optimum, flat, [s for part in directions for s in part])
            for group, members, part in zip(self.param_groups, found, directions, strict=True):
                for member, direction in zip(members, part, strict=True):
                    member.param.sub_(direction.mul_((size * group["lr"]).to(direction.dtype)))
        return loss.detach()

    def _decay(self, group: Group) -> float | None:
        return None if self.preconditioner == "adagrad" else float(group["beta"])

    def _differentiate(self, loss: Tensor) -> tuple[list[list[Member]], list[list[Tensor]]]:
        """Members with the gradient of ``loss``, and for each an estimate of the Hessian's diagonal.

        The only references to the graph are local: it goes when this returns.
        """
        if loss.grad_fn is None:
            raise GradientError(
                "SANIA: the loss has no graph to differentiate. Return it without backward() or detach()."
            )
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad and p.numel()]
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        kept = {p: g for p, g in zip(params, grads, strict=True) if g is not None}
        for param, grad in kept.items():
            if grad.layout != torch.strided:
                raise GradientError(
                    f"SANIA does not take sparse gradients, and the parameter of shape {tuple(param.shape)} has one. "
                    "Build its embedding with sparse=False."
                )
        curvature = dict(zip(kept, hutchinson_diagonal(list(kept), list(kept.values()), self.samples), strict=True))
        found = [
            [Member(p.detach(), kept[p].detach(), self.state[p]) for p in group["params"] if p in kept]
            for group in self.param_groups
        ]
        return found, [[curvature[p] for p in group["params"] if p in kept] for group in self.param_groups]


def hutchinson_diagonal(params: Sequence[Tensor], grads: Sequence[Tensor], samples: int) -> list[Tensor]:
    """Hutchinson's unbiased estimate of the Hessian's diagonal, from the global random state.

    Args:
        params: the leaves, ``n`` tensors.
        grads: their gradients, with a graph.
        samples: draws to average.
    """
    total = [torch.zeros_like(param) for param in params]
    live = [place for place, grad in enumerate(grads) if grad.requires_grad]
    for draw in range(samples if live else 0):
        signs = [torch.empty_like(param).bernoulli_(0.5).mul_(2).sub_(1) for param in params]
        products = torch.autograd.grad(
            [grads[place] for place in live],
            list(params),
            [signs[place] for place in live],
            retain_graph=draw + 1 < samples,
            allow_unused=True,
        )
        for part, sign, product in zip(total, signs, products, strict=True):
            if product is not None:
                part.addcmul_(sign, product, value=1 / samples)
    return total


def _direction(member: Member, estimate: Tensor, decay: float | None, group: Group) -> Tensor:
    """The preconditioned gradient, after taking ``estimate`` into the running diagonal; ``decay`` None adds it up."""
    state = member.state
    if not state:
        state["step"] = 0
        state["diagonal"] = torch.zeros_like(member.grad)
    state["step"] += 1
    diagonal = state["diagonal"]
    if decay is None:
        floored = diagonal.add_(estimate).clamp(min=group["eps"])
    else:
        diagonal.lerp_(estimate, 1 - decay)
        floored = (diagonal / (1 - decay ** state["step"])).abs_().clamp_(min=group["eps"])
    return torch.div(member.grad, floored, out=floored)


def _size(gap: Tensor, members: Sequence[Member], directions: Sequence[Tensor]) -> Tensor:
    """The common factor of the step, 0-dimensional, in at least float32."""
    pieces = [_dot(member.grad, direction) for member, direction in zip(members, directions, strict=True)]
    norm = torch.stack(pieces).sum()
    share = 2 * gap.to(norm).clamp(min=0) / norm
    inside = share / (1 + (1 - share).clamp(min=0).sqrt())
    return torch.where(share <= 1, inside, torch.ones_like(inside))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    wide = torch.promote_types(left.dtype, torch.float32)
    return torch.dot(left.to(wide).flatten(), right.to(wide).flatten()).double()
