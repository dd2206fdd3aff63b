"""Post-training quantization on few inputs, which a network learned alongside varies."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset

from netwright.compress._calibrated import calibrated, levels
from netwright.compress._input_change import Augmented, can_change, kind_of, parts
from netwright.compress._settings import check_count, check_number, check_weights
from netwright.compress._training import train
from netwright.core.data import Batch, Dataset, Inputs, batches, to_device
from netwright.core.errors import TransformError
from netwright.core.evaluate import device_of
from netwright.core.fit import StepHook
from netwright.core.graph.export import arguments
from netwright.core.losses import teacher_loss
from netwright.core.outputs import take_items
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["MetaAug"]


def _scaled(gradient: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor over its root mean square, that taken as constant: as long as a step of Adam, of any gradient."""
    wide = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in gradient]  # squares of half are zero
    made = [part / (part.detach().square().mean().sqrt() + 1e-12) for part in wide]
    return [step.to(part.dtype) for step, part in zip(made, gradient, strict=True)]


def _surrogate(step: Sequence[Tensor], outer: Sequence[Tensor], rate: float) -> Tensor:
    """``-rate <step, outer>``: rises with what the step depends on as the outer loss after it does.

    Args:
        step: from the inner loss, with its graph.
        outer: gradient of the outer loss by the same weights after the step, constant.
        rate: length of the step.
    """
    return -rate * torch.stack([(one * two).sum() for one, two in zip(step, outer, strict=True)]).sum()


def _margin(moved: Tensor, margin: float) -> Tensor:
    """Mean over the items of ``max(0, margin - r)``, ``r`` the root mean square of an item's change."""
    size = (moved.flatten(1).square().mean(1) + 1e-12).sqrt()
    return functional.relu(margin - size).mean()


