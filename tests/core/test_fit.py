"""The training loop against hand-written loops, interruptions and bad input."""

import copy
import itertools
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from netwright.core.average import MovingAverage
from netwright.core.checkpoint import load_checkpoint, save_checkpoint
from netwright.core.data import Data
from netwright.core.errors import (
    CorruptRunError,
    NonFiniteLossError,
    RecipeError,
    RunDirectoryError,
    TaskError,
)
from netwright.core.evaluate import evaluate, predict
from netwright.core.fit import Record, fit
from netwright.core.losses import task_loss, teacher_loss
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy, r2
from netwright.core.task import Task, load_task

ITEMS, FEATURES, CLASSES = 37, 5, 3


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))


def blobs(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (size,), generator=generator)
    x = torch.randn(size, FEATURES, generator=generator) + functional.one_hot(y, FEATURES) * 2
    return TensorDataset(x, y)


def make_task(**changes: Any) -> Task:
    settings: dict[str, Any] = {
        "name": "blobs",
        "model": network,
        "data": Data(blobs(ITEMS, 0), blobs(20, 1), blobs(20, 2)),
        "loss": functional.cross_entropy,
        "score": accuracy,
        "recipe": Recipe(epochs=3, batch_size=8),
    }
    return Task(**(settings | changes))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def facts(history: tuple[Record, ...]) -> list[tuple[Any, ...]]:
    return [(r.step, r.epoch, r.train_loss, r.val_score, r.lr) for r in history]


