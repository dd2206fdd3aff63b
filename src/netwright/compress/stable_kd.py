"""Distillation block by block, the blocks then put together again."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from netwright.compress._blocks import Cut, channel, features, find_cuts, replaced, seen
from netwright.compress._settings import check_count, check_number, check_weights
from netwright.compress._student import StudentSpec, build_student, check_student
from netwright.compress._training import train
from netwright.core.data import Inputs, beside, call
from netwright.core.errors import TransformError
from netwright.core.evaluate import device_of
from netwright.core.fit import StepHook
from netwright.core.losses import task_loss, teacher_loss
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["StableKD"]


def _open_cuts(share: float, cuts: int, decomposed: float, recomposed: float) -> int:
    """How many of the cuts, the last ones, are still open when ``share`` of the steps is done.

    All up to ``decomposed``, none from ``recomposed`` on, in between one fewer after each equal interval.

    Example:
        >>> [_open_cuts(share / 10, 2, 0.3, 0.7) for share in range(10)]
        [2, 2, 2, 1, 1, 0, 0, 0, 0, 0]
    """
    if share < decomposed:
        return cuts
    if share >= recomposed:
        return 0
    passed = int((share - decomposed) / (recomposed - decomposed) * cuts + 1e-9)
    return max(cuts - 1 - passed, 0)


def _distance(given: Tensor, goal: Tensor) -> Tensor:
    """Squared error relative to the goal's mean square."""
    return (given - goal).square().mean() / goal.square().mean().clamp_min(1e-12)


class _Adapter(nn.Module):
    """A linear map along one dimension, cut off below zero where what it stands in for never is."""

    def __init__(self, given: int, wanted: int, dimension: int, positive: bool) -> None:
        super().__init__()
        self.dimension, self.positive = dimension, positive
        self.map = nn.Linear(given, wanted)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with ``wanted`` entries along the dimension."""
        mapped: Tensor = self.map(x.movedim(self.dimension, -1).contiguous()).movedim(-1, self.dimension)
        return (mapped.relu() if self.positive else mapped).contiguous()


class _Blocks(nn.Module):
    """A student whose blocks read the teacher's features at open cuts, and its own at the others."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cuts: Sequence[Cut], adapters: Sequence[nn.Module]):
        super().__init__()
        self.student, self.teacher, self.cuts = student, teacher.requires_grad_(False), tuple(cuts)
        self.adapters = nn.ModuleList(adapters)
        self.opened = len(self.cuts)
        self.goal: Any = None
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def train(self, mode: bool = True) -> "_Blocks":
        """Set the mode; the teacher evaluates in either."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's answer; ``goal`` is the teacher's, ``pairs`` what blocks gave and should have given."""
        inputs: Inputs = kwargs or (args[0] if len(args) == 1 else args)
        first = len(self.cuts) - self.opened
        with torch.no_grad():
            features, self.goal = seen(self.teacher, [cut.teacher for cut in self.cuts[first:]], inputs)
        self.pairs = []

        def feed(instead: Tensor) -> Callable[[Tensor], Tensor]:
            def change(output: Tensor) -> Tensor:
                self.pairs.append((output, instead.detach()))
                return instead.clone()  # what reads it may change it in place

            return change

        fed = {
            cut.student: feed(adapter(features[cut.teacher]))
            for cut, adapter in zip(self.cuts[first:], list(self.adapters)[first:], strict=True)
        }
        with replaced(self.student, fed):
            return call(self.student, inputs)


class _Schedule(StepHook):
    """The loss of every block, and how many are open."""

    def __init__(self, settings: "StableKD", net: _Blocks, task: Task, recipe: Recipe) -> None:
        self.settings, self.net, self.task, self.recipe = settings, net, task, recipe
        net.opened = _open_cuts(0.0, len(net.cuts), settings.decomposed, settings.recomposed)

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """The last block's loss against labels and the teacher's answer, and the others' against its features."""
        weight = self.recipe.distill_weight
        goal = self.task.read(self.net.goal)
        total = (1 - weight) * task_loss(self.task, output, targets)
        total = total + weight * teacher_loss(output, goal, targets, self.recipe.distill_temperature)
        for given, wanted in self.net.pairs:
            total = total + self.settings.feature_weight * _distance(given, wanted)
        return total

    def after_step(self, step: int, total: int) -> None:
        """Close the cuts whose time has come."""
        settings = self.settings
        self.net.opened = _open_cuts((step + 1) / total, len(self.net.cuts), settings.decomposed, settings.recomposed)


