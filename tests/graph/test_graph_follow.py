"""A graph taken from a trace goes where it is moved, also where the model makes tensors beside its inputs."""

import pytest
import torch
from torch import Tensor, nn

from netwright.core.builtin.networks import CharTransformer
from netwright.core.graph import export_model, trace
from netwright.core.graph.follow import follow_inputs


class Placed(nn.Module):
    """Adds a learned vector for each position, whose numbers are made on the device of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(6, 8)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        window = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
        return self.last(torch.relu(self.first(x + places))) * window[:, None]


def test_a_smaller_network_moves_to_another_device() -> None:
    model, inputs = Placed().eval(), torch.randn(3, 6, 8)
    graph = trace(model, inputs)
    (group,) = [group for group in graph.groups if group.size == 12]
    smaller = graph.shrink(model, {group.name: [0, 5]})
    expected = smaller(inputs)
    moved = smaller.to("meta")  # a device on which anything left on the CPU is an error
    assert moved(inputs.to("meta")).device.type == "meta"
    assert moved(inputs.to("meta")).shape == expected.shape


def test_a_followed_graph_computes_what_it_did() -> None:
    model, inputs = Placed().eval(), torch.randn(3, 6, 8)
    module = export_model(model, inputs).module(check_guards=False)
    fixed = [node for node in module.graph.nodes if "device" in node.kwargs]
    assert fixed
    with pytest.raises(RuntimeError, match="device"):
        torch.fx.GraphModule(module, module.graph).to("meta")(inputs.to("meta"))
    module = export_model(model, inputs).module(check_guards=False)
    follow_inputs(module.graph)
    module.recompile()
    torch.testing.assert_close(module(inputs), model(inputs))
    assert not any(isinstance(node.kwargs.get("device"), torch.device) for node in module.graph.nodes)


def test_a_transformer_moves() -> None:
    torch.manual_seed(0)
    model = CharTransformer(64).eval()
    inputs = torch.randint(64, (2, 16))
    graph = trace(model, inputs)
    smaller = graph.shrink(model, {graph.groups[0].name: [0]}).to("meta")
    assert smaller(inputs.to("meta")).device.type == "meta"