def test_equals_a_hand_written_loop_to_the_last_bit() -> None:
    task = make_task()
    x, y = task.data.train.tensors  # type: ignore[attr-defined]
    naive = task.build(seed=3)
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.AdamW(naive.parameters(), lr=2e-3)
    steps = 3 * (ITEMS // 8)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    losses, rates = [], []
    naive.train()
    for _ in range(3):
        order = torch.randperm(ITEMS, generator=generator)
        for start in range(0, ITEMS // 8 * 8, 8):
            index = order[start : start + 8]
            loss = functional.cross_entropy(naive(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    result = fit(task.build(seed=3), task, seed=7, device="cpu")
    assert torch.equal(weights(result.model), weights(naive))
    assert [record.step for record in result.history] == list(range(1, steps + 1))
    assert [record.train_loss for record in result.history] == losses
    assert [record.lr for record in result.history] == rates
    scored = [record.val_score for record in result.history if record.val_score is not None]
    assert len(scored) == 3
    assert scored[-1] == evaluate(result.model, task, "val")
    assert not any(part.training for part in result.model.modules())


def test_same_seed_same_weights_whatever_the_callers_random_state() -> None:
    task = make_task()
    first = fit(task.build(), task, seed=1)
    torch.manual_seed(99)
    np.random.set_state(np.random.RandomState(5).get_state())  # noqa: NPY002 - the legacy generator is the point
    random.seed(5)
    state, draw = torch.get_rng_state(), random.getstate()
    numbers = np.random.get_state()[1].copy()  # noqa: NPY002 - as above
    second = fit(task.build(), task, seed=1, validate=False)
    assert torch.equal(weights(first.model), weights(second.model))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == draw
    assert np.array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002 - as above
    assert not torch.equal(weights(first.model), weights(fit(task.build(), task, seed=2).model))


class InterruptError(Exception):
    """Stands for whatever ends a process."""


def interrupted(task: Task, at: int) -> Task:
    """The task, its loss raising at the given iteration."""
    calls = itertools.count(1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if next(calls) == at:
            raise InterruptError
        return functional.cross_entropy(output, target)

    return Task(name=task.name, model=network, data=task.data, loss=loss, score=task.score, recipe=task.recipe)


@pytest.mark.parametrize("at", [2, 4, 5, 7, 12])
@pytest.mark.parametrize("teach", [False, True])
def test_resumes_bit_for_bit(tmp_path: Path, at: int, teach: bool) -> None:
    recipe = Recipe(
        epochs=3,
        batch_size=8,
        average=0.9,
        clip_norm=0.5,
        schedule="torch.optim.lr_scheduler:CosineAnnealingLR",
        schedule_settings={},
    )
    task = make_task(recipe=recipe)
    teacher = task.build(seed=11) if teach else None
    whole = fit(task.build(), task, seed=4, teacher=teacher)
    file = tmp_path / "state"
    with pytest.raises(InterruptError):
        fit(task.build(), interrupted(task, at), seed=4, teacher=teacher, checkpoint=file, checkpoint_seconds=0)
    assert load_checkpoint(file)["step"] == at - 1
    torch.manual_seed(1234)
    resumed = fit(task.build(seed=77), task, seed=4, teacher=teacher, checkpoint=file)
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert facts(whole.history) == facts(resumed.history)
    again = fit(task.build(seed=78), task, seed=4, teacher=teacher, checkpoint=file)  # nothing left to do
    assert torch.equal(weights(whole.model), weights(again.model))


class Jittered(Dataset[tuple[Tensor, Tensor]]):
    """A dataset that draws its augmentation from all three global generators."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.gauss(0, 1) + np.random.standard_normal() + torch.randn(()).item()  # noqa: NPY002 - the point
        return torch.full((FEATURES,), index / ITEMS + 0.1 * noise), torch.tensor(index % CLASSES)


def test_resumes_a_randomly_augmented_dataset_within_an_epoch(tmp_path: Path) -> None:
    task = make_task(data=Data(Jittered(), blobs(20, 1), blobs(20, 2)))
    whole = fit(task.build(), task)
    with pytest.raises(InterruptError):
        fit(task.build(), interrupted(task, 7), checkpoint=tmp_path / "state", checkpoint_seconds=0)
    resumed = fit(task.build(), task, checkpoint=str(tmp_path / "state"))
    assert torch.equal(weights(whole.model), weights(resumed.model))


def test_numbers_of_numpy_in_a_recipe_are_resumed(tmp_path: Path) -> None:
    task = make_task()
    recipe = Recipe(epochs=3, batch_size=8, optimizer_settings={"lr": np.float64(2e-3)}, schedule=None)
    whole = fit(task.build(), task, recipe)
    with pytest.raises(InterruptError):
        fit(task.build(), interrupted(task, 7), recipe, checkpoint=tmp_path / "state", checkpoint_seconds=0)
    resumed = fit(task.build(), task, recipe, checkpoint=tmp_path / "state")
    assert torch.equal(weights(whole.model), weights(resumed.model))


def test_killed_while_writing_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "state"
    code = (
        "import os, pathlib, torch\n"
        "from netwright.core.checkpoint import save_checkpoint\n"
        f"file = pathlib.Path({str(file)!r})\n"
        "save_checkpoint(file, {'step': 1})\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "save_checkpoint(file, {'step': 2, 'weights': torch.zeros(100000)})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert load_checkpoint(file) == {"step": 1}


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state"
    save_checkpoint(file, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunDirectoryError, match="No space left on device"):
            save_checkpoint(file, {"step": 2})
    assert load_checkpoint(file) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]
    task = make_task()
    with pytest.raises(RunDirectoryError, match="There is no folder"):
        fit(task.build(), task, checkpoint=tmp_path / "nowhere" / "state")


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:5], lambda b: b"", lambda b: _flipped(b)])
def test_damaged_checkpoint(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    task, file = make_task(), tmp_path / "state"
    fit(task.build(), task, checkpoint=file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptRunError, match="Delete it"):
        fit(task.build(), task, checkpoint=file)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe": Recipe(epochs=4, batch_size=8)}, "recipe's epochs was 3, now it is 4"),
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"validate": False}, "validation"),
        ({"teacher": torch.zeros(ITEMS, CLASSES)}, "teacher"),
    ],
)
def test_checkpoint_of_another_training(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    task, file = make_task(), tmp_path / "state"
    fit(task.build(), task, checkpoint=file)
    with pytest.raises(RunDirectoryError, match=named):
        fit(task.build(), task, checkpoint=file, **changes)
    with pytest.raises(RunDirectoryError, match=r"model's 0\.bias was .*\(8,\).* now it is .*\(3,\)"):
        fit(nn.Sequential(nn.Linear(FEATURES, CLASSES)), task, checkpoint=file)


def test_checkpoints_are_not_written_more_often_than_asked(tmp_path: Path) -> None:
    task, file, seen = make_task(), tmp_path / "state", []
    fit(task.build(), task, checkpoint=file, checkpoint_seconds=1e6, callbacks=[lambda _: seen.append(file.exists())])
    assert not any(seen)
    assert file.exists()


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4)])
def test_teachers_term_on_classes(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    targets = torch.randint(4, shape[:-1])
    targets.view(-1)[1] = -100  # ignored
    temperature, total, rows = 3.0, 0.0, 0
    flat = zip(
        student.double().reshape(-1, 4).tolist(),
        teacher.double().reshape(-1, 4).tolist(),
        targets.flatten().tolist(),
        strict=True,
    )
    for ours, theirs, target in flat:
        if target < 0:
            continue
        p = [math.exp(z / temperature) for z in theirs]
        q = [math.exp(z / temperature) for z in ours]
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        rows += 1
    expected = temperature**2 * total / rows
    assert float(teacher_loss(student, teacher, targets, temperature)) == pytest.approx(expected, rel=1e-5)


def test_teachers_term_elsewhere() -> None:
    a, b = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    dense = torch.randint(3, (4, 2, 2))
    last = teacher_loss(a.movedim(1, -1), b.movedim(1, -1), dense.flatten(0).view(4, 2, 2), 2.0)
    assert torch.allclose(teacher_loss(a, b, dense, 2.0), last)
    regression = torch.randn(4, 3, 2, 2)
    assert float(teacher_loss(a, b, regression, 2.0)) == pytest.approx(float((a - b).square().mean()))
    pair = teacher_loss((a, a * 2), (b, b * 2), regression, 2.0)
    assert float(pair) == pytest.approx(float((a - b).square().mean() * 2.5))
    with pytest.raises(TaskError, match="same outputs"):
        teacher_loss(a, b[:, :2], dense, 2.0)


@pytest.mark.parametrize("epochs", [1, 3])
def test_distillation_weighs_both_terms(epochs: int) -> None:
    recipe = Recipe(epochs=epochs, batch_size=ITEMS, schedule=None, optimizer="torch.optim:SGD", distill_weight=0.3)
    task = make_task(model=lambda: nn.Linear(FEATURES, CLASSES))
    x, y = task.data.train.tensors  # type: ignore[attr-defined]
    teacher = nn.Sequential(nn.Dropout(0.9), nn.Linear(FEATURES, CLASSES))  # dropout must be off in a teacher
    naive = task.build()
    optimizer = torch.optim.SGD(naive.parameters(), lr=2e-3)
    goal = teacher[1](x).detach()
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = 0.7 * functional.cross_entropy(naive(x), y) + 0.3 * teacher_loss(naive(x), goal, y, 2.0)
        loss.backward()
        optimizer.step()
    by_module = fit(task.build(), task, recipe, teacher=teacher)
    by_outputs = fit(task.build(), task, recipe, teacher=goal)
    assert torch.allclose(weights(by_module.model), weights(naive), atol=1e-7)
    assert torch.allclose(weights(by_outputs.model), weights(naive), atol=1e-7)
    assert teacher.training
    assert teacher[1].weight.grad is None


def test_a_teacher_that_says_nothing_changes_nothing() -> None:
    task = make_task(recipe=Recipe(epochs=2, batch_size=8, distill_weight=0.0))
    alone = fit(task.build(), task)
    taught = fit(task.build(), task, teacher=task.build(seed=9))
    assert torch.equal(weights(alone.model), weights(taught.model))


def test_moving_average_against_its_equation() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = MovingAverage(model, 0.5)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for step in range(1, 13):
        model.train()
        model(torch.randn(6, 2))
        with torch.no_grad():
            model[0].weight.normal_()
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            exact = value.double() if not value.is_floating_point() else decay * expected[name] + (1 - decay) * value
            expected[name] = exact.double()
    own = copy.deepcopy(model.state_dict())
    with average.applied(model):
        for name, value in model.state_dict().items():
            assert torch.allclose(value.double(), expected[name], atol=1e-6), name
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_the_average_of_half_precision_weights_is_that_of_float32() -> None:
    def averaged(dtype: torch.dtype) -> Tensor:
        model = nn.Linear(1, 1, bias=False, dtype=dtype)
        nn.init.ones_(model.weight)
        average = MovingAverage(model, 0.999)
        for step in range(2000):
            if step == 500:
                nn.init.constant_(model.weight, 2.0)
            average.update(model)
        average.put_into(model)
        assert model.weight.dtype == dtype
        return model.weight.detach()

    torch.testing.assert_close(averaged(torch.bfloat16), averaged(torch.float32).bfloat16())


def test_complex_weights_are_averaged_part_by_part() -> None:
    model = nn.Linear(2, 1, bias=False, dtype=torch.complex64)
    pair = nn.Linear(4, 1, bias=False)
    averages = MovingAverage(model, 0.9), MovingAverage(pair, 0.9)
    for average, own in zip(averages, (model, pair), strict=True):
        nn.init.zeros_(own.weight)
        average.load_state_dict({"steps": 0, "average": own.state_dict()})
        for step in range(5):
            with torch.no_grad():
                own.weight.view(torch.float32).copy_(torch.arange(4.0) + step)
            average.update(own)
        average.put_into(own)
    assert torch.allclose(model.weight.view(torch.float32), pair.weight)
    assert not torch.equal(pair.weight, torch.arange(4.0)[None] + 4)


def test_averaged_weights_are_validated_and_returned() -> None:
    task = make_task()
    recipe = Recipe(epochs=3, batch_size=8, average=0.95)
    plain = fit(task.build(), task, recipe.replace(average=None))
    averaged = fit(task.build(), task, recipe)
    assert not torch.equal(weights(plain.model), weights(averaged.model))
    assert [r.train_loss for r in plain.history] == [r.train_loss for r in averaged.history]
    assert averaged.history[-1].val_score == evaluate(averaged.model, task, "val")


@pytest.mark.parametrize(
    ("schedule", "settings", "expected"),
    [
        ("CosineAnnealingLR", {}, [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]),
        ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0}, [1 - k / 8 for k in range(8)]),
        ("StepLR", {"step_size": 3}, [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ("LinearLR", {"start_factor": 0.5, "total_iters": 2}, [0.5, 0.75, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules_are_stepped_once_per_iteration(
    schedule: str, settings: dict[str, Any], expected: list[float]
) -> None:
    recipe = Recipe(
        epochs=2,
        batch_size=9,
        optimizer="torch.optim:SGD",
        optimizer_settings={"lr": 1.0},
        schedule=f"torch.optim.lr_scheduler:{schedule}",
        schedule_settings=settings,
    )
    task = make_task()
    history = fit(task.build(), task, recipe, validate=False).history
    assert [record.lr for record in history] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer_settings": {"learning_rate": 1}}, "refuses the settings"),
        ({"optimizer": "torch.nn:ParameterList", "optimizer_settings": {}}, "ParameterList is .*Optimizer"),
        ({"optimizer": "torch.optim:Nowhere"}, "cannot be imported"),
        ({"schedule_settings": {"max_lr": -1, "pct_start": 7}}, "refuses the settings"),
        (
            {"schedule": "torch.optim.lr_scheduler:ReduceLROnPlateau", "schedule_settings": {}},
            "stepped once per iteration",
        ),
    ],
)
def test_recipes_that_cannot_work(changes: dict[str, Any], said: str) -> None:
    task = make_task()
    with pytest.raises(RecipeError, match=said):
        fit(task.build(), task, Recipe(**changes))


def test_fractional_epochs_and_small_data() -> None:
    task = make_task()
    assert fit(task.build(), task, Recipe(epochs=1.5, batch_size=8)).steps == 6
    assert fit(task.build(), task, Recipe(epochs=0.01, batch_size=8)).steps == 1
    assert fit(task.build(), task, Recipe(epochs=2, batch_size=1000)).steps == 2


def test_clipping_bounds_the_step() -> None:
    task = make_task(loss=lambda o, t: 1e6 * functional.cross_entropy(o, t))
    recipe = Recipe(
        epochs=0.01, optimizer="torch.optim:SGD", optimizer_settings={"lr": 1.0}, schedule=None, clip_norm=0.25
    )
    model = task.build()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    fit(model, task, recipe)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.25, rel=1e-4)


def test_bfloat16_trains_and_keeps_float32_weights() -> None:
    task = make_task()
    result = fit(task.build(), task, Recipe(epochs=20, batch_size=8, precision="bfloat16"))
    exact = fit(task.build(), task, Recipe(epochs=20, batch_size=8))
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert not torch.equal(weights(result.model), weights(exact.model))
    assert evaluate(result.model, task, "test") == pytest.approx(evaluate(exact.model, task, "test"), abs=0.15)


def test_closures_are_given_to_optimizers_that_call_them_often() -> None:
    data = Data(*(TensorDataset(x := torch.randn(64, 3), x @ torch.tensor([[1.0], [2.0], [-1.0]])) for _ in range(3)))
    task = make_task(model=lambda: nn.Linear(3, 1), data=data, loss=functional.mse_loss, score=r2)
    recipe = Recipe(
        epochs=3,
        batch_size=64,
        schedule=None,
        optimizer="torch.optim:LBFGS",
        optimizer_settings={"line_search_fn": "strong_wolfe"},
    )
    assert evaluate(fit(task.build(), task, recipe).model, task, "test") == pytest.approx(1.0, abs=1e-6)


class Pair(Dataset[tuple[Any, Tensor]]):
    """Items whose input is a tuple or a dict."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, (self.x, self.y) = kind, blobs(ITEMS, seed).tensors

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        first, second = self.x[index, :2], self.x[index, 2:]
        return ({"first": first, "second": second} if self.kind == "dict" else (first, second)), self.y[index]


class Joined(nn.Module):
    """A model of two inputs, its output in one of several wrappings."""

    def __init__(self, wrap: str) -> None:
        super().__init__()
        self.wrap, self.layer = wrap, nn.Linear(FEATURES, CLASSES)

    def forward(self, first: Tensor, second: Tensor) -> Any:
        logits = self.layer(torch.cat([first, second], 1))
        if self.wrap == "output":
            from transformers.modeling_outputs import SequenceClassifierOutput

            return SequenceClassifierOutput(logits=logits)
        return {"tensor": logits, "dict": {"logits": logits}, "tuple": (logits, logits)}[self.wrap]


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("wrap", ["tensor", "dict", "output", "tuple"])
def test_inputs_and_outputs_of_every_kind(kind: str, wrap: str) -> None:
    data = Data(*(Pair(kind, seed) for seed in range(3)))
    changes: dict[str, Any] = {"output": lambda result: result[0]} if wrap == "tuple" else {}
    task = make_task(data=data, model=lambda: Joined(wrap), **changes)
    plain = make_task(data=data, model=lambda: Joined("tensor"))
    recipe = Recipe(epochs=2, batch_size=8)
    result = fit(task.build(), task, recipe, teacher=task.build(seed=5))
    expected = fit(plain.build(), plain, recipe, teacher=plain.build(seed=5))
    assert torch.equal(weights(result.model), weights(expected.model))
    assert torch.equal(predict(result.model, task, "test")[0], predict(expected.model, plain, "test")[0])


def test_a_language_model_and_its_teacher() -> None:
    symbols = torch.randint(7, (24, 10), generator=torch.Generator().manual_seed(0))
    data = Data(*(TensorDataset(part[:, :-1], part[:, 1:]) for part in symbols.split(8)))
    task = make_task(
        model=lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)),
        data=data,
        loss=lambda o, t: functional.cross_entropy(o.flatten(0, 1), t.flatten()),
    )
    teacher = task.build(seed=8)
    recipe = Recipe(epochs=300, batch_size=8, optimizer_settings={"lr": 2e-2}, distill_weight=1.0, schedule=None)
    student = fit(task.build(), task, recipe, teacher=teacher, validate=False).model
    ours, theirs = predict(student, task, "train")[0].softmax(-1), predict(teacher, task, "train")[0].softmax(-1)
    assert torch.allclose(ours, theirs, atol=0.01)


def test_loss_that_is_not_finite() -> None:
    calls = itertools.count(1)
    task = make_task(loss=lambda o, t: functional.cross_entropy(o, t) * (math.nan if next(calls) == 6 else 1.0))
    with pytest.raises(NonFiniteLossError, match=r"nan at step 6 of 12 \(epoch 1\.25, learning rate .*clip_norm=1\.0"):
        fit(task.build(), task)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda o, t: functional.cross_entropy(o, t, reduction="none"), r"shape \(8,\).*loss\.mean\(\)"),
        (lambda o, t: 1.5, "got float"),
        (lambda o, t: torch.tensor(1.0), "does not depend"),
        (lambda o, t: functional.cross_entropy(o, t.float()), r"raised RuntimeError|raised"),
    ],
)
def test_losses_that_cannot_be_minimized(loss: Callable[[Tensor, Tensor], Any], said: str) -> None:
    task = make_task(loss=loss)
    with pytest.raises(TaskError, match=said):
        fit(task.build(), task)


