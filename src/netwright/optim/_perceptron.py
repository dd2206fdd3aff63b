"""Networks with one hidden layer, and how to find their layers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from netwright.core.errors import SettingError

__all__ = ["BypassPerceptron", "Layers", "layers_of"]


class BypassPerceptron(nn.Module):
    """``output(activation(hidden(x))) + bypass(x)``: one hidden layer, and weights from the inputs to the outputs.

    Args:
        inputs: number of inputs.
        hidden: number of hidden units.
        outputs: number of outputs.
        activation: without parameters, of each unit by itself; ``nn.Sigmoid()`` where None.

    Example:
        >>> BypassPerceptron(3, 5, 2)(torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.activation: nn.Module = nn.Sigmoid() if activation is None else activation
        self.output = nn.Linear(hidden, outputs)
        self.bypass = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, inputs) -> (n, outputs)``."""
        y: Tensor = self.output(self.activation(self.hidden(x))) + self.bypass(x)
        return y


class Layers(NamedTuple):
    """The layers of a network with one hidden layer."""

    hidden: nn.Linear
    activation: nn.Module
    output: nn.Linear
    bypass: nn.Linear | None


def layers_of(model: nn.Module) -> Layers:
    """The layers of a model with one hidden layer.

    Raises:
        SettingError: another kind of model.
    """
    wanted = "an nn.Sequential that ends in Linear, activations, Linear, or a BypassPerceptron"
    if isinstance(model, BypassPerceptron):
        layers = Layers(model.hidden, model.activation, model.output, model.bypass)
    else:
        parts = list(model.children()) if isinstance(model, nn.Sequential) else []
        places = [place for place, part in enumerate(parts) if isinstance(part, nn.Linear)]
        if len(places) != 2 or places[1] != len(parts) - 1:
            raise SettingError(f"OptimalInputGain: model must be {wanted}, got {type(model).__name__}.")
        hidden, output = parts[places[0]], parts[places[1]]
        assert isinstance(hidden, nn.Linear)
        assert isinstance(output, nn.Linear)
        layers = Layers(hidden, nn.Sequential(*parts[places[0] + 1 : places[1]]), output, None)
    own = [layer for layer in (layers.hidden, layers.output, layers.bypass) if layer is not None]
    kept = {id(param) for layer in own for param in layer.parameters()}
    if any(id(param) not in kept for param in model.parameters()):
        raise SettingError(
            "OptimalInputGain: what precedes the hidden layer, and its activation, may not have parameters. Leave "
            "normalization out and standardize the inputs; take an activation without parameters."
        )
    probe = torch.linspace(-2.0, 2.0, 2 * layers.output.in_features, device=layers.output.weight.device)
    try:
        whole = layers.activation(probe.view(2, -1)).flatten()
        single = layers.activation(probe[:, None])[:, 0]
    except (RuntimeError, ValueError, IndexError):
        whole, single = probe, probe + 1
    if whole.shape != single.shape or not torch.allclose(whole, single, atol=1e-6):
        raise SettingError(
            f"OptimalInputGain: the activation {layers.activation} must act on each unit by itself, always in the same "
            "way. Leave dropout, softmax and normalization out."
        )
    return layers
