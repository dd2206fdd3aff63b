"""From the state of a node to the weights of its layer: shapes as features, decoding, slices and tiles, scale."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from netwright.search._ghn_graph import Node

__all__ = ["Decoder", "Shape", "ShapeEncoder", "assigned", "fitted", "normalized"]

Shape = tuple[int, int, int, int]

_CHANNELS = torch.tensor(sorted({round(2 ** (step / 4)) for step in range(53)}))  # four for each doubling, to 8,192
_SPATIAL = 16
_OWN = 0.2  # part of the standard deviation that a node's state makes at the start
_CLASSIFIER = 0.1  # scale of the classifier at the start: large logits would first be unlearned, features with them


def fitted(values: Tensor, shape: Shape) -> Tensor:
    """``values`` ``(o, i, h, w)`` cut to ``shape``; where that has more outputs or inputs they are repeated in turn.

    ``fitted(v, s)[a, b, y, x] = v[a mod o, b mod i, y, x]``.
    """
    outputs, inputs = min(shape[0], values.shape[0]), min(shape[1], values.shape[1])
    cut = values[:outputs, :inputs, : shape[2], : shape[3]]
    times = -(-shape[0] // outputs), -(-shape[1] // inputs), 1, 1
    return cut.repeat(times)[: shape[0], : shape[1]]


def normalized(values: Tensor, node: Node) -> Tensor:
    r"""Predicted values of unit variance at the scale of their layer.

    .. math:: W \sqrt{g / \mathrm{fan}_\mathrm{in}}, \qquad \gamma = 2 \sigma(v / 2), \qquad b = \tanh(v / 5)

    for the weights of a layer with gain :math:`g`, the scale of a norm, and biases. Of a norm ``values`` is
    ``(2, size)``, scale and shift.
    """
    if node.operation == "norm":
        return torch.stack([2.0 * torch.sigmoid(0.5 * values[0]), torch.tanh(0.2 * values[1])])
    if node.operation == "bias":
        return torch.tanh(0.2 * values)
    scaled: Tensor = values * (node.gain / prod(values.shape[1:])) ** 0.5
    return scaled


def assigned(node: Node, values: Tensor) -> dict[str, Tensor]:
    """The parameters of a node by name, from what was decoded for it."""
    assert node.weight is not None
    assert node.shape is not None
    if node.operation not in ("norm", "bias"):
        return {node.weight: normalized(fitted(values, node.shape), node)}
    lines = torch.stack([fitted(line[:, None, None, None], node.shape).flatten() for line in values])
    if node.shift is None:
        return {node.weight: normalized(lines[0], node)}
    scale, shift = normalized(lines, node)
    return {node.weight: scale, node.shift: shift}


class ShapeEncoder(nn.Module):
    """Features ``(n, d)`` of the shapes of parameters: outputs, inputs, height and width have a quarter each.

    Numbers of channels are rounded to the nearest of a grid of four for each doubling; nodes without a parameter have
    an entry of their own.

    Args:
        features: ``d``, a multiple of 4.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.channels = nn.Embedding(len(_CHANNELS) + 1, features // 4)
        self.spatial = nn.Embedding(_SPATIAL + 1, features // 4)

    def forward(self, shapes: list[Shape | None]) -> Tensor:
        """Features of each shape, ``(n, d)``."""
        channels = torch.tensor([[_nearest(size) for size in shape[:2]] if shape else [-1, -1] for shape in shapes])
        spatial = torch.tensor([[min(size, _SPATIAL) for size in shape[2:]] if shape else [0, 0] for shape in shapes])
        channels = torch.where(channels < 0, len(_CHANNELS), channels).to(self.channels.weight.device)
        found = [self.channels(channels), self.spatial(spatial.to(self.spatial.weight.device))]
        return torch.cat([part.flatten(1) for part in found], 1)


def _nearest(size: int) -> int:
    return int((_CHANNELS - size).abs().argmin())


class Decoder(nn.Module):
    """Values of unit variance for the layers of nodes, whose states are ``(n, d)`` of unit variance.

    A perceptron gives ``(n, 4 d, h, w)``, one vector for each place of the largest kernel; two convolutions of size 1
    turn each into the ``outputs * inputs`` weights at that place. A linear map over the outputs gives the classifier's
    rows, and a perceptron gives vectors. Only what the shapes at hand need of the largest is computed.

    Args:
        features: ``d``.
        largest: ``(outputs, inputs, h, w)``.
        classes: rows of the classifier.
    """

    def __init__(self, features: int, largest: Shape, classes: int) -> None:
        super().__init__()
        self.largest = largest
        outputs, inputs, height, width = largest
        longest = max(outputs, inputs)
        self.places = nn.Linear(features, 4 * features * height * width)
        self.hidden = nn.Linear(4 * features, 8 * features)
        self.weights = nn.Linear(8 * features, outputs * inputs)
        self.classes = nn.Linear(outputs, classes)
        self.vector_hidden = nn.Linear(features, 2 * features)
        self.vectors = nn.Linear(2 * features, 2 * longest)
        self.class_bias = nn.Linear(longest, classes)
        self._start()

    def _start(self) -> None:
        """Unit variance, most of it shared by all layers: weights then start alike and drift apart as they need to."""
        for layer in (self.places, self.vector_hidden):
            nn.init.normal_(layer.weight, std=_OWN / layer.in_features**0.5)
            nn.init.normal_(layer.bias, std=(1.0 - _OWN**2) ** 0.5)
        for layer, scale in (
            (self.hidden, 1.0),
            (self.weights, 1.0),
            (self.classes, _CLASSIFIER),
            (self.vectors, 1.0),
            (self.class_bias, 1.0),
        ):
            nn.init.normal_(layer.weight, std=scale * (2.0 / layer.in_features) ** 0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, nodes: Sequence[Node], states: Tensor) -> dict[int, Tensor]:
        """By its number, what is decoded for every node with a parameter, before it is fitted to the layer's shape.

        Args:
            nodes: of one or more graphs.
            states: ``(n, d)``.
        """
        alike: dict[tuple[str, Shape], list[int]] = {}
        for place, node in enumerate(nodes):
            if node.shape is not None:
                behind_classifier = nodes[place - 1].operation == "classifier"
                alike.setdefault(self._key(node, node.shape, behind_classifier), []).append(place)
        found: dict[int, Tensor] = {}
        for (kind, shape), places in alike.items():
            found.update(zip(places, self._decoded(kind, shape, states[places]), strict=True))
        return found

    def _key(self, node: Node, shape: Shape, behind_classifier: bool) -> tuple[str, Shape]:
        """Nodes of equal keys are decoded together; a shape is what they need of the largest."""
        if node.operation in ("norm", "bias"):
            return "class_bias" if node.operation == "bias" and behind_classifier else "vector", (1, 1, 1, 1)
        needed = min(shape[0], self.largest[0]), min(shape[1], self.largest[1]), shape[2], shape[3]
        return node.operation if node.operation == "classifier" else "", needed

    def _decoded(self, kind: str, shape: Shape, states: Tensor) -> Tensor:
        if kind == "vector":
            return self.rows(states)
        if kind == "class_bias":
            return self.class_biases(states)[:, None]
        return self.classifiers(states, shape[1]) if kind else self.matrices(states, shape)

    def matrices(self, states: Tensor, shape: Shape) -> Tensor:
        """``(n, *shape)`` weights of layers that need ``shape`` of the largest."""
        outputs, inputs, height, width = shape
        _, most, rows, columns = self.largest
        places = torch.relu(self.places(states)).view(len(states), -1, rows, columns)[:, :, :height, :width]
        hidden = torch.relu(self.hidden(places.permute(0, 2, 3, 1)))
        weight = self.weights.weight.view(-1, most, hidden.shape[-1])[:outputs, :inputs].flatten(0, 1)
        bias = self.weights.bias.view(-1, most)[:outputs, :inputs].flatten()
        found = nn.functional.linear(hidden, weight, bias)
        return found.permute(0, 3, 1, 2).reshape(len(states), outputs, inputs, height, width)

    def classifiers(self, states: Tensor, inputs: int) -> Tensor:
        """``(n, classes, inputs, 1, 1)``, ``inputs`` at most the largest."""
        found = self.matrices(states, (self.largest[0], inputs, 1, 1))[..., 0, 0]
        rows: Tensor = self.classes(torch.relu(found).transpose(1, 2)).transpose(1, 2)
        return rows[..., None, None]

    def rows(self, states: Tensor) -> Tensor:
        """``(n, 2, longest)`` scales or biases and shifts."""
        found: Tensor = self.vectors(torch.relu(self.vector_hidden(states)))
        return found.view(len(states), 2, -1)

    def class_biases(self, states: Tensor) -> Tensor:
        """``(n, classes)``."""
        found: Tensor = self.class_bias(torch.relu(self.rows(states)[:, 0]))
        return found
