"""GETA: units are removed and bit widths are learned in one training."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, fx, nn

from netwright.compress._fold import source_of
from netwright.compress._geta_hook import JointTraining, Stages
from netwright.compress._learned_quantizer import FixedQuantizer
from netwright.compress._placement import Weighted
from netwright.compress._quantizers import Integers
from netwright.compress._settings import check_choice, check_count, check_ratio, check_weights, checked_paths
from netwright.compress._sparse_recipe_masks import shared_epochs, steps_per_epoch
from netwright.compress._training import train
from netwright.compress._unit_plan import Goal, Plan, Scope, plan, step_sizes
from netwright.compress._unit_vectors import UnitVectors
from netwright.compress.quantize import Int8, insert, observe, prepare, round_outputs
from netwright.core.errors import TransformError
from netwright.core.graph import trace
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["GETA"]

_LEAST, _MOST = 2, 8


@dataclass(frozen=True)
class GETA:
    r"""Removes units and rounds weights to few bits in one training, each layer to a width that is learned.

    Reach for it where a network has to become small in both ways, and pruning first and rounding afterwards would lose
    too much. The result stores integers of at most ``most_bits`` bits (in bytes) and runs on integer kernels.

    A weight :math:`x` of a layer with step :math:`d` and range :math:`q` is computed with as

    .. math:: x^Q = \mathrm{sgn}(x)\, d\, \mathrm{round}\Big(\frac{\min(|x|, q)}{d}\Big), \qquad
              b = \log_2\Big(\frac q d + 1\Big) + 1

    :math:`b` being its bit width. Weights, :math:`d` and :math:`q` descend on the loss, rounding passed straight
    through, and after every step :math:`d` is projected so that :math:`l \le b \le u`. Four stages follow one another:
    up to ``start`` :math:`u = 16`; up to ``prune`` :math:`u` falls to ``most_bits`` in ``periods``; up to ``stop``
    units go, in ``periods``; then widths are whole and stay.

    In each period of the third stage the units of lowest score (see :class:`netwright.compress.hesso.HESSO`) join
    those that are to go, and are forgotten, :math:`x \leftarrow \bar x - \gamma x^Q`, with :math:`\bar x` what the
    optimizer makes of :math:`x`; at the period's end they are zero. With :math:`g` the gradient in all redundant
    units of a group, :math:`c` their clipped parameters, :math:`r` the rounding residuals, :math:`\alpha` the learning
    rate and :math:`T - t` steps left,

    .. math:: \gamma = \begin{cases} 1 / (T - t) & c^\top g \ge 0 \\
              (1 - \eta)\, \alpha \|g\|^2 / (-c^\top g) & \text{else} \end{cases} \qquad
              d = \begin{cases} d(l) & r^\top g \ge 0 \\ \xi \eta\, \alpha \|g\|^2 / (-\gamma\, r^\top g) & \text{else}
              \end{cases}

    so that a plain gradient step together with forgetting descends: what matters most is forgotten last, and layers
    that lose units are rounded as coarsely as that allows.

    Args:
        ratio: share of the units to remove, in [0, 1); 0 learns widths alone.
        least_bits: :math:`l`, at least 2.
        most_bits: :math:`u`, at most 8, which is what integer kernels execute; with 8, x86 processors without VNNI
            saturate, see :class:`netwright.compress.quantize.Int8`.
        scope: "layer" takes the share of each group; "global" counts units in all groups together, and may leave a
            group a single unit.
        periods: in which the bound falls, and in which units go.
        start: fraction of the training after which the bound begins to fall.
        prune: fraction after which units go, above ``start``.
        stop: fraction after which they are gone, above ``prune``.
        exclude: names of groups to leave whole.

    Raises:
        TransformError: a setting outside its range, widths that cannot be executed among them; on a call, a ratio that
            cannot be met, a name in ``exclude`` that no group has, a model without a convolution or linear layer,
            weights that are not finite, a task without a loss, or one that trains by its own ``fit``.
        NothingToPruneError: on a call with a ratio, no zero-invariant group is left.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(64, 4), torch.zeros(64).long())
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> small = GETA(0.75, most_bits=6)(model, task, budget=4)
        >>> small.get_parameter("0.weight").shape, GETA.widths(small)["0.weight"] <= 6
        (torch.Size([4, 4]), True)

    Source: 74. X. Qu, D. Aponte, C. Banbury, D. P. Robinson, T. Ding, K. Koishida, I. Zharkov, T. Chen. Automatic Joint
        Structured Pruning and Quantization for Efficient Neural Network Training and Compression. CVPR 2025.
        arXiv:2502.16638.

    Differs: the exponent of the paper's quantizer is 1, for which there are integer kernels. The dependency graph is
        that of the model without quantizers, which change no dependency here: a weight has one grid while it trains.
        Batch norms are folded at the end, by which each output channel has a step of its own. Kernels that do not train
        (buffers) are rounded to ``most_bits`` then. Activations are rounded to 8 bits on ranges seen after training.
        Forgetting takes the gradient for the optimizer's direction, so descent is assured for plain gradient descent.
        Step sizes of :math:`d` and :math:`q` are the learning rate over the root of the number of weights (and of
        steps). A moving average and a parameterization of the recipe are left out of this training.

    Cost: the training that ``budget`` allows (None: the recipe's epochs), with a few passes over the weights and a copy
        of them at every step; three traces, and a copy of the model for each group.
    """

    trains: ClassVar[bool] = True
    low_precision: ClassVar[bool] = True

    ratio: float = 0.5
    least_bits: int = 4
    most_bits: int = 7
    scope: Scope = "layer"
    periods: int = 4
    start: float = 0.1
    prune: float = 0.3
    stop: float = 0.7
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        check_ratio(self, "ratio", self.ratio, what="removes half of the units", zero=True)
        check_choice(self, "scope", self.scope, get_args(Scope))
        check_count(self, "periods", self.periods)
        check_count(self, "least_bits", self.least_bits, least=_LEAST)
        check_count(self, "most_bits", self.most_bits, least=_LEAST)
        if self.most_bits > _MOST or self.least_bits > self.most_bits:
            raise TransformError(
                f"GETA needs least_bits <= most_bits <= {_MOST}, for integer kernels take bytes; got "
                f"{self.least_bits} and {self.most_bits}."
            )
        check_ratio(self, "start", self.start, what="begins to narrow widths after half of the training", zero=True)
        check_ratio(self, "prune", self.prune, what="begins to prune after half of the training")
        check_ratio(self, "stop", self.stop, what="has pruned after half of the training")
        if not self.start < self.prune < self.stop:
            raise TransformError(
                f"GETA needs start < prune < stop, got {self.start!r}, {self.prune!r} and {self.stop!r}."
            )

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A smaller, trained, quantized module, in eval mode.

        Args:
            model: any module that ``torch.export`` traces, trained or not.
            task: data, loss and recipe.
            budget: epochs to train; None is the recipe's, 0 cuts the shortest groups and rounds to ``most_bits``.
            seed: draws the batches and the items that show the ranges of activations.
            progress: told how far it is.
        """
        check_weights(self, model)
        report = progress or (lambda fraction, what: None)
        report(0.0, "tracing")
        _, where = prepare(self, model, task, fold=False)  # folding gives shared weights other names
        module = copy.deepcopy(model)
        rounded = {str(_node(node, rule).target) for node, rule in where.weights.items()}
        names = sorted(rounded & dict(module.named_parameters(remove_duplicate=False)).keys())
        found = self._plan(module, task)
        recipe = task.recipe or Recipe()
        [epochs] = shared_epochs(task, recipe.epochs if budget is None else budget, [1.0])
        total = round(epochs * steps_per_epoch(task))
        hook = self.hook(module, names, found, recipe, total)
        train(
            self,
            module,
            task,
            epochs=epochs,
            seed=seed,
            hook=hook,
            progress=lambda fraction, what: report(0.05 + 0.85 * fraction, what),
            average=None,
        )
        hook.finish()
        report(0.92, "storing integers")
        units = hook.units()
        smaller = found.graph.shrink(module, units) if units else module
        result = self._store(smaller, task, hook, seed)
        report(1.0, f"removed {found.goal.total} units")
        return result

    def hook(self, module: nn.Module, names: list[str], found: Plan, recipe: Recipe, total: int) -> JointTraining:
        """What goes on within ``total`` iterations."""
        widths = int(self.start * total)
        prune = max(widths, int(self.prune * total))
        stages = Stages(widths, prune, max(prune + 1, int(self.stop * total)), self.periods)
        bits = (self.least_bits, self.most_bits)
        vectors = UnitVectors(module, found.places)
        return JointTraining(module, names, vectors, found, stages, bits, step_sizes(recipe, total))

    @staticmethod
    def widths(model: nn.Module) -> dict[str, int]:
        """The bit width of each weight of a result that has learned one."""
        parts = {name: part for name, part in model.named_modules() if isinstance(part, FixedQuantizer)}
        return {name.removesuffix("_quantizer"): part.width for name, part in parts.items()}

    def _plan(self, module: nn.Module, task: Task) -> Plan:
        if self.ratio == 0:
            return Plan(trace(module, task.example()), (), {}, Goal({}, 0))
        return plan(self, module, task)

    def _store(self, smaller: nn.Module, task: Task, hook: JointTraining, seed: int) -> nn.Module:
        """Quantizers with the learned grids, plain ones for weights that did not train, and of activations."""
        assert hook.widths is not None
        settings = Int8(weight_bits=self.most_bits)
        trained = dict(smaller.named_parameters(remove_duplicate=False))
        module, where = prepare(self, smaller, task)
        layers = [(_node(node, rule), rule.axis) for node, rule in where.weights.items()]
        module, observers = insert(self, module, where, settings)
        for node, axis in layers:
            source, name = source_of(node), str(node.target)
            if source in hook.grids:
                factors = _folded(trained[source], module.get_parameter(name), axis)
                quantizer = FixedQuantizer(hook.grids[source].step * factors, hook.widths[source], axis)
                module.set_submodule(f"{name}_quantizer", quantizer)
        observe(module, observers, task.data.train, settings, seed)
        round_outputs(module, observers, settings.calibration, Integers.activation(settings.activation))
        return module.eval()


def _folded(before: Tensor, after: Tensor, axis: int) -> Tensor:
    """By what each output channel of a weight was multiplied when a batch norm was folded into it; its sign aside."""
    lengths = [value.detach().double().movedim(axis, 0).flatten(1).abs().amax(1) for value in (before, after)]
    return torch.where(lengths[0] > 0, lengths[1] / lengths[0], torch.ones_like(lengths[0]))


def _node(layer: fx.Node, rule: Weighted) -> fx.Node:
    """The node that names the weight of a layer."""
    node = layer.args[rule.weight]
    assert isinstance(node, fx.Node)
    return node
