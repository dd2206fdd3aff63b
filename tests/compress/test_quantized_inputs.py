"""Quantization of networks whose inputs have names with capitals, are nested, or hold values that are not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from netwright.compress import GETA, OMPQ, EasyQuant, Int8, LowRank, MetaAug, PruneBranches, fastest_int8
from netwright.compress._input_change import Augmented, parts, whole_of
from netwright.core.artifact import OnnxModule, export_onnx
from netwright.core.data import Data, call
from netwright.core.errors import NetwrightError, TransformError
from netwright.core.recipe import Recipe
from netwright.core.task import Task


class Capitals(nn.Module):
    """A residual network of an input ``X`` and another ``x``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(8, 16), nn.Linear(8, 16)
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def compute(self, large: Tensor, small: Tensor) -> Tensor:
        h = torch.relu(self.first(large) - 3 * self.other(small))
        return self.head(h + self.b(torch.relu(self.a(h))))

    exec("def forward(self, X, x): return self.compute(X, x)")


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, left: Tensor, pair: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        return self.head(torch.relu(self.a(left) + self.b(pair[0]) + pair[1]["scale"]))


class Items:
    """Inputs made of random rows by a function, every target its index's remainder."""

    def __init__(self, make: Any) -> None:
        self.make, self.rows = make, torch.randn(32, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.rows[index]), index % 4


def task_of(model: nn.Module, make: Any) -> Task:
    recipe = Recipe(epochs=1, batch_size=16)
    data = Data(Items(make), Items(make), Items(make))
    return Task("made", model, data, nn.functional.cross_entropy, lambda outputs, targets: 0.0, recipe=recipe)


def named(row: Tensor) -> dict[str, Tensor]:
    return {"X": row[:8], "x": row[8:]}


def nested(row: Tensor) -> tuple[Any, ...]:
    return row[:8], (row[8:12], {"scale": row[12:13]})


@pytest.mark.parametrize("method", [Int8(), EasyQuant(bits=7), OMPQ(average_bits=8.0), MetaAug(bits=8), GETA(ratio=0)])
def test_inputs_with_capitals(method: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Capitals().eval()
    task = task_of(model, named)
    inputs = task.example(16)
    rounded = method(model, task, budget=0)
    with torch.no_grad():
        exact, found = model(**inputs), rounded(**inputs)
    assert float((found - exact).norm()) < 0.1 * float(exact.norm())  # the two inputs swapped change all of it
    export_onnx(rounded, inputs, tmp_path / "made.onnx")
    torch.testing.assert_close(OnnxModule(tmp_path / "made.onnx")(**inputs), found, atol=0.02, rtol=0)


def test_branches_and_types_of_a_network_with_capitals() -> None:
    torch.manual_seed(0)
    model = Capitals().eval()
    task = task_of(model, named)
    inputs = task.example(16)
    thinner = PruneBranches(0.9)(model, task)
    with torch.no_grad():
        hidden = torch.relu(model.first(inputs["X"]) - 3 * model.other(inputs["x"]))
        torch.testing.assert_close(thinner(**inputs), model.head(hidden))
    assert fastest_int8(model, task, seconds=0.02).table


def test_nested_inputs_are_changed_where_they_are_tensors() -> None:
    torch.manual_seed(0)
    model = Nested().eval()
    task = task_of(model, nested)
    inputs = task.example(16)
    found = MetaAug(bits=8, calibration_items=16)(model, task, budget=0.5)
    with torch.no_grad():
        exact = call(model, inputs)
        assert float((call(found, inputs) - exact).norm()) < 0.3 * float(exact.norm())


def test_parts_of_nested_inputs_make_them_again() -> None:
    inputs = (torch.randn(6, 8), [torch.arange(6), {"text": "as it is", "wide": torch.randn(6, 3)}])
    pieces = parts(inputs)
    again = whole_of(inputs, pieces)
    assert again[1][1]["text"] == "as it is"
    assert torch.equal(again[0], inputs[0])
    assert torch.equal(again[1][1]["wide"], inputs[1][1]["wide"])
    net = Augmented(nn.Identity(), nn.Identity(), inputs, 4, 1.0)
    varied, moved = net.vary(inputs)
    assert len(moved) == 2
    assert not torch.equal(varied[0], inputs[0])
    assert not torch.equal(varied[1][1]["wide"], inputs[1][1]["wide"])
    assert torch.equal(varied[1][0], inputs[1][0])
    assert varied[1][1]["text"] == "as it is"


@pytest.mark.parametrize("method", [EasyQuant(), MetaAug(), GETA(ratio=0), Int8()])
def test_activations_that_are_not_finite_are_told_of_by_the_method_itself(method: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    inputs = torch.randn(8, 8)
    inputs[0, 0] = torch.nan
    data = Data(*(TensorDataset(inputs, torch.zeros(8).long()) for _ in range(3)))
    task = Task("made", model, data, nn.functional.cross_entropy, lambda outputs, targets: 0.0)
    with pytest.raises(TransformError, match=f"^{type(method).__name__}: the activations at"):
        method(model, task, budget=0)


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (OMPQ(), Int8(), r"^Int8: .*rounded or held in codebooks already: leave one of the two steps out"),
        (Int8(), GETA(ratio=0), r"^GETA: .*rounded or held in codebooks already"),
        (Int8(), LowRank(0.2), r"rounded or held in codebooks already. Take this step before that one"),
    ],
)
def test_a_second_step_on_rounded_weights_is_told_why_not(first: Any, then: Any, said: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    data = Data(*(TensorDataset(torch.randn(8, 8), torch.zeros(8).long()) for _ in range(3)))
    task = Task("made", model, data, nn.functional.cross_entropy, lambda outputs, targets: 0.0)
    rounded = first(model, task)
    with pytest.raises(NetwrightError, match=said):
        then(rounded, task, budget=0)


def test_transposed_convolutions_alone_are_told_why_not() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(1, 4, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = Data(*(TensorDataset(torch.randn(8, 1, 4, 4), torch.zeros(8).long()) for _ in range(3)))
    task = Task("made", model, data, nn.functional.cross_entropy, lambda outputs, targets: 0.0)
    with pytest.raises(TransformError, match=r"Transposed convolutions are not rounded\. Leave this step out"):
        Int8()(model, task)
