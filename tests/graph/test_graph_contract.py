"""What the graph promises around its groups: errors, what is left untouched, rules of a stranger."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netwright.core.errors import NothingToPruneError, TraceError, TransformError
from netwright.core.graph import Call, Graph, UnprovableError, Value, register_rule, trace
from netwright.core.graph.agreement import outputs
from netwright.core.graph.rebuild import rebuild, resized
from netwright.core.graph.rules import follow, pointwise

sys.path.insert(0, str(Path(__file__).parent))
from zoo import build


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture
def mlp() -> tuple[nn.Module, Tensor, Graph]:
    model, x = _MLP(), torch.randn(2, 4)
    return model, x, trace(model, x)


def test_places_of_a_group_are_its_parameters(mlp: tuple[nn.Module, Tensor, Graph]) -> None:
    group = mlp[2].group("first")
    found = {(place.parameter, place.dim): place.index.tolist() for place in group.places}
    units = [[unit] for unit in range(8)]
    assert found == {("first.weight", 0): units, ("first.bias", 0): units, ("second.weight", 1): units}


def test_units_of_a_flattened_channel_are_all_its_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 4, 2))
    group = trace(model, torch.randn(2, 1, 4, 4)).group("0")
    places = {place.parameter: place.index.tolist() for place in group.places}
    assert places["2.weight"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_zeroing_and_shrinking_leave_the_model_untouched(mlp: tuple[nn.Module, Tensor, Graph]) -> None:
    model, _, graph = mlp
    before = copy.deepcopy(model.state_dict())
    graph.zero(model, {"first": [1]})
    graph.shrink(model, {"first": [1], "second": [0, 2]})
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert model.training


def test_zero_touches_the_named_units_and_nothing_else(mlp: tuple[nn.Module, Tensor, Graph]) -> None:
    model, _, graph = mlp
    zero = graph.zero(model, {"first": [1, 5]})
    assert not zero.first.weight[[1, 5]].any()
    assert not zero.first.bias[[1, 5]].any()
    assert not zero.second.weight[:, [1, 5]].any()
    others = [0, 2, 3, 4, 6, 7]
    assert torch.equal(zero.first.weight[others], model.first.weight[others])
    assert torch.equal(zero.second.weight[:, others], model.second.weight[:, others])
    assert torch.equal(zero.last.weight, model.last.weight)


def test_shrink_keeps_class_attributes_and_settings(mlp: tuple[nn.Module, Tensor, Graph]) -> None:
    model, _, graph = mlp
    model.first.weight.requires_grad_(False)
    small = graph.shrink(model.double(), {"first": [1, 5]})
    assert type(small) is _MLP
    assert (small.first.out_features, small.second.in_features) == (6, 6)
    assert torch.equal(small.first.weight, model.first.weight[[0, 2, 3, 4, 6, 7]])
    assert small.first.weight.dtype == torch.float64
    assert not small.first.weight.requires_grad
    assert small.second.weight.requires_grad
    assert small.first.weight.grad is None


def test_tied_parameters_stay_tied() -> None:
    model, inputs = build("tied-lm")
    graph = trace(model, inputs)
    small = graph.shrink(model, {"embed": [0, 3]})
    assert small.head.weight is small.embed.weight
    assert small.embed.weight.shape == (30, 10)
    zero = graph.zero(model, {"embed": [0, 3]})
    assert zero.head.weight is zero.embed.weight


def test_numbers_that_modules_remember_follow() -> None:
    model, inputs = build("hf-gpt2")
    small = trace(model, inputs).shrink(model, {"transformer.h.0.attn.c_attn": [2]})
    attention = small.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.head_dim) == (3, 12, 4)
    assert small.transformer.h[1].attn.num_heads == 4
    assert (attention.c_attn.nf, attention.c_proj.nx) == (36, 12)


def test_leaf_modules_of_a_rebuilt_model_are_modules_again() -> None:
    model, inputs = build("shufflenet-v2")
    small = trace(model, inputs).shrink(model, {"head.0": [0], "units.0.branch.0.0": [1, 2]})
    depthwise = small.get_submodule("units.0.branch.1.0")
    if type(small) is type(model):
        assert depthwise.groups == 6
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (6, 6, 6)
    assert isinstance(small.get_submodule("head.1"), nn.BatchNorm2d)
    assert small.get_submodule("head.1").num_features == 19


def test_dropout_of_a_rebuilt_model_is_alive_in_training() -> None:
    model, inputs = build("transformer")
    small = trace(model, inputs).shrink(model, {"encoder.layers.0.self_attn": [0]})
    assert isinstance(small, torch.fx.GraphModule)
    assert torch.equal(small(inputs), small(inputs))
    small.train()
    assert not torch.equal(small(inputs), small(inputs))
    assert isinstance(copy.deepcopy(small), torch.fx.GraphModule)


def test_cached_generation_is_put_aside_while_tracing_only() -> None:
    model, inputs = build("hf-gpt2")
    assert model.config.use_cache
    graph = trace(model, inputs)
    small = graph.shrink(model, {graph.groups[1].name: [0]})
    assert model.config.use_cache
    assert small.config.use_cache
    assert small(**inputs).past_key_values is not None


def test_a_rebuilt_graph_makes_its_tensors_where_the_model_is() -> None:
    model, inputs = build("hf-bert")
    graph = trace(model, inputs)
    module = resized(graph.program, graph._walk, np.zeros(graph._walk.constraints.count, dtype=np.bool_))
    rebuilt = rebuild(module, copy.deepcopy(model).to("meta"))
    makers = [node for node in rebuilt.graph.nodes if "arange" in str(node.target)]
    assert len(makers) > 0
    assert all(isinstance(node.kwargs["device"], torch.fx.Node) for node in makers)  # that of the inputs
    assert rebuilt(**{key: tensor.to("meta") for key, tensor in inputs.items()}).logits.device.type == "meta"


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"frist": [0]}, "No group 'frist'"),
        ({"first": [8]}, "units 0 to 7, got 8"),
        ({"first": [-1]}, "units 0 to 7, got -1"),
        ({"first": [2, 2]}, "named twice"),
        ({"first": list(range(8))}, "one has to remain"),
    ],
)
def test_bad_units_are_named(mlp: tuple[nn.Module, Tensor, Graph], units: dict[str, list[int]], message: str) -> None:
    model, _, graph = mlp
    for change in (graph.zero, graph.shrink):
        with pytest.raises(TransformError, match=message):
            change(model, units)


def test_another_model_is_refused(mlp: tuple[nn.Module, Tensor, Graph]) -> None:
    _, _, graph = mlp
    with pytest.raises(TransformError, match=r"no parameter 'first\.weight'"):
        graph.shrink(nn.Linear(4, 2), {"first": [0]})
    other = _MLP()
    other.first, other.second = nn.Linear(4, 9), nn.Linear(9, 6)
    with pytest.raises(TransformError, match=r"first\.weight has the shape \(9, 4\), but 8 entries"):
        graph.zero(other, {"first": [0]})


def test_shrunk_models_must_be_traced_again(mlp: tuple[nn.Module, Tensor, Graph]) -> None:
    model, _, graph = mlp
    with pytest.raises(TransformError, match="Trace it again"):
        graph.shrink(graph.shrink(model, {"first": [0]}), {"first": [0]})


def test_nothing_to_prune_is_an_error_that_names_what_stopped_it() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    graph = trace(model, torch.randn(2, 4))
    assert graph.groups == ()
    with pytest.raises(NothingToPruneError, match=r"0: aten\.softmax\.int \(softmax runs over this dimension\)"):
        graph.require_groups()
    with pytest.raises(TransformError, match="Its groups are: none"):
        graph.shrink(model, {"0": [0]})


def test_removing_nothing_gives_a_copy(mlp: tuple[nn.Module, Tensor, Graph]) -> None:
    model, x, graph = mlp
    small = graph.shrink(model, {})
    assert small is not model
    assert torch.equal(outputs(small, x)[0], outputs(model, x)[0])


def test_a_model_that_does_not_trace_is_an_error() -> None:
    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="Stubborn cannot be traced"):
        trace(Stubborn(), torch.randn(2, 3))


def test_repr_tells_groups_and_what_stays(mlp: tuple[nn.Module, Tensor, Graph]) -> None:
    lines = repr(mlp[2]).splitlines()
    assert lines == [
        "Graph of 14 units in 2 groups",
        "  Group('first', 8 units, 3 places)",
        "  Group('second', 6 units, 3 places)",
        "  last stays: output: it is an output of the model",
    ]


@torch.library.custom_op("netwright_tests::swish", mutates_args=())
def _swish(x: Tensor, beta: Tensor) -> Tensor:
    """A stranger's activation with one parameter per channel."""
    return x * torch.sigmoid(x * beta.view(1, -1, 1, 1))


