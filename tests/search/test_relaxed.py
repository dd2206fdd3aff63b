"""Mixed operations: the mixture against a naive sum, what is derived, networks of one's own, the loop, bad input."""

import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.errors import NonFiniteLossError, RunDirectoryError, SettingError, TaskError
from netwright.core.task import Task
from netwright.search.amended_darts import AmendedDARTS
from netwright.search.darts import DARTS
from netwright.search.manas import MANAS
from netwright.search.rarts import RARTS
from netwright.search.relaxed import (
    Mixed,
    alphas,
    choices,
    derive,
    mixed,
    on_path,
    skip_share,
    weights,
)
from netwright.search.relaxed_cells import OPERATIONS, DartsCell, cell_network

torch.set_num_threads(1)
SEARCHES = [DARTS, AmendedDARTS, RARTS, MANAS]


def edge(width=4, **more):
    return Mixed({"skip": nn.Identity(), "linear": nn.Linear(width, width), "tanh": nn.Tanh()}, **more)


def network():
    return nn.Sequential(edge(), nn.Dropout(0.2), edge(), nn.BatchNorm1d(4), nn.Linear(4, 3))


class Recording(TensorDataset):
    """Counts what is read."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


def task(count=40, model=network, split=TensorDataset):
    generator = torch.Generator().manual_seed(0)

    def part(size):
        x = torch.randn(size, 4, generator=generator)
        return split(x, x.abs()[:, :3].argmax(1))

    def accuracy(outputs, targets):
        return float((outputs.argmax(1) == targets).float().mean())

    return Task("small", model, Data(part(count), part(16), part(16)), nn.functional.cross_entropy, accuracy)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=3, max_size=3), st.integers(1, 5))
def test_mixture_is_the_sum_weighed_by_softmax(values, count):
    part = edge().double()
    with torch.no_grad():
        part.alpha.copy_(torch.tensor(values))
    x = torch.randn(count, 4, dtype=torch.float64)
    shares = torch.tensor(values, dtype=torch.float64).exp()
    linear = part.operations[1]
    naive = (shares[0] * x + shares[1] * (x @ linear.weight.T + linear.bias) + shares[2] * x.tanh()) / shares.sum()
    torch.testing.assert_close(part(x), naive)
    assert torch.equal(derive(part)(x), [x, linear(x), x.tanh()][int(torch.tensor(values).argmax())])


@settings(max_examples=20, deadline=None)
@given(st.permutations(["skip", "linear", "tanh"]).map(lambda order: order[:2]))
def test_a_path_is_the_network_that_is_derived(path):
    torch.manual_seed(0)
    model = network().eval()
    chosen = dict(zip(mixed(model), path, strict=True))
    x = torch.randn(5, 4)
    plain = derive(model, chosen)
    with on_path(model, chosen):
        assert torch.equal(model(x), plain(x))
    assert not torch.equal(model(x), plain(x))
    assert all(part.path is None for part in mixed(model).values())


def test_derived_network_loads_without_netwright():
    plain = derive(network(), {"0": "linear", "2": "tanh"})
    modules = set()

    class Watching(pickle.Unpickler):
        def find_class(self, module, name):
            modules.add(module)
            return super().find_class(module, name)

    Watching(io.BytesIO(pickle.dumps(plain))).load()
    assert modules
    assert not any(module.startswith("netwright") for module in modules)


class Own(nn.Module):
    """A network of one's own: an edge used twice, a shared alpha, a choice within a choice."""

    def __init__(self):
        super().__init__()
        self.first = edge()
        self.again = self.first
        self.tied = edge(alpha=self.first.alpha)
        self.outer = Mixed({"skip": nn.Identity(), "deep": nn.Sequential(edge(), nn.ReLU())})
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.outer(self.again(self.first(x)) + self.tied(x)))


def test_a_network_of_ones_own_takes_part_as_it_is():
    model = Own()
    assert list(mixed(model)) == ["first", "tied", "outer", "outer.operations.1.0"]
    assert list(alphas(model)) == ["first", "outer", "outer.operations.1.0"]
    assert len(weights(model)) == len(list(model.parameters())) - 3
    plain = derive(model, {"first": "linear", "tied": "tanh", "outer": "deep", "outer.operations.1.0": "linear"})
    assert not any(isinstance(part, Mixed) for part in plain.modules())
    assert plain.first is plain.again
    before = model.first.operations[1].weight
    assert torch.equal(plain.first.weight, before)
    assert plain.first.weight is not before
    assert isinstance(plain.outer[0], nn.Linear)
    result = RARTS(epochs=1, alpha_lr=0.1).search(model, task())
    assert set(result.choices) == set(mixed(model))
    assert torch.isfinite(result.network(torch.randn(2, 4))).all()


def test_share_of_skips():
    model = nn.Sequential(edge(), edge(), Mixed({"none": nn.Identity(), "tanh": nn.Tanh()}), edge())
    with torch.no_grad():
        model[1].alpha[1] = 1.0
        model[3].alpha[2] = 1.0
    assert choices(model) == {"0": "skip", "1": "linear", "2": "none", "3": "tanh"}
    assert skip_share(model) == 0.5


