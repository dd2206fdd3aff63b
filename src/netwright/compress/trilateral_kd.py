"""Distillation whose balance between teacher and label is learned for every item."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.compress._settings import check_count, check_number, check_weights
from netwright.compress._student import StudentSpec, build_student, check_student
from netwright.compress._training import train
from netwright.core.data import Batch, Inputs, batches
from netwright.core.errors import TransformError
from netwright.core.evaluate import device_of, predict, settled
from netwright.core.fit import StepHook
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.score import class_rows
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["TrilateralKD"]

_WIDTH = 0.01  # length of the step, relative to that of the weights, over which the item losses are differenced


class _Terms(NamedTuple):
    """Losses of each row against its label and its teacher, ``(n,)`` each."""

    label: Tensor
    teacher: Tensor


def _terms(student: Tensor, teacher: Tensor, classes: Tensor, temperature: float) -> _Terms:
    """Cross-entropy with the labels, and ``T**2 KL(teacher || student)`` of the softened rows."""
    own, theirs = (functional.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    divergence = functional.kl_div(own, theirs, reduction="none", log_target=True).sum(1)
    return _Terms(functional.cross_entropy(student, classes, reduction="none"), temperature**2 * divergence)


def _geometry(student: Tensor, teacher: Tensor, classes: Tensor, means: Tensor) -> Tensor:
    """Sides of the triangles student-teacher-label and student-class mean-label, ``(n, 5 classes)``."""
    own, theirs = student.softmax(1), teacher.softmax(1)
    truth = functional.one_hot(classes, student.shape[1]).to(own.dtype)
    mean = means[classes]
    return torch.cat([truth - own, truth - theirs, theirs - own, truth - mean, mean - own], 1)


def _ratio_slopes(rise: Tensor, rate: float) -> Tensor:
    """Derivatives of the outer loss by the items' ratios: ``-rate / n`` times how much more a teacher's term rises.

    Args:
        rise: derivative of ``teacher - label`` of each row along the outer gradient, ``(n,)``.
        rate: learning rate of the step that the ratios weighted.
    """
    return -rate / len(rise) * rise


class _Fusion(nn.Module):
    """Two layers from triangles to ratios in (0, 1); one half everywhere at the start."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5 * classes, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, triangles: Tensor) -> Tensor:
        """Ratios of rows, ``(n,)``."""
        ratio: Tensor = torch.sigmoid(self.last(functional.relu(self.first(triangles))))[:, 0]
        return ratio


