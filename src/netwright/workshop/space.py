"""The space of steps that a run searches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from netwright.core.errors import TargetError
from netwright.workshop.point import Step

__all__ = ["STEPS", "Space", "parse_steps"]

STEPS = ("prune", "int8")
"""What ``optimize`` may do to a network, in the order in which it is done."""

_LADDER = (0.25, 0.125, 0.5, 0.0625, 0.18, 0.35, 0.09, 1.0)
_SPREAD = 1.0
_BOTH_FORMS = 4  # rungs of the ladder that are tried with and without int8


@dataclass(frozen=True)
class Space:
    """Structured pruning of every group, then int8 or not.

    The share of group ``g`` that is kept is ``keep * 2**offset_g``, cut to the range that leaves
    at least one unit: one number says how small the network becomes, and one for each group
    says where. The saliency that ranks the units is a choice too.

    Args:
        groups: name and size of every group that may be pruned.
        int8: settings of the quantization step that this machine runs fastest, or None where it
            gains nothing.
        least: smallest share of the units that may be kept.

    Example:
        >>> space = Space((("conv1", 8), ("conv2", 16)), int8={"activation": "uint8"})
        >>> [step.method for step in space.steps({"keep": 0.5, "offset/conv1": -1.0, "int8": True})]
        ['netwright.compress:Prune', 'netwright.compress:Int8']
        >>> space.steps({"keep": 0.5, "offset/conv1": -1.0})[0].settings["ratios"]
        {'conv1': 0.75, 'conv2': 0.5}
    """

    groups: tuple[tuple[str, int], ...]
    int8: Mapping[str, Any] | None
    least: float = 0.03

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """What may be proposed for each parameter."""
        found: dict[str, optuna.distributions.BaseDistribution] = {}
        if self.groups:
            found["keep"] = optuna.distributions.FloatDistribution(self.least, 1.0, log=True)
            found["saliency"] = optuna.distributions.CategoricalDistribution(["magnitude", "taylor"])
            for name, _ in self.groups:
                found[f"offset/{name}"] = optuna.distributions.FloatDistribution(-_SPREAD, _SPREAD, step=0.25)
        if self.int8 is not None:
            found["int8"] = optuna.distributions.CategoricalDistribution([True, False])
        return found

    def steps(self, values: Mapping[str, Any]) -> tuple[Step, ...]:
        """The steps that a proposal stands for. Parameters left out are neutral."""
        ratios = {}
        for name, size in self.groups:
            share = values.get("keep", 1.0) * 2.0 ** values.get(f"offset/{name}", 0.0)
            removed = size - min(size, max(1, round(share * size)))
            if removed:
                ratios[name] = removed / size
        found = []
        if ratios:
            settings = {"ratios": ratios, "saliency": values.get("saliency", "magnitude")}
            found.append(Step("netwright.compress:Prune", settings))
        if self.int8 is not None and values.get("int8", False):
            found.append(Step("netwright.compress:Int8", dict(self.int8)))
        return tuple(found)

    def ladder(self) -> Sequence[dict[str, Any]]:
        """Proposals to begin with: the whole network, uniformly thinner and thinner, from the middle outwards."""
        forms = [{}] if self.int8 is None else [{"int8": True}, {"int8": False}]
        if not self.groups:
            return forms[:1]
        neutral = {"saliency": "magnitude", **{f"offset/{name}": 0.0 for name, _ in self.groups}}
        rungs = [share for share in _LADDER if share >= self.least]
        return [
            {"keep": share, **neutral, **form}
            for number, share in enumerate(rungs)
            for form in forms[: 2 if number < _BOTH_FORMS else 1]
        ]

    def size(self) -> float:
        """Base-10 logarithm of the number of different proposals, ratios counted in whole units."""
        count = sum(math.log10(max(size, 1)) for _, size in self.groups)
        return count + (math.log10(2) if self.int8 is not None else 0.0) + (math.log10(2) if self.groups else 0.0)


def parse_steps(names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of steps, as a sequence or with commas between, in the order of :data:`STEPS`; None stands for all.

    Raises:
        TargetError: an unknown name, or none at all.

    Example:
        >>> parse_steps("int8,prune")
        ('prune', 'int8')
    """
    if names is None:
        return None
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    unknown = [name for name in wanted if name not in STEPS]
    if unknown or not wanted:
        said = f"{unknown[0]!r} is no step of optimize" if unknown else "No step is named"
        raise TargetError(f"{said}. Known are {', '.join(STEPS)}; leave the option out for all of them.")
    return tuple(name for name in STEPS if name in wanted)