def test_cell_sums_over_all_paths():
    cell = DartsCell(3, nodes=4)
    x = torch.randn(2, 3, 5, 5)
    names = [f"edges.{number}" for number in range(6)]
    with on_path(cell, dict.fromkeys(names, "skip")):
        assert torch.equal(cell(x), 4 * x)
    with on_path(cell, dict.fromkeys(names, "none")):
        assert torch.equal(cell(x), 0 * x)
    for kind, (first, last) in itertools.product(OPERATIONS, [(0, 1), (5, 3)]):
        with on_path(cell, {**dict.fromkeys(names, "none"), f"edges.{first}": kind, f"edges.{last}": kind}):
            assert cell(x).shape == x.shape
    model = cell_network(1, 10, width=4, stages=(2, 1), stride=2)
    assert len(mixed(model)) == 18
    assert len(alphas(model)) == 6
    assert model(torch.randn(2, 1, 12, 12)).shape == (2, 10)


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_search_is_determined_by_its_seed_and_leaves_the_rest_alone(kind):
    model, problem, search = network(), task(split=Recording), kind(epochs=2, batch_size=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    told = []
    result = search.search(model, problem, seed=1, progress=lambda share, text: told.append((share, text)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    same, other = search.search(model, problem, seed=1), search.search(model, problem, seed=2)
    for name, value in result.network.state_dict().items():
        assert torch.equal(value, same.network.state_dict()[name])
    assert result.scores == same.scores
    assert not torch.equal(result.alphas["0"][1:], other.alphas["0"][1:])
    assert result.alphas["0"].shape == (3, 3)
    assert (result.steps, len(result.scores)) == (4, 2)
    assert [share for share, _ in told] == [0.25, 0.5, 0.75, 1.0]
    assert "score" in told[-1][1]
    assert problem.data.val.read == 6 * 16
    assert problem.data.test.read == 0


@pytest.mark.parametrize("kind", SEARCHES)
def test_an_interrupted_search_ends_as_one_that_was_not(kind, tmp_path):
    search, problem, path = kind(epochs=3, batch_size=8), task(), tmp_path / "search.pt"

    def stop(share, _text):
        if share > 0.7:
            raise KeyboardInterrupt

    model = network()
    with pytest.raises(KeyboardInterrupt):
        search.search(model, problem, checkpoint=path, progress=stop)
    resumed, whole = search.search(model, problem, checkpoint=path), search.search(model, problem)
    assert resumed.scores == whole.scores
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name])
    assert all(torch.equal(values, resumed.alphas[name]) for name, values in whole.alphas.items())
    with pytest.raises(RunDirectoryError, match="seed was 0, now it is 1"):
        search.search(model, problem, seed=1, checkpoint=path)
    with pytest.raises(RunDirectoryError, match="no folder"):
        search.search(model, problem, checkpoint=tmp_path / "no" / "x")


@pytest.mark.parametrize("kind", SEARCHES)
def test_bad_input(kind):
    with pytest.raises(SettingError, match="Sequential has no Mixed part"):
        kind().search(nn.Sequential(nn.Linear(4, 3)), task())
    with pytest.raises(SettingError, match="Mixed has no trainable weights beside the alphas"):
        kind().search(Mixed({"skip": nn.Identity(), "relu": nn.ReLU()}), task())
    with pytest.raises(TaskError, match="needs two"):
        kind().search(network(), task(count=1))
    broken = task(model=lambda: nn.Sequential(edge(), nn.Linear(4, 3)))
    broken.data.train.tensors[0][:] = torch.nan
    with pytest.raises(NonFiniteLossError, match="loss is nan at step 1 of 100"):
        kind(batch_size=8).search(broken.build(), broken)
    for name, value in [("epochs", 0), ("epochs", 1.5), ("lr", -0.1), ("momentum", 1.0), ("weight_decay", -1.0)]:
        with pytest.raises(SettingError, match=f"{kind.__name__}: {name} must be"):
            kind(**{name: value})


def test_bad_edges():
    with pytest.raises(SettingError, match=r"at least two operations, got \['skip'\]"):
        Mixed({"skip": nn.Identity()})
    with pytest.raises(SettingError, match=r"'f' must be an nn\.Module, got function"):
        Mixed({"skip": nn.Identity(), "f": lambda x: x})
    with pytest.raises(SettingError, match=r"shape \(3,\)"):
        edge(alpha=nn.Parameter(torch.zeros(2)))
    with pytest.raises(SettingError, match=r"'a' gave \(2, 4\), 'b' gave \(2, 3\)"):
        Mixed({"a": nn.Identity(), "b": nn.Linear(4, 3)})(torch.zeros(2, 4))
    with pytest.raises(SettingError, match="no Mixed at 'x'"):
        derive(network(), {"x": "skip"})
    with pytest.raises(SettingError, match="no operation 'conv'"):
        derive(network(), {"0": "conv"})
    with pytest.raises(SettingError, match="no Mixed at 'x'"), on_path(network(), {"x": "skip"}):
        pass
    with pytest.raises(SettingError, match="no operation 'conv'"), on_path(network(), {"0": "conv"}):
        pass
    with pytest.raises(SettingError, match="No operation 'conv_9x9'"):
        cell_network(1, 10, kinds=("skip", "conv_9x9"))
    with pytest.raises(SettingError, match="6 edges, got 1 alphas"):
        DartsCell(4, [nn.Parameter(torch.zeros(5))])
