"""One candidate: its steps, its recovery, its scores and costs, and its faults."""

import copy
import dataclasses
import itertools
import os
import time
from pathlib import Path

import pytest
import tiny
import torch
from subjects import INT8, RECIPE, prune, request, subject, weights_of
from torch import Tensor, nn

from netwright.core.errors import RunDirectoryError
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.onnx_module import OnnxModule
from netwright.core.recipe import Recipe
from netwright.workshop import evaluation
from netwright.workshop.evaluation import (
    Evaluator,
    Outcome,
    Request,
    Subject,
    is_low_precision,
    rebuild,
    structure,
)
from netwright.workshop.pace import epoch_seconds
from netwright.workshop.point import Step
from netwright.workshop.quiet import QuietRoom

CASES = {
    "prune": (prune(first=0.5, second=0.75),),
    "int8": (INT8,),
    "both": (prune(first=0.5, second=0.75), INT8),
}


@pytest.fixture
def room(tmp_path: Path) -> QuietRoom:
    return QuietRoom(tmp_path / "room")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, dict[str, Outcome], dict[str, Tensor]]:
    """A subject, an outcome of each case, and the baseline's weights before them."""
    base = subject()
    before = weights_of(base.model)
    evaluator = Evaluator(base, QuietRoom(tmp_path_factory.mktemp("room")))
    torch.set_num_threads(1)
    return base, {name: evaluator(request(3, *steps, deliver=True)) for name, steps in CASES.items()}, before


Evaluated = tuple[Subject, dict[str, Outcome], dict[str, Tensor]]


@pytest.mark.vnni
@pytest.mark.parametrize("case", CASES)
def test_what_is_delivered_is_what_was_measured(case: str, evaluated: Evaluated, tmp_path: Path) -> None:
    base, outcomes, _ = evaluated
    outcome = outcomes[case]
    assert outcome.error is None
    assert outcome.point is not None
    assert outcome.point.steps == CASES[case]
    path = tmp_path / "model.onnx"
    path.write_bytes(outcome.artifact)
    assert outcome.point.cost.size_bytes == len(outcome.artifact)
    runtime = OnnxModule(path)
    assert outcome.point.val == evaluate(runtime, base.task, "val")

    again = rebuild(base.model, base.task, outcome, tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"], "nothing is left behind"
    inputs = base.task.data.val[:64][0]
    with torch.no_grad():
        ours, theirs = again(inputs), runtime(inputs)
    if case == "prune":
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    else:  # rounding ties fall differently
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
        assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.96


def test_weights_that_cannot_be_delivered_are_a_clear_error(evaluated: Evaluated, tmp_path: Path) -> None:
    base, outcomes, _ = evaluated
    with pytest.raises(RunDirectoryError, match=r"Cannot write .*gone/"):
        rebuild(base.model, base.task, outcomes["prune"], tmp_path / "gone")


def test_the_baseline_stays_as_it_was(evaluated: Evaluated) -> None:
    base, _, before = evaluated
    assert base.model.state_dict().keys() == before.keys()
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, before[name]), f"the baseline's {name} was changed"


def test_costs_are_those_of_the_smaller_network(evaluated: Evaluated) -> None:
    base, outcomes, _ = evaluated
    for case in ("prune", "both"):
        point = outcomes[case].point
        assert point is not None  # 8 and 8 channels are left
        assert point.cost.macs == 8 * 9 * 64 + 8 * 8 * 9 * 16 + 8 * 10
        assert point.cost.size_bytes < len(base.artifact)
        assert point.latency_ratio is not None
    assert outcomes["prune"].point is not None
    # weights, biases, and the two learned vectors of each batch norm
    expected = (8 * 9 + 8) + (8 * 8 * 9 + 8) + 2 * 8 + 2 * 8 + (8 * 10 + 10)
    assert outcomes["prune"].point.cost.parameters == expected


def test_the_same_request_gives_the_same_candidate(evaluated: Evaluated, room: QuietRoom) -> None:
    _, outcomes, _ = evaluated
    first, second = outcomes["both"], Evaluator(subject(), room)(request(4, *CASES["both"]))
    assert first.point is not None
    assert second.point is not None
    assert first.point.val == second.point.val
    assert first.epochs == second.epochs == 0.1
    assert first.artifact == second.artifact
    assert [record.train_loss for record in first.history] == [record.train_loss for record in second.history]
    assert first.weights
    assert second.weights == b"", "weights come only when they are asked for"


def test_the_curve_of_two_recoveries_goes_on(evaluated: Evaluated, room: QuietRoom) -> None:
    history = Evaluator(subject(), room)(request(0, *CASES["both"], epochs=1.5)).history
    for name in ("step", "epoch", "seconds"):
        values = [getattr(record, name) for record in history]
        assert all(before < after for before, after in itertools.pairwise(values)), name
    assert history[-1].epoch == pytest.approx(1.5, abs=0.1)


def test_recovery_helps_a_candidate_that_was_cut_hard(evaluated: Evaluated, room: QuietRoom) -> None:
    _, outcomes, _ = evaluated
    much = Evaluator(subject(), room)(request(0, *CASES["prune"], epochs=3.0))
    assert much.point is not None
    assert outcomes["prune"].point is not None
    assert much.point.val > outcomes["prune"].point.val + 0.1


