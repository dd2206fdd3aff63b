"""What was cut where."""

import pytest
import torch
from subjects import INT8, prune, subject
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.graph.export import export_model
from netwright.core.graph.macs import total_macs
from netwright.core.task import Task, load_task
from netwright.workshop.evaluation import structure
from netwright.workshop.layers import layer_table, precisions
from netwright.workshop.point import Step


def test_one_row_for_each_layer_with_both_shapes() -> None:
    base = subject()
    smaller = structure(base.model, base.task, (prune(first=0.5, second=0.75),), 0)
    steps = (prune(first=0.5, second=0.75), INT8)
    built = INT8.build()(smaller, base.task)
    stored = precisions(built, steps)
    rows = {row["layer"]: row for row in layer_table(base.model, smaller, base.task.example(2), stored)}
    assert list(rows) == ["0", "1", "3", "4", "8"]
    second = rows["3"]
    assert second["kind"] == "Conv2d"
    assert second["baseline_shape"] == [32, 16, 3, 3]
    assert second["chosen_shape"] == [8, 8, 3, 3]
    assert second["baseline_macs"] == 32 * 16 * 9 * 16
    assert second["chosen_macs"] == 8 * 8 * 9 * 16
    assert second["baseline_parameters"] == 32 * 16 * 9 + 32
    assert second["chosen_parameters"] == 8 * 8 * 9 + 8
    assert {name: row["precision"] for name, row in rows.items()} == {
        "0": "int8",
        "1": "float32",
        "3": "int8",
        "4": "float32",
        "8": "int8",
    }
    assert rows["1"]["baseline_macs"] == 0


def test_the_baseline_against_itself_changes_nothing() -> None:
    base = subject()
    rows = layer_table(base.model, base.model, base.task.example(2), {})
    for row in rows:
        assert row["baseline_shape"] == row["chosen_shape"]
        assert row["baseline_macs"] == row["chosen_macs"]
        assert row["precision"] == "float32"
    assert sum(row["baseline_macs"] for row in rows) == total_macs(export_model(base.model, base.task.example(2)))
    assert sum(row["baseline_parameters"] for row in rows) == sum(p.numel() for p in base.model.parameters())


class Bare(nn.Module):
    """A layer without a bias, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, bias=False)
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.first(x)))


def test_a_layer_without_bias_and_one_used_twice() -> None:
    model = Bare().eval()
    first, twice = layer_table(model, model, torch.randn(2, 4), {})
    assert (first["layer"], first["baseline_parameters"], first["baseline_macs"]) == ("first", 24, 24)
    assert (twice["layer"], twice["baseline_parameters"]) == ("twice", 42)
    assert twice["baseline_macs"] == 2 * 36


def test_a_network_that_is_one_layer() -> None:
    model = nn.Linear(4, 2).eval()
    (row,) = layer_table(model, model, torch.randn(2, 4), {})
    assert (row["layer"], row["baseline_shape"], row["baseline_parameters"]) == ("Linear", [2, 4], 10)
    assert row["baseline_macs"] == 8


@pytest.mark.parametrize("name", ["breast-cancer"])
def test_built_in_networks_add_up(name: str) -> None:
    task = load_task(name)
    model = task.build(0).eval()
    rows = layer_table(model, model, task.example(2), {})
    assert sum(row["baseline_parameters"] for row in rows) == sum(p.numel() for p in model.parameters())


class Mixed(nn.Module):
    """Layers that can be stored in few bits, and ones that multiply and stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.last = nn.Conv2d(8, 2, 3)
        self.hidden = nn.Linear(2 * 14 * 14, 32)
        self.same = nn.Linear(32, 32)
        self.again = nn.Linear(32, 32)
        self.again.weight = self.same.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(self.last(self.up(self.norm(self.first(x)))).flatten(1))
        return self.again(self.same(hidden.relu()).relu())


class TiedHead(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 24)
        self.body = nn.Linear(24, 24)
        self.head = nn.Linear(24, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)).relu())


def stored_by(model: nn.Module, inputs: Tensor, step: Step) -> dict[str, str]:
    """How the layers of ``model`` are stored after ``step``, as the table says."""
    parts = [TensorDataset(inputs + part, torch.zeros(len(inputs)).long()) for part in range(3)]
    task = Task("mixed", model.eval(), Data(*parts), nn.functional.cross_entropy, lambda outputs, targets: 0.0)
    built = step.build()(model, task, budget=0.0)
    rows = layer_table(model, model, task.example(2), precisions(built, (step,)))
    return {row["layer"]: row["precision"] for row in rows}


@pytest.mark.parametrize(
    ("step", "label", "coded"),
    [
        (INT8, "int8", {"same", "again"}),
        (Step("netwright.compress:Int8", {"weight_bits": 4}), "int8, 4-bit weights", {"same", "again"}),
        (Step("netwright.compress:Codebooks", {"bits": 3, "groups": 1}), "3-bit codebook", set()),
    ],
)
def test_a_layer_that_stays_in_float_is_not_called_otherwise(step: Step, label: str, coded: set[str]) -> None:
    """Transposed convolutions stay whole; so do shared weights, with codebooks."""
    torch.manual_seed(0)
    found = stored_by(Mixed(), torch.randn(8, 1, 8, 8), step)
    low = {"first", "last", "hidden", *coded}
    assert found == {
        name: label if name in low else "float32" for name in ("first", "norm", "up", "last", "hidden", "same", "again")
    }


def test_a_head_that_shares_an_embedding_stays_in_float() -> None:
    torch.manual_seed(0)
    found = stored_by(TiedHead(), torch.arange(8).view(4, 2) % 13, INT8)
    assert found == {"embedding": "float32", "body": "int8", "head": "float32"}


def test_a_network_that_is_one_layer_is_named_too() -> None:
    assert stored_by(nn.Linear(4, 2), torch.randn(8, 4), INT8) == {"Linear": "int8"}
