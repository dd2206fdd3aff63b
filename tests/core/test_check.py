"""What is said about tasks that cannot be worked on."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset, TensorDataset

from netwright.core.check import check_task
from netwright.core.data import Data
from netwright.core.errors import DataError, TaskError
from netwright.core.overlap import check_overlap
from netwright.core.score import accuracy, r2
from netwright.core.task import Task, builtin_tasks, load_task


def blobs(size: int = 40, seed: int = 0, features: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(size, features, generator=generator), torch.randint(3, (size,), generator=generator)
    )


def make_task(train: Any = None, val: Any = None, test: Any = None, **changes: Any) -> Task:
    data = Data(*(given or blobs(seed=seed) for seed, given in enumerate((train, val, test))))
    settings: dict[str, Any] = {
        "name": "t",
        "model": lambda: nn.Linear(4, 3),
        "data": data,
        "loss": functional.cross_entropy,
        "score": accuracy,
    }
    return Task(**(settings | changes))


class Listed(Dataset[Any]):
    """Items of any kind."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def listed(size: int = 10, seed: int = 0) -> list[Any]:
    return [blobs(size, seed)[index] for index in range(size)]


@pytest.mark.parametrize("name", [name for name in builtin_tasks() if name != "fashion-mnist"])
def test_built_in_tasks_are_fine(name: str) -> None:
    check_task(load_task(name))


def test_a_sound_task_leaves_no_trace() -> None:
    task = make_task()
    state = torch.get_rng_state()
    check_task(task)
    assert torch.equal(state, torch.get_rng_state())
    trained = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    check_task(make_task(model=trained))
    assert trained.training
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert trained[0].weight.grad is None


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite(split: str, bad: float) -> None:
    data = blobs(3000, seed=9)
    data.tensors[0][2025, 1] = bad
    with pytest.raises(DataError, match=rf"Data\.{split}\[2025\]"):
        check_task(make_task(**{split: data}))
    items = listed(seed=9)
    items[7] = (torch.tensor([0.0, bad, 0, 0]), items[7][1])
    with pytest.raises(DataError, match=rf"The input of Data\.{split}\[7\] has a value that is NaN or infinite"):
        check_task(make_task(**{split: Listed(items)}))


def test_a_target_that_is_not_finite() -> None:
    items = [(x, torch.tensor([math.nan if index == 9 else 1.0 + index])) for index, (x, _) in enumerate(listed())]
    splits = [Listed([(x + seed, y) for x, y in listed(seed=seed)]) for seed in (1, 2)]
    floats = [Listed([(x, torch.tensor([float(y)])) for x, y in split.items]) for split in splits]
    with pytest.raises(DataError, match=r"The target of Data\.train\[9\]"):
        check_task(make_task(Listed(items), *floats, loss=functional.mse_loss))


@pytest.mark.parametrize("index", [0, 4, 9])
@pytest.mark.parametrize("split", ["val", "test"])
def test_an_item_of_another_shape(split: str, index: int) -> None:
    items = listed(seed=5)
    items[index] = (torch.zeros(5), items[index][1])
    with pytest.raises(DataError, match=rf"Data\.{split}\[{index}\] is \(5 float32, .*Data\.train\[0\] is \(4 float32"):
        check_task(make_task(**{split: Listed(items)}))


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (torch.zeros(4), "must be a pair"),
        ((torch.zeros(4), torch.tensor(1), 2), "must be a pair"),
        ((torch.zeros(4).double(), torch.tensor(1)), "4 float64"),
        ((torch.zeros(4), "cat"), "a str"),
        ((torch.zeros(4), torch.tensor(3)), "target 3, but the model has 3 outputs"),
        (KeyError("image"), "raised KeyError"),
    ],
)
def test_other_bad_items(item: Any, said: str) -> None:
    items = listed()
    items[6] = item
    with pytest.raises(DataError, match=r"Data\.train\[6\].*" + said):
        check_task(make_task(Listed(items)))


