"""Which parts of chains to merge and which layers to leave out: the choices there are, and the best of them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import fx

from netwright.compress._batch_norms import free_name
from netwright.compress._fold import attribute, op_name
from netwright.compress._merge_chains import Chain, Skip, find_chains, image_size
from netwright.compress._merge_convolutions import Extent
from netwright.compress._merge_segment import Segment, build, convolution, extent_of

__all__ = ["Actions", "Choice", "Entry", "apply", "best_path", "choices", "least", "merge_all"]

Actions = Literal["both", "merge", "prune"]

_IDEMPOTENT = frozenset({"relu", "hardtanh", "relu6"})


@dataclass(frozen=True)
class Choice:
    """What becomes of the layers between two positions of a chain.

    Args:
        chain: number of the chain.
        start, stop: the positions; between them no activation survives.
        kept: positions of the layers that are merged into one.
        original: whether nothing changes.
        extent: of the merged convolution.
        groups: 1 for a dense one, or the number of its channels.
        empty: whether nothing is left but the input itself.
    """

    chain: int
    start: int
    stop: int
    kept: tuple[int, ...]
    original: bool
    extent: Extent
    groups: int
    empty: bool


class Entry(NamedTuple):
    """A choice on the line of all positions of all chains, with its time and its importance."""

    start: int
    stop: int
    time: float
    importance: float


def best_path(entries: Sequence[Entry], size: int, limit: float, levels: int) -> list[int] | None:
    r"""Entries that lead from position 0 to ``size`` within a time limit and have the largest sum of importances.

    With times rounded up to ``n`` = ``levels`` ticks of the limit,

    .. math:: M[j, t] = \max_{(i, j, T, I)} M[i, t - T] + I, \quad M[0, t] = 0

    over the entries that end in position :math:`j`; exact for the rounded times.

    Returns:
        Numbers of the entries in their order; None where no path keeps the limit.
    """
    ticks = [math.ceil(entry.time / limit * levels - 1e-9) for entry in entries]
    ending: dict[int, list[int]] = {}
    for number, entry in enumerate(entries):
        ending.setdefault(entry.stop, []).append(number)
    value = [[0.0] * (levels + 1)] + [[-math.inf] * (levels + 1) for _ in range(size)]
    came = [[-1] * (levels + 1) for _ in range(size + 1)]
    for stop in range(1, size + 1):
        for number in ending.get(stop, ()):
            start, importance = entries[number].start, entries[number].importance
            for tick in range(ticks[number], levels + 1):
                total = value[start][tick - ticks[number]] + importance
                if total > value[stop][tick]:
                    value[stop][tick], came[stop][tick] = total, number
    if value[size][levels] == -math.inf:
        return None
    path, position, tick = [], size, levels
    while position > 0:
        number = came[position][tick]
        path.append(number)
        position, tick = entries[number].start, tick - ticks[number]
    return path[::-1]


def least(entries: Sequence[Entry], size: int) -> list[int]:
    """Entries that lead from position 0 to ``size`` in the shortest time."""
    time, came = [0.0] + [math.inf] * size, [-1] * (size + 1)
    for stop in range(1, size + 1):
        for number, entry in enumerate(entries):
            if entry.stop == stop and time[entry.start] + entry.time < time[stop]:
                time[stop], came[stop] = time[entry.start] + entry.time, number
    path, position = [], size
    while position > 0:
        path.append(came[position])
        position = entries[path[-1]].start
    return path[::-1]


def choices(module: fx.GraphModule, chains: Sequence[Chain], span: int, actions: Actions) -> list[Choice]:
    """What can become of every part of at most ``span`` layers.

    Of the sets of kept layers that give the same kernel, the one with the largest sum of absolute weights stands.
    """
    found: list[Choice] = []
    for number, chain in enumerate(chains):
        for start in range(len(chain.layers)):
            for stop in range(start + 1, min(start + span, len(chain.layers)) + 1):
                found += _choices_between(module, chain, number, start, stop, actions)
    return found


def _choices_between(
    module: fx.GraphModule, chain: Chain, number: int, start: int, stop: int, actions: Actions
) -> list[Choice]:
    best: dict[object, tuple[float, Choice]] = {}
    inside = [(skip, end) for skip, end in chain.skips() if start <= skip.start and end <= stop]
    apart = [end <= start or skip.start >= stop or (skip.start <= start and stop <= end) for skip, end in chain.skips()]
    single = stop == start + 1
    if single:
        layer = chain.layers[start]
        whole = Choice(number, start, stop, (stop,), True, extent_of(module, layer), layer.groups, False)
        best["original"] = math.inf, whole
    if all(free or pair in inside for free, pair in zip(apart, chain.skips(), strict=True)):
        for kept in _kept_sets(module, chain, inside, start, stop):
            choice, convolutions = _choice(module, chain, number, inside, start, stop, kept)
            if choice is None or (single and not inside and kept == (stop,)):
                continue
            merges = convolutions > 1 or any(set(kept) & set(range(s.start + 1, end + 1)) for s, end in inside)
            prunes = len(kept) < stop - start
            if (actions == "merge" and prunes) or (actions == "prune" and merges):
                continue
            key = choice.extent, choice.groups, choice.empty
            norm = sum(_norm(module, chain, position) for position in kept)
            if key not in best or norm > best[key][0]:
                best[key] = norm, choice
    return [choice for _, choice in best.values()]


def _kept_sets(
    module: fx.GraphModule, chain: Chain, inside: Sequence[tuple[Skip, int]], start: int, stop: int
) -> Iterator[tuple[int, ...]]:
    """Sets of layers that can stay: what goes keeps the shape, or is the whole branch around which a skip is."""
    every = range(start + 1, stop + 1)
    free = [position for position in every if _is_prunable(module, chain, position)]
    for gone in itertools.product((False, True), repeat=len(inside)):
        branches = {
            position
            for (skip, end), out in zip(inside, gone, strict=True)
            if out
            for position in range(skip.start + 1, end + 1)
        }
        rest = [position for position in free if position not in branches]
        for count in range(len(rest) + 1):
            for left in itertools.combinations(rest, count):
                yield tuple(position for position in every if position not in branches and position not in left)


def _is_prunable(module: fx.GraphModule, chain: Chain, position: int) -> bool:
    """Whether the identity could stand in place of a layer."""
    layer = chain.layers[position - 1]
    extent = extent_of(module, layer)
    source = layer.conv.args[0]
    assert isinstance(source, fx.Node)
    centred = all(2 * pad == size - 1 for pad, size in zip(extent.padding, extent.size, strict=True))
    return centred and extent.stride == (1, 1) and image_size(source) == image_size(layer.conv)


def _choice(
    module: fx.GraphModule,
    chain: Chain,
    number: int,
    inside: Sequence[tuple[Skip, int]],
    start: int,
    stop: int,
    kept: tuple[int, ...],
) -> tuple[Choice | None, int]:
    """The choice, None where a skip does not fit into the kernel; and how many convolutions become one."""
    whole, position, convolutions = Extent(), start, len(kept)
    ends = {skip.start: (skip, end) for skip, end in inside}
    separate = True  # whether each channel is convolved for itself
    while position < stop:
        skip, end = ends.get(position, (None, position + 1))
        layers = [chain.layers[each - 1] for each in range(position + 1, end + 1) if each in kept]
        inner = Extent()
        for layer in layers:
            inner = inner.then(extent_of(module, layer))
        if skip is not None and skip.layer is not None:
            convolutions += 1
            around = extent_of(module, skip.layer)
            if layers and inner.offset(around) is None:
                return None, 0
            inner = inner if layers else around
            layers.append(skip.layer)
        elif skip is not None and layers and inner.offset(Extent()) is None:
            return None, 0
        separate = separate and all(_is_depthwise(module, layer.conv) for layer in layers)
        whole, position = whole.then(inner), end
    channels = _size(chain.value(start))[0]
    empty = convolutions == 0
    groups = channels if separate and not empty else 1
    if convolutions == 1 and len(kept) == 1:
        groups = (
            chain.layers[kept[0] - 1].groups
            if not any(kept[0] > s.start and kept[0] <= e for s, e in inside)
            else groups
        )
    return Choice(number, start, stop, kept, False, whole, groups, empty), convolutions


def apply(module: fx.GraphModule, chosen: Sequence[Choice]) -> None:
    """Put the segments that are chosen into a graph, as layers that can be trained."""
    chains = find_chains(module)
    moved: dict[fx.Node, fx.Node] = {}
    for count, choice in enumerate(each for each in chosen if not each.original):
        chain = chains[choice.chain]
        boundary = chain.boundaries[choice.stop - 1]
        inside = [(skip, end) for skip, end in chain.skips() if choice.start <= skip.start and end <= choice.stop]
        covered = any(end == choice.stop for _, end in inside)
        assert not covered or boundary.skip is not None
        out = boundary.skip.join if covered and boundary.skip is not None else chain.layers[choice.stop - 1].last
        given = chain.value(choice.start)
        source = moved.get(given, given)
        layers = [(position, chain.layers[position - 1]) for position in choice.kept]
        segment = build(module, layers, inside, choice.start, choice.stop, _size(given)[0])
        if len(segment.units) == 0:
            new = source
        else:
            path = free_name(module, f"segment_{count}")
            module.add_submodule(path, segment)
            with module.graph.inserting_before(out):
                new = module.graph.call_module(path, (source,))
            new.meta = dict(out.meta)
        out.replace_all_uses_with(new)
        moved[out] = new
        act = boundary.act
        if new is source and act is not None and op_name(act) == op_name(source) and op_name(act) in _IDEMPOTENT:
            act.replace_all_uses_with(source)
            moved[act] = source
    module.graph.eliminate_dead_code()
    module.recompile()


def merge_all(module: fx.GraphModule) -> None:
    """Make one convolution of every segment."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Segment):
            convolution(module, node)
    module.recompile()


def _is_depthwise(module: fx.GraphModule, conv: fx.Node) -> bool:
    weight = attribute(module, conv.args[1])
    grouped = weight is not None and len(conv.args) > 6 and bool(conv.args[6] == len(weight))
    return weight is not None and grouped and weight.shape[1] == 1


def _norm(module: fx.GraphModule, chain: Chain, position: int) -> float:
    weight = attribute(module, chain.layers[position - 1].conv.args[1])
    assert weight is not None
    with torch.no_grad():
        return float(weight.abs().sum())


def _size(node: fx.Node) -> tuple[int, int, int]:
    size = image_size(node)
    assert size is not None
    return size
