"""Initial weights and the largest learning rate of a network, from its graph."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from netwright.core.data import Inputs
from netwright.core.errors import SettingError
from netwright.core.graph import export_model
from netwright.param._layer_graph import WeightLayer, layer_graph

__all__ = ["ArchitectureScaling", "architecture_scaling"]


@dataclass(frozen=True)
class ArchitectureScaling:
    r"""What :func:`architecture_scaling` returns.

    Args:
        layers: the weight layers, in the order of the computation.
        depths: how many paths from an input to an output there are with each number of weight layers.
        kernel: :math:`q`, the geometric mean of the kernel sides of all convolutions; 1 where there are none.
    """

    layers: tuple[WeightLayer, ...]
    depths: Mapping[int, int]
    kernel: float

    @property
    def paths(self) -> int:
        """The number :math:`P` of paths from an input to an output."""
        return sum(self.depths.values())

    @property
    def relative_lr(self) -> float:
        """The largest learning rate, relative to that of a single linear layer."""
        cubes = sum(count * depth**3 for depth, count in self.depths.items())
        return math.exp(-0.5 * math.log(cubes)) / self.kernel

    @property
    def variances(self) -> dict[str, float]:
        """The variance of the initial values of each weight; the least one where a weight is used several times."""
        found: dict[str, float] = {}
        for layer in self.layers:
            variance = 1 / layer.fan_in**2 if layer.last else 2 / (layer.fan_in * layer.in_degree)
            found[layer.weight] = min(variance, found.get(layer.weight, math.inf))
        return found

    def lr_for(self, base: "ArchitectureScaling", base_lr: float) -> float:
        """The learning rate for this network that corresponds to ``base_lr`` for another.

        Args:
            base: the scaling of the other network, whose learning rate was found by trying.
            base_lr: that learning rate.

        Raises:
            SettingError: a rate that is not positive.
        """
        if isinstance(base_lr, bool) or not isinstance(base_lr, int | float) or not 0 < base_lr < math.inf:
            raise SettingError(f"architecture_scaling: base_lr must be a positive number, got {base_lr!r}.")
        return base_lr * self.relative_lr / base.relative_lr

    @torch.no_grad()
    def initialize(self, model: nn.Module, seed: int = 0) -> None:
        """Draw the weights of ``model`` in place and set the biases of its weight layers to zero.

        All other parameters, those of normalizations among them, stay as they are.

        Args:
            model: the traced network, or one of the same shape.
            seed: of the draws, which do not depend on the device.

        Raises:
            SettingError: a model without these weights.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        biases = {layer.bias for layer in self.layers if layer.bias}
        for name in [*self.variances, *biases]:
            if name not in parameters:
                raise SettingError(f"architecture_scaling: {type(model).__name__} has no parameter {name!r}.")
        generator = torch.Generator().manual_seed(seed)
        for name, variance in self.variances.items():
            _draw(parameters[name], math.sqrt(variance), generator)
        for name in biases:
            parameters[name].zero_()


def architecture_scaling(model: nn.Module, inputs: Inputs) -> ArchitectureScaling:
    r"""How the initial weights and the learning rate of a network have to depend on its architecture.

    Reach for it to carry a learning rate that was found on a small network over to networks of other depth, topology,
    width and kernel size, without trying again; to rank architectures each at a learning rate of its own; and to
    initialize networks whose layers are wired in unusual ways. The rule demands that one step of gradient descent
    changes the pre-activations of every network by the same mean square (maximal update).

    With :math:`n_\ell` the fan-in of layer :math:`\ell` (input channels of a group times kernel area), :math:`d_\ell`
    the in-degree of its vertex in the graph, :math:`L_p` the number of weight layers on path :math:`p` of the
    :math:`P` paths from an input to an output, and :math:`q` the side of the convolution kernels,

    .. math:: \operatorname{Var} W_\ell = \frac{2}{n_\ell d_\ell}, \qquad
              \operatorname{Var} W_{\text{last}} = \frac{1}{n^2}, \qquad
              \eta^* \propto \frac1q \Bigl(\sum_{p=1}^{P} L_p^3\Bigr)^{-1/2},

    biases zero. Width does not appear in :math:`\eta^*`, as the last layer is initialized in the mean-field manner:
    call :meth:`ArchitectureScaling.initialize` on both networks before rates are compared. The rates are for SGD.

    The weight layers are the linear, convolutional and embedding layers and matrix products with a parameter in the
    trace. The in-degree is the number of summands in the sum that a layer's result enters before any
    nonlinearity, and otherwise of the sum that it reads.

    Cost: one ``torch.export``; paths are counted by depth, not listed.

    Args:
        model: any module that ``torch.export`` traces; it is left as it is.
        inputs: a batch for it: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        TraceError: a model that cannot be traced.
        SettingError: no weight layer on any path, a recurrent layer, an einsum with a weight, or a weight that is
            computed from several parameters.

    Example:
        >>> chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> scaling = architecture_scaling(chain, torch.zeros(2, 4))
        >>> scaling.depths, scaling.variances
        ({3: 1}, {'0.weight': 0.5, '2.weight': 0.25, '4.weight': 0.015625})
        >>> round(scaling.lr_for(architecture_scaling(base, torch.zeros(2, 4)), base_lr=0.1), 4)
        0.0544

    Source: paper 194, W. Chen, J. Wu, Z. Wang, B. Hanin, "Principled Architecture-aware Scaling of Hyperparameters",
    2024, arXiv:2402.17440; for chains S. Jelassi et al., "Depth Dependence of muP Learning Rates in ReLU MLPs", 2023.

    Differs: the statements were taken from the authors' code and the abstracts. Paths and in-degrees are read off the
    trace of any model, where the paper has a fixed family. The code charges the in-degree to the layers that read a sum
    of activations, the theory to those that write a sum of pre-activations; here the trace decides which it is. The
    code takes the fan-out of layers, which are of equal width there. For kernels of several sizes, which
    the paper does not treat, :math:`q` is their geometric mean. The sum over paths is meant for networks without
    normalization: with :math:`N` residual blocks in a row there are :math:`2^N` paths and the rate becomes very
    cautious; attention is beyond the theory, its paths are counted all the same.
    """
    found = layer_graph(export_model(model, inputs))
    if not any(found.depths):
        raise SettingError(
            f"architecture_scaling: no path from an input to an output of {type(model).__name__} leads through a "
            "linear or convolutional layer."
        )
    first = {id(value): name for name, value in model.named_parameters()}
    one_name = {name: first[id(value)] for name, value in model.named_parameters(remove_duplicate=False)}
    layers = tuple(replace(layer, weight=one_name[layer.weight]) for layer in found.layers)
    sides = [math.log(layer.kernel) for layer in layers if layer.kernel]
    kernel = math.exp(math.fsum(sides) / len(sides)) if sides else 1.0
    return ArchitectureScaling(layers, found.depths, kernel)


def _draw(target: Tensor, deviation: float, generator: torch.Generator) -> None:
    drawn = torch.empty(target.shape, dtype=torch.float64).normal_(0.0, deviation, generator=generator)
    target.copy_(drawn)