@_swish.register_fake
def _(x: Tensor, beta: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.beta = nn.Parameter(torch.rand(8))
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.ops.netwright_tests.swish(self.conv(x), self.beta).mean((2, 3)))


def test_an_unknown_operation_stops_and_is_named_until_it_is_taught() -> None:
    model, x = _Strange(), torch.randn(2, 3, 6, 6)
    graph = trace(model, x)
    assert graph.groups == ()
    stopped = {item.name: (item.operation, item.reason) for item in graph.blocked}
    assert stopped["conv"] == ("netwright_tests.swish.default", "no rule is registered for it")

    def swish(call: Call) -> Value:
        x, beta = call["x"], call["beta"]
        if len(x.axes) != 4:
            raise UnprovableError("it knows images only")
        call.tie(x.axes[1], beta.axes[0])
        return Value(x.axes, x.null)

    register_rule(torch.ops.netwright_tests.swish, swish)
    graph = trace(model, x)
    assert [(group.name, group.size, group.exact) for group in graph.groups] == [("conv", 8, True)]
    units = {"conv": [1, 4, 7]}
    small = graph.shrink(model, units)
    assert small.beta.shape == (5,)
    assert torch.allclose(outputs(small, x)[0], outputs(graph.zero(model, units), x)[0], atol=1e-5)


