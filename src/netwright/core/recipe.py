"""How a network is trained, as plain data."""

import dataclasses
import importlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from netwright.core.errors import RecipeError

__all__ = ["SCHEDULE_LENGTHS", "Recipe", "resolve"]

SCHEDULE_LENGTHS = ("total_steps", "T_max", "total_iters")
"""Arguments of schedules that are the number of iterations of the whole fit, filled in where they are not given."""

_PARTS = ("step_size", "step_size_up", "step_size_down", "T_0", "milestones")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; round-trips through JSON.

    Names of methods are import paths (``"torch.optim:AdamW"``), so that any library's method
    serves. What a name leads to is called only if it is of the kind that the setting asks for: a class is judged by its
    bases, a library's function by its annotations; a function of the user's own needs none.

    Args:
        optimizer: import path of a ``torch.optim.Optimizer``. One whose signature has a parameter ``model`` is given
            the model; one with an attribute ``closure_kind`` is given the closure that it asks for; one with a method
            ``observe`` is shown every batch in two halves, and called after the backward pass of each.
        optimizer_settings: its keyword arguments.
        schedule: import path of an ``LRScheduler`` stepped once per iteration, or None. Its
            arguments ``total_steps``, ``T_max`` and ``total_iters`` are filled in with the number
            of iterations where they are not given, ``max_lr`` with the optimizer's learning rate.
        schedule_settings: its keyword arguments.
        batch_size: items per iteration.
        epochs: passes over the training data; may be a fraction.
        clip_norm: largest total gradient norm, or None.
        clip: import path of a class whose objects clip: called with the parameters after every backward pass, in
            place of ``clip_norm``; or None.
        clip_settings: its keyword arguments.
        average: decay of an exponential moving average of the weights, or None.
        average_method: import path of the class that averages (see ``MovingAverage``), made from the model and
            ``average``.
        average_settings: its further keyword arguments.
        parameterization: import path of a function called as ``f(model, **settings)`` before training, that rewrites
            the model in place; it may return parameter groups for the optimizer. Or None.
        parameterization_settings: its keyword arguments.
        penalty: import path of a function called as ``f(model, **settings)``, that returns a function without
            arguments whose value is added to the loss; or None.
        penalty_settings: its keyword arguments.
        keep_zeros: whether weights that are zero at the start stay so (see :mod:`netwright.core.zeros`).
        precision: "float32" or "bfloat16" (autocast).
        distill_weight: share of the teacher's term in the loss when a teacher is given, in [0, 1].
        distill_temperature: softening of both distributions in the teacher's term.

    Raises:
        RecipeError: a setting outside its range.

    Example:
        >>> recipe = Recipe(epochs=3, optimizer_settings={"lr": 1e-2})
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    optimizer: str = "torch.optim:AdamW"
    optimizer_settings: Mapping[str, Any] = field(default_factory=lambda: {"lr": 2e-3})
    schedule: str | None = "torch.optim.lr_scheduler:OneCycleLR"
    schedule_settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    epochs: float = 10.0
    clip_norm: float | None = None
    clip: str | None = None
    clip_settings: Mapping[str, Any] = field(default_factory=dict)
    average: float | None = None
    average_method: str = "netwright.core.average:MovingAverage"
    average_settings: Mapping[str, Any] = field(default_factory=dict)
    parameterization: str | None = None
    parameterization_settings: Mapping[str, Any] = field(default_factory=dict)
    penalty: str | None = None
    penalty_settings: Mapping[str, Any] = field(default_factory=dict)
    keep_zeros: bool = False
    precision: str = "float32"
    distill_weight: float = 0.5
    distill_temperature: float = 2.0

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name.endswith("_settings"):
                _require(isinstance(value, Mapping), entry.name, "a mapping of names to values", self)
            elif entry.type is str:
                _require(isinstance(value, str), entry.name, "a string", self)
            elif entry.type == str | None:
                _require(value is None or isinstance(value, str), entry.name, "a string, or None", self)
        size = self.batch_size
        _require(_number(size) and isinstance(size, int) and size > 0, "batch_size", "a positive integer", self)
        _require(_positive(self.epochs), "epochs", "a positive finite number", self)
        _require(self.clip_norm is None or _positive(self.clip_norm), "clip_norm", "positive, or None", self)
        _require(self.clip is None or self.clip_norm is None, "clip", "None where clip_norm is given", self)
        _require(
            self.average is None or _open(self.average),
            "average",
            "between 0 and 1, or None",
            self,
        )
        _require(isinstance(self.keep_zeros, bool), "keep_zeros", "true or false", self)
        _require(
            not self.keep_zeros or self.parameterization is None, "keep_zeros", "false with a parameterization", self
        )
        _require(self.precision in ("float32", "bfloat16"), "precision", "'float32' or 'bfloat16'", self)
        _require(
            _number(self.distill_weight) and 0 <= self.distill_weight <= 1, "distill_weight", "between 0 and 1", self
        )
        _require(_positive(self.distill_temperature), "distill_temperature", "a positive finite number", self)

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with some settings changed."""
        try:
            return dataclasses.replace(self, **changes)
        except TypeError as error:
            raise RecipeError(f"Recipe has no such setting: {error}") from error

    def lasting(self, epochs: float) -> "Recipe":
        """The recipe for so many epochs; a length that its schedule was given in iterations changes in proportion.

        Example:
            >>> short = Recipe(epochs=8, schedule_settings={"max_lr": 1e-3, "total_steps": 160}).lasting(2.0)
            >>> short.epochs, short.schedule_settings
            (2.0, {'max_lr': 0.001, 'total_steps': 40})
        """
        changed = self.replace(epochs=epochs)
        settings = dict(self.schedule_settings)
        if epochs == self.epochs:
            return changed
        if _number(settings.get("epochs")) and _number(settings.get("steps_per_epoch")):  # OneCycleLR takes both
            settings["total_steps"] = settings.pop("epochs") * settings.pop("steps_per_epoch")

        def scaled(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [scaled(entry) for entry in value]
            return max(1, math.ceil(round(value * epochs / self.epochs, 6))) if _number(value) else value

        for name in settings.keys() & {*SCHEDULE_LENGTHS, *_PARTS}:
            settings[name] = scaled(settings[name])
        warmup = settings.get("warmup")
        if isinstance(warmup, int) and _number(warmup):  # iterations; a share of them stays
            settings["warmup"] = math.floor(round(warmup * epochs / self.epochs, 6))  # less than the whole
        return changed.replace(schedule_settings=settings)

    def scaled(self, rate: float) -> "Recipe":
        """The recipe with its learning rates multiplied by ``rate``.

        Example:
            >>> Recipe().scaled(0.5).optimizer_settings
            {'lr': 0.001}
        """

        def changed(settings: Mapping[str, Any]) -> dict[str, Any]:
            return {name: scaled(name, value) for name, value in settings.items()}

        def scaled(name: str, value: Any) -> Any:
            if isinstance(value, Mapping):  # of an optimizer within the optimizer
                return changed(value)
            if name not in ("lr", "max_lr") or value is None:
                return value
            return [entry * rate for entry in value] if isinstance(value, list | tuple) else value * rate

        return self.replace(
            optimizer_settings=changed(self.optimizer_settings),
            schedule_settings=changed(self.schedule_settings),
            parameterization_settings=changed(self.parameterization_settings),  # where muP has its rate
        )

    def to_json(self) -> str:
        """The recipe as a JSON object.

        Raises:
            RecipeError: a setting that is no plain data, such as a class or a tensor.
        """
        try:
            return json.dumps(dataclasses.asdict(self), indent=2)
        except TypeError as error:
            named = ", ".join(_unplain(vars(self))) or "The recipe"
            raise RecipeError(
                f"{named} cannot be written as JSON: {error}. Give numbers and names, and a class or a function as "
                "import path, for example torch.optim:AdamW."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The recipe written by :meth:`to_json`.

        Raises:
            RecipeError: text that is not a JSON object of a recipe's settings.
        """
        try:
            settings = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"A recipe must be a JSON object: {error}") from error
        if not isinstance(settings, dict):
            raise RecipeError(f"A recipe must be a JSON object, got {type(settings).__name__}.")
        known = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise RecipeError(f"Recipe has no setting {', '.join(unknown)}. Known are {', '.join(sorted(known))}.")
        return cls(**settings)


def resolve(path: str) -> Any:
    """The object at an import path ``module:name``.

    Raises:
        RecipeError: a path that is malformed or leads nowhere.

    Example:
        >>> resolve("torch.optim:SGD").__name__
        'SGD'
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise RecipeError(f"{path!r} is not an import path. Write module:name, for example torch.optim:AdamW.")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{path!r} cannot be imported: {error}.") from error
    return found


def _unplain(settings: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Where the settings are that have no form in JSON."""
    for name, value in settings.items():
        place = f"{within}[{name!r}]" if within else f"Recipe.{name}"
        if isinstance(value, Mapping):
            yield from _unplain(value, place)
            continue
        try:
            json.dumps(value)
        except TypeError:
            yield place


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _open(value: Any) -> bool:
    return _number(value) and 0 < value < 1


def _closed(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _require(holds: bool, name: str, what: str, recipe: Recipe) -> None:
    if not holds:
        raise RecipeError(f"Recipe.{name} must be {what}, got {getattr(recipe, name)!r}.")