@pytest.mark.parametrize(
    "lengths", [{"epochs": 4, "steps_per_epoch": 12}, {"total_steps": 48}], ids=["epochs", "total_steps"]
)
@pytest.mark.parametrize("epochs", [1.0, 6.0])
def test_a_schedule_with_a_length_of_its_own_is_stretched(lengths: dict, epochs: float, room: QuietRoom) -> None:
    recipe = RECIPE.replace(schedule_settings={**RECIPE.schedule_settings, **lengths})
    curves = []
    for each in (RECIPE, recipe):
        outcome = Evaluator(subject(recipe=each), room)(request(0, *CASES["prune"], epochs=epochs))
        assert outcome.point is not None, outcome.error
        curves.append([(record.lr, record.train_loss) for record in outcome.history])
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("epoch", "seconds", "expected"),
    [
        (1e9, 1.0, 0.02 * RECIPE.epochs),  # never less than a fiftieth of the recipe
        (4.0, 1.0, 0.25),  # as many as fit into the time
        (1e-9, 1.0, 4.0 * RECIPE.epochs),  # never more than four times the recipe
    ],
)
def test_time_becomes_epochs(
    epoch: float, seconds: float, expected: float, room: QuietRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "epoch_seconds", lambda *_: epoch)
    outcome = Evaluator(subject(), room)(Request(0, (prune(first=0.5),), seconds, 0))
    assert outcome.point is not None
    assert outcome.epochs == pytest.approx(expected, abs=1e-3)


def test_the_pace_is_that_of_training_and_leaves_the_model_alone() -> None:
    base = subject()
    before = weights_of(base.model)
    predicted = epoch_seconds(base.model, base.task, base.recipe, None)
    start = time.perf_counter()
    fit(copy.deepcopy(base.model), base.task, base.recipe.replace(epochs=3), validate=False)
    taken = (time.perf_counter() - start) / 3
    assert 0.2 < predicted / taken < 5, "within what a loaded machine does to so short a time"
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_progress_is_told_in_order(room: QuietRoom) -> None:
    told: list[tuple[float, str]] = []
    Evaluator(subject(), room)(request(0, *CASES["prune"]), lambda fraction, what: told.append((fraction, what)))
    assert told[0] == (0.0, "pruned")
    assert all(0 <= fraction <= 1 for fraction, _ in told)


def test_a_loss_that_is_not_finite_is_a_failed_outcome_and_the_next_one_works(room: QuietRoom) -> None:
    wild = Recipe(optimizer="torch.optim:SGD", optimizer_settings={"lr": 1e30}, schedule=None)
    base = subject(recipe=wild)
    evaluator = Evaluator(base, room)
    outcome = evaluator(request(4, prune(first=0.5), epochs=1.0))
    assert outcome.point is None
    assert outcome.error is not None
    assert outcome.error.startswith("NonFiniteLossError: Task 'tiny': the loss is ")
    assert "\n" not in outcome.error
    assert outcome.seconds > 0
    assert outcome.request.number == 4
    one_step = request(5, prune(first=0.5), epochs=1e-3)
    assert Evaluator(dataclasses.replace(base, recipe=RECIPE), room)(one_step).error is None
    with room.measure():  # the failed one holds the room no longer
        pass


class Fussy(nn.Module):
    """Raises when it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny.network()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ArithmeticError("too thin\nto stand")
        return self.body(x)


def test_a_candidate_that_raises_in_forward_is_a_failed_outcome(room: QuietRoom) -> None:
    base = subject()
    fussy = dataclasses.replace(base, model=Fussy().eval())
    step = Step("netwright.compress:Prune", {"ratios": {"body.0": 0.5}})
    outcome = Evaluator(fussy, room)(request(0, step))
    assert outcome.point is None
    assert outcome.error is not None
    assert "too thin" in outcome.error
    assert "\n" not in outcome.error


def _score_of_the_whole(outputs: Tensor, targets: Tensor) -> float:
    return float("nan")


def test_a_score_that_is_not_a_number_is_a_failed_outcome(room: QuietRoom) -> None:
    base = subject()
    outcome = Evaluator(
        dataclasses.replace(base, task=dataclasses.replace(base.task, score=_score_of_the_whole)), room
    )(request())
    assert outcome.point is None
    assert outcome.error is not None
    assert "nan" in outcome.error


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step("netwright.compress:Prune", {"ratios": {"nowhere": 0.5}}), "TransformError: .*nowhere"),
        (Step("netwright.compress:Prune", {"ratios": 2.0}), "TransformError: "),
        (Step("netwright.compress:Shave", {}), "RecipeError: .*Shave"),
        (Step("netwright.compress:Prune", {"colour": "red"}), "TypeError: .*colour"),
    ],
)
def test_a_step_that_cannot_be_taken_is_a_failed_outcome(step: Step, words: str, room: QuietRoom) -> None:
    outcome = Evaluator(subject(), room)(request(0, step))
    assert outcome.point is None
    assert outcome.error is not None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(outcome.error)


def test_structure_takes_only_the_structural_steps() -> None:
    base = subject()
    model = structure(base.model, base.task, (INT8, prune(first=0.5)), 0)
    assert model[0].out_channels == 8
    assert not isinstance(model, torch.fx.GraphModule)
    assert is_low_precision(INT8.build())
    assert not is_low_precision(prune(first=0.5).build())
    assert structure(base.model, base.task, (INT8,), 0) is base.model


def test_its_files_go_with_it(room: QuietRoom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    evaluator = Evaluator(subject(), room)
    assert evaluator(request()).error is None
    assert [path for path in tmp_path.iterdir() if path.name != "room"]
    del evaluator
    assert os.listdir(tmp_path) == ["room"]