@torch.library.custom_op("netwright_tests::double", mutates_args=())
def _double(x: Tensor) -> Tensor:
    return x * 2


@_double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_ready_made_rules_serve_strangers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.ops.netwright_tests.double(self.a(x)))

    register_rule("netwright_tests::double", pointwise)
    assert [group.name for group in trace(Model(), torch.randn(2, 3)).groups] == ["a"]


def test_a_wrong_rule_freezes_instead_of_breaking() -> None:
    @torch.library.custom_op("netwright_tests::halves", mutates_args=())
    def halves(x: Tensor) -> Tensor:
        return x[:, ::2].clone()

    @halves.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1] // 2)

    register_rule("netwright_tests::halves", lambda call: call["x"])  # claims that nothing changes

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.ops.netwright_tests.halves(self.a(x)))

    graph = trace(Model(), torch.randn(2, 3))
    assert graph.groups == ()
    assert {item.reason for item in graph.blocked if item.name == "a"} == {
        "its rule does not fit the shape of its result"
    }


@torch.library.custom_op("netwright_tests::backwards", mutates_args=())
def _backwards(x: Tensor) -> Tensor:
    return x.flip(-1)


@_backwards.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_rule_that_lies_is_found_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.ops.netwright_tests.backwards(self.a(x)))

    register_rule("netwright_tests::backwards", follow)  # in truth the order is reversed
    model = Model()
    graph = trace(model, torch.randn(2, 3))
    with pytest.raises(TransformError, match="Model cannot be shrunk: without these units its outputs differ"):
        graph.shrink(model, {"a": [0, 1]})


@pytest.mark.parametrize(("op", "fn"), [("relu", pointwise), (F.relu, pointwise), ("aten::relu", None)])
def test_register_rule_refuses_nonsense(op: object, fn: object) -> None:
    with pytest.raises(TraceError):
        register_rule(op, fn)  # type: ignore[arg-type]
