"""Distillation block by block on 40% of the data against end to end on 40% and on all of them, at equal steps."""

import dataclasses

from torch.utils.data import TensorDataset

from claims._compress import task_of, trained
from claims.compress.stable_kd import best, student_network, teacher_network
from netwright.core.data import Data
from netwright.core.evaluate import evaluate

PAPER = 73
CLAIM = (
    "On 40% of 6,000 Fashion-MNIST images, a student of nine hidden layers of 64 units without normalization learns "
    "from a teacher of three with batch norm to a higher test accuracy block by block than end to end on all of them "
    "in as many steps, the better of three learning rates for each."
)
BETTER = "higher"
SEEDS = 5


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(teacher_network, items=6000, epochs=6, smoke=smoke)
    teacher = trained(task, seed)
    assert isinstance(task.data.train, TensorDataset)
    assert task.recipe is not None
    few = TensorDataset(*(tensor[: len(tensor) * 2 // 5] for tensor in task.data.train.tensors))
    recipe = task.recipe.replace(distill_weight=0.5, distill_temperature=4.0)
    student = dataclasses.replace(task, model=student_network, recipe=recipe)
    less = dataclasses.replace(student, data=Data(few, task.data.val, task.data.test))
    epochs = 0.2 if smoke else 2.0
    return {
        "method": best(teacher, less, seed, 2.5 * epochs, apart=True),
        "baseline": best(teacher, student, seed, epochs, apart=False),
        "baseline_few": best(teacher, less, seed, 2.5 * epochs, apart=False),
        "teacher": evaluate(teacher, task, "test"),
    }
