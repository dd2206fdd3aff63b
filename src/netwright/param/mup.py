"""Maximal update parameterization: initial scales, learning rates and dampings that hold for every width."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.core.errors import SettingError
from netwright.param._mup_coordinates import CoordinateCheck, coordinate_check
from netwright.param._mup_widths import Role, Shapes, Width, shapes_of, tied_outputs, widths_of

__all__ = ["CoordinateCheck", "coordinate_check", "mup", "shapes_of"]

OptimizerName: TypeAlias = Literal["sgd", "adam", "kfac", "shampoo"]
Initialization: TypeAlias = Literal["fan_in", "constant", "keep"]

_MARK = "_netwright_mup"


class _Multiplier:
    """A forward pre-hook that scales a layer's input."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        if args:
            return (args[0] * self.factor, *args[1:]), named
        return args, {**named, "input": named["input"] * self.factor}


def mup(
    model: nn.Module,
    base: Shapes,
    delta: Shapes | None = None,
    *,
    optimizer: OptimizerName = "adam",
    lr: float = 1e-3,
    damping: float | None = None,
    initialization: Initialization = "fan_in",
    roles: Mapping[str, Role] | None = None,
) -> list[dict[str, Any]]:
    r"""Rescales a new model in place, and gives parameter groups, such that settings hold for every width.

    Reach for it when a wide network is too dear to tune: tune ``lr`` and ``damping`` on a narrow one, and give the same
    numbers here for the wide one, with the same ``base``. In the common parameterization the best learning rate falls
    with the width; here the change of every layer's features in a step keeps its size, and the best learning rate
    its place.

    The dimensions in which ``model`` differs from ``base`` are widths. For a parameter whose input and output
    dimensions have grown by the factors :math:`n` and :math:`m` against the base (1 where a dimension is no width; a
    vector has an output only), settings of the base are multiplied by

    ============================ =================== ================== ===================
    \                            input, vectors      hidden             output
    ============================ =================== ================== ===================
    initial standard deviation   1                   :math:`n^{-1/2}`   :math:`n^{-1}`
    SGD: lr                      :math:`m`           :math:`m / n`      :math:`1 / n`
    Adam: lr                     1                   :math:`1 / n`      :math:`1 / n`
    Adam: eps                    :math:`1 / m`       :math:`1 / m`      1
    K-FAC: lr                    1                   1                  1
    K-FAC: damping of A, of B    1, :math:`1 / m`    :math:`n, 1 / m`   :math:`n, 1`
    Shampoo: lr                  :math:`\sqrt{m}`    :math:`\sqrt{m/n}` :math:`1/\sqrt{n}`
    Shampoo: damping             :math:`1 / m`       :math:`n / m`      :math:`n`
    ============================ =================== ================== ===================

    K-FAC treats biases as a last column of their weight, whose scale is that of the other columns, so their lr is
    multiplied by their weight's :math:`n`; what K-FAC leaves to SGD follows SGD's row.

    Not changed by this function: attention must divide its logits by the head's dimension, not its square root, where
    that dimension grows; a schedule must multiply each group's own lr (``LambdaLR``, ``CosineAnnealingLR``, not
    ``OneCycleLR`` with one ``max_lr``; a recipe that gives no ``max_lr`` has one for each group). Weight decay that is
    multiplied by the lr weakens with it.

    Args:
        model: freshly initialized; rescaled in place.
        base: a model of the base width, or its shapes by name (:func:`shapes_of`); never changed.
        delta: another model, or shapes, that differs from ``base`` in every width; needed only where ``model`` has
            some width in common with the base.
        optimizer: for which groups are meant: ``torch.optim.SGD``; ``Adam``, ``AdamW`` and others that divide by the
            root of squared gradients per entry; ``netwright.optim.KFAC``; ``netwright.optim.Shampoo`` without grafting.
        lr: learning rate at the base width.
        damping: at the base width: ``eps`` of Adam, the product of both dampings of K-FAC, ``damping`` of Shampoo. None
            leaves it to the optimizer (of K-FAC's splits, "trace" then scales by itself).
        initialization: how the model was initialized: "fan_in" as torch's layers are, with variance inverse to the
            fan-in, "constant" with a variance that is the same at all widths. "keep" leaves the weights as they are,
            for a model that was rescaled before and trained since, here or in another process.
        roles: by name of parameters: "input", "hidden", "output" or "scalar", for parameters of modules of your own
            that are not used as those of ``nn.Linear`` are. Without it, such a parameter with one width is "input".

    Returns:
        Groups with ``params``, ``lr`` and, where given, ``damping`` (``eps``), one for each distinct setting.

    Raises:
        SettingError: models that differ in more than lengths, a setting outside its range, a dimension that is no
            width, a weight that is computed from other parameters, or a model that was rescaled before.

    Example:
        >>> def network(width):
        ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        >>> groups = mup(network(256), network(32), optimizer="sgd", lr=0.1)
        >>> [([tuple(param.shape) for param in group["params"]], group["lr"]) for group in groups]
        [([(256, 8), (256,)], 0.8), ([(2, 256)], 0.0125), ([(2,)], 0.1)]
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)

    Cost: one pass over the parameters.

    Source: paper 138, Ishikawa and Karakida, "On the Parameterization of Second-Order Optimization Effective Towards
    the Infinite Width", 2023, arXiv 2312.12226. SGD and Adam: Yang et al., "Tensor Programs V", 2022, arXiv
    2203.03466. Paper 137, Noci et al., "Why do Learning Rates Transfer? Reconciling Optimization and Scaling Limits for
    Deep Learning", 2024, explains by constant sharpness why it works.

    Differs: exponents of K-FAC and Shampoo are those in the authors' code, and checked by deriving them; the rows for
    damping of Shampoo and for biases are derived. Depth is not scaled. An output layer that shares its weight with an
    embedding has its input multiplied by :math:`1 / n` instead, by a hook, and follows the embedding's column. The hook
    is not part of a state dict, so "keep" adds it where it is missing.
    """
    _check(model, optimizer, lr, damping, initialization)
    _require_plain(model)
    widths = widths_of(model, base, delta, roles or {})
    params = dict(model.named_parameters())
    if initialization != "keep":
        if _MARK in model.__dict__:
            raise SettingError(
                "mup: this model was rescaled before, and would be a second time. Pass initialization='keep'."
            )
        model.__dict__[_MARK] = True
        for name, param in params.items():
            _rescale(param, _gain(widths[name], initialization))
    for name, layer in tied_outputs(model):
        if not any(isinstance(hook, _Multiplier) for hook in layer._forward_pre_hooks.values()):
            layer.register_forward_pre_hook(_Multiplier(1 / widths[name].fan_out), with_kwargs=True)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, param in params.items():
        settings = {"lr": lr * _RATES[optimizer](widths[name]), **_dampings(optimizer, widths[name], damping)}
        groups.setdefault(tuple(settings.items()), {"params": [], **settings})["params"].append(param)
    return list(groups.values())


