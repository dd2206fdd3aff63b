"""Saddle-free Newton: Newton's step with the absolute values of the curvatures, in a Krylov subspace."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from netwright.core.errors import ClosureError, GradientError, SettingError
from netwright.core.randomness import restore_states, save_states
from netwright.optim._base import BaseOptimizer, Group, check_number, require_one_process
from netwright.optim._krylov import krylov

__all__ = ["SaddleFreeNewton"]

_GRID = tuple(10.0**-power for power in range(7))
_BEYOND = 10  # larger dampings, each ten times the last, that are tried where all of the grid raise the loss
_SHARED = ("subspace", "damping")


class _Leaf(NamedTuple):
    """A parameter that the loss depends on.

    Args:
        group: the group it is in.
        param: the parameter.
        grad: its gradient, with its graph.
    """

    group: Group
    param: Tensor
    grad: Tensor


class SaddleFreeNewton(BaseOptimizer):
    r"""Divides each component of the gradient by the absolute curvature along it, so that saddles repel.

    Reach for it where training rests on a plateau that is a saddle: deep networks without normalization or residual
    connections (autoencoders, recurrent networks) on full batches or large ones, with at most some 100,000
    parameters. Newton's method is drawn to saddles and gradient descent leaves them slowly; this leaves along negative
    curvature at the speed at which Newton's method arrives. A point where the gradient is exactly zero is not left.

    With the gradient :math:`g` and the Hessian :math:`H` of the loss :math:`f` at :math:`\theta`, the rows of
    :math:`V \in \mathbb R^{k \times d}` an orthonormal basis of
    :math:`\mathrm{span}(g, Hg, \dots, H^{k-2} g, \Delta_{t-1})`, where :math:`\Delta_{t-1}` is the previous direction,

    .. math:: V H V^\top = U \operatorname{diag}(e) U^\top, \qquad
              \Delta(\lambda) = -V^\top U \operatorname{diag}\Big(\frac{1}{|e| + \lambda}\Big) U^\top V g, \qquad
              \theta_{t+1} = \theta_t + \eta \Delta(\lambda_t),

    with the learning rate :math:`\eta` and :math:`\lambda_t` the damping from a grid whose step has the lowest loss
    (the smallest of equals, for close to a saddle rounding hides the gain). Where all raise the loss, up to ten larger
    ones follow, each ten times the last, until one does not; where none is left, the parameters stay. So the loss of
    the closure never rises.

    Cost: a gradient and ``k`` Hessian-vector products, each about two gradients, then one evaluation of the loss for
    each damping (10 more at worst), and ``O(d k**2)`` for orthogonality. Memory: one word for each parameter between
    steps, ``k`` more during a step, beside the graph of the gradient. The closure is called once for each evaluation,
    from the same random state, so that dropout repeats itself; a layer that counts calls, as batch normalization does
    in training mode, counts each of them.

    Args:
        params: parameters or groups; they are moved together.
        lr: length of the step relative to Newton's. A group may have its own.
        subspace: dimension k; the same for all groups.
        damping: the grid, in the units of curvature; the same for all groups. One value fixes it. A 0 among several is
            tried like the others, and passed over where the curvature is singular.

    Raises:
        SettingError: a setting outside its range, groups that disagree on a shared one, complex parameters, parameters
            on several devices, several processes.
        ClosureError: in a step, no closure, or one whose loss has no graph (it must not call ``backward``).
        GradientError: in a step, gradients or Hessian-vector products that are sparse or not finite. The parameters
            have not moved then.

    Example:
        >>> point = torch.tensor([1.0, 1e-4], requires_grad=True)
        >>> optimizer = SaddleFreeNewton([point], subspace=2)
        >>> def closure():  # a saddle at the origin, minima at (0, 1) and (0, -1)
        ...     x, y = point
        ...     return x**2 + (y**2 - 1) ** 2
        >>> for _ in range(20):
        ...     loss = optimizer.step(closure)
        >>> bool(loss < 1e-6)
        True

    Source: paper 72, Pascanu, Dauphin, Ganguli and Bengio, "On the saddle point problem for non-convex optimization",
    2014, arXiv 1405.4604, and Dauphin et al., "Identifying and attacking the saddle point problem in high-dimensional
    non-convex optimization", 2014, arXiv 1406.2572. The sources could not be read here: the direction is derived from
    the definition of :math:`|H|`, algorithm and grid follow an account of the second paper.

    Differs: the subspace begins with the gradient, where the papers take Lanczos vectors without saying from which
    start, and all its vectors are orthogonalized against each other twice. One step is taken in each subspace, where
    the papers allow several. The search beyond the grid, and staying put where everything raises the loss, are ours.
    """

    closure_kind = "graph"
    state_names: ClassVar[frozenset[str]] = frozenset({"direction"})
    one_device: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        subspace: int = 20,
        damping: float | Sequence[float] = _GRID,
    ) -> None:
        require_one_process(self, "it takes derivatives of the batch of one process")
        super().__init__(params, {"lr": lr, "subspace": subspace, "damping": damping})

    def check(self, group: Group) -> None:
        """Raise ``SettingError`` for a setting of this group outside its range."""
        check_number(self, "lr", group["lr"])
        subspace = group["subspace"]
        if not isinstance(subspace, int) or isinstance(subspace, bool) or subspace < 1:
            raise SettingError(f"SaddleFreeNewton: subspace must be a positive integer, got {subspace!r}.")
        grid = group["damping"] if isinstance(group["damping"], list | tuple) else [group["damping"]]
        if not grid:
            raise SettingError("SaddleFreeNewton: damping must be a number or several, got none.")
        group["damping"] = tuple(sorted((check_number(self, "damping", value) for value in grid), reverse=True))
        first = self.param_groups[0]
        for name in _SHARED:
            if group[name] != first[name]:
                raise SettingError(
                    f"SaddleFreeNewton: all groups share one {name}, got {first[name]!r} and {group[name]!r}. Give it "
                    "to SaddleFreeNewton, not to a group."
                )

    @staticmethod
    def curvature(eigenvalues: Tensor) -> Tensor:
        """What steps along eigenvectors are divided by, before damping; Newton's method has the eigenvalues."""
        return eigenvalues.abs()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the loss before it.

        Args:
            closure: returns the loss with its graph, without calling ``backward``.

        Raises:
            ClosureError: no closure, or a loss without graph.
            GradientError: gradients or curvatures that are sparse or not finite.
        """
        device = self.param_groups[0]["params"][0].device
        before = save_states(device)
        loss = self.loss_of(self.evaluate(closure))
        after = save_states(device)

        def again() -> float:
            restore_states(before, device)
            return float(self.loss_of(self.evaluate(closure)).detach())

        leaves = self._leaves(loss)
        try:
            if leaves:
                directions = self._directions(leaves)
                self._search(leaves, directions, float(loss), again)
        finally:
            restore_states(after, device)
        return loss.detach()

    def _leaves(self, loss: Tensor) -> list[_Leaf]:
        """The parameters that have a gradient, with its graph."""
        if not loss.requires_grad:
            raise ClosureError(
                "SaddleFreeNewton: the loss that the closure returned has no graph. Return it as the model gave it: no "
                "detach(), no item(), no backward(), and not under torch.no_grad()."
            )
        pairs = [
            (group, param)
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad and param.numel()
        ]
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, [param for _, param in pairs], create_graph=True, allow_unused=True)
        leaves = [_Leaf(*pair, grad) for pair, grad in zip(pairs, grads, strict=True) if grad is not None]
        for leaf in leaves:
            _require_dense(leaf.grad, leaf.param)
        return leaves

    def _directions(self, leaves: Sequence[_Leaf]) -> Iterator[tuple[Tensor, bool]]:
        """The direction for each damping, ``(d,)``, and whether the damping is of the grid."""
        dtype = torch.float32
        for leaf in leaves:
            dtype = torch.promote_types(dtype, leaf.param.dtype)
        gradient = _flat([leaf.grad.detach() for leaf in leaves], dtype)
        if not bool(gradient.isfinite().all()):
            raise GradientError("SaddleFreeNewton: the gradient is not finite. Go back to a sound point.")
        length = float(gradient.norm())
        if length == 0:
            return
        previous = None
        if any("direction" in self.state[leaf.param] for leaf in leaves):
            kept = [self.state[leaf.param].get("direction", torch.zeros_like(leaf.param)) for leaf in leaves]
            previous = _flat(kept, dtype)
        settings = self.param_groups[0]
        size = min(settings["subspace"], len(gradient))
        basis, projected = krylov(gradient, lambda vector: _hessian_product(leaves, vector), size, previous)
        values, vectors = torch.linalg.eigh(projected)
        largest = max(*settings["damping"], 1e-6)
        beyond = [largest * 10.0**power for power in range(1, _BEYOND + 1)]
        for damping, regular in chain(((d, True) for d in settings["damping"]), ((d, False) for d in beyond)):
            inside = -length * (vectors @ (vectors[0] / (self.curvature(values) + damping)))
            yield basis.mT @ inside.to(dtype), regular

    def _search(
        self,
        leaves: Sequence[_Leaf],
        directions: Iterator[tuple[Tensor, bool]],
        loss: float,
        again: Callable[[], float],
    ) -> None:
        """Move along the direction with the lowest loss; beyond the grid, along the first that does not raise it."""
        start = [leaf.param.detach().clone() for leaf in leaves]
        best, lowest = None, loss
        try:
            for direction, regular in directions:
                if best is not None and not regular:
                    break
                _move(leaves, start, direction)
                value = again()
                if value <= lowest:  # where rounding hides the gain, as next to a saddle, move all the same
                    best, lowest = direction, value
        finally:
            torch._foreach_copy_([leaf.param for leaf in leaves], start)
        if best is not None:
            _move(leaves, start, best)
            for leaf, piece in zip(leaves, _pieces(best, leaves), strict=True):
                self.state[leaf.param]["direction"] = piece.to(leaf.param.dtype, copy=True)


def _hessian_product(leaves: Sequence[_Leaf], vector: Tensor) -> Tensor:
    """The Hessian times ``vector``, both ``(d,)``, by differentiating the gradient."""
    pairs = [
        (leaf.grad, piece.to(leaf.grad.dtype))
        for leaf, piece in zip(leaves, _pieces(vector, leaves), strict=True)
        if leaf.grad.requires_grad
    ]
    if not pairs:
        return torch.zeros_like(vector)
    grads, pieces = zip(*pairs, strict=True)
    params = [leaf.param for leaf in leaves]
    products = torch.autograd.grad(grads, params, pieces, retain_graph=True, allow_unused=True, materialize_grads=True)
    for value, param in zip(products, params, strict=True):
        _require_dense(value, param)
    flat = _flat(products, vector.dtype)
    if not bool(flat.isfinite().all()):
        raise GradientError(
            "SaddleFreeNewton: the loss has no finite second derivatives here. Look for square roots or norms at zero."
        )
    return flat


def _require_dense(value: Tensor, param: Tensor) -> None:
    if value.layout != torch.strided:
        raise GradientError(
            f"SaddleFreeNewton does not take sparse gradients, and the parameter of shape {tuple(param.shape)} has "
            "one. Build its embedding with sparse=False."
        )


def _move(leaves: Sequence[_Leaf], start: list[Tensor], direction: Tensor) -> None:
    for leaf, origin, piece in zip(leaves, start, _pieces(direction, leaves), strict=True):
        leaf.param.copy_(origin).add_(piece, alpha=float(leaf.group["lr"]))


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])


def _pieces(flat: Tensor, leaves: Sequence[_Leaf]) -> list[Tensor]:
    """The parts of ``(d,)`` in the shapes of the parameters."""
    parts = torch.split(flat, [leaf.param.numel() for leaf in leaves])
    return [part.view(leaf.param.shape) for part, leaf in zip(parts, leaves, strict=True)]
