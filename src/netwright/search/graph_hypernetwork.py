"""Graph hypernetworks: one network predicts the weights of others from their graphs."""

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from netwright.core.artifact import load_weights, save_weights
from netwright.core.data import Inputs
from netwright.core.errors import ArtifactError, SettingError
from netwright.core.files import atomic_write
from netwright.core.randomness import isolated
from netwright.core.task import Task
from netwright.core.transform import Progress
from netwright.search._ghn_decoder import Decoder, Shape, ShapeEncoder, assigned
from netwright.search._ghn_fit import settle_norms, train
from netwright.search._ghn_gnn import GatedGNN, messages
from netwright.search._ghn_graph import OPERATIONS, NetworkGraph, network_graph

__all__ = ["GraphHyperNetwork"]

_SETTINGS, _WEIGHTS = "hypernetwork.json", "hypernetwork.safetensors"


@dataclass(frozen=True)
class _Settings:
    classes: int
    largest: Shape
    features: int
    cutoff: int
    rounds: int
    seed: int


class GraphHyperNetwork(nn.Module):
    r"""Predicts all weights of a network that it has never seen, in one pass of a fraction of a second.

    Reach for it where many architectures for one task are to be compared, or one needs a start that already works:
    trained once on sampled architectures, it ranks others without training any. Train it on many architectures, for
    long: on digits, 2,000 steps over 1,000 networks gave a rank correlation of 0.57 with trained accuracy where 600
    steps over 300 gave 0.46. Compare it with what costs nothing: the number of parameters ranked better there (0.7).

    A network's graph has a node for each operation (biases too). With :math:`e` an embedding of its kind and of the
    shape of its parameters,

    .. math:: h = \mathrm{LN}(\mathrm{GNN}(e)), \qquad W_v = \mathrm{norm}(\mathrm{fit}(D(h_v)))

    where the GNN sweeps over the graph forward and backward, with virtual edges of weight 1/distance between nodes up
    to ``cutoff`` edges apart (:class:`~netwright.search._ghn_gnn.GatedGNN`); :math:`D` decodes to the largest shape,
    which is sliced, or tiled where the layer is larger; and weights are scaled by
    :math:`\sqrt{g / \mathrm{fan}_\mathrm{in}}`, the gain :math:`g` 2 before a rectifier and 1 elsewhere. It is
    trained by the task's loss of networks that run with predicted weights.

    Predicted are weights and biases of convolutions (grouped ones too) and linear layers, and scale and shift of batch
    norm. Running statistics of batch norm are no weights: see :meth:`predict`.

    Args:
        classes: outputs of the last linear layer of every network.
        largest: ``(outputs, inputs, height, width)`` to which is decoded; channels beyond repeat, kernels may not
            exceed it.
        features: size of a node's state, a multiple of 4.
        cutoff: longest path that makes a virtual edge; 1 for the plain hypernetwork without.
        rounds: forward and backward sweeps.
        seed: draws the initial weights.

    Raises:
        SettingError: a setting outside its range; on a call, a network with an operation or parameter that is not
            supported, a kernel beyond ``largest``, or another number of classes.
        TraceError: on a call, a network that ``torch.fx`` cannot trace.

    Example:
        >>> ghn = GraphHyperNetwork(3, largest=(16, 16, 3, 3), features=8)
        >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
        >>> predicted = ghn.predict(network)
        >>> predicted(torch.rand(2, 1, 4, 4)).shape, bool((predicted[0].weight != network[0].weight).all())
        (torch.Size([2, 3]), True)

    Source: papers 293 and 282: Zhang, Ren and Urtasun, "Graph HyperNetworks for Neural Architecture Search", 2019,
        arXiv 1810.05749; Knyazev, Drozdzal, Taylor and Romero-Soriano, "Parameter Prediction for Unseen Deep
        Architectures", 2021, arXiv 2110.13100.

    Differs: nodes of equal depth are visited together, which gives the same states as one after the other. A virtual
        edge has more than one edge, as in the paper's equation (the authors' code adds direct ones again). The gain
        depends on whether a rectifier follows, not on the kernel's shape; channel numbers are embedded on a
        logarithmic grid. Predicted weights start with Kaiming's variance, 96% of which is common to all layers, and
        a small classifier: without that the first hundreds of steps are spent on unlearning large logits.

    Cost: a prediction takes ``O(n^2 + n d^2)`` for ``n`` nodes, in as many sequential steps as the graph is deep, and
        ``O(h w d o i)`` for each decoded layer; memory is that of the predicted weights and of ``n^2`` numbers.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        largest: Shape = (64, 64, 3, 3),
        features: int = 32,
        cutoff: int = 50,
        rounds: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        numbers = {"classes": classes, "features": features, "cutoff": cutoff, "rounds": rounds}
        numbers |= {f"largest[{place}]": size for place, size in enumerate(largest)}
        for name, value in numbers.items():
            if not isinstance(value, int) or value < 1:
                raise SettingError(f"GraphHyperNetwork.{name} must be a whole number of at least 1, got {value!r}.")
        if len(largest) != 4 or features % 4:
            raise SettingError(
                "GraphHyperNetwork needs largest=(outputs, inputs, height, width) and features divisible by 4, got "
                f"{largest!r} and {features!r}."
            )
        outputs, inputs, height, width = largest
        self._settings = _Settings(classes, (outputs, inputs, height, width), features, cutoff, rounds, seed)
        with isolated(seed):
            self.operations = nn.Embedding(len(OPERATIONS), features)
            self.shapes = ShapeEncoder(features)
            self.gnn = GatedGNN(features, cutoff > 1, rounds)
            self.norm = nn.LayerNorm(features)
            self.decoder = Decoder(features, self._settings.largest, classes)

    def forward(self, graphs: Sequence[NetworkGraph]) -> list[dict[str, Tensor]]:
        """The parameters of each network by name, differentiable; 1-D and 2-D ones as ``(o, i, h, w)`` too.

        Args:
            graphs: as :meth:`graph` returns them.
        """
        nodes = [(owner, node) for owner, graph in enumerate(graphs) for node in graph.nodes]
        kinds = torch.tensor([OPERATIONS.index(node.operation) for _, node in nodes], device=self._device())
        states = self.operations(kinds) + self.shapes([node.shape for _, node in nodes])
        states = self.norm(self.gnn(states, messages(graphs, self._settings.cutoff)))
        found: list[dict[str, Tensor]] = [{} for _ in graphs]
        for place, values in self.decoder([node for _, node in nodes], states).items():
            owner, node = nodes[place]
            for name, value in assigned(node, values).items():
                found[owner].setdefault(name, value)  # a layer used twice has the weights of its first use
        return found

    def graph(self, model: nn.Module) -> NetworkGraph:
        """The graph of a network, checked against what can be predicted.

        Raises:
            SettingError, TraceError: as for the class.
        """
        graph = network_graph(model)
        for node in graph.nodes:
            if node.shape is None:
                continue
            if node.shape[2] > self._settings.largest[2] or node.shape[3] > self._settings.largest[3]:
                raise SettingError(
                    f"{node.weight} has a kernel of {node.shape[2]} x {node.shape[3]}, more than largest="
                    f"{self._settings.largest}. Train a hypernetwork with a larger one."
                )
            if node.operation == "classifier" and node.shape[0] != self._settings.classes:
                raise SettingError(
                    f"{node.weight} has {node.shape[0]} outputs; this hypernetwork was made for classes="
                    f"{self._settings.classes}."
                )
        return graph

    @torch.no_grad()
    def predict(self, model: nn.Module, inputs: Inputs | list[Inputs] | None = None) -> nn.Module:
        """A copy of ``model`` with predicted weights, in eval mode.

        Args:
            model: any network of supported layers; its weights are not read.
            inputs: batches of training inputs (a list), or one, from which the running statistics of batch norm are
                taken: each layer's are the mean over the batches of what it sees while all layers normalize by the
                batch. None: batch norm goes on normalizing by the batch it is given, in eval mode too.

        Raises:
            SettingError, TraceError: as for the class.
        """
        graph = self.graph(model)
        predicted = self([graph])[0]
        copy = deepcopy(model).eval()
        for name, value in copy.named_parameters():
            value.copy_(predicted[name].view(value.shape))
        settle_norms(copy, inputs if isinstance(inputs, list) or inputs is None else [inputs])
        return copy

    def fit(
        self,
        task: Task,
        architectures: Sequence[nn.Module],
        *,
        steps: int = 1000,
        meta_batch: int = 8,
        batch_size: int = 64,
        lr: float = 1e-3,
        clip_norm: float = 5.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[float]:
        """Train on ``architectures`` by the task's loss; the mean loss of each step.

        Each step draws ``meta_batch`` of them and one batch of ``task.data.train``, runs every network on it with
        predicted weights (batch norm normalizes by the batch), and moves the hypernetwork by Adam down the mean loss,
        the rate falling to zero along half a cosine. The architectures are left as they are.

        Args:
            task: data and loss; its model is not used.
            architectures: networks to learn from.
            steps: how many.
            meta_batch: networks in a step.
            batch_size: items in a step.
            lr: the highest learning rate.
            clip_norm: largest norm of a step's gradient.
            seed: draws networks and batches.
            progress: told how far it is.

        Raises:
            SettingError: a setting outside its range, or no architecture.
            NonFiniteLossError: a loss that is NaN or infinite.
            TraceError: as for the class.

        Cost: ``meta_batch`` forward and backward passes of the networks a step, and those of the hypernetwork.
        """
        for name, value in (("steps", steps), ("meta_batch", meta_batch), ("batch_size", batch_size)):
            if value < 1:
                raise SettingError(f"GraphHyperNetwork.fit: {name} must be at least 1, got {value!r}.")
        for name, rate in (("lr", lr), ("clip_norm", clip_norm)):
            if not 0 < rate < math.inf:
                raise SettingError(f"GraphHyperNetwork.fit: {name} must be a positive finite number, got {rate!r}.")
        if not architectures:
            raise SettingError("GraphHyperNetwork.fit needs at least one architecture, got none.")
        graphs = [self.graph(model) for model in architectures]
        report = progress or (lambda fraction, what: None)
        return train(self, task, architectures, graphs, steps, meta_batch, batch_size, lr, clip_norm, seed, report)

    def save(self, folder: str | Path) -> None:
        """Write settings (JSON) and weights (safetensors) into ``folder``, which is made where it is missing.

        Raises:
            ArtifactError: a folder that cannot be written.
        """
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"Cannot make the folder {place}: {error.strerror or error}.") from error
        save_weights(self, place / _WEIGHTS)
        with atomic_write(place / _SETTINGS, ArtifactError) as path:
            path.write_text(json.dumps(asdict(self._settings), indent=2))

    @classmethod
    def load(cls, folder: str | Path) -> "GraphHyperNetwork":
        """The hypernetwork that :meth:`save` wrote.

        Raises:
            ArtifactError: files that are missing or damaged, or that belong to something else.
        """
        path = Path(folder) / _SETTINGS
        try:
            settings = json.loads(path.read_text())
            classes, largest = settings.pop("classes"), tuple(settings.pop("largest"))
            found = cls(classes, largest=largest, **settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} does not hold the settings of a hypernetwork: {error}") from error
        load_weights(found, Path(folder) / _WEIGHTS)
        return found

    def _device(self) -> torch.device:
        return self.operations.weight.device
