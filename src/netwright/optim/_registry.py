"""Optimizers and schedules by name, and what each optimizer can do."""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from netwright.core.errors import SettingError
from netwright.core.optimization import closure_kind
from netwright.core.recipe import resolve

__all__ = ["Capability", "available", "create", "find", "schedules"]


@dataclass(frozen=True)
class Capability:
    """What an optimizer needs and can do.

    Args:
        name: short name, as ``create`` and ``netwright train`` take it.
        object: import path, as a recipe names it.
        paper: number in the list of papers, or None.
        state: words of state for each parameter's element with default settings, in words where it is not a number.
        closure: what ``step`` wants (see ``BaseOptimizer``): "optional", "loss", "graph" or "outputs".
        foreach: has a form over lists of tensors.
        fused: has a form that passes over memory once.
        complex: takes complex parameters, as pairs of real ones.
        lr_free: has no learning rate to choose.
        needs_model: is constructed with the model beside its parameters.
    """

    name: str
    object: str
    paper: int | None
    state: str
    closure: str
    foreach: bool
    fused: bool
    complex: bool
    lr_free: bool
    needs_model: bool


_OURS: Mapping[str, tuple[str, int | None, str]] = {
    "lion": ("Lion", 114, "1"),
    "diffgrad": ("DiffGrad", 3, "3"),
    "optimistic-amsgrad": ("OptimisticAMSGrad", 65, "5 + span"),
    "sania": ("SANIA", 54, "1"),
    "dog": ("DoG", None, "2"),
    "udog": ("UDoG", 103, "2"),
    "mfac": ("MFAC", 14, "window"),
    "kfac": ("KFAC", None, "two factors and their inverses a layer"),
    "shampoo": ("Shampoo", None, "two factors and their roots a block"),
    "exact-gauss-newton": ("ExactGaussNewton", 101, "0; 1 with momentum"),
    "saddle-free-newton": ("SaddleFreeNewton", 72, "1"),
    "optimal-input-gain": ("OptimalInputGain", 155, "0"),
    "bert-adam": ("BertAdam", None, "2"),
    "optex": ("OptEx.over", 67, "its base's and 100"),
    "agvm": ("AGVM.over", 49, "its base's"),
}

_LR_FREE = frozenset({"sania", "dog", "udog"})

_TORCH: Mapping[str, tuple[str, str]] = {
    "sgd": ("torch.optim:SGD", "0; 1 with momentum"),
    "adam": ("torch.optim:Adam", "2"),
    "adamw": ("torch.optim:AdamW", "2"),
    "nadam": ("torch.optim:NAdam", "2"),
    "radam": ("torch.optim:RAdam", "2"),
    "adamax": ("torch.optim:Adamax", "2"),
    "adagrad": ("torch.optim:Adagrad", "1"),
    "adadelta": ("torch.optim:Adadelta", "2"),
    "rmsprop": ("torch.optim:RMSprop", "1"),
    "rprop": ("torch.optim:Rprop", "2"),
}

_SCHEDULES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "cosine": ("torch.optim.lr_scheduler:CosineAnnealingLR", {}),
    "one-cycle": ("torch.optim.lr_scheduler:OneCycleLR", {}),
    "linear": ("torch.optim.lr_scheduler:LinearLR", {"start_factor": 1.0, "end_factor": 0.0}),
    "unified-budget": ("netwright.optim:UnifiedBudget", {}),
}


def available() -> Mapping[str, Capability]:
    """Every optimizer that :func:`create` knows, by name: ours first, then PyTorch's.

    Example:
        >>> available()["lion"].state
        '1'
        >>> available()["sania"].closure
        'loss'
    """
    ours = {
        name: _capability(name, f"netwright.optim:{of}", paper, state) for name, (of, paper, state) in _OURS.items()
    }
    return ours | {name: _capability(name, path, None, state) for name, (path, state) in _TORCH.items()}


def schedules() -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """Learning rate schedules by short name: import path and settings.

    Example:
        >>> sorted(schedules())
        ['cosine', 'linear', 'one-cycle', 'unified-budget']
    """
    return _SCHEDULES


def create(name: str, params: ParamsT | nn.Module, **settings: Any) -> Optimizer:
    """The optimizer called ``name``.

    Args:
        name: see :func:`available`; upper case and underscores do not matter.
        params: parameters, groups of them, or a module, whose parameters are taken. A module is needed for
            optimizers that work on layers (``needs_model``).
        settings: keyword arguments of the optimizer.

    Raises:
        SettingError: an unknown name, or settings that the optimizer refuses.

    Example:
        >>> create("lion", nn.Linear(2, 1), lr=1e-4).defaults["betas"]
        (0.9, 0.99)
    """
    record = find(name)
    key = record.name
    if record.needs_model and "model" not in settings:
        if not isinstance(params, nn.Module):
            raise SettingError(f"{key} works on layers, so it needs the model. Write create({key!r}, model, ...).")
        settings = {"model": params, **settings}
    given = params.parameters() if isinstance(params, nn.Module) else params
    try:
        optimizer: Optimizer = resolve(record.object)(given, **settings)
    except SettingError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise SettingError(f"{key} refuses the settings {sorted(settings)}: {reason}.") from error
    return optimizer


def find(name: str) -> Capability:
    """The record of the optimizer called ``name``, of :func:`available`.

    Raises:
        SettingError: an unknown name.

    Example:
        >>> find("Lion").object
        'netwright.optim:Lion'
    """
    known = available()
    key = name.lower().replace("_", "-")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known are {', '.join(known)}."
        raise SettingError(f"There is no optimizer {name!r}. {hint}")
    return known[key]


def _capability(name: str, path: str, paper: int | None, state: str) -> Capability:
    maker = resolve(path)
    signature = inspect.signature(maker).parameters
    kind = getattr(maker, "__self__", maker)  # the class of a class method, as OptEx.over
    ours = path.startswith("netwright.")
    return Capability(
        name=name,
        object=path,
        paper=paper,
        state=state,
        closure=closure_kind(kind),
        foreach="foreach" in signature,
        fused="fused" in signature,
        complex=bool(kind.takes_complex) if ours else True,
        lr_free=name in _LR_FREE,
        needs_model="model" in signature,
    )