class _Distillation(StepHook):
    """The fused loss of a batch, and the step of the fusion network that follows the student's."""

    def __init__(
        self, settings: "TrilateralKD", student: nn.Module, teacher: nn.Module, task: Task, seed: int, rate: float
    ) -> None:
        self.settings, self.student, self.teacher, self.task = settings, student, teacher, task
        self.rate, self.seed = rate, seed
        self.means = self._class_means()
        with isolated(seed):
            self.fusion = _Fusion(self.means.shape[1], settings.hidden).to(self.means.device)
        self.optimizer = torch.optim.Adam(self.fusion.parameters(), lr=settings.fusion_lr)
        self.outer = self._outer_batches()
        self.inputs: Inputs | None = None
        self.seen: tuple[Inputs, Tensor, Tensor, Tensor] | None = None

    def remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the inputs of a call, as a forward pre-hook of the student."""
        self.inputs = kwargs or (args[0] if len(args) == 1 else args)

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """``mean(a teacher + (1 - a) label)`` with the ratios ``a`` of the rows."""
        assert self.inputs is not None
        self._follow(device_of(self.student))
        with torch.no_grad(), settled(self.teacher):
            goal = self.task.outputs(self.teacher, self.inputs)
        student, classes = _rows(self.task, output, targets)
        teacher, _ = _rows(self.task, goal, targets)
        with torch.enable_grad():
            ratios = self.fusion(_geometry(student.detach(), teacher, classes, self.means))
        self.seen = self.inputs, targets, goal, ratios
        terms, weight = _terms(student, teacher, classes, self.settings.temperature), ratios.detach()
        fused: Tensor = (weight * terms.teacher + (1 - weight) * terms.label).mean()
        return fused

    def _follow(self, device: torch.device) -> None:
        """Move everything to where the student trains."""
        if self.means.device != device:
            self.means = self.means.to(device)
            for part in (self.teacher, self.fusion):
                part.to(device)

    def after_step(self, step: int, total: int) -> None:
        """Let the fusion network follow the gradient of the outer loss through the student's step."""
        if step % self.settings.every or self.seen is None:
            return
        inputs, targets, goal, ratios = self.seen
        direction = self._outer_gradient()
        length = math.sqrt(sum(float(part.square().sum()) for part in direction))
        if length == 0 or not math.isfinite(length):
            return
        rise = self._rise(inputs, targets, goal, direction, length)
        self.optimizer.zero_grad()
        slopes = _ratio_slopes(rise, self.rate) / length  # Adam is blind to a common factor
        torch.autograd.backward(ratios, slopes)
        self.optimizer.step()
        self.seen = None

    def _outer_gradient(self) -> list[Tensor]:
        """The gradient of the label loss on held-out items at the student's new weights."""
        inputs, targets = next(self.outer)
        with settled(self.student), torch.enable_grad():
            student, classes = _rows(self.task, self.task.outputs(self.student, inputs), targets)
            loss = functional.cross_entropy(student, classes)
        return list(torch.autograd.grad(loss, self._weights(), materialize_grads=True))

    @torch.no_grad()
    def _rise(self, inputs: Inputs, targets: Tensor, goal: Tensor, direction: list[Tensor], length: float) -> Tensor:
        """The derivative of ``teacher - label`` of each row along ``direction``, by central differences."""
        weights = self._weights()
        before = [value.clone() for value in weights]
        size = math.sqrt(sum(float(value.square().sum()) for value in weights))
        epsilon = _WIDTH * max(size, 1e-3) / length
        found = []
        for sign in (1.0, -1.0):
            for value, start, part in zip(weights, before, direction, strict=True):
                value.copy_(start + sign * epsilon * part)
            with settled(self.student):
                student, classes = _rows(self.task, self.task.outputs(self.student, inputs), targets)
            terms = _terms(student, _rows(self.task, goal, targets)[0], classes, self.settings.temperature)
            found.append(terms.teacher - terms.label)
        for value, start in zip(weights, before, strict=True):
            value.copy_(start)
        return (found[0] - found[1]) / (2 * epsilon)

    def _weights(self) -> list[Tensor]:
        return [value for value in self.student.parameters() if value.requires_grad]

    def _class_means(self) -> Tensor:
        """The teacher's mean prediction for every class over the training split, ``(classes, classes)``."""
        outputs, targets = predict(self.teacher, self.task, "train")
        rows, classes = _rows(self.task, outputs, targets)
        truth = functional.one_hot(classes, rows.shape[1]).to(rows.dtype)
        count = truth.sum(0).clamp(min=1)
        means: Tensor = (truth.T @ rows.softmax(1)) / count[:, None]
        return means.to(device_of(self.student))

    def _outer_batches(self) -> Iterator[Batch]:
        size = min(self.settings.outer_items, len(self.task.data.val))
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            place = device_of(self.student)
            yield from batches(self.task.data.val, size, generator=generator, drop_last=True, device=place)


