"""Finds claims, runs them over seeds, and writes what came out as JSON lines."""

import importlib.util
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from claims._statistics import Verdict, judge
from netwright.core.errors import NetwrightError

__all__ = ["Claim", "ClaimError", "find", "load", "run_claim"]

ROOT = Path(__file__).resolve().parent
_LEAST_SEEDS = 3


class ClaimError(NetwrightError):
    """A claim that cannot be found or run, or a result that is no evidence."""


@dataclass(frozen=True)
class Claim:
    """One claim, as its module states it (see the package's description)."""

    name: str
    paper: int | None
    sentence: str
    better: str
    run: Callable[..., Any]
    parity: float | None = None
    seeds: int = _LEAST_SEEDS
    why: str = ""


def find(root: Path = ROOT) -> dict[str, Path]:
    """The claims under ``root`` by name, ``wing/method``."""
    paths = sorted(path for path in root.glob("*/*.py") if not path.name.startswith("_"))
    return {f"{path.parent.name}/{path.stem}": path for path in paths}


def load(name: str, root: Path = ROOT) -> Claim:
    """The claim called ``wing/method``, or ``method`` where one wing only has it.

    Raises:
        ClaimError: no such claim, several, or a module that does not state its claim.
    """
    known = find(root)
    wanted = name.removesuffix(".py").removeprefix("claims/")
    matches = [entry for entry in known if wanted in (entry, entry.partition("/")[2])]
    if len(matches) != 1:
        found = "No claim" if not matches else "More than one claim"
        raise ClaimError(f"{found} {name!r}. Known are {', '.join(known) or 'none yet'}.")
    return _read(matches[0], _import(matches[0], known[matches[0]]))


def run_claim(
    claim: Claim, seeds: Sequence[int], write: Callable[[dict[str, Any]], None], *, smoke: bool = False
) -> Verdict:
    """Run ``claim`` for every seed and write one record each, then the summary.

    Args:
        claim: what to run.
        seeds: at least three different ones and at least as many as the claim asks for; one is enough with
            ``smoke``.
        write: called with each record as soon as it is known.
        smoke: run small, to see that the script works; the summary then says so and judges nothing.

    Raises:
        ClaimError: too few or repeated seeds, or a result without finite "method" and "baseline".
    """
    least = 1 if smoke else max(_LEAST_SEEDS, claim.seeds)
    if len(set(seeds)) != len(seeds):
        raise ClaimError(f"Claim {claim.name}: seeds {_listed(seeds)} repeat. Every seed counts once.")
    if len(seeds) < least:
        raise ClaimError(f"Claim {claim.name} needs at least {least} seeds, got {len(seeds)}. Add --seeds.")
    start = time.monotonic()
    results = []
    for seed in seeds:
        began = time.monotonic()
        result = _numbers(claim, seed, claim.run(seed, smoke=smoke))
        write({"name": claim.name, "seed": seed, **result, "seconds": _seconds(began)})
        results.append(result)
    verdict = judge(
        [entry["method"] for entry in results], [entry["baseline"] for entry in results], claim.better, claim.parity
    )
    write(_summary(claim, verdict, seeds, _seconds(start), smoke))
    return verdict


def _summary(claim: Claim, verdict: Verdict, seeds: Sequence[int], seconds: float, smoke: bool) -> dict[str, Any]:
    holds = None if smoke else verdict.holds
    summary: dict[str, Any] = {
        "claim": claim.sentence,
        "paper": claim.paper,
        "mean_method": verdict.mean_method,
        "mean_baseline": verdict.mean_baseline,
        "ratio": verdict.ratio,
        "ci95": None if verdict.ci95 is None else list(verdict.ci95),
        "holds": holds,
        "name": claim.name,
        "better": claim.better,
        "parity": claim.parity,
        "seeds": list(seeds),
        "seconds": seconds,
        "smoke": smoke,
    }
    return {**summary, "why": claim.why} if holds is False else summary


def _numbers(claim: Claim, seed: int, result: Any) -> dict[str, float]:
    if not isinstance(result, dict) or not {"method", "baseline"} <= set(result):
        raise ClaimError(f'Claim {claim.name}: run({seed}) must return {{"method": x, "baseline": y}}, got {result!r}.')
    for key, value in result.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ClaimError(
                f"Claim {claim.name}: run({seed}) returned {key}={value!r}; only finite numbers can be compared. Cap a "
                "loss that diverged."
            )
    return {key: float(value) for key, value in result.items()}


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"claims.{name.replace('/', '.')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _read(name: str, module: ModuleType) -> Claim:
    missing = [entry for entry in ("PAPER", "CLAIM", "BETTER", "run") if not hasattr(module, entry)]
    if missing:
        raise ClaimError(f"Claim {name} does not define {', '.join(missing)}.")
    claim = Claim(
        name=name,
        paper=module.PAPER,
        sentence=module.CLAIM,
        better=module.BETTER,
        run=module.run,
        parity=getattr(module, "PARITY", None),
        seeds=getattr(module, "SEEDS", _LEAST_SEEDS),
        why=getattr(module, "WHY", ""),
    )
    if claim.better not in ("higher", "lower"):
        raise ClaimError(f"Claim {name}: BETTER must be 'higher' or 'lower', got {claim.better!r}.")
    if claim.paper is not None and not isinstance(claim.paper, int):
        raise ClaimError(f"Claim {name}: PAPER must be a number or None, got {claim.paper!r}.")
    if not isinstance(claim.sentence, str) or not claim.sentence:
        raise ClaimError(f"Claim {name}: CLAIM must be a sentence, got {claim.sentence!r}.")
    if claim.parity is not None and not claim.parity > 0:
        raise ClaimError(f"Claim {name}: PARITY must be a positive margin, got {claim.parity!r}.")
    if not isinstance(claim.seeds, int) or claim.seeds < _LEAST_SEEDS:
        raise ClaimError(f"Claim {name}: SEEDS must be at least {_LEAST_SEEDS}, got {claim.seeds!r}.")
    try:
        inspect.signature(claim.run).bind(0, smoke=True)
    except TypeError as error:
        raise ClaimError(f"Claim {name}: run must be callable as run(seed, smoke=True): {error}.") from error
    return claim


def to_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON."""
    return json.dumps(record, allow_nan=False)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _seconds(start: float) -> float:
    return round(time.monotonic() - start, 3)
