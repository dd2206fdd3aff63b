"""Optimal input gains: two-stage training of a multilayer perceptron by small linear systems."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from netwright.core.errors import ClosureError, SettingError, StateDictError
from netwright.optim._base import BaseOptimizer, ClosureKind, Group, check_number, require_one_process
from netwright.optim._output_curvature import loss_and_outputs
from netwright.optim._perceptron import BypassPerceptron, layers_of

__all__ = ["BypassPerceptron", "OptimalInputGain"]

Hidden = Literal["bp", "hwo"]

_COMMON = frozenset({"differentiable", "param_names", "initial_lr", "max_lr", "min_lr"})  # of torch and its schedules
_RANK = 1e-12  # eigenvalues below this share of the largest are zero
_HALVINGS = 6  # of a step of the hidden weights after which the error is not smaller


def _solve(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``(matrix + ridge mean(diag) I)^+ right`` of a symmetric matrix without negative eigenvalues."""
    damped = matrix.clone()
    damped.diagonal().add_(ridge * float(matrix.diagonal().mean()))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if not int(failed) and bool(factor.diagonal().square().min() > _RANK * damped.diagonal().max()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(damped)
    kept = values > _RANK * values[-1].clamp_min(0.0)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    solved: Tensor = vectors @ (inverse[:, None] * (vectors.T @ right))
    return solved


def _whitening(inputs: Tensor) -> Tensor:
    """``A`` with ``A (X' X / b) A' = I`` over the directions in which the inputs vary, ``(rank, n)``."""
    values, vectors = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    kept = values > _RANK * values[-1]
    turn: Tensor = (vectors[:, kept] * values[kept].rsqrt()).T
    return turn


def _gain_system(
    inputs: Tensor, slopes: Tensor, output: Tensor, errors: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """``H`` and ``g``: half the error is, to second order in Gauss and Newton's sense, ``-g' r + r' H r / 2``.

    Args:
        inputs: ``X``, ``(b, n)``.
        slopes: derivatives of the activations, ``(b, h)``.
        output: weights from hidden units to outputs, ``(m, h)``.
        errors: targets minus outputs, ``(b, m)``.
        gradient: ``G``, ``(h, n)``; the hidden weights move by ``G diag(r)``.
    """
    system = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
    right = inputs.new_zeros(inputs.shape[1])
    for weights, error in zip(output, errors.T, strict=True):
        change = inputs * ((slopes * weights) @ gradient)
        system.addmm_(change.T, change)
        right += change.T @ error
    return system / len(inputs), right / len(inputs)


def _with_one(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else torch.cat((x, torch.ones_like(x[:, :1])), 1)


class OptimalInputGain(BaseOptimizer):
    r"""Trains a perceptron with one hidden layer in two stages: gains for the hidden weights, equations for the others.

    Reach for it for regression on tables: full batches, up to a few hundred inputs and hidden units, squared error.
    There is no step size to tune, and a few dozen steps do what Levenberg-Marquardt does at a cost that grows with the
    cube of all weights.

    For inputs :math:`X \in \mathbb R^{b \times n}` (with a column of ones), hidden weights :math:`W`, hidden outputs
    :math:`O = f(X W^\top)`, output weights :math:`W_o`, errors :math:`E = T - Y` and the negative gradient
    :math:`G = \frac1b (f' \circ E W_o)^\top X`, one step is

    .. math:: W \leftarrow W + G A^\top \mathrm{diag}(r) A, \qquad H r = g, \qquad
              W_o \leftarrow \Big(\tfrac1b \Phi^\top \Phi\Big)^{-1} \tfrac1b \Phi^\top T

    with :math:`g_m = \frac1b \langle E, \partial_m Y \rangle`,
    :math:`H_{mk} = \frac1b \langle \partial_m Y, \partial_k Y \rangle` and the derivatives :math:`\partial_m Y` of the
    outputs by the gains at :math:`r = 0`: the gains minimize the error to second order in Gauss
    and Newton's sense. With ``hidden="bp"`` (back-propagation) :math:`A = I`, a gain for each input.
    With ``hidden="hwo"`` (hidden weight optimization) :math:`A` whitens the inputs,
    :math:`A \frac{X^\top X}{b} A^\top = I`, a gain for each principal direction; with equal gains
    :math:`G A^\top A = G (X^\top X / b)^{-1}`, which is the step of that method. :math:`\Phi` has the hidden outputs, a
    column of ones and, where the network has bypass weights, the inputs. With ``gains=False`` one gain serves all
    inputs: the optimal learning factor :math:`z = \sum_m g_m / \sum_{mk} H_{mk}`.

    Where the error after both stages is not smaller, the step of the hidden weights is halved, at most six times, and
    then left out: on a fixed batch the error never grows where the output and bypass weights have a rate of 1.

    Cost: for :math:`h` hidden units and :math:`m` outputs, time
    :math:`O(b (n h m + n^2 m + (h + n)^2) + (h + n)^3)`, the last two terms again for each halving; the layers run in
    float64 on the side. Memory: nothing between steps, :math:`O(b (h + n))` in one.

    Args:
        params: the model's parameters, all of them, or groups of them.
        model: an ``nn.Sequential`` that ends in ``nn.Linear``, activations, ``nn.Linear``, or a
            :class:`BypassPerceptron`. What precedes the first linear layer may not have parameters.
        lr: of the hidden weights, the length at which halving begins; of the others, the share of the way to their
            solution.
        hidden: "bp" or "hwo".
        gains: whether each input has a gain of its own.
        ridge: added to the diagonals of all equations, relative to their mean; raise it where the network overfits.

    Raises:
        SettingError: a setting outside its range, another kind of model, parameters that are not the model's, or
            several processes.
        ClosureError: no closure; or, at a step, a loss other than the squared error, or a closure that does not call
            the model once.
        GradientError: sparse gradients.
        StateDictError: on loading, the state of another optimizer.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> inputs = torch.randn(100, 3)
        >>> targets = inputs.prod(1, keepdim=True)
        >>> model = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1))
        >>> optimizer = OptimalInputGain(model.parameters(), model)
        >>> def closure():
        ...     outputs = model(inputs)
        ...     return nn.functional.mse_loss(outputs, targets), outputs
        >>> losses = [float(optimizer.step(closure)) for _ in range(30)]
        >>> losses[0] > 10 * losses[-1]
        True

    Source: paper 155. Rane, Tyagi, Malalur, Shinge, Manry, "Optimal Input Gain: All You Need to Supercharge a
    Feed-Forward Neural Network", 2023, arXiv:2303.17732.

    Differs: the full text was out of reach and the equations are derived from its abstract and from what is known of
    the two-stage methods; gains under ``"hwo"`` are those of back-propagation on whitened inputs. Cholesky in place
    of orthogonal least squares, with directions without variance left out. Halving is an addition; the original takes
    every step.
    """

    closure_kind: ClosureKind = "outputs"
    state_names: ClassVar[frozenset[str]] = frozenset()
    one_device: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        model: nn.Module,
        lr: float | Tensor = 1.0,
        *,
        hidden: Hidden = "hwo",
        gains: bool = True,
        ridge: float = 1e-8,
    ) -> None:
        require_one_process(self, "it takes derivatives of the batch of one process")
        if hidden not in get_args(Hidden):
            raise SettingError(f"OptimalInputGain: hidden must be 'bp' or 'hwo', got {hidden!r}.")
        if not isinstance(gains, bool):
            raise SettingError(f"OptimalInputGain: gains must be True or False, got {gains!r}.")
        self.hidden, self.gains = hidden, gains
        self.ridge = check_number(self, "ridge", ridge)
        self._layers = layers_of(model)
        self._complete = False
        super().__init__(params, {"lr": lr})
        self._complete = True
        own = {id(param) for param in model.parameters()}
        given = {id(param) for group in self.param_groups for param in group["params"] if param.requires_grad}
        if own != given:
            raise SettingError(
                "OptimalInputGain moves all layers of its model together: params must be exactly model.parameters(), "
                f"all trainable; {len(own - given)} of the model's are missing and {len(given - own)} are not its own."
            )

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting of this group outside its range."""
        check_number(self, "lr", group["lr"])
        if self._complete:
            raise SettingError("OptimalInputGain has all layers of its model and takes no further group.")

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise ``StateDictError`` for the state of another kind of optimizer, whose groups have further settings."""
        known = _COMMON.union(self.defaults, *self.param_groups)
        for group in state_dict["param_groups"]:
            unknown = sorted(set(group) - known)
            if unknown:
                raise StateDictError(self._foreign(f"its groups have {', '.join(unknown)}"))
        super().check_state(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]  # torch wants a float
        """Take one step: hidden weights, then the others.

        Args:
            closure: returns the mean squared error and the outputs ``(b, m)``, without calling ``backward``.

        Returns:
            The loss before the step.
        """
        self.refuse_sparse()
        hidden, _, output, bypass = self._layers
        calls: list[Tensor] = []
        handle = hidden.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].detach()))
        try:
            returned = self.evaluate(closure)
        finally:
            handle.remove()
        loss, outputs = self._checked(returned, calls)
        targets = _targets(loss, outputs).double()
        x = calls[0].double()
        rates = {id(param): float(group["lr"]) for group in self.param_groups for param in group["params"]}
        errors = targets - outputs.detach().double()
        weights = _joined(hidden)
        move = self._hidden_move(x, weights, errors) * rates[id(hidden.weight)]
        best = float(errors.square().sum())
        for left in reversed(range(_HALVINGS + 1)):
            features = self._features(x, weights + move)
            solution = _solve(features.T @ features / len(x), features.T @ targets / len(x), self.ridge).T
            if left == 0 or float((targets - features @ solution.T).square().sum()) <= best:
                break
            move = move / 2 if left > 1 else 0 * move
        self._write(hidden.weight, hidden.bias, weights + move, {})
        width, one = output.in_features, output.bias is not None
        self._write(output.weight, output.bias, solution[:, : width + one], rates)
        if bypass is not None:
            self._write(bypass.weight, None, solution[:, width + one :], rates)
        return loss.detach()

    def _checked(self, returned: Any, calls: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss and the outputs of a closure that called the model once.

        Raises:
            ClosureError: anything else.
        """
        loss, outputs = loss_and_outputs(self, returned)
        if len(calls) != 1 or calls[0].dim() != 2 or outputs.shape != (len(calls[0]), self._layers.output.out_features):
            raise ClosureError(
                "OptimalInputGain: the closure must call its model once, on inputs (b, n), and return the outputs "
                f"(b, m) as they are; it was called {len(calls)} times and the outputs are {tuple(outputs.shape)}."
            )
        return loss, outputs

    def _hidden_move(self, x: Tensor, weights: Tensor, errors: Tensor) -> Tensor:
        """What the first stage adds to the hidden weights, ``(h, n)``."""
        hidden, activation, output, _ = self._layers
        inputs = _with_one(x, hidden.bias)
        with torch.enable_grad():
            net = (inputs @ weights.T).requires_grad_()
            (slopes,) = torch.autograd.grad(activation(net).sum(), net)
        out = output.weight.double()
        gradient = (slopes * (errors @ out)).T @ inputs / len(x)
        turn = _whitening(inputs) if self.hidden == "hwo" else None
        if turn is not None:
            inputs, gradient = inputs @ turn.T, gradient @ turn.T
        system, right = _gain_system(inputs, slopes, out, errors, gradient)
        if self.gains:
            gains = _solve(system, right[:, None], self.ridge)[:, 0]
        else:
            gains = (right.sum() / system.sum().clamp_min(torch.finfo(system.dtype).tiny)).expand_as(right)
        move = gradient * gains
        return move if turn is None else move @ turn

    def _features(self, x: Tensor, weights: Tensor) -> Tensor:
        """What the outputs are linear in: hidden outputs, a column of ones, and inputs where there is a bypass."""
        hidden, activation, output, bypass = self._layers
        features = _with_one(activation(_with_one(x, hidden.bias) @ weights.T), output.bias)
        return features if bypass is None else torch.cat((features, x), 1)

    def _write(self, weight: Tensor, bias: Tensor | None, value: Tensor, rates: dict[int, float]) -> None:
        """Move a layer towards ``value``, ``(out, in)`` with the bias as last column, by the share in ``rates``."""
        weight.lerp_(value[:, : weight.shape[1]].to(weight.dtype), rates.get(id(weight), 1.0))
        if bias is not None:
            bias.lerp_(value[:, -1].to(bias.dtype), rates.get(id(bias), 1.0))


def _joined(layer: nn.Linear) -> Tensor:
    weight = layer.weight.double()
    return weight if layer.bias is None else torch.cat((weight, layer.bias.double()[:, None]), 1)


def _targets(loss: Tensor, outputs: Tensor) -> Tensor:
    """The targets of a squared error, from its slope and its curvature.

    Raises:
        ClosureError: another loss.
    """
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
    if slope is not None and slope.requires_grad:
        seed = torch.linspace(1.0, 2.0, outputs.numel(), dtype=outputs.dtype, device=outputs.device).view_as(outputs)
        (bend,) = torch.autograd.grad(slope, outputs, seed)
        ratio = bend / seed
        curvature = ratio.mean()
        if bool(curvature > 0) and bool((ratio - curvature).abs().max() <= 1e-4 * curvature):
            return outputs.detach() - slope.detach() / curvature
    raise ClosureError(
        "OptimalInputGain solves for its output weights and needs the squared error, torch.nn.functional.mse_loss, of "
        "the very outputs that the closure returns. Take such a loss, or another optimizer."
    )
