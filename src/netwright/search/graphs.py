"""Candidates as graphs: labelled nodes and directed links."""

from dataclasses import dataclass

from netwright.core.errors import SettingError

__all__ = ["Graph"]


@dataclass(frozen=True)
class Graph:
    """A directed graph with a label on every node.

    Args:
        labels: one a node.
        links: pairs ``(from, to)`` of node numbers.

    Raises:
        SettingError: a link to a node that is not there.

    Example:
        >>> Graph(("input", "skip", "conv"), ((0, 1), (1, 2))).without("skip")
        Graph(labels=('input', 'conv'), links=((0, 1),))
    """

    labels: tuple[str, ...]
    links: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for start, end in self.links:
            if not (0 <= start < len(self.labels) and 0 <= end < len(self.labels)):
                raise SettingError(f"Link {(start, end)} leaves the graph's {len(self.labels)} nodes.")

    def without(self, label: str) -> "Graph":
        """The graph in which nodes of that label are passed over: what led to one leads to what it led to."""
        links = set(self.links)
        for node in (number for number, name in enumerate(self.labels) if name == label):
            before = {start for start, end in links if end == node}
            after = {end for start, end in links if start == node}
            links = {link for link in links if node not in link} | {(start, end) for start in before for end in after}
        kept = [number for number, name in enumerate(self.labels) if name != label]
        place = {node: number for number, node in enumerate(kept)}
        return Graph(tuple(self.labels[node] for node in kept), tuple(sorted((place[a], place[b]) for a, b in links)))