@dataclass(frozen=True)
class StableKD:
    r"""Trains a smaller network block by block on its teacher's features, and then as a whole.

    Reach for it where plain distillation takes too many steps or there are few data: as long as blocks are trained
    apart, none has to follow the others' changes.

    Teacher and student are cut into :math:`K` blocks, :math:`t_k` and :math:`s_k` the features after block ``k``. As
    long as the cut before it is open, block ``k`` of the student reads the teacher's features instead of its
    predecessor's, and the steps minimize the sum over the open cuts and the last block

    .. math:: (1 - w)\,\mathrm{loss}(z, y) + w\,\mathrm{teacher\_loss}(z, z') + \gamma \sum_{k\ \mathrm{open}}
              \frac{\|s_k(a_{k-1}) - a_k\|^2}{\|a_k\|^2}, \quad a_k = A_k(t_k), \quad a_0 = x

    with :math:`w` and the temperature from the task's recipe, outputs :math:`z`, the teacher's :math:`z'` and targets
    :math:`y`. :math:`A_k` is the identity where features agree in shape; elsewhere a linear map of the channels that is
    learned by the block that reads it (no gradient passes from :math:`s_k` to :math:`a_k`). All cuts are open until
    the share ``decomposed`` of the steps; they then close one after the other, from the input on, in equal intervals
    until ``recomposed``, from where on the student is trained end to end.

    Args:
        student: an import path ``module:function`` that builds the student, or ``{"method": ..., "settings": ...}``,
            a transform that makes it out of the teacher.
        blocks: :math:`K`, of about equal numbers of layers; fewer where the networks cannot be cut so often.
        at: pairs of names, a module of the teacher and one of the student, at whose outputs to cut, in the order of
            execution; None looks for them.
        decomposed: share of the steps with all cuts open.
        recomposed: share of the steps after which none is.
        feature_weight: :math:`\gamma`.

    Raises:
        TransformError: a setting outside its range; on a call, outputs of teacher and student that do not match,
            networks that cannot be cut, modules in ``at`` that do not exist, that do not run once in a pass, or whose
            outputs are no tensors or differ in more than the channels, weights that are not finite, or a task that
            trains by its own ``fit``.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> half = {"method": "netwright.compress:Prune", "settings": {"ratios": 0.5}}
        >>> student = StableKD(half, blocks=2)(task.build(seed=0), task, budget=2)
        >>> sum(p.numel() for p in student.parameters()) < 0.6 * sum(p.numel() for p in task.build().parameters())
        True

    Source: paper 73, Kao, Chen, Chan, "StableKD: Breaking Inter-block Optimization Entanglement for Stable Knowledge
    Distillation", 2023, arXiv 2312.13223.

    Differs: all blocks train in the same steps; cuts close one at a time from the input on, at times that are our
    choice; where channels differ, the student learns to give what its next block makes of the teacher's features. A
    parameterization of the recipe is left out, since it would rewrite the teacher too.

    Cost: a forward pass of the teacher for each step more than plain training, and one of both for each module when
    cuts are looked for. Memory: a copy of the teacher.
    """

    student: StudentSpec
    blocks: int = 3
    at: tuple[tuple[str, str], ...] | None = None
    decomposed: float = 0.4
    recomposed: float = 0.6
    feature_weight: float = 1.0

    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "student", check_student(self, self.student))
        check_count(self, "blocks", self.blocks, least=2)
        for field in ("decomposed", "recomposed"):
            check_number(self, field, getattr(self, field), high=1.0)
        if self.recomposed < self.decomposed:
            raise TransformError(
                f"StableKD.recomposed must be at least decomposed, {self.decomposed:g}, got {self.recomposed:g}."
            )
        check_number(self, "feature_weight", self.feature_weight)
        if self.at is not None:
            given = self.at if isinstance(self.at, tuple | list) else (self.at,)
            pairs = tuple(tuple(pair) if isinstance(pair, tuple | list) else (pair,) for pair in given)
            if not pairs or not all(len(pair) == 2 and all(isinstance(name, str) for name in pair) for pair in pairs):
                raise TransformError(
                    f"StableKD.at must be pairs of module names (of the teacher, of the student), got {self.at!r}."
                )
            object.__setattr__(self, "at", pairs)

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
            task: its training split trains the student.
            budget: epochs; None is the recipe's.
            seed: source of the student's weights and of batches.
            progress: told how far it is.
        """
        check_weights(self, model)
        recipe = task.recipe or Recipe()
        teacher = copy.deepcopy(model).eval()
        student = build_student(self, self.student, teacher, task, seed)
        if progress is not None:
            progress(0.0, "cutting into blocks")
        if self.at is None:
            cuts = find_cuts(self, teacher, student, task, self.blocks)
        else:
            cuts = [Cut(*pair) for pair in self.at]
        with isolated(seed):
            adapters = _adapters(self, teacher, student, task, cuts)
        net = _Blocks(student, teacher, cuts, adapters).to(device_of(student))
        hook = _Schedule(self, net, task, recipe)
        joint = dataclasses.replace(task, loss=hook.loss)
        epochs = recipe.epochs if budget is None else budget
        train(self, net, joint, epochs=epochs, seed=seed, hook=hook, progress=progress)
        return student.eval()


def _adapters(
    owner: object, teacher: nn.Module, student: nn.Module, task: Task, cuts: Sequence[Cut]
) -> list[nn.Module]:
    """What makes of the teacher's features the student's, at every cut."""
    name = type(owner).__name__
    for cut in cuts:
        for who, model, path in (("teacher", teacher, cut.teacher), ("student", student, cut.student)):
            if path not in dict(model.named_modules()):
                raise TransformError(f"{name}.at: the {who} has no module {path!r}. Look at named_modules().")
    inputs = beside(task.example(4), teacher)
    theirs = features(owner, "teacher", teacher, [cut.teacher for cut in cuts], inputs)
    own = features(owner, "student", student, [cut.student for cut in cuts], inputs)
    found: list[nn.Module] = []
    for cut in cuts:
        shapes = tuple(theirs[cut.teacher].shape), tuple(own[cut.student].shape)
        dimension = channel(*shapes)
        if dimension is None:
            raise TransformError(
                f"{name}: the teacher's features at {cut.teacher!r} are {shapes[0]}, the student's at {cut.student!r} "
                f"{shapes[1]}. They may differ in one dimension, the channels."
            )
        positive = bool((own[cut.student] >= 0).all())
        linear = _Adapter(shapes[0][dimension], shapes[1][dimension], dimension, positive)
        found.append(nn.Identity() if dimension < 0 else linear)
    return found