def test_other_refusals() -> None:
    task = make_task()
    model = task.build()
    with pytest.raises(RecipeError, match="teacher is the model itself"):
        fit(model, task, teacher=model)
    with pytest.raises(TaskError, match="outputs are for 3 items"):
        fit(model, task, teacher=torch.zeros(3, CLASSES))
    with pytest.raises(RecipeError, match="nothing to train"):
        fit(model.requires_grad_(False), task)
    with pytest.raises(TaskError, match="no loss="):
        task_loss(make_task(loss=None, fit=lambda model, **_: model), torch.zeros(1), torch.zeros(1))


def test_a_loop_of_the_users_own() -> None:
    seen: list[dict[str, Any]] = []

    def own(model: nn.Module, *, budget: float | None, seed: int, teacher: nn.Module | None = None) -> None:
        seen.append({"budget": budget, "seed": seed, "teacher": teacher, "draw": torch.rand(()).item()})

    task = make_task(fit=own, recipe=None)
    model = task.build().train()
    result = fit(model, task, Recipe(epochs=2.5), seed=3)
    fit(model, task, seed=3, teacher=model[0])
    assert result.model is model
    assert not model.training
    assert result.history[0].val_score == evaluate(model, task, "val")
    assert [entry["budget"] for entry in seen] == [2.5, None]
    assert seen[1]["teacher"] is model[0]
    assert seen[0]["draw"] == seen[1]["draw"]
    with pytest.raises(TaskError, match=r"must return an nn\.Module or None, got int"):
        fit(model, make_task(fit=lambda model, **_: 3))