class _Bilevel(StepHook):
    """The inner loss of the quantized model, and before each of its steps the step of the transformation."""

    def __init__(self, settings: "MetaAug", net: Augmented, task: Task, held: Batch, rate: float) -> None:
        self.settings, self.net, self.task, self.held, self.rate = settings, net, task, held, rate
        into = list(net.changes.parameters())
        self.optimizer = torch.optim.Adam(into, lr=settings.transform_lr) if into else None

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """How far the quantized model is from the whole one on the inputs that it has just read."""
        return self._apart(output, self.net.seen, targets)

    def before_step(self, step: int, total: int) -> None:
        """Let the transformation follow the gradient of its losses."""
        if self.optimizer is None or step % self.settings.every:
            return
        place = device_of(self.net.model)
        inputs, targets = to_device(self.held[0], place), self.held[1].to(place)
        into = list(self.net.changes.parameters())
        self.net.changes.requires_grad_(True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivatives
            weights: dict[str, Tensor] = {
                name: value for name, value in self.net.model.named_parameters() if value.requires_grad
            }
            varied, moved = self.net.vary(inputs)
            inner = self._apart(self.task.outputs(self.net.model, varied), varied, targets, follow=True)
            gradient = torch.autograd.grad(inner, list(weights.values()), create_graph=True, materialize_grads=True)
            step_taken = _scaled(gradient)
            outer = self._outer_gradient(weights, step_taken, inputs, targets)
            total_loss = _surrogate(step_taken, outer, self.rate) + self._kept(varied, moved, inputs, targets)
            slopes = torch.autograd.grad(total_loss, into, materialize_grads=True)
        for value, slope in zip(into, slopes, strict=True):
            value.grad = slope
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.net.changes.requires_grad_(False)

    def _outer_gradient(
        self, weights: dict[str, Tensor], step: Sequence[Tensor], inputs: Inputs, targets: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradient of the loss on unchanged inputs at the weights that a step would lead to."""
        moved = {
            name: (value - self.rate * slope).detach().requires_grad_(True)
            for (name, value), slope in zip(weights.items(), step, strict=True)
        }
        args, kwargs = arguments(inputs)
        output = self.task.read(functional_call(self.net.model, moved, args, kwargs))
        loss = self._apart(output, inputs, targets)
        return torch.autograd.grad(loss, list(moved.values()), materialize_grads=True)

    def _kept(self, varied: Inputs, moved: list[Tensor], inputs: Inputs, targets: Tensor) -> Tensor:
        """What keeps changes from losing the input's meaning, and from vanishing."""
        with torch.no_grad():
            goal = self.task.outputs(self.net.whole, inputs)
        meaning = teacher_loss(self.task.outputs(self.net.whole, varied), goal, targets, 1.0)
        margin = torch.stack([_margin(each, self.settings.margin * self.settings.strength) for each in moved]).mean()
        return self.settings.keep * meaning + margin

    def _apart(self, output: Any, inputs: Inputs, targets: Tensor, *, follow: bool = False) -> Tensor:
        with torch.set_grad_enabled(follow):
            goal = self.task.outputs(self.net.whole, inputs)
        return teacher_loss(output, goal, targets, self.settings.temperature)


@dataclass(frozen=True)
class MetaAug:
    r"""Rounds weights and activations and trains them on a few unlabelled inputs, which a second network varies.

    Reach for it where there are some dozens of inputs to calibrate on and so few bits that rounded weights have to be
    trained: trained on the inputs alone they fit these and nothing else.

    With the whole model :math:`f`, the quantized one :math:`q_\theta` (straight-through gradients), its distance
    :math:`D(x; \theta) = T^2\,\mathrm{KL}\big(\mathrm{softmax}(f(x) / T) \,\|\,
    \mathrm{softmax}(q_\theta(x) / T)\big)` (mean squared where outputs are no logits) and calibration inputs
    :math:`x`, the transformation changes an input by at most :math:`\rho` of its spread :math:`\sigma`,

    .. math:: g_\phi(x, z) = x + \sigma \delta, \quad \delta = \rho \tanh(\mathrm{net}_\phi(x / \sigma, z)), \quad
              z \sim \mathcal{N}(0, I)

    with a network of two layers (3 x 3 convolutions for images, linear layers along the last dimension otherwise).
    The quantized model minimizes :math:`D` on inputs of which a ``share`` is changed and the others are as they are,
    and the transformation the loss on the unchanged inputs after a step on changed ones,

    .. math:: D(x; \theta') + \lambda\,\mathrm{KL}\big(f(x) \,\|\, f(g_\phi(x))\big)
              + \max(0, \mu \rho - \|\delta\|_{rms}), \quad
              \theta' = \theta - \eta \frac{\nabla_\theta D(g_\phi(x); \theta)}{r}

    with :math:`\eta` the recipe's learning rate and :math:`r` the root mean square of the gradient in each tensor,
    taken as constant. The first term has the gradient :math:`-\eta \nabla_\phi \langle \nabla_\theta
    D(g_\phi(x); \theta) / r, \nabla D(x; \theta') \rangle`.

    Args:
        bits: of weights, 2 to 8.
        activation_bits: 2 to 8. Fewer than 8 are for hardware with kernels for them: ONNX Runtime clips in float
            between its integers, which is slower than float alone, see :class:`netwright.compress.EasyQuant`.
        calibration_items: training inputs that are seen; their targets are not.
        strength: :math:`\rho`, at most 1; 0 trains on the inputs as they are.
        share: of the items that are changed when they are read, at random.
        keep: :math:`\lambda`, how much changed inputs must mean the same to the whole model.
        margin: :math:`\mu` from 0 to 1, the least change.
        hidden: channels within the transformation.
        transform_lr: its learning rate (Adam).
        every: steps of the quantized model from one of its steps to the next.
        temperature: :math:`T > 0`.

    Raises:
        TransformError: a setting outside its range, a width that cannot be executed; on a call, a model with no
            layer to quantize or values that are not finite, no input of floating point in 2 to 5 dimensions, a task
            that trains by its own ``fit``.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("digits")
        >>> small = MetaAug(bits=4, calibration_items=16)(task.build(seed=0), task, budget=0.1)
        >>> small(task.example(3)).shape
        torch.Size([3, 10])

    Source: paper 245, Pham et al., "MetaAug: Meta-Data Augmentation for Post-Training Quantization", 2024,
    arXiv 2407.14726.

    Differs: all weights train at once, where the paper reconstructs block after block; the transformation is bounded
    and reads noise, so that every passage sees other inputs, where the paper's is a U-Net without; its meaning is
    kept by the divergence alone; a gradient scaled tensor by tensor stands in for the optimizer's step. A
    parameterization of the recipe is left out, since it would rewrite the whole model too.

    Cost: a budget of one epoch is as many steps as one of the training split has, on batches of calibration items;
    a step with one of the transformation costs about six forward and backward passes. Memory: two copies of the model.
    """

    bits: int = 4
    activation_bits: int = 8
    calibration_items: int = 32
    strength: float = 0.5
    share: float = 0.5
    keep: float = 1.0
    margin: float = 0.5
    hidden: int = 16
    transform_lr: float = 1e-3
    every: int = 2
    temperature: float = 1.0

    low_precision: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("bits", "activation_bits"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
                raise TransformError(f"MetaAug.{field} must be an integer from 2 to 8, got {value!r}.")
        for field in ("calibration_items", "hidden", "every"):
            check_count(self, field, getattr(self, field))
        check_number(self, "strength", self.strength, high=1.0)
        check_number(self, "share", self.share, high=1.0)
        check_number(self, "margin", self.margin, high=1.0)
        check_number(self, "keep", self.keep)
        check_number(self, "transform_lr", self.transform_lr, above=True)
        check_number(self, "temperature", self.temperature, above=True)

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """The quantized model in evaluation mode; ``model`` is untouched.

        Args:
            model: any module that ``torch.export`` traces.
            task: inputs of its training split calibrate and train; its recipe says how.
            budget: epochs, whose number of steps is taken; None is the recipe's.
            seed: draws calibration items, noise and batches.
            progress: told how far it is.
        """
        check_weights(self, model)
        if progress is not None:
            progress(0.0, "tracing")
        count = self.calibration_items
        weights, activations = levels(self.bits)[0], levels(self.activation_bits)[1]
        quantized = calibrated(
            self, model, task, weights=weights, activations=activations, items=count, seed=seed
        ).module
        held = next(iter(batches(task.data.train, count, generator=torch.Generator().manual_seed(seed))))
        if self.strength > 0 and not any(map(can_change, parts(held[0]).values())):
            raise TransformError(
                f"MetaAug varies inputs of floating point in 2 to 5 dimensions, but those of task {task.name!r} are "
                f"{', '.join(map(kind_of, parts(held[0]).values()))}. Set strength=0, or use EasyQuant."
            )
        recipe = task.recipe or Recipe()
        epochs = recipe.epochs if budget is None else budget
        size = min(recipe.batch_size, len(held[1]))
        steps = epochs * max(1, len(task.data.train) // recipe.batch_size)
        with isolated(seed):
            whole = copy.deepcopy(model).eval()
            net = Augmented(quantized, whole, held[0], self.hidden, self.strength, self.share).to(device_of(model))
        rate = float(recipe.optimizer_settings.get("lr", 1e-3))
        hook = _Bilevel(self, net, task, held, rate)
        train_split: Dataset = [(take_items(held[0], at), held[1][at]) for at in torch.arange(len(held[1]))]
        if isinstance(held[0], Tensor):
            train_split = TensorDataset(held[0], held[1])
        few = replace(task, loss=hook.loss, data=replace(task.data, train=train_split))
        passes = steps / max(1, len(held[1]) // size)
        train(self, net, few, epochs=passes, seed=seed, hook=hook, progress=progress, batch_size=size)
        return quantized.eval()
