"""What was cut where."""

import pytest
import torch
from subjects import prune, subject
from torch import Tensor, nn

from netwright.core.graph.export import export_model
from netwright.core.graph.macs import total_macs
from netwright.core.task import load_task
from netwright.workshop.evaluation import structure
from netwright.workshop.layers import layer_table


def test_one_row_for_each_layer_with_both_shapes() -> None:
    base = subject()
    smaller = structure(base.model, base.task, (prune(first=0.5, second=0.75),), 0)
    rows = {row["layer"]: row for row in layer_table(base.model, smaller, base.task.example(2), "int8")}
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
    rows = layer_table(base.model, base.model, base.task.example(2), None)
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
    first, twice = layer_table(model, model, torch.randn(2, 4), None)
    assert (first["layer"], first["baseline_parameters"], first["baseline_macs"]) == ("first", 24, 24)
    assert (twice["layer"], twice["baseline_parameters"]) == ("twice", 42)
    assert twice["baseline_macs"] == 2 * 36


def test_a_network_that_is_one_layer() -> None:
    model = nn.Linear(4, 2).eval()
    (row,) = layer_table(model, model, torch.randn(2, 4), None)
    assert (row["layer"], row["baseline_shape"], row["baseline_parameters"]) == ("Linear", [2, 4], 10)
    assert row["baseline_macs"] == 8


@pytest.mark.parametrize("name", ["breast-cancer"])
def test_built_in_networks_add_up(name: str) -> None:
    task = load_task(name)
    model = task.build(0).eval()
    rows = layer_table(model, model, task.example(2), None)
    assert sum(row["baseline_parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
