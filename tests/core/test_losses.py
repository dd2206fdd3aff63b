"""The teacher's term of the loss: what kind of outputs it takes them for."""

import torch
from torch.nn import functional

from netwright.core.losses import teacher_loss
from netwright.core.score import class_rows


def test_one_logit_is_a_number_to_learn() -> None:
    for shape, targets in (((4, 1), (4,)), ((2, 3, 1), (2, 3)), ((2, 1, 3, 3), (2, 3, 3))):
        student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        student.requires_grad_()
        classes = torch.zeros(targets, dtype=torch.long)
        assert class_rows(student, classes) is None
        loss = teacher_loss(student, teacher, classes, 2.0)
        assert loss.item() == functional.mse_loss(student, teacher).item() > 0.1
        (gradient,) = torch.autograd.grad(loss, student)
        assert bool((gradient * (student - teacher) > 0).all()), "a step against it goes towards the teacher"


def test_several_logits_are_softened_by_the_temperature() -> None:
    student, teacher = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    p, q = (value.div(2).softmax(1) for value in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(teacher_loss(student, teacher, torch.zeros(5).long(), 2.0), expected)