def test_progress_and_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    task, told, records = make_task(), [], []
    fit(task.build(), task, progress=lambda *report: told.append(report), callbacks=[records.append], console=True)
    assert told[-1][0] == 1.0
    assert "epoch 3.0/3" in told[-1][1]
    assert "score" in told[-1][1]
    assert [f for f, _ in told] == sorted(f for f, _ in told)
    assert len(records) == 12
    assert capsys.readouterr().err == ""  # quick and not on a terminal: quiet
    long = fit(task.build(), task, Recipe(epochs=50, batch_size=8, schedule=None), validate=False)
    assert 50 <= len(long.history) <= 75


def test_digits_are_learned_in_two_epochs() -> None:
    task = load_task("digits")
    assert task.recipe is not None
    result = fit(task.build(), task, task.recipe.replace(epochs=2))
    assert result.history[-1].val_score is not None
    assert result.history[-1].val_score > 0.9


def test_weights_that_are_not_finite_are_told_where_the_loss_hides_them() -> None:
    task = load_task("digits")

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)
            self.lost = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(1)) + torch.nan_to_num(self.lost.square().sqrt())

    with pytest.raises(NonFiniteLossError, match="training left values in lost that are not finite"):
        fit(Hidden(), task, Recipe(epochs=0.2), validate=False)