def _rows(task: Task, output: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    found = class_rows(output, targets) if isinstance(output, Tensor) else None
    if found is None:
        raise TransformError(
            f"TrilateralKD needs logits over classes and integer targets; task {task.name!r} has "
            f"{tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__} and targets of "
            f"{targets.dtype}."
        )
    return found


@dataclass(frozen=True)
class TrilateralKD:
    r"""Trains a smaller network with, for each item, its own balance between the teacher's answer and the label.

    Reach for it where one ratio cannot be right for all items: labels that are wrong here and there, a teacher that is
    weak on some classes. Classification only.

    With the student's logits :math:`s_i(\theta)`, the teacher's :math:`t_i`, the label :math:`y_i` and temperature
    :math:`T`, the student minimizes

    .. math:: \frac1n \sum_i \alpha_i K_i(\theta) + (1 - \alpha_i) C_i(\theta), \quad
              K_i = T^2\, \mathrm{KL}\big(\mathrm{softmax}(t_i / T) \,\|\, \mathrm{softmax}(s_i / T)\big), \quad
              C_i = -\log \mathrm{softmax}(s_i)_{y_i}

    where :math:`\alpha_i = f_\omega(\Delta_i) \in (0, 1)` comes from a two-layer network of the sides
    :math:`\Delta_i` of two triangles of probability vectors: student, teacher, label, and student, teacher's mean for
    the class, label. :math:`\omega` minimizes the student's cross-entropy :math:`V` on held-out items after the step
    :math:`\theta' = \theta - \eta \nabla_\theta`, through which

    .. math:: \frac{\partial V(\theta')}{\partial \alpha_i} = -\frac{\eta}{n} \Big\langle \nabla V(\theta'),
              \nabla_\theta (K_i - C_i) \Big\rangle

    is a derivative of the items' losses along one direction, found by a central difference: no second derivatives.

    Args:
        student: an import path ``module:function`` that builds the student, or ``{"method": ..., "settings": ...}``,
            a transform that makes it out of the teacher.
        temperature: :math:`T > 0`.
        hidden: width of the fusion network.
        fusion_lr: its learning rate (Adam).
        every: steps of the student from one of its steps to the next.
        outer_items: held-out items in each of them, drawn from the validation split.

    Raises:
        TransformError: a setting outside its range; on a call, a task that is not classification, outputs of teacher
            and student that do not match, weights that are not finite, or a task that trains by its own ``fit``.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> half = {"method": "netwright.compress:Prune", "settings": {"ratios": 0.5}}
        >>> student = TrilateralKD(half)(task.build(seed=0), task, budget=2)
        >>> sum(p.numel() for p in student.parameters()) < 0.6 * sum(p.numel() for p in task.build().parameters())
        True

    Source: paper 180, Hu, Wang, Li, Xia, Wang, Yu, "Less or More From Teacher: Exploiting Trilateral Geometry For
    Knowledge Distillation", 2024, arXiv 2312.15112.

    Differs: the derivative by the ratios is written out and differenced, where the paper differentiates an unrolled
    step; it is exact for SGD and, as in the paper, takes one SGD step as stand-in for other optimizers. The sides alone
    enter the fusion network, not the corners too, their sums up to the label. A recipe's parameterization is left out.

    Cost: a forward pass of the teacher for each batch, and on every ``every``-th step two forward passes of the batch
    and one forward and backward pass of ``outer_items`` items: about three times plain training at ``every=1``.
    Memory: two copies of the student's weights.
    """

    student: StudentSpec
    temperature: float = 2.0
    hidden: int = 32
    fusion_lr: float = 1e-2
    every: int = 2
    outer_items: int = 128

    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "student", check_student(self, self.student))
        check_number(self, "temperature", self.temperature, above=True)
        check_number(self, "fusion_lr", self.fusion_lr, above=True)
        for field in ("hidden", "every", "outer_items"):
            check_count(self, field, getattr(self, field))

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A trained student, in eval mode; ``model`` is its teacher and stays as it is.

        Args:
            model: the teacher.
            task: its training split trains the student, its validation split the fusion network.
            budget: epochs; None is the recipe's.
            seed: source of the student's weights, of batches and of the fusion network.
            progress: told how far it is.
        """
        check_weights(self, model)
        recipe = task.recipe or Recipe()
        epochs = recipe.epochs if budget is None else budget
        teacher = copy.deepcopy(model).eval()
        student = build_student(self, self.student, teacher, task, seed)
        if progress is not None:
            progress(0.0, "asking the teacher")
        rate = float(recipe.optimizer_settings.get("lr", 1.0))
        hook = _Distillation(self, student, teacher, task, seed, rate)
        captured = student.register_forward_pre_hook(hook.remember, with_kwargs=True)
        fused = dataclasses.replace(task, loss=hook.loss)
        try:
            return train(self, student, fused, epochs=epochs, seed=seed, hook=hook, progress=progress)
        finally:
            captured.remove()