def test_models_losses_and_scores_that_do_not_work() -> None:
    with pytest.raises(TaskError, match=r"Linear does not accept a batch of inputs of 8x4 float32: RuntimeError"):
        check_task(make_task(model=lambda: nn.Linear(5, 3)))
    with pytest.raises(TaskError, match="building the model failed: ZeroDivisionError"):
        check_task(make_task(model=lambda: nn.Linear(4 // 0, 3)))
    with pytest.raises(TaskError, match=r"output\(result\) raised KeyError"):
        check_task(make_task(output=lambda result: {}["x"]))
    with pytest.raises(TaskError, match=r"shape \(8,\)"):
        check_task(make_task(loss=lambda o, t: functional.cross_entropy(o, t, reduction="none")))
    with pytest.raises(TaskError, match="first training batch is nan"):
        check_task(make_task(loss=lambda o, t: (o * math.nan).sum()))
    with pytest.raises(TaskError, match="does not depend on any parameter"):
        check_task(make_task(loss=lambda o, t: torch.tensor(1.0)))
    with pytest.raises(TaskError, match="score is nan"):
        check_task(make_task(score=lambda o, t: math.nan))
    with pytest.raises(TaskError, match="must be a number, got list"):
        check_task(make_task(score=lambda o, t: [1.0]))


def test_own_fit_and_evaluate_are_not_called() -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    check_task(make_task(loss=None, score=None, fit=never, evaluate=never))


def test_subsets_of_one_dataset_must_not_share_an_index() -> None:
    whole = blobs(100)
    outer = Subset(whole, range(50, 100))
    apart = Data(Subset(whole, range(50)), Subset(outer, range(25)), Subset(outer, range(25, 50)))
    check_overlap(apart)
    with pytest.raises(DataError, match=r"Data\.val and Data\.test overlap: both hold 1 items .* indices 74\."):
        check_overlap(Data(apart.train, apart.val, Subset(outer, range(24, 50))))
    with pytest.raises(DataError, match=r"Data\.train and Data\.val overlap: both hold 10"):
        check_overlap(Data(whole, Subset(whole, range(10)), blobs(seed=3)))


def test_copies_of_the_training_data_in_another_split() -> None:
    train, val, test = blobs(200, 0), blobs(60, 1), blobs(60, 2)
    test.tensors[0][10:20] = train.tensors[0][100:110]
    with pytest.raises(DataError, match=r"Data\.train and Data\.test overlap: 10 of 60 .*test\[10\] = train\[100\]"):
        check_task(make_task(train, val, test))
    with pytest.raises(DataError, match=r"Data\.val and Data\.test overlap"):
        check_overlap(Data(blobs(200, 9), test, TensorDataset(test.tensors[0].clone(), test.tensors[1])))
    large = blobs(20_000, 4)
    again = TensorDataset(large.tensors[0][:2000].clone(), large.tensors[1][:2000])
    with pytest.raises(DataError, match=r"Data\.train and Data\.val overlap"):
        check_overlap(Data(large, again, test))


def test_accidental_and_natural_duplicates_are_no_overlap() -> None:
    train, val, test = blobs(200, 0), blobs(100, 1), blobs(100, 2)
    test.tensors[0][10:14] = train.tensors[0][100:104]  # 4%
    check_overlap(Data(train, val, test))
    generator = torch.Generator().manual_seed(0)
    coarse = [TensorDataset(torch.randint(3, (80, 3), generator=generator), torch.zeros(80)) for _ in range(3)]
    check_overlap(Data(*coarse))


def test_regression_and_dict_inputs() -> None:
    def items(seed: int) -> Listed:
        return Listed([({"x": x, "scale": 1.5}, float(y) + index / 7) for index, (x, y) in enumerate(listed(20, seed))])

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            result: Tensor = self.layer(x)[:, 0] * scale.float()
            return result.double()

    check_task(make_task(*map(items, range(3)), model=Named, loss=functional.mse_loss, score=r2))


def masks(seed: int, least: int) -> Listed:
    """Images and masks of 21 classes, some places of which are not to count; one mask has a class of its own."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(12):
        mask = torch.randint(21, (4, 4), generator=generator)
        mask[0] = 255
        items.append((torch.randn(3, 4, 4, generator=generator), mask))
    items[9][1][2, 3] = least
    return Listed(items)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(ignore_index=255), nn.CrossEntropyLoss(torch.ones(21), None, 255)]
)
def test_a_class_that_the_loss_ignores(loss: nn.Module) -> None:
    def task(least: int) -> Task:
        splits = (masks(seed, least) for seed in range(3))
        return make_task(*splits, model=lambda: nn.Conv2d(3, 21, 1), loss=loss)

    check_task(task(255))
    check_task(task(20))
    with pytest.raises(DataError, match=r"Data\.train\[9\] has the target 21, but the model has 21 outputs"):
        check_task(task(21))
    with pytest.raises(DataError, match=r"has the target 255, but the model has 21 outputs"):
        check_task(dataclasses.replace(task(20), loss=functional.cross_entropy))


def ordinal(output: Tensor, target: Tensor) -> Tensor:
    """Cumulative logits: one output fewer than classes."""
    levels = torch.arange(output.shape[1])
    return functional.binary_cross_entropy_with_logits(output, (target[:, None] > levels).float())


def column(output: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(output[:, 0], target.clamp(max=1).float())


def squares(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output, target[:, None].float())


@pytest.mark.parametrize(("outputs", "loss"), [(2, ordinal), (1, column), (1, squares)])
def test_integer_targets_that_are_no_index_of_the_outputs(outputs: int, loss: Any) -> None:
    check_task(make_task(model=lambda: nn.Linear(4, outputs), loss=loss, score=lambda o, t: -float(loss(o, t))))


@pytest.mark.parametrize("target", [(1, 2), [1, 2], {"a": 1, "b": 2}], ids=["tuple", "list", "dict"])
def test_several_targets_of_one_item(target: Any) -> None:
    def several(seed: int) -> Listed:
        return Listed([(x, target) for x, _ in listed(seed=seed)])

    with pytest.raises(DataError, match=r"target of Data\.train\[0\] is a \w+\. It must be one tensor"):
        check_task(make_task(*map(several, range(3))))

    def own(*_: Any, **__: Any) -> Any:
        raise AssertionError

    check_task(make_task(*map(several, range(3)), loss=None, score=None, fit=own, evaluate=own))


def zero(outputs: Tensor, targets: Tensor) -> float:
    return 0.0


def numbers(seed: int, *shape: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(20, 4, generator=generator), torch.randn(20, *shape, generator=generator))


@pytest.mark.parametrize("loss", [functional.mse_loss, nn.L1Loss(), functional.smooth_l1_loss, functional.huber_loss])
@pytest.mark.parametrize(("outputs", "targets"), [((1,), ()), ((), (1,))])
def test_a_loss_of_each_output_with_the_targets_of_all(
    loss: Any, outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    def task(*shape: int) -> Task:
        splits = [numbers(seed, *shape) for seed in range(3)]
        return make_task(
            *splits,
            model=lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(1 if outputs else 0)),
            loss=loss,
            score=zero,
        )

    check_task(task(*outputs))
    shapes = [str((8, *shape)).replace("(", r"\(").replace(")", r"\)") for shape in (outputs, targets)]
    with pytest.raises(TaskError, match=f"compares shape {shapes[0]} with shape {shapes[1]}, .*squeeze"):
        check_task(task(*targets))


def test_a_loss_that_broadcasts_within_items_is_sound() -> None:
    """Several heads against one target, or a constant: torch warns, and so does the check."""
    splits = [numbers(seed, 1) for seed in range(3)]

    def model() -> nn.Module:
        return nn.Linear(4, 5)

    with pytest.warns(UserWarning, match="different to the input size"):
        check_task(make_task(*splits, model=model, loss=functional.mse_loss, score=zero))
    with pytest.warns(UserWarning, match="different to the input size"):
        check_task(make_task(model=model, loss=lambda o, t: functional.mse_loss(o, torch.ones(5))))


def rare(seed: int, size: int = 20_000, positives: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.zeros(size).long()
    targets[torch.randperm(size, generator=generator)[:positives]] = 1
    return TensorDataset(torch.randn(size, 4, generator=generator), targets)


def test_a_score_that_a_sample_of_the_items_does_not_give() -> None:
    sizes: list[int] = []

    def picky(outputs: Tensor, targets: Tensor) -> float:
        sizes.append(len(targets))
        if targets.unique().numel() < 2:
            raise ValueError("one class only")
        return accuracy(outputs, targets)

    splits = [rare(0, 100, 10), rare(1), rare(2, 100, 10)]
    check_task(make_task(*splits, score=picky))
    assert len(sizes) == 2
    assert sizes[0] < 300
    assert sizes[1] == 20_000
    splits[1] = rare(1, positives=0)
    with pytest.raises(TaskError, match=r"raised ValueError on outputs of shape \(20000, 3\).*one class only"):
        check_task(make_task(*splits, score=picky))
    sizes.clear()
    splits[1] = rare(1, 100, 0)
    with pytest.raises(TaskError, match="one class only"):
        check_task(make_task(*splits, score=picky))
    assert sizes == [100], "there is no more to try"