def _check(model: object, optimizer: object, lr: object, damping: object, initialization: object) -> None:
    if not isinstance(model, nn.Module):
        raise SettingError(f"mup: model must be an nn.Module, got {type(model).__name__}.")
    for what, value, kinds in (
        ("optimizer", optimizer, OptimizerName),
        ("initialization", initialization, Initialization),
    ):
        if value not in get_args(kinds):
            raise SettingError(f"mup: {what} must be one of {', '.join(get_args(kinds))}, got {value!r}.")
    for what, value in (("lr", lr), *([] if damping is None else [("damping", damping)])):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise SettingError(f"mup: {what} must be a number at least 0, got {value!r}.")
    if damping is not None and optimizer == "sgd":
        raise SettingError("mup: SGD has no damping. Leave it out.")


def _require_plain(model: nn.Module) -> None:
    for name, part in model.named_modules():
        computed = parametrize.is_parametrized(part)
        older = any(hasattr(part, f"weight_{end}") for end in ("g", "orig"))  # weight_norm and spectral_norm by hooks
        if computed or (older and "weight" not in part._parameters):
            raise SettingError(
                f"mup: layer {name!r} computes its weight from other parameters, and those have no role here. Undo "
                "that first: netwright.param.fold(model), or the older torch.nn.utils.remove_weight_norm."
            )


def _gain(width: Width, initialization: Initialization) -> float:
    """What initial values are multiplied by, to have the standard deviations of the table."""
    wanted = {"hidden": 1 / math.sqrt(width.fan_in), "output": 1 / width.fan_in}.get(width.role, 1.0)
    return wanted * (math.sqrt(width.drawn) if initialization == "fan_in" else 1.0)


@torch.no_grad()
def _rescale(param: Tensor, gain: float) -> None:
    if gain != 1.0:
        param.mul_(gain)


def _sgd(width: Width) -> float:
    return width.fan_out / width.fan_in


def _adam(width: Width) -> float:
    return 1 / width.fan_in


def _kfac(width: Width) -> float:
    if not width.natural:
        return _sgd(width)
    return width.layer_fan_in / width.fan_in  # 1 for a weight


def _shampoo(width: Width) -> float:
    return math.sqrt(width.fan_out / width.fan_in)


_RATES: Mapping[str, Callable[[Width], float]] = {"sgd": _sgd, "adam": _adam, "kfac": _kfac, "shampoo": _shampoo}


def _dampings(optimizer: OptimizerName, width: Width, damping: float | None) -> dict[str, Any]:
    if damping is None or (optimizer == "kfac" and not width.natural):
        return {}
    if optimizer == "adam":
        return {"eps": damping / width.fan_out}
    if optimizer == "shampoo":
        return {"damping": damping * width.fan_in / width.fan_out}
    root = math.sqrt(damping)
    return {"damping": (root * width.layer_fan_in, root / width.fan_out)}
