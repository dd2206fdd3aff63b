"""Sphinx extension: paths of optimizers on classic surfaces, drawn anew at every build by the optimizers themselves."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from contourpy import contour_generator
from sphinx.application import Sphinx
from torch import Tensor

from netwright.core.optimization import closure_kind
from netwright.optim import available, create

__all__ = ["MARK", "SURFACES", "TABLE", "Surface", "capabilities", "draw", "path", "setup"]

MARK = "<!-- surfaces -->"
TABLE = "<!-- optimizers -->"

_SIZE = 420
_GRID = 160
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8a2be2", "#7f7f7f")


@dataclass(frozen=True)
class Surface:
    """A function of two numbers, and how it is descended.

    Args:
        title: what stands above the picture.
        residuals: the two residuals of which the function is half the sum of squares; None where it is none.
        value: the function; None is half the sum of squares of ``residuals``.
        start: where every path begins.
        across: range of the first number.
        up: range of the second.
        steps: of every path.
        optimizers: name and settings of each.
    """

    title: str
    start: tuple[float, float]
    across: tuple[float, float]
    up: tuple[float, float]
    steps: int
    optimizers: Mapping[str, Mapping[str, Any]]
    value: Callable[[Tensor, Tensor], Tensor] | None = None
    residuals: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The function's value."""
        if self.value is not None:
            return self.value(x, y)
        assert self.residuals is not None
        first, second = self.residuals(x, y)
        return (first**2 + second**2) / 2


SURFACES = (
    Surface(
        "Rosenbrock's valley",
        (-1.2, 1.0),
        (-1.6, 1.6),
        (-1.1, 1.9),
        200,
        {
            "sgd": {"lr": 2e-3},
            "adam": {"lr": 0.1},
            "lion": {"lr": 0.02},
            "diffgrad": {"lr": 0.15},
            "udog": {},
            "saddle-free-newton": {},
            "exact-gauss-newton": {},
        },
        residuals=lambda x, y: (1 - x, 10 * (y - x * x)),
    ),
    Surface(
        "Monkey saddle with walls",
        (0.7, 0.02),
        (-1.5, 1.5),
        (-1.5, 1.5),
        120,
        {"sgd": {"lr": 0.05}, "adam": {"lr": 0.03}, "optimistic-amsgrad": {"lr": 0.03}, "saddle-free-newton": {}},
        value=lambda x, y: x**3 - 3 * x * y**2 + (x**2 + y**2) ** 2,
    ),
    Surface(
        "Stretched quadratic",
        (-4.0, 1.2),
        (-4.6, 1.6),
        (-1.6, 1.6),
        120,
        {
            "sgd": {"lr": 0.03},
            "adam": {"lr": 0.1},
            "lion": {"lr": 0.02},
            "dog": {},
            "udog": {},
            "sania": {"preconditioner": "adam"},
        },
        value=lambda x, y: (x**2 + 30 * y**2) / 2,
    ),
)


def path(surface: Surface, name: str, settings: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Where the optimizer called ``name`` goes, step by step, until it leaves the picture by far."""
    torch.manual_seed(0)
    point = torch.tensor(surface.start, dtype=torch.float64, requires_grad=True)
    optimizer = create(name, [point], **settings)
    kind = closure_kind(optimizer)

    def closure() -> Any:
        loss = surface(point[0], point[1])
        if kind == "graph":
            return loss
        if kind == "outputs":
            assert surface.residuals is not None
            outputs = torch.stack(surface.residuals(point[0], point[1]))[None]
            return (outputs**2).sum() / 2, outputs
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        return loss.detach()

    found = [surface.start]
    step: Callable[[Callable[[], Any]], object] = optimizer.step
    for _ in range(surface.steps):
        step(closure)
        x, y = point.tolist()
        if not (math.isfinite(x) and math.isfinite(y)) or max(abs(x), abs(y)) > 100:
            break
        found.append((x, y))
    return found


def capabilities() -> str:
    """What every optimizer needs and can do, as a Markdown table."""
    head = ["name", "paper", "state, words a parameter", "closure", "foreach", "fused", "complex", "no lr", "model"]
    rows = [" | ".join(head), " | ".join(["---"] * len(head))]
    for name, can in available().items():
        flags = (can.foreach, can.fused, can.complex, can.lr_free, can.needs_model)
        paper = "" if can.paper is None else str(can.paper)
        rows.append(
            " | ".join([f"`{name}`", paper, can.state, can.closure, *("yes" if flag else "" for flag in flags)])
        )
    return "\n".join(f"| {row} |" for row in rows)


def draw(surface: Surface) -> str:
    """The surface's level lines and all paths, as an SVG picture with a legend."""
    height = round(_SIZE * (surface.up[1] - surface.up[0]) / (surface.across[1] - surface.across[0]))
    paths = {name: path(surface, name, settings) for name, settings in surface.optimizers.items()}
    curves = [
        _line(_placed(surface, points, height), colour)
        for points, colour in zip(paths.values(), _COLOURS, strict=False)
    ]
    entries = [
        f'<span style="color:{colour}">●</span> {html.escape(_said(surface, *entry))}'
        for entry, colour in zip(paths.items(), _COLOURS, strict=False)
    ]
    title = html.escape(surface.title)
    style = f"max-width:{_SIZE * 1.5:.0f}px;width:100%;overflow:hidden"
    picture = "".join([_levels(surface, height), *curves])
    return (
        f'<figure><svg viewBox="0 0 {_SIZE} {height}" role="img" aria-label="{title}" style="{style}">{picture}</svg>'
        f'<figcaption style="text-align:left;font-size:85%">{"&emsp;".join(entries)}</figcaption></figure>'
    )


def _said(surface: Surface, name: str, points: Sequence[tuple[float, float]]) -> str:
    lr = surface.optimizers[name].get("lr")
    last = float(surface(*(torch.tensor(value, dtype=torch.float64) for value in points[-1])))
    return f"{name}{'' if lr is None else f', lr {lr:g}'}: {last:.2g}"


def _levels(surface: Surface, height: int) -> str:
    x, y = np.linspace(*surface.across, _GRID), np.linspace(*surface.up, _GRID)
    grid = np.meshgrid(x, y)
    values = surface(torch.from_numpy(grid[0]), torch.from_numpy(grid[1])).numpy()
    shifted = values - values.min()
    levels = np.quantile(shifted, np.linspace(0.02, 0.97, 14) ** 1.6)
    generator = contour_generator(x, y, shifted)
    lines = [line for level in levels for line in generator.lines(float(level))]
    return "".join(
        _line(_placed(surface, [(float(a), float(b)) for a, b in line], height), "#8888", 0.8) for line in lines
    )


def _placed(surface: Surface, points: Sequence[tuple[float, float]], height: int) -> list[tuple[float, float]]:
    wide, tall = surface.across[1] - surface.across[0], surface.up[1] - surface.up[0]
    return [((x - surface.across[0]) / wide * _SIZE, (surface.up[1] - y) / tall * height) for x, y in points]


def _line(points: Sequence[tuple[float, float]], colour: str, width: float = 2.0) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    if TABLE in source[0]:
        source[0] = source[0].replace(TABLE, capabilities())
    if MARK in source[0]:
        parts = [f"### {surface.title}\n\n```{{raw}} html\n{draw(surface)}\n```\n" for surface in SURFACES]
        source[0] = source[0].replace(MARK, "\n".join(parts))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", _read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
