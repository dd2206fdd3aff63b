"""Networks that grow while they train: from a small seed towards a budget of operations, units and layers both."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from netwright.core.errors import SettingError
from netwright.core.evaluate import device_of
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress
from netwright.search._growing_masks import LAYERS, Masks
from netwright.search._growing_module import Growing, GrowingModule, Segment
from netwright.search._growing_structure import Structure

__all__ = ["GrowingNetwork", "Grown", "Stage"]


@dataclass(frozen=True)
class Stage:
    """A stretch of training in which the network did not change.

    Args:
        step: the first iteration.
        steps: how many.
        macs: multiply-accumulates of one item.
        widths: open units of each group.
        layers: open ones of the layers that can be left out.
    """

    step: int
    steps: int
    macs: int
    widths: Mapping[str, int]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Grown:
    """What came of growing.

    Args:
        model: an ordinary, smaller module, trained, in eval mode.
        history: every network that was trained, in order.
        macs: multiply-accumulates of one item in ``model``.
        full_macs: the same in the full-size network.
        training_macs: those of the whole training, three for each of a forward pass (one forward, two backward).
        full_training_macs: what as many steps of the full-size network would have taken.
    """

    model: nn.Module
    history: tuple[Stage, ...]
    macs: int
    full_macs: int
    training_macs: int
    full_training_macs: int

    @property
    def training_share(self) -> float:
        """``training_macs`` over ``full_training_macs``."""
        return self.training_macs / self.full_training_macs


@dataclass(frozen=True)
class GrowingNetwork:
    r"""Trains a network that starts small and grows towards a share of the full one, in fewer operations.

    Reach for it when training the full-size network is itself too expensive, or when widths and depth are not known:
    what is never needed is never computed.

    Every channel, head or hidden unit, and every layer that can be left out, has a mask with a logit :math:`s` and a
    temperature :math:`\beta` of its own. In each of ``rounds`` rounds a network is drawn and trained:

    .. math:: q \sim \mathrm{Bernoulli}(m), \qquad m = \sigma(\beta s), \qquad \beta = \beta_R^{\,t/R}

    with :math:`t` the rounds that have drawn a mask so far, :math:`\beta_R` = ``final``. Only units with
    :math:`q = 1` are computed; what they put out is multiplied by :math:`m`, and an open layer :math:`f` gives
    :math:`m f(x) + (1 - m) x`. With :math:`L` the loss of a batch, :math:`c(m)` the expected share of the full
    network's multiply-accumulates and :math:`b` = ``budget``, each step moves

    .. math:: s \leftarrow s - \tfrac{r}{T}\, \beta m (1 - m) \Big( \tfrac{q}{\nu} \tfrac{\partial L}{\partial m}
              + \lambda\, (c(m) - b) \Big)

    over :math:`T` steps, :math:`\nu` the root mean square of the slopes (its running maximum), :math:`\lambda` =
    ``strength``, :math:`r` = ``reach``: below its budget the network grows, above it shrinks. The seed has
    ``seed_share`` of the units of each group and is unlikely to draw any layer that can be left out. At the end masks
    are folded into the weights, the units of highest :math:`s` that fit the budget stay, and that network has the last
    ``settle`` of the training to itself.

    Args:
        budget: share of the full network's multiply-accumulates that the result may have, in (0, 1).
        seed_share: share of each group's units with which it starts, in (0, 1).
        rounds: networks that are drawn.
        settle: fraction of the training that the final network has, in (0, 1).
        strength: :math:`\lambda`.
        reach: :math:`r`.
        final: :math:`\beta_R`, at least 1.
        layers: names of modules that may be left out; they map one tensor to one of the same shape and the same
            channels. None takes all members of ``nn.Sequential`` and ``nn.ModuleList`` that do and that are made of
            layers themselves; ``()`` none.

    Raises:
        SettingError: a setting outside its range; on a call, a name in ``layers`` that is no module or that cannot be
            left out, a budget that one unit in each group exceeds, a task that trains by its own ``fit``, or weights
            that are not finite.
        NothingToPruneError: on a call, no group of units that could grow.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(64, 4), torch.zeros(64).long())
        >>> network = lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> task = Task("tiny", network, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> grown = GrowingNetwork(0.5, rounds=2)(task.build(), task, budget=4)
        >>> grown.model[0], grown.training_share < 1
        (Linear(in_features=4, out_features=8, bias=True), True)

    Source: paper 18: Yuan, Savarese and Maire, "Growing Efficient Deep Networks by Structured Continuous
        Sparsification", 2020, arXiv 2007.15353.

    Differs: written from the paper's description, without its code. A layer is any module that the identity can
        replace. Masks act where units are read, for a batch norm behind the unit would undo them. Derived for this
        code: slopes are scaled, so that settings carry over between tasks; the budget is of multiply-accumulates and
        met exactly, by rank; and the last part of the training goes to the final network alone. The paper decides by
        the sign of :math:`s` and has no such part.

    Cost: ``training_macs`` for the training, plus one trace for each set of open layers (a second or so), and for each
        round ten passes of two items. Memory is that of the full network's parameters and optimizer state, and of one
        smaller network's activations.
    """

    budget: float = 0.5
    seed_share: float = 0.25
    rounds: int = 8
    settle: float = 0.4
    strength: float = 4.0
    reach: float = 10.0
    final: float = 100.0
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "seed_share", "settle"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise SettingError(f"GrowingNetwork.{name} must lie in (0, 1), got {value!r}.")
        for name, least in (("strength", 0.0), ("reach", 0.0), ("final", 1.0)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise SettingError(f"GrowingNetwork.{name} must be finite and at least {least:g}, got {value!r}.")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise SettingError(f"GrowingNetwork.rounds must be a positive integer, got {self.rounds!r}.")
        if isinstance(self.layers, str):
            raise SettingError(
                f"GrowingNetwork.layers must be names of modules, got one string. Write ({self.layers!r},)."
            )

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Grown:
        """Train a growing copy of ``model``.

        Args:
            model: the full-size network, untrained; any module that ``torch.export`` traces.
            task: data, loss and recipe.
            budget: epochs to train; None is the recipe's.
            seed: draws networks and batches.
            progress: told how far it is.
        """
        recipe = task.recipe or Recipe()
        if budget is not None:
            recipe = recipe.lasting(budget)
        if task.fit is not None or task.loss is None:
            raise SettingError(
                f"GrowingNetwork works within every iteration of training, but task {task.name!r} trains by its own "
                "fit=. Give the task a loss, and let it be trained by netwright."
            )
        for name, value in model.named_parameters():
            if not bool(value.isfinite().all()):
                raise SettingError(f"GrowingNetwork: parameter {name!r} has values that are not finite.")
        full = deepcopy(model)
        structure = Structure(full, task.example(), self.layers)
        masks = Masks(
            {group.name: group.size for group in structure.groups},
            len(structure.layers),
            seed_share=self.seed_share,
            final=self.final,
            rounds=self.rounds,
            generator=torch.Generator().manual_seed(seed),
        )
        module = GrowingModule(full, structure)
        hook = Growing(
            module,
            structure,
            masks,
            budget=self.budget,
            rounds=self.rounds,
            settle=self.settle,
            strength=self.strength,
            reach=self.reach,
        )
        device = device_of(model)
        fit(module, task, recipe, seed=seed, device=device, progress=progress, validate=False, hook=hook)
        module.store()
        smaller = structure.build(full, hook.segments[-1].drawn).eval()
        return self._grown(structure, smaller, hook.segments, task, recipe)

    def _grown(
        self, structure: Structure, model: nn.Module, segments: Sequence[Segment], task: Task, recipe: Recipe
    ) -> Grown:
        items = 3 * min(recipe.batch_size, len(task.data.train))
        stages = tuple(_stage(structure, segment) for segment in segments)
        return Grown(
            model=model,
            history=stages,
            macs=stages[-1].macs,
            full_macs=structure.total,
            training_macs=items * sum(stage.steps * stage.macs for stage in stages),
            full_training_macs=items * sum(stage.steps for stage in stages) * structure.total,
        )


def _stage(structure: Structure, segment: Segment) -> Stage:
    widths = {group.name: int(segment.drawn[group.name].sum()) for group in structure.groups}
    drawn = segment.drawn.get(LAYERS, torch.empty(0)).tolist()
    layers = tuple(name for name, mask in zip(structure.layers, drawn, strict=True) if mask)
    return Stage(segment.step, segment.steps, segment.macs, widths, layers)
